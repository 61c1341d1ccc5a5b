"""The length of a run: as long as its data where that was asked for, an error where the data are too short."""

import itertools
import math

import jax
import numpy as np
import pytest
from staged_run import get_config as staged_config
from staged_run import on_one_device
from tiny_run import get_config

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.loader import make_loader
from mllm_jax.data.pipeline.packing import Budget
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.synthetic.scenes import Scenes
from mllm_jax.train import length
from mllm_jax.train.checkpoint.manager import Checkpoints
from mllm_jax.train.checkpoint.restore import restore_params
from mllm_jax.train.length import DataEnded, count_updates
from mllm_jax.train.loop import train
from mllm_jax.train.monitor.metrics import Reporter, read_metrics
from mllm_jax.train.monitor.processes import StopSignal
from mllm_jax.train.run_stages import train_run
from mllm_jax.train.runs.config import read_run
from mllm_jax.types import Example

# Tokens of conversations: a long tail, and two sizes of which the large ones fit badly.
SIZES = {
    "long tail": lambda rng, n: np.clip(rng.exponential(20, n), 1, 100),
    "two sizes": lambda rng, n: rng.choice([5, 80], n),
}


class Texts:
    """Records that are the length of a text."""

    def __init__(self, sizes):
        self.sizes = sizes.astype(int).tolist()

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return {"messages": self.sizes[index], "kind": "", "id": str(index)}


class Blank(Processor):
    """Makes texts of given lengths in tokens."""

    spec = ProcessorSpec(patch=1)

    def __init__(self):
        pass

    def __call__(self, size, budget=None, tools=None):
        return Example(
            np.zeros(size, np.int32), np.ones(size, np.float32), np.zeros((size, 3), np.int32), np.full(size, -1), ()
        )


def texts(sizes, streams, rows, epochs):
    return make_loader(
        Texts(sizes), Blank(), Budget(100), rows, epochs=epochs, streams=streams, workers=0, prefetch=0, seed=3
    )


@pytest.mark.parametrize("kind, streams, rows, epochs", [("long tail", 8, 8, 1), ("two sizes", 16, 16, 2)])
def test_the_length_is_estimated_within_a_few_percent(kind, streams, rows, epochs):
    sizes = SIZES[kind](np.random.default_rng(1), 4000 // epochs)
    make = lambda: texts(sizes, streams, rows, epochs)
    actual, told = sum(1 for _ in make()), []
    found = count_updates(make(), epochs, 1200, lambda done, of: told.append((done, of)))
    assert abs(found.updates - actual) <= max(2, 0.03 * actual), (found, actual)
    assert found.epochs == epochs and 1200 <= found.sampled < 1800 and found.records == 4000
    assert told[-1] == (found.sampled, 4000) and told == sorted(told)


@pytest.mark.parametrize("size, epochs", [(1, 1), (7, 3), (100, 2)])
def test_small_sets_are_counted(size, epochs):
    make = lambda: texts(np.full(size, 30), 2, 4, epochs)
    found = count_updates(make(), epochs)
    assert found.updates == sum(1 for _ in make()) and found.sampled == found.records == size * epochs


def test_one_conversation_a_row_is_no_estimate():
    """Rows that hold one conversation each, however long: streams of equally many records end together."""
    found = count_updates(texts(np.random.default_rng(0).integers(60, 100, 2000), 8, 8, 1), 1, 500)
    assert abs(found.updates - 250) <= 1


@pytest.fixture
def short(monkeypatch):
    """A set of 61 conversations; a function epochs -> config of the tiny run on them."""
    monkeypatch.setattr(Scenes, "__len__", lambda self: 61)
    on_one_device(monkeypatch)

    def config(epochs=2):
        config = get_config()
        config.model.decoder.layers = 1
        config.data.epochs = epochs
        config.optim.update(name="adamw", steps=0, warmup=2, final_lr_ratio=0.0)
        config.train.update(log_every=1, save_every=3, evaluate_every=0, num_eval_examples=4)
        return config

    return config


def rates(workdir):
    return [line["learning_rate"] for line in read_metrics(workdir) if "loss" in line]


def cosine(step, steps, warmup=2, peak=3e-3):
    """The learning rate of a step, from 1, after a linear rise."""
    done = step - 1
    if done < warmup:
        return peak * (done + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (steps - warmup)))


def test_a_run_of_two_epochs_has_their_schedule_and_goes_on_bit_equal(short, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    steps = train(short(), whole)
    told = capsys.readouterr().out
    assert (
        f"{steps} updates (config.data.epochs=2, counted, 122 records)" in told and f"at step 0 of {steps} on" in told
    )
    assert f"step {steps}/{steps}" in told and f"held-out {steps}/{steps}" in told
    np.testing.assert_allclose(
        rates(whole), [cosine(step, steps) for step in range(1, steps + 1)], rtol=1e-5, atol=1e-9
    )
    assert sum(line["tokens"] for line in read_metrics(whole) if "loss" in line) > 122 * 8

    report, count = Reporter.step, itertools.count()

    def lost(self, record):
        report(self, record)
        if record["step"] == 5 and next(count) == 0:
            raise OSError("killed")

    monkeypatch.setattr(Reporter, "step", lost)
    with pytest.raises(OSError, match="killed"):
        train(short(), stopped)
    assert Checkpoints(stopped).latest() == 3
    capsys.readouterr()
    monkeypatch.setattr(length, "count_updates", None)  # the checkpoint tells the length
    assert train(short(), stopped) == steps and f"resumes at step 3 of {steps} on" in capsys.readouterr().out
    assert rates(stopped) == rates(whole)
    jax.tree.map(np.testing.assert_array_equal, restore_params(stopped)[1], restore_params(whole)[1])
    before = read_metrics(whole)
    assert train(short(), whole) == steps and read_metrics(whole) == before, "nothing is left to do"


def test_data_that_end_too_early_are_an_error_and_with_more_the_run_goes_on(short, tmp_path, monkeypatch, capsys):
    config = short(epochs=1)
    config.optim.steps = 12
    with pytest.raises(DataEnded) as error:
        train(config, tmp_path)
    step = Checkpoints(tmp_path).latest()
    assert 2 < step < 12 and len(rates(tmp_path)) == step
    share = cosine(step, 12, peak=1.0)
    assert str(error.value) == (
        f"config.data.epochs=1: the data ended at step {step} of config.optim.steps=12, where the learning rate is "
        f"{share:.0%} of its peak. The step is saved. Set config.data.epochs={2 * math.ceil(12 / step)} to continue "
        "to the last step, or config.optim.steps=0 and another --workdir for a schedule that ends with the data."
    )
    with pytest.raises(DataEnded, match=f"ended at step {step} of"):  # again: there is nothing that it could do
        train(config, tmp_path)
    # With a length that was estimated too short: the run lasts as long as the data, its learning rate stays the last.
    monkeypatch.setattr(length, "count_updates", lambda *_, **options: length.Length(2, 8, 40, 122))
    capsys.readouterr()
    reached, told = train(short(), tmp_path), capsys.readouterr().out
    assert "the run has about 8 updates (config.data.epochs=2, estimated by 40 of 122 records)" in told
    assert reached > 11 and f"step {reached}/{reached}" in told and "0:00:00 left" in told
    np.testing.assert_allclose(rates(tmp_path)[7:], [cosine(8, 8)] + [0] * (reached - 8), rtol=1e-4, atol=1e-9)


def test_a_stage_whose_data_end_too_early_ends_the_chain(short, tmp_path):
    config = staged_config()
    config.stages.align.data.epochs = 1
    config.stages.align.optim.update(steps=30, warmup=0)
    with pytest.raises(
        DataEnded,
        match=r"^config.stages.align.data.epochs=1: .* of config.stages.align.optim.steps=30, .*Set config.st",
    ):
        train_run(config, tmp_path)
    assert not (tmp_path / "instruct").exists()


def test_asked_to_stop_while_the_length_is_found_nothing_begins(short, tmp_path):
    class Asked(StopSignal):
        noted = True

    stop = Asked()
    assert train(short(), tmp_path, stop) == 0
    assert stop.heeded and Checkpoints(tmp_path).latest() is None


def test_a_length_that_nobody_knows_is_refused(short, tmp_path):
    def refused(message, change):
        config = short()
        change(config)
        with pytest.raises(ConfigError, match=message):
            train(config, tmp_path)

    forever = "config.optim.steps=0: the data have no end. Set config.optim.steps or config.data.epochs"
    refused(forever, lambda config: config.data.update(epochs=None))
    refused(
        r"config.optim.warmup=50: longer than the run, which has \d+ updates .*Set at most \d+",
        lambda config: config.optim.update(warmup=50),
    )
    config = staged_config()
    config.stages.align.optim.steps = 0
    with pytest.raises(ConfigError, match="config.stages.align.optim.steps=0: the data have no end"):
        read_run(config)
