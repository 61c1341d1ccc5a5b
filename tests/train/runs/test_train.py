"""Whole runs: what they write, and that nothing that stops them changes what they learn."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from paths import HELPERS
from tiny_run import get_config

from mllm_jax.common.config import ConfigError
from mllm_jax.evaluate.ask import ask
from mllm_jax.evaluate.metrics import scores
from mllm_jax.train.checkpoint.manager import Checkpoints
from mllm_jax.train.checkpoint.restore import load_workdir, read_config, restore_params
from mllm_jax.train.evaluators.base import Spread
from mllm_jax.train.input.pipeline import Placer
from mllm_jax.train.loop import Training, train
from mllm_jax.train.monitor.goodput import PARTS, Clock
from mllm_jax.train.monitor.metrics import Meter, MetricsFile, read_metrics
from mllm_jax.train.monitor.processes import AGAIN, StopSignal
from mllm_jax.train.monitor.results import Diverged
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.runs.data import without_images

CLOCK = {"seconds_per_step", "tokens_per_second", "patches_per_second", "data_wait", "mfu", "mean_loss"}
CLOCK |= {"fill_tokens", "fill_patches", "goodput", "seconds"}  # of an interval, which begins anew where a run goes on


def start(workdir, *overrides):
    """The command line of the tiny run, with the devices that these tests have."""
    config = HELPERS / "tiny_run.py"
    command = [sys.executable, "-m", "mllm_jax.train", "--config", str(config), "--workdir", str(workdir), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def wait_for(process, condition, seconds=240):
    """Returns whether the condition came true before the process ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def last_step(workdir):
    return max((line["step"] for line in read_metrics(workdir)), default=0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    config = get_config()
    config.train.log_every = 1
    training = Training(config, read_run(config), workdir)
    assert training.run(StopSignal()) == 24
    training.close()
    assert training.train_step._cache_size() == 1
    return workdir


def test_a_run_writes_every_step_once_and_learns(uninterrupted, record_property):
    record_property("trains", "qwen3_vl")
    lines = read_metrics(uninterrupted)
    steps = [line for line in lines if "heldout" not in line]
    assert [line["step"] for line in steps] == list(range(1, 25))
    assert [line["step"] for line in lines if "heldout" in line] == [8, 16, 24]
    assert np.mean([line["loss"] for line in steps[-4:]]) < 0.6 * steps[0]["loss"]
    assert all(line["finite"] == 1 and line["tokens"] > 0 and line["flops"] > 0 for line in steps)
    assert steps[11]["tokens_per_second"] > 0 and 0 < steps[11]["fill_patches"] <= 1
    seconds = [line["seconds_per_step"] for line in steps[1:]]  # the first one compiles and is not measured
    assert seconds[-1] > min(seconds[:-1]) / 10, "the last step is measured alone, too"
    found = lines[-1]["heldout"]
    assert found["conversations"] == 32 and set(found["exact_match"]) == {"all", "color"}
    assert list((uninterrupted / "tensorboard").glob("events*"))


def test_a_run_leaves_what_generation_needs(uninterrupted):
    model, params = restore_params(uninterrupted)
    assert model == read_run(get_config()).model
    assert params["decoder"]["embed"].shape == (model.decoder.vocab, model.decoder.width)
    processor = load_workdir(uninterrupted).processor
    assert processor.spec.patch == model.encoder.patch_size and processor.image_id == model.tokens.image


def test_evaluation_in_training_says_what_greedy_generation_would(uninterrupted):
    run = read_config(uninterrupted)
    questions = Spread(run.data.source("heldout"), run.train.num_eval_examples)
    answers = list(ask(load_workdir(uninterrupted), questions, max_new_tokens=4))
    assert scores(answers) == read_metrics(uninterrupted)[-1]["heldout"]["exact_match"]


def test_killed_at_any_moment_a_run_goes_on_bit_equal(uninterrupted, tmp_path):
    """Killed between steps, killed inside a save, asked to stop by SIGTERM: the same numbers in the end."""
    saving = lambda: any((tmp_path / "checkpoints").glob("*tmp*")) and last_step(tmp_path) >= 8
    began = time.time()
    moments = [(signal.SIGKILL, lambda: last_step(tmp_path) >= 6), (signal.SIGKILL, saving)]
    for number, condition in [*moments, (signal.SIGTERM, lambda: last_step(tmp_path) >= 13)]:
        process = start(tmp_path)
        assert wait_for(process, condition), process.communicate()
        process.send_signal(number)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == (AGAIN if number == signal.SIGTERM else -signal.SIGKILL), errors
    assert 13 <= Checkpoints(tmp_path).latest() < 24
    process = start(tmp_path)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors

    deterministic = lambda lines: [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
    assert deterministic(read_metrics(tmp_path)) == deterministic(read_metrics(uninterrupted))
    spent = read_metrics(tmp_path)[-2]["seconds"]  # the last step; the last evaluation comes after it
    assert spent["down"] > 0 and spent["start"] > 0
    assert sum(spent.values()) < time.time() - began, "but for how long the first process took to begin"
    (_, ours), (_, theirs) = restore_params(tmp_path), restore_params(uninterrupted)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_asked_to_stop_before_the_first_batch_a_run_claims_no_save(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mllm_jax.train.input.feed.InputPipeline.wait", lambda self, seconds: False)
    config = get_config()
    training, stop = Training(config, read_run(config), tmp_path), StopSignal()
    stop._asked = True
    assert training.run(stop) == 0 and stop.heeded
    training.close()
    assert Checkpoints(tmp_path).latest() is None
    assert "asked to stop: no step was taken after step 0, from which" in capsys.readouterr().out


def test_a_finished_run_has_nothing_left_to_do(uninterrupted):
    before = read_metrics(uninterrupted)
    assert train(get_config(), uninterrupted) == 24
    assert read_metrics(uninterrupted) == before


def test_a_checkpoint_of_another_run_is_refused(uninterrupted):
    config = get_config()
    config.model.decoder.mlp = 64
    with pytest.raises(ConfigError, match="config.model.decoder.mlp was 32, is 64"):
        train(config, uninterrupted)
    config = get_config()
    config.data.seed = 5
    said = f"config.data.seed was 0, is 5. Use another --workdir; --config.init={uninterrupted} begins with"
    with pytest.raises(ConfigError, match=said):
        train(config, uninterrupted)


def test_a_workdir_in_a_bucket_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for workdir in ("gs://bucket/run", pathlib.Path("s3://bucket/run")):
        with pytest.raises(ConfigError, match=r"--workdir=\w\w:/.*is not a folder.*gcsfuse BUCKET"):
            train(get_config(), workdir)
    assert not list(tmp_path.iterdir())


def test_non_finite_steps_are_skipped_and_in_a_row_stop_the_run(tmp_path, monkeypatch):
    """The last good checkpoint is kept, though the run would save after every step."""
    poisoned, place, count = {5, 6, *range(12, 100)}, Placer.__call__, itertools.count(1)

    def poison(self, batch):
        batch = batch._replace(weight=batch.weight * np.float32(np.nan if next(count) in poisoned else 1))
        return place(self, batch)

    monkeypatch.setattr(Placer, "__call__", poison)
    config = get_config()
    config.train.update(save_every=1, evaluate_every=0, patience=3, log_every=1)
    with pytest.raises(Diverged, match="3 steps in a row, up to step 14.*checkpoint of step 11 is kept"):
        train(config, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path) if not line["finite"]] == [5, 6, 12, 13, 14]
    assert Checkpoints(tmp_path).latest() == 11
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restore_params(tmp_path)[1]))


def test_a_blind_run_sees_no_image(tmp_path):
    config = get_config("blind")
    config.optim.steps = 4
    train(config, tmp_path)
    assert all(line["patches"] == 0 for line in read_metrics(tmp_path) if "heldout" not in line)


def test_without_images_only_texts_are_left():
    image, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}
    messages = [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": "x"}]
    record = {"messages": messages, "kind": "k"}
    found = without_images(record)
    assert found["messages"][0]["content"] == [text] and found["messages"][1]["content"] == "x" and found["kind"] == "k"
    assert record["messages"][0]["content"] == [image, text]


def test_metrics_after_the_restored_step_are_forgotten(tmp_path):
    file = MetricsFile(tmp_path, 0)
    for step in range(1, 6):
        file.write({"step": step, "loss": float("nan")})
    file.close()
    with open(tmp_path / "metrics.jsonl", "a") as cut:
        cut.write('{"step": 6, "lo')
    MetricsFile(tmp_path, 3).close()
    assert read_metrics(tmp_path) == [{"step": step, "loss": None} for step in (1, 2, 3)]


def test_damaged_metrics_lose_the_damaged_lines_alone_and_a_copy_stays(tmp_path, capsys):
    lines = [
        b'{"step": 1, "loss": 3.0}',
        b'{"step": 2, "lo\xff": 2.0',
        b"7",
        b'{"loss": 1}',
        b'{"step": 5, "loss": 1.0}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(before := b"\n".join(lines) + b"\n")
    MetricsFile(tmp_path, 9).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 5]
    assert (tmp_path / "damaged-metrics.jsonl").read_bytes() == before
    assert "metrics.jsonl: 3 lines are damaged and left out. See" in capsys.readouterr().err


def test_rates_leave_out_pauses_and_the_step_that_compiled(monkeypatch):
    now = 0.0
    monkeypatch.setattr("mllm_jax.train.monitor.goodput.time.perf_counter", lambda: now)
    clock = Clock()
    clock.enter("compile")
    now = 10.0
    clock.enter("steps")
    meter = Meter({"tokens": 100, "patches": 0}, clock)
    meter.restart(skip=1)
    meter.add({"tokens": 1000, "loss": 9.0})
    meter.add({"tokens": 50, "loss": 1.0, "flops": 30.0})
    now = 14.0
    with clock.within("save"):
        now = 19.0
    with clock.within("input"):
        now = 20.0
    seconds = dict.fromkeys(PARTS, 0.0) | {"compile": 10.0, "steps": 4.0, "save": 5.0, "input": 1.0}
    assert meter.rates(peak=12.0) == {
        "mean_loss": 1.0,
        "seconds_per_step": 5.0,
        "tokens_per_second": 10.0,
        "patches_per_second": 0.0,
        "data_wait": 0.2,
        "fill_tokens": 0.5,
        "mfu": 0.5,
        "goodput": 0.2,
        "seconds": seconds,
    }


def test_a_finished_run_is_evaluated_from_the_command_line(uninterrupted, tmp_path):
    command = ["-m", "mllm_jax.evaluate", "--workdir", str(uninterrupted), "--count=5", "--max_new_tokens=2"]
    done = subprocess.run(
        [sys.executable, *command, f"--output={tmp_path / 'answers.jsonl'}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["all", "color"]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 5 and set(answers[0]) == {"kind", "question", "truth", "answer", "right"}


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    process = start(tmp_path, "--config.optim.learning_rat=1")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.strip().startswith("error: config.optim has no 'learning_rat'; did you mean 'learning_rate'?")
    assert "Traceback" not in errors
