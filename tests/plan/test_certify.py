"""Certifying meshes: that they pass, and that what drifts is found, named and ends with exit code 1."""

import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from examples import random_params
from paths import ROOT
from tiny_run import load_config, load_module

from mllm_jax.common.config import ConfigError, dump, load
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.plan.verify.certificate import (
    MESHES,
    Comparison,
    Measured,
    compare,
    decisions,
    differences,
    measure,
    packed_batch,
    read_certificate,
)
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.sharding.presets import LOGICAL_AXIS_RULES, PRESETS
from mllm_jax.train.runs.config import with_rules

ISSUED = {"fsdp=8", "fsdp=2,tensor=4", "data=2,expert=4", "fsdp=2,context=4", "data=2,fsdp=2,tensor=2"}


def certify(*arguments, code="from mllm_jax.plan.verify.certify import main"):
    script = f"import sys\n{code}\nmain()"
    command = [sys.executable, "-c", script, "--config=configs/certify.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def small(rules=LOGICAL_AXIS_RULES):
    """A dense layer, one with experts, and images; so narrow that it compiles in seconds."""
    config = load_module("certify").model(MoeConfig(experts=8, top_k=2, mlp=8))
    attention = replace(config.decoder.attention, head_dim=4, rope_sections=(1, 1, 0))
    decoder = replace(config.decoder, width=16, mlp=16, num_dense_layers=1, attention=attention)
    return with_rules(
        replace(config, encoder=replace(config.encoder, width=16, mlp=16, layers=1), decoder=decoder), rules
    )


@pytest.fixture(scope="module")
def alone():
    """The result of one device, and a function that computes it on other meshes."""
    certificate, model = read_certificate(load_config("certify")), small()
    batch = packed_batch(certificate, model)
    on = lambda model, mesh: measure(model, random_params(model), batch, certificate.balance, mesh)
    return on(model, make_mesh({}, jax.devices()[:1])), on


@pytest.mark.parametrize(
    "preset, mesh",
    [
        ("fsdp", {"fsdp": 8}),
        ("fsdp_tensor", {"fsdp": 2, "tensor": 4}),
        ("expert", {"data": 2, "expert": 4}),
        ("long_context", {"fsdp": 2, "context": 4}),
        ("fsdp", {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param("replicated", {"data": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_presets_and_meshes_change_nothing(alone, preset, mesh):
    found = alone[1](small(PRESETS[preset]["rules"]), make_mesh(mesh))
    comparison = Comparison(preset, differences(found, alone[0]), decisions(found, alone[0]))
    assert not comparison.drifts(1e-5) and comparison.drifts(1e-9), comparison.worst
    names = comparison.differences.keys()
    assert {"logits", "loss", "balance", "z", "gradient decoder/layers/slots_1/mlp/router/w"} <= names
    assert sum(name.startswith("gradient encoder/") for name in names) > 10


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "experts"])
def test_the_default_config_holds_on_all_meshes(model):
    assert set(MESHES) == ISSUED
    done = certify(f"--config=configs/certify.py:{model}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok") == 5 and "no drift: all results are within 1e-05" in done.stdout


def test_what_drifts_is_named():
    values = np.linspace(-1, 2, 12, dtype=np.float32)
    alone = Measured({"logits": values, "gradient w": values, "gradient unused": 0 * values}, {"loss": 3.0}, None)
    assert set(differences(alone, alone).values()) == {0.0}
    moved = alone._replace(tensors=alone.tensors | {"gradient w": values + np.float32(2e-4)})
    found = Comparison("fsdp=8", differences(moved, alone), None)
    assert found.worst == "gradient w" and found.differences["gradient w"] == pytest.approx(1e-4, rel=1e-2)
    assert found.drifts(1e-5) and not found.drifts(1e-3)
    broken = alone._replace(tensors=alone.tensors | {"logits": np.where(values > 1, np.nan, values)})
    assert Comparison("fsdp=8", differences(broken, alone), None).worst == "logits"


def test_other_decisions_are_drift():
    """Two tokens of the first layer have swapped their experts, so that every expert is chosen as often."""
    choices = np.array([[[0, 1], [2, 3], [2, 1]], [[1, 3], [0, 2], [1, 0]]], np.int32)
    swapped, turned = choices.copy(), choices[..., ::-1]
    swapped[0, :2] = swapped[0, 1::-1]
    one, two, three = (Measured({"logits": np.ones(1)}, {}, x) for x in (choices, swapped, turned))
    assert (decisions(one, one), decisions(two, one), decisions(three, one)) == (0, 2, 0)
    assert Comparison("fsdp=8", differences(two, one), 1).drifts(1e-5)


def test_drift_ends_with_one_and_a_mistake_with_two():
    drifting = """
from mllm_jax.plan.verify import certify
from mllm_jax.plan.verify.certificate import Comparison
found = {"logits": 1e-7, "gradient decoder/embed": 3e-4, "loss": 0.0}
certify.compare = lambda certificate, name: iter([Comparison("fsdp=8", found, None)])
main = certify.main
"""
    done = certify(code=drifting)
    assert done.returncode == 1, done.stderr
    assert "gradient decoder/embed" in done.stdout and "drift: not all results are within 1e-05" in done.stdout
    done = certify("--config.meshes=('fsdp=2;tensor=4',)")
    assert done.returncode == 2 and "'fsdp=2;tensor=4' is not written as in 'fsdp=2,tensor=4'" in done.stderr


def test_a_mesh_that_does_not_fit_is_refused():
    certificate = replace(read_certificate(load_config("certify")), meshes=("fsdp=3",))
    with pytest.raises(ConfigError, match="config.meshes: fsdp=3 with dense: .*not divisible"):
        list(compare(certificate, "dense"))


def test_the_config_survives_json():
    config = load_config("certify")
    assert read_certificate(load(dump(config))) == read_certificate(config)


def test_the_config_of_a_run_is_certified_too():
    certificate = read_certificate(load_config("scenes", "experts"), "scenes")
    assert certificate.meshes == MESHES and certificate.balance.loss == "global"
    assert certificate.models["scenes"].decoder.moe.experts == 8
