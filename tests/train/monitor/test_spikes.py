"""A loss that spikes takes the run back, and the data around it are skipped: the same run as one without these data."""

import jax
import numpy as np
import pytest
import watched_run

from mllm_jax.common.config import ConfigError
from mllm_jax.train.algorithms.supervised import Supervised
from mllm_jax.train.checkpoint.manager import Checkpoints
from mllm_jax.train.checkpoint.restore import restore_params
from mllm_jax.train.input.feed import InputPipeline
from mllm_jax.train.input.pipeline import Placer
from mllm_jax.train.loop import Training
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.monitor.processes import StopSignal
from mllm_jax.train.monitor.spikes import SpikeRule
from mllm_jax.train.runs.config import SpikeConfig, read_run

LAST = 16


class StopAt(StopSignal):
    def __init__(self, step):
        super().__init__()
        self.left = step and step + 1  # it is asked before every step

    def asked(self):
        self.left = self.left and self.left - 1
        return self.left == 0


def small_config(**spikes):
    config = watched_run.get_config()
    config.train.update(save_every=4, evaluate_every=0, num_eval_examples=4, log_every=5, max_to_keep=3)
    config.train.spikes.update(**spikes)
    return config


def run(config, workdir, stop=None):
    training = Training(config, read_run(config), workdir)
    reached = training.run(StopAt(stop))
    training.close()
    return reached


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}


def test_data_that_spike_are_skipped_also_where_the_run_was_stopped_in_between(tmp_path, monkeypatch):
    following, compiled = InputPipeline.next, {}
    make_step = Supervised.step
    monkeypatch.setattr(Supervised, "step", lambda self, context: compiled.setdefault("step", make_step(self, context)))
    nothing = {"loss": 0.0, "conversations": 0, "exact_match": {}}
    monkeypatch.setattr("mllm_jax.train.evaluators.base.Evaluator.__call__", lambda *_: nothing)

    def without(self):
        """The expected run: it reads the first 8 batches and skips those up to the spike."""
        while True:
            fetched = following(self)
            self.read = getattr(self, "read", 0) + 1
            if not 8 < self.read <= watched_run.POISONED[-1]:
                return fetched

    monkeypatch.setattr(InputPipeline, "next", without)
    expected, workdir = tmp_path / "expected", tmp_path / "spikes"
    for folder in (expected, workdir):
        folder.mkdir()
    assert run(small_config(), expected) == LAST
    monkeypatch.setattr(InputPipeline, "next", following)

    monkeypatch.setattr(Placer, "__call__", watched_run.poison)
    config = small_config(factor=1.4, window=4, rewinds=2)
    assert run(config, workdir, stop=9) == 9 and Checkpoints(workdir).latest() == 9
    assert run(config, workdir) == LAST
    assert losses(workdir) == losses(expected)
    (_, ours), (_, theirs) = restore_params(workdir), restore_params(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    told = [line for line in read_metrics(workdir) if "rewind" in line]
    assert [line["step"] for line in told] == [8, 8]
    assert "back to step 8, the data of 2 steps are skipped (1 of 2)" in told[0]["rewind"]
    assert "back to step 8, the data of 1 steps are skipped (2 of 2)" in told[1]["rewind"]
    assert Checkpoints(workdir).steps() == [8, 12, 16], "the one of step 9 is not of this history"


def test_a_spike_is_a_multiple_of_the_median_before_it():
    rule = SpikeRule(SpikeConfig(factor=2.0, window=3))
    assert [rule.median_if_spike(loss) for loss in (9.0, 1.0, 1.2)] == [None] * 3, "too few to say"
    assert (
        rule.median_if_spike(2.3) is None
        and rule.median_if_spike(float("nan")) is rule.median_if_spike(float("inf")) is None
    )
    assert rule.median_if_spike(2.5) == 1.2
    assert rule.get_state() == {"losses": [1.0, 1.2, 2.3], "rewinds": 0}, "spikes are no measure for later ones"
    again = SpikeRule(rule.config)
    again.set_state(rule.get_state())
    assert again.median_if_spike(2.5) == 1.2
    off = SpikeRule(SpikeConfig())
    assert [off.median_if_spike(loss) for loss in (1.0, 1e9)] == [None, None] and off.get_state()["losses"] == []


def test_a_factor_below_one_is_refused():
    with pytest.raises(ConfigError, match="config.train.spikes.factor=0.5: must be more than 1, or 0."):
        read_run(small_config(factor=0.5))
