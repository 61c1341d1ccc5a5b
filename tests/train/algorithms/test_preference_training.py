"""Runs on pairs of answers: equal rewards at the start for every reference, bit-equal resumption, errors."""

import json
import math
import shutil

import pytest
import tiny_run

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.preference import Reference
from mllm_jax.data.records.records import BadData
from mllm_jax.data.synthetic.captions import Captions, count_named, false_share, recall
from mllm_jax.plan.compile import abstract_step
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms.reference import log_probs
from mllm_jax.train.algorithms.stored_references import read_references, write_references
from mllm_jax.train.loop import train
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.runs.stages import stage_config


def a_config(reference, **preference):
    """The last stage of configs/prefer.py, made small, from random weights."""
    config = stage_config(tiny_run.load_config("prefer"), "mpo")
    small = tiny_run.get_config()
    config.model = small.model
    config.data.update(batch=8, tokens=160, patch_rows=1, patches_per_row=112)
    config.optim.update(steps=4, warmup=0, learning_rate=1e-2)
    config.train.update(log_every=1, save_every=2, evaluate_every=0, num_eval_examples=8, loss_chunk=32)
    config.algorithm.update(reference=reference, **preference)
    return config


def losses(workdir):
    return {row["step"]: row for row in read_metrics(workdir) if "loss" in row}


def begins_at_the_reference(workdir):
    """At the reference, the DPO loss is log 2 and all rewards are 0."""
    first = losses(workdir)[1]
    assert abs(first["reward_chosen"]) < 1e-4 and abs(first["reward_rejected"]) < 1e-4
    return first["loss"]


@pytest.fixture
def few_captions(monkeypatch):
    monkeypatch.setattr(Captions, "__len__", lambda self: 24)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(folder of a run against a file, the file), of 24 captions."""
    folder = tmp_path_factory.mktemp("stored")
    config = a_config(str(folder / "reference.jsonl"), dpo=1.0, bco=0.0, sft=0.0)
    run, mesh = read_run(config), make_mesh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Captions, "__len__", lambda self: 24)
        assert write_references(folder / "reference.jsonl", log_probs(run, mesh, pytest.fail)) == 24
        train(config, folder / "run")
    return folder / "run", folder / "reference.jsonl"


@pytest.mark.slow
def test_a_run_against_a_file(stored, few_captions):
    workdir, file = stored
    assert begins_at_the_reference(workdir) == pytest.approx(math.log(2), abs=1e-5)
    assert len(losses(workdir)) == 4 and losses(workdir)[4]["loss"] < losses(workdir)[1]["loss"]
    config = a_config(str(file), dpo=1.0, diff_token_weight=5.0)
    with pytest.raises(BadData, match="is not what it was when its log-probabilities were computed"):
        train(config, workdir.parent / "other")


@pytest.mark.slow
def test_a_run_against_its_first_weights_goes_on(stored, tmp_path, few_captions):
    """The run reports the same as the run against a file of these weights, and resumes bit-equal."""
    config = a_config("first", dpo=1.0, bco=0.0, sft=0.0)
    train(config, tmp_path / "run")
    begins_at_the_reference(tmp_path / "run")
    found, expected = losses(tmp_path / "run"), losses(stored[0])
    for step in expected:
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], abs=2e-4)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train(config, tmp_path / "again")
    again = losses(tmp_path / "again")
    assert {step: row["loss"] for step, row in again.items()} == {step: row["loss"] for step, row in found.items()}
    config.train.seed = 7
    with pytest.raises(ConfigError, match="^config.train.seed=7 gives other reference weights than .* began with"):
        train(config, tmp_path / "again")


@pytest.mark.slow
def test_a_run_against_its_base(tmp_path, few_captions):
    config = a_config("base")
    config.lora.update(rank=2)
    train(config, tmp_path / "run")
    begins_at_the_reference(tmp_path / "run")
    rows = losses(tmp_path / "run")
    assert rows[4]["reward_chosen"] != 0 and rows[4]["loss"] < rows[1]["loss"]


def test_what_a_run_refuses():
    with pytest.raises(ConfigError, match="reference='base': the model without its adapters, which needs"):
        read_run(a_config("base"))
    with pytest.raises(ConfigError, match="a step with a frozen reference cannot be planned"):
        abstract_step(read_run(a_config("first")), make_mesh())
    with pytest.raises(ConfigError, match="reference='nowhere.jsonl': neither .* nor a readable file"):
        read_references("nowhere.jsonl")


def test_files_of_references(tmp_path):
    path = tmp_path / "reference.jsonl"
    written = [("a", Reference(3, (-1.5, -2.0))), ("b", Reference(4, (-0.5, -3.0)))]
    assert write_references(path, written) == 2 and read_references(str(path)) == dict(written)
    with pytest.raises(ConfigError, match="id='a': two different records have this id"):
        write_references(path, [*written, ("a", Reference(5, (0.0, 0.0)))])
    assert read_references(str(path)) == dict(written)  # what was there is still there
    path.write_text(json.dumps({"id": "a"}))
    with pytest.raises(ConfigError, match="not a file of reference log-probabilities"):
        read_references(str(path))


def test_captions_and_what_they_name():
    captions, noisy = Captions("heldout", 3), Captions("heldout", 3, false=0.75)
    added = 0
    for i in range(24):
        (_, true), (_, said) = captions[i]["messages"], noisy[i]["messages"]
        there, rejected = true["content"].split(", "), captions[i]["rejected"]
        assert sorted(there) == sorted(captions.scenes[i]["messages"][1]["content"].split(", "))
        assert count_named(rejected, true["content"]).false == 1
        added += said["content"] != true["content"]
        assert said["content"].split(", ")[: len(there)] == there
    assert 12 < added < 24


def test_counts_of_what_is_named():
    """Counts by hand; the standard error of a share of independent objects is the binomial one."""
    named = [
        count_named("red square, red square", "red square"),
        count_named("blue circle", "red square, blue circle"),
        count_named("", "red square"),
    ]
    assert named == [(2, 1, 0), (1, 0, 1), (0, 0, 1)] and [one.there for one in named] == [1, 2, 1]
    assert false_share(named).value == pytest.approx(1 / 3) and recall(named).value == pytest.approx(1 / 2)
    ones = [count_named("blue circle" if i % 4 else "red square", "blue circle") for i in range(400)]
    assert false_share(ones) == pytest.approx((0.25, math.sqrt(0.25 * 0.75 / 400)))
    assert false_share([count_named("", "red square")]) == (0, 0)
