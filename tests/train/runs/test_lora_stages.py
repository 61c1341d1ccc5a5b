"""Stages with adapters: the weights that each starts from, resumption and merging, also after interruptions."""

import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_run
from examples import random_params
from flax.traverse_util import flatten_dict, unflatten_dict
from staged_run import on_one_device
from tiny_lora import merged

from mllm_jax.common.config import ConfigError
from mllm_jax.common.workdir import ended
from mllm_jax.nn.lora import LoraConfig, split_adapters
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.checkpoint.frozen_base import note_base, saved
from mllm_jax.train.checkpoint.manager import Checkpoints
from mllm_jax.train.checkpoint.restore import first_params, restore_params
from mllm_jax.train.loop import Training
from mllm_jax.train.monitor.metrics import Reporter, read_metrics
from mllm_jax.train.run_stages import train_run
from mllm_jax.train.runs.config import Stage, read_run, run_config
from mllm_jax.train.runs.stages import stage_config
from mllm_jax.train.step.optimizer import split
from mllm_jax.train.step.state import TrainState

LORA = LoraConfig(rank=2, dropout=0.1, modules_to_save=("^connector/",), base_dtype="bfloat16")
MESH = make_mesh({}, jax.devices()[:1])


def a_config(**changes):
    """Aligns the connector, trains adapters in two stages, and in a branch trains on from merged weights."""
    run = read_run(tiny_run.get_config())
    optim = replace(run.optim, name="adamw", steps=4, warmup=0)
    run = replace(run, optim=optim, train=replace(run.train, log_every=1, save_every=0, evaluate_every=0))
    stages = {
        "align": Stage(optim=replace(optim, steps=2, freeze=("encoder", "decoder"))),
        "instruct": Stage(lora=LORA),
        "more": Stage(lora=LORA),
        "whole": Stage(after="instruct"),
    }
    stages = {name: stage for name, stage in (stages | changes).items() if stage}
    return run_config(replace(run, stages=stages))


def flat(tree):
    return flatten_dict(tree, sep="/")


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def begin(name, workdir):
    return flat(first_params(read_run(stage_config(a_config(), name, workdir)), MESH))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(folder of a chain with checkpoints of two stages, weights after the first, before the second, after it)"""
    workdir = tmp_path_factory.mktemp("chain")
    rng, weights = np.random.default_rng(0), []
    for name in ("align", "instruct"):
        config = stage_config(a_config(), name, workdir)
        run = read_run(config)
        began = begin(name, workdir) if name == "instruct" else flat(random_params(run.model))
        trained = flat(split(unflatten_dict(began, sep="/"), run.optim.freeze)[0])
        moved = {path: x + rng.normal(0, 0.1, x.shape).astype(x.dtype) for path, x in trained.items()}
        whole = unflatten_dict(began | moved, sep="/")
        (workdir / name).mkdir()
        note_base(run, workdir / name, whole)
        zero = np.zeros((), np.int32)
        state = TrainState(zero, saved(run, whole), {}, zero, zero, np.zeros(2, np.float32))
        checkpoints = Checkpoints(workdir / name)
        checkpoints.save(4, state, config, {"streams": {}, "data": {}}, {})
        checkpoints.close()
        weights.append((began, began | moved))
    (_, aligned), (began, learned) = weights
    return workdir, aligned, began, learned


def test_adapters_begin_on_the_weights_of_the_stage_before_and_go_on(chain):
    workdir, aligned, began, learned = chain
    adapters = {path for path in began if "/lora_" in path}
    assert aligned.keys() == began.keys() - adapters and len(adapters) == 4 * 7
    for path, x in aligned.items():  # frozen matrices are kept in bf16
        np.testing.assert_array_equal(began[path], x.astype(began[path].dtype), err_msg=path)
    assert began["decoder/layers/mlp/up/w"].dtype == "bfloat16" and began["connector/main/mlp/up/w"].dtype == "float32"
    assert not any(np.any(began[path]) for path in adapters if path.endswith("lora_up"))
    assert_same(begin("more", workdir), learned)


def test_without_adapters_a_stage_begins_with_what_they_came_to(chain):
    workdir, _, _, learned = chain
    in_full = {path: np.array(x, np.float32) for path, x in learned.items()}
    base, adapters = split_adapters(unflatten_dict(in_full, sep="/"))
    found, expected = begin("whole", workdir), flat(merged(base, adapters))
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(found[path], x, atol=1e-6, err_msg=path)
    assert all(x.dtype == np.float32 for x in found.values())
    assert np.abs(found["decoder/layers/mlp/up/w"] - base["decoder"]["layers"]["mlp"]["up"]["w"]).max() > 1e-3


def test_what_adapters_cannot_become_is_told_before_the_first_stage(chain, tmp_path):
    refused = (
        ("config.stages.more.lora: the adapters of stage instruct cannot change, and rank was 2, is 3. ",
         {"more": Stage(lora=replace(LORA, rank=3))}),
        ("config.stages.instruct: lora.target_modules: 'decodr' matches no weight",
         {"instruct": Stage(lora=replace(LORA, target_modules=("decodr",))), "more": None}),
        ("config.stages.align: optim.freeze=.*: leaves nothing to train",
         {"align": Stage(lora=LoraConfig(2), optim=read_run(stage_config(a_config(), "align")).optim)}),
    )  # fmt: skip
    for message, stages in refused:
        with pytest.raises(ConfigError, match=message):
            train_run(a_config(**stages), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = tiny_run.get_config()
    config.init = str(chain[0] / "instruct")
    config.lora.update(rank=2, alpha=3.0)
    with pytest.raises(ConfigError, match="config.lora: the adapters of config.init=.*instruct .* alpha was 16.0, is"):
        first_params(read_run(config), MESH)


@pytest.mark.slow
def test_stopped_among_adapters_a_chain_goes_on_bit_equal(tmp_path, monkeypatch):
    moments, report = [(4, 1)], Reporter.step

    def stopping(self, record):
        if (self.steps, record["step"]) in moments:
            moments.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        report(self, record)

    monkeypatch.setattr(Training, "_evaluate", lambda self: None)
    monkeypatch.setattr(Reporter, "step", stopping)
    on_one_device(monkeypatch)
    stopped, uninterrupted, two = tmp_path / "stopped", tmp_path / "whole", a_config(more=None, whole=None)
    assert not train_run(two, stopped)
    assert ended(stopped) == {"align": 2} and not moments
    assert train_run(two, stopped) and train_run(a_config(), uninterrupted)
    assert ended(stopped) == {"align": 2, "instruct": 4} and len(ended(uninterrupted)) == 4
    losses = lambda folder: {x["step"]: x["loss"] for x in read_metrics(folder / "instruct") if "loss" in x}
    assert losses(stopped) == losses(uninterrupted) and len(losses(stopped)) == 4
    last = [flat(restore_params(folder / "instruct")[1]) for folder in (stopped, uninterrupted)]
    assert_same(*last)
    began = begin("instruct", uninterrupted)
    changed = {path for path in began if np.any(began[path] != last[0][path])}
    assert changed == {path for path in began if path.startswith("connector/") or path.endswith(("_up", "_down"))}
    assert not restore_params(uninterrupted / "whole")[0].lora.rank
