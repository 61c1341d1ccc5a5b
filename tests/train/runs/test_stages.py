"""Runs in stages: what each begins with, that nothing that stops them changes what they learn, what is refused."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tiny_run
from flax.traverse_util import flatten_dict
from paths import HELPERS, ROOT
from rich.console import Console
from staged_run import get_config, on_one_device

from mllm_jax.common.config import ConfigError, dump, load
from mllm_jax.common.format import short
from mllm_jax.common.workdir import ended, is_run, run_folder
from mllm_jax.evaluate.stages import branches, table, write_page
from mllm_jax.train import run_stages
from mllm_jax.train.checkpoint.manager import Checkpoints
from mllm_jax.train.checkpoint.restore import load_workdir, read_config, restore_params
from mllm_jax.train.loop import Training, train
from mllm_jax.train.monitor.metrics import Reporter, read_metrics
from mllm_jax.train.monitor.processes import AGAIN
from mllm_jax.train.run_stages import train_run
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.runs.stages import names_in_order, one_run

CLOCK = {"seconds_per_step", "tokens_per_second", "patches_per_second", "data_wait", "mfu", "mean_loss"}
CLOCK |= {"fill_tokens", "fill_patches", "goodput", "seconds"}


def without_clock(lines):
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def flat(params):
    return flatten_dict(params, sep="/")


def weights(workdir):
    return flat(restore_params(workdir)[1])


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


class Began(NamedTuple):
    """Record of the weights that a run or a stage began with."""

    params: dict
    moments: list


@pytest.fixture(scope="module")
def beginnings():
    return []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, beginnings):
    """The folder of the run that nothing stopped."""
    begin = Training._begin

    def noted(self, *arguments):
        found = begin(self, *arguments)
        params, moments = jax.device_get((found.state.params, jax.tree.leaves(found.state.opt_state)))
        beginnings.append(Began(flat(params), moments))
        return found

    workdir = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_begin", noted)
        on_one_device(patch)
        train_run(get_config(), workdir)
    return workdir


def test_stages_follow_each_other_and_what_is_frozen_stays(uninterrupted, beginnings):
    assert ended(uninterrupted) == {"align": 8, "instruct": 16}
    first, second = beginnings
    aligned, instructed = weights(uninterrupted / "align"), weights(uninterrupted / "instruct")
    assert_same(second.params, aligned)
    assert not any(np.any(moment) for moment in first.moments + second.moments)
    frozen = {path for path in aligned if not moved(path)}
    assert 10 < len(frozen) < len(aligned)
    assert_same(*({path: tree[path] for path in frozen} for tree in (first.params, aligned)))
    assert all(np.any(aligned[path] != first.params[path]) for path in aligned.keys() - frozen)
    assert all(np.any(instructed[path] != aligned[path]) for path in aligned)


def test_every_stage_has_its_own_metrics_schedule_and_data(uninterrupted):
    align, instruct = (read_metrics(uninterrupted / name) for name in ("align", "instruct"))
    rates = [[line["learning_rate"] for line in lines if "loss" in line] for lines in (align, instruct)]
    assert list(map(len, rates)) == [8, 16]
    np.testing.assert_allclose([rates[0][0], rates[1][0]], [5e-3 / 4, 3e-3 / 4], rtol=1e-6)
    assert set(align[-1]["heldout"]["exact_match"]) == {"all", "color"}
    assert set(instruct[-1]["heldout"]["exact_match"]) == {"all", "shape"}
    run = read_config(uninterrupted / "align")
    assert run.optim.freeze == ("encoder", "decoder/layers") and not run.stages


def test_the_table_and_the_page_tell_of_every_stage(uninterrupted):
    console = Console(width=200, file=io.StringIO())
    console.print(table(uninterrupted))
    header, align, instruct = (line.split() for line in console.file.getvalue().splitlines())
    assert header == "stage after steps trained held-out loss all color shape".split()
    assert align[:3] == ["align", "–", "8"] and instruct[:3] == ["instruct", "align", "16"]
    sizes = [sum(x.size for path, x in weights(uninterrupted).items() if trained(path)) for trained in (moved, str)]
    assert [align[3], instruct[3]] == [short(size) for size in sizes]
    (run,) = branches(uninterrupted)
    steps = [record for record in run.records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 25)) and run.name == "instruct"
    assert [record["stage"] for record in steps] == ["align"] * 8 + ["instruct"] * 16
    assert run.marks == [(8, "instruct begins")]
    page = write_page(uninterrupted).read_text()
    assert "instruct begins" in page and "align, instruct" in page


def moved(path):
    """Returns whether the first stage trains this weight."""
    return not path.startswith(("encoder", "decoder/layers"))


def test_a_staged_run_is_read_as_its_last_stage(uninterrupted, tmp_path):
    assert_same(weights(uninterrupted), weights(uninterrupted / "instruct"))
    assert read_config(uninterrupted).data.tokens == 72 and load_workdir(uninterrupted).processor
    assert is_run(uninterrupted) and run_folder(uninterrupted, "align") == uninterrupted / "align"
    with pytest.raises(ConfigError, match="has no stage 'aling'; did you mean 'align'"):
        run_folder(uninterrupted, "aling")
    (tmp_path / "stages.json").write_text(json.dumps({"stages": ["align"], "ended": {}}))
    with pytest.raises(
        FileNotFoundError, match="no stage is complete yet. Wait, or name a stage with checkpoints: none"
    ):
        load_workdir(tmp_path)


def test_stopped_and_killed_a_chain_goes_on_in_the_same_stage_bit_equal(uninterrupted, tmp_path, monkeypatch):
    """SIGTERM in the first stage, from which no second one begins; the process is lost in the middle of the second."""
    moments = {(8, 3): lambda: os.kill(os.getpid(), signal.SIGTERM), (16, 13): lambda: (_ for _ in ()).throw(OSError)}
    report = Reporter.step

    def interrupted(self, record):
        moments.pop((self.steps, record["step"]), lambda: None)()
        report(self, record)

    monkeypatch.setattr(Reporter, "step", interrupted)
    on_one_device(monkeypatch)
    train_run(get_config(), tmp_path)
    assert ended(tmp_path) == {} and 5 <= Checkpoints(tmp_path / "align").latest() < 8
    assert not (tmp_path / "instruct").exists()
    with pytest.raises(OSError):
        train_run(get_config(), tmp_path)
    assert ended(tmp_path) == {"align": 8} and Checkpoints(tmp_path / "instruct").latest() == 12
    before = (tmp_path / "align" / "metrics.jsonl").stat()
    train_run(get_config(), tmp_path)
    assert not moments and ended(tmp_path) == ended(uninterrupted)
    assert (tmp_path / "align" / "metrics.jsonl").stat() == before
    for name in ("align", "instruct"):
        found, expected = (without_clock(read_metrics(folder / name)) for folder in (tmp_path, uninterrupted))
        assert found == expected
    assert_same(weights(tmp_path), weights(uninterrupted))


@pytest.mark.slow
def test_processes_are_stopped_in_the_second_stage_and_go_on_there_bit_equal(tmp_path):
    """The second stage counts its steps from 0 again, while jax's notice of preemption counts on."""
    config = str(HELPERS / "staged_run.py")
    command = [sys.executable, "-m", "launch.local", "--processes=2", "--devices=2", "--", "--config", config]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert subprocess.run([*command, "--workdir", whole], cwd=ROOT).returncode == 0
    launcher = subprocess.Popen([*command, "--workdir", stopped, "--config.train.log_every=1"], cwd=ROOT)
    while len(read_metrics(stopped / "instruct")) < 4:
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=600) == AGAIN and ended(stopped) == {"align": 8}
    assert 4 <= Checkpoints(stopped / "instruct").latest() < 16
    assert subprocess.run([*command, "--workdir", stopped], cwd=ROOT).returncode == 0
    assert ended(stopped) == ended(whole) == {"align": 8, "instruct": 16}
    assert_same(weights(stopped), weights(whole))


def test_a_stage_alone_begins_where_the_one_before_ended_or_anew(uninterrupted, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_stages, "train", lambda config, folder, stop: asked.append((config, folder)) or 16)
    train_run(get_config(), tmp_path, "instruct")
    shutil.copytree(uninterrupted / "align", tmp_path / "align")
    train_run(get_config(), tmp_path, "instruct")
    assert [config.init for config, _ in asked] == ["", str(tmp_path / "align")]
    assert {folder for _, folder in asked} == {tmp_path / "instruct"} and ended(tmp_path) == {"instruct": 16}
    config = asked[1][0]
    assert read_run(config) == read_run(config_of(uninterrupted / "instruct", init=config.init))


def config_of(folder, init):
    """The config in a run's folder, but for where it began."""
    config = load((folder / "config.json").read_text())
    config.init = init
    return config


def test_what_a_stage_does_not_say_follows_the_run():
    config = get_config()
    config.optim.b2, config.data.batch, config.optim.steps = 0.9, 4, 30
    assert config.stages.align.optim.b2 == 0.9 and config.stages.align.optim.steps == 8
    assert config.stages.instruct.data.batch == 4 and config.stages.instruct.data.tokens == 72
    config.stages.align.optim.b2 = 0.5
    assert (config.optim.b2, config.stages.instruct.optim.b2) == (0.9, 0.9)
    run = read_run(config)
    assert run.stages["align"].optim.b2 == 0.5 and run.stages["instruct"].after == "align"
    assert read_run(load(dump(config))) == run


def test_stages_branch_where_they_say_after_which_they_come():
    config = get_config()
    with config.unlocked():
        config.stages.early = config.stages.instruct.copy_and_resolve_references()
        config.stages.last = config.stages.instruct.copy_and_resolve_references()
    config.stages.last.after = "early"
    assert names_in_order(config) == ["align", "early", "last", "instruct"]
    config.stages.early.after = "last"
    with pytest.raises(ConfigError, match="in a circle: last, early, last|in a circle: early, last, early"):
        names_in_order(config)
    config.stages.early.after = "aling"
    with pytest.raises(
        ConfigError, match="config.stages.early.after: no stage is called 'aling'; did you mean 'align'"
    ):
        names_in_order(config)


def test_mistakes_are_told_before_the_first_stage_begins(tmp_path):
    def refused(message, stage=None, change=lambda config: None):
        config = get_config()
        change(config)
        with pytest.raises(ConfigError, match=message):
            train_run(config, tmp_path / "run", stage)

    refused("config.stages has no 'instrct'; did you mean 'instruct'", "instrct")
    freeze = lambda config: config.stages.instruct.optim.update(freeze=("encodr",))
    refused(
        "config.stages.instruct: optim.freeze: 'encodr' matches no weight; the nearest names are encoder", None, freeze
    )
    divide = lambda config: config.stages.instruct.train.update(grad_accum_steps=3)
    refused(
        "config.stages.instruct.train.grad_accum_steps=3 must divide config.stages.instruct.data.batch=8", None, divide
    )
    with pytest.raises(ConfigError, match="the config has stages. Set one with --stage: align, instruct"):
        one_run(get_config(), None)
    with pytest.raises(ConfigError, match="--stage=align: the config has no stages"):
        one_run(tiny_run.get_config(), "align")
    with pytest.raises(ConfigError, match="Train them with mllm_jax.train.run_stages"):
        train(get_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_model_is_nothing_to_begin_with(uninterrupted, tmp_path):
    config = tiny_run.get_config()
    config.init = str(uninterrupted)
    config.model.decoder.mlp = 64
    with pytest.raises(
        ConfigError, match="is a run of another model: decoder/layers/mlp/.* there, .* here, and .* more"
    ):
        Training(config, read_run(config), tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stages": ["align"]}', '{"stages": 3, "ended": {}}'])
def test_a_damaged_list_of_stages_is_one_line_with_the_fix(tmp_path, content):
    (tmp_path / "stages.json").write_text(content)
    with pytest.raises(ConfigError, match=r"stages.json is damaged \(.*\). Write into it the stages that have ended"):
        ended(tmp_path)
