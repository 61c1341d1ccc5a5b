"""The type of `config.algorithm` chooses what a run learns; a new algorithm is one file."""

from dataclasses import dataclass

import jax.numpy as jnp
import pytest
import tiny_run
from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError
from mllm_jax.common.settings import NonNegative
from mllm_jax.train.algorithms import ALGORITHMS, algorithm_of
from mllm_jax.train.algorithms.base import Algorithm
from mllm_jax.train.algorithms.supervised import CrossEntropy
from mllm_jax.train.checkpoint.restore import read_config
from mllm_jax.train.loop import train
from mllm_jax.train.losses.algorithm_config import AlgorithmConfig
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.runs.config import PARTS, read_run
from mllm_jax.train.step.forward import loss_sum
from mllm_jax.train.step.objective import Objective, Sums
from mllm_jax.types import Array, Batch


@dataclass(frozen=True)
class ScaledConfig(AlgorithmConfig):
    """Learns answers, by a loss that is `factor` times as large."""

    factor: NonNegative = 2.0

    def check(self, run, path):
        if run.train.grad_accum_steps > 4:
            raise ConfigError(f"{path}.train.grad_accum_steps={run.train.grad_accum_steps}: must be at most 4.")


@dataclass(frozen=True)
class ScaledLoss(Objective):
    config: object
    factor: float

    def weights(self, batch: Batch) -> Array:
        return batch.weight

    def sums(self, params, batch: Batch, key=None, frozen=None, rewards=None) -> Sums:
        loss, routing = loss_sum(self.config, params, batch, key=key)
        return {"loss": self.factor * loss, "plain": loss, "answers": jnp.sum(batch.weight > 0)}, routing


class Scaled(Algorithm):
    def objective(self) -> ScaledLoss:
        return ScaledLoss(self.run.model, self.config.factor)


@pytest.fixture
def scaled(monkeypatch):
    """The config of a run of the new algorithm."""
    monkeypatch.setitem(PARTS, "ScaledConfig", ScaledConfig)
    monkeypatch.setitem(ALGORITHMS, ScaledConfig, Scaled)
    config = tiny_run.get_config()
    config.optim.update(steps=2, warmup=1)
    config.train.update(log_every=1, evaluate_every=0)
    with config.unlocked(), config.ignore_type():
        config.algorithm = ConfigDict({"type": "ScaledConfig", "factor": 3.0})
    return config


def test_a_new_algorithm_trains(scaled, tmp_path):
    assert train(scaled, tmp_path / "run") == 2
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["loss"] == pytest.approx(3 * row["plain"], rel=1e-6) and row["answers"] == 1
    assert read_config(tmp_path / "run").algorithm == ScaledConfig(factor=3.0)


def test_a_run_with_stages_needs_an_algorithm_too():
    config = tiny_run.load_config("prefer")
    with config.unlocked(), config.ignore_type():
        config.algorithm = ConfigDict(config.data.to_dict())
    with pytest.raises(ConfigError, match="config.algorithm.type: must be one of SupervisedConfig, PreferenceConfig"):
        read_run(config)


def test_its_config_checks_the_other_settings(scaled):
    scaled.train.grad_accum_steps = 8
    with pytest.raises(ConfigError, match="config.train.grad_accum_steps=8: must be at most 4"):
        read_run(scaled)
    scaled.algorithm.factor = -1.0
    with pytest.raises(ConfigError, match="config.algorithm.factor=-1.0: must be at least 0"):
        read_run(scaled)


def test_every_algorithm_has_a_config_that_runs_can_name():
    assert {PARTS[kind.__name__] for kind in ALGORITHMS} == set(ALGORITHMS)
    run = read_run(tiny_run.get_config())
    assert isinstance(algorithm_of(run).objective(), CrossEntropy)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "scenes",
            "ContrastiveConfig",
            "trains a DualConfig, and config.model is a ModelConfig. Set Supervised",
        ),
        ("contrastive", "SupervisedConfig", "trains a ModelConfig, and config.model is a DualConfig. Set Contrastive"),
        ("scenes", "ScenesData", "config.algorithm.type: must be one of SupervisedConfig, PreferenceConfig"),
    ],
)
def test_an_algorithm_of_another_model_is_refused(name, kind, message):
    config = tiny_run.load_config(name)
    fields = config.data.to_dict() if kind == "ScenesData" else {"type": kind}
    with config.unlocked(), config.ignore_type():
        config.algorithm = ConfigDict(fields)
    with pytest.raises(ConfigError, match=message):
        read_run(config)
