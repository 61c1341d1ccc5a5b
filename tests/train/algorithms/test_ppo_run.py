"""Runs of a reward model and of PPO with it: first step, bit-equal resumption, a changed reward model."""

import math
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from staged_run import on_one_device

from mllm_jax import load_workdir
from mllm_jax.common.config import ConfigError
from mllm_jax.nn.value_head import NAME
from mllm_jax.train.checkpoint.restore import restore_params
from mllm_jax.train.loop import train
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.runs.stages import stage_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Eight are for tests/train/algorithms/test_rollout.py: on two cores they may wait for each other for ever."""
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        yield


def a_config(stage, steps, **settings):
    """A stage of configs/ppo.py, made small, from random weights."""
    config = stage_config(tiny_run.load_config("ppo"), stage)
    config.model = tiny_run.get_config().model
    config.data.update(batch=8, tokens=192 if stage == "reward" else 48, patch_rows=1, patches_per_row=112)
    config.optim.update(steps=steps, warmup=0, learning_rate=1e-2)
    config.train.update(log_every=1, save_every=2, evaluate_every=0, num_eval_examples=16, loss_chunk=32)
    config.train.update(settings)
    return config


def ppo_config(reward, steps=4, **ppo):
    config = a_config("ppo", steps)
    config.algorithm.update(reward_model=str(reward), response_length=8, **ppo)
    return config


def told(workdir):
    return {row["step"]: row for row in read_metrics(workdir) if "loss" in row}


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reward") / "run"
    train(a_config("reward", 6), workdir)
    return workdir


def test_a_reward_model_begins_without_a_preference(reward):
    rows = told(reward)
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[1]["reward_chosen"] == 0
    assert rows[6]["loss"] != rows[1]["loss"] and rows[1]["weight"] > 8
    (heldout,) = (row["heldout"] for row in read_metrics(reward) if "heldout" in row)
    assert heldout["pairs"] == 16 and set(heldout["preferred"]) == {"all", "caption"}
    assert np.any(restore_params(reward)[1][NAME]["w"]) and NAME not in load_workdir(reward).params


def test_a_run_of_ppo_goes_on(reward, tmp_path):
    """PPO starts at its reference, resumes bit-equal, and refuses another reward model."""
    config = ppo_config(reward)
    train(config, tmp_path / "run")
    rows = told(tmp_path / "run")
    assert abs(rows[1]["kl"]) < 1e-3 and rows[4]["kl"] != 0 and all(row["finite"] for row in rows.values())
    assert len(rows) == 4 and 0 < rows[1]["length"] <= 8 and "flops" not in rows[1]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train(config, tmp_path / "again")
    for step, row in told(tmp_path / "again").items():
        assert {name: row[name] for name in ("loss", "reward", "kl")} == {
            n: rows[step][n] for n in ("loss", "reward", "kl")
        }
    jax.tree.map(
        np.testing.assert_array_equal, load_workdir(tmp_path / "again").params, load_workdir(tmp_path / "run").params
    )
    train(a_config("reward", 2, seed=7), tmp_path / "other")
    with pytest.raises(ConfigError, match="reward_model=.*other.* gives other reward model's weights than"):
        train(ppo_config(tmp_path / "other", steps=5), tmp_path / "again")


def test_ppo_of_adapters_against_the_model_without_them(reward, tmp_path):
    config = ppo_config(reward, steps=2, reference="base")
    config.lora.rank = 2
    train(config, tmp_path / "run")
    rows = told(tmp_path / "run")
    assert abs(rows[1]["kl"]) < 1e-3 and rows[2]["kl"] != 0
    trained = restore_params(tmp_path / "run")[1]
    assert np.any(trained[NAME]["w"]) and NAME not in load_workdir(tmp_path / "run").params
