"""A poisoned weight is found, layer and all, in towers, in scanned patterns of layers, and in one accumulated part."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest
import watched_run
from examples import VALUES, random_example, random_params, tiny_config
from flax.traverse_util import flatten_dict, unflatten_dict

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.nn import mlp
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms import algorithm_of
from mllm_jax.train.input.pipeline import Placer
from mllm_jax.train.loop import Training
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.monitor.nonfinite import find_nonfinite, layer_name
from mllm_jax.train.monitor.processes import StopSignal
from mllm_jax.train.monitor.profiler import steps_of
from mllm_jax.train.monitor.results import Diverged
from mllm_jax.train.runs.config import Run, TrainConfig, read_run
from mllm_jax.train.runs.data import ScenesData
from mllm_jax.train.step.optimizer import OptimConfig
from mllm_jax.train.step.state import new_state

MODEL = tiny_config()
RUN = Run(MODEL, ScenesData(), OptimConfig(freeze=("encoder/patch_embed/.*",)))
NOT_FINITE = "contain values that are not finite"


def find(run, *poisoned, nan_targets=()):
    """The report for a state in which one element of (path, layer) is set to each value."""
    flat = flatten_dict(random_params(run.model), sep="/")
    for path, layer, value in poisoned:
        flat[path] = np.array(flat[path])
        flat[path][layer].flat[-1] = value
    rng = np.random.default_rng(0)
    rows = [[random_example(rng, 20, (4, 6))] for _ in range(2)]
    batch = collate(rows, Budget(32, 1, 32), merge=2, values=VALUES)
    batch.weight[list(nan_targets)] = np.nan
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    state = new_state(optax.identity(), unflatten_dict(flat, sep="/"))
    return find_nonfinite(run, algorithm_of(run).objective(), state, jax.tree.map(jax.numpy.asarray, batch), mesh)


def test_a_poisoned_layer_is_named():
    first, forward, backward = find(RUN, ("decoder/layers/mlp/up/w", 1, np.inf))
    assert first == f"weights: decoder/layers/1/mlp/up/w {NOT_FINITE}"
    assert forward == "forward: the first output that is not finite is that of decoder/layers/1/mlp/up"
    assert backward.startswith("backward: the first gradient that is not finite is that of decoder/")


@pytest.mark.slow
def test_the_first_of_several_is_named_in_the_order_of_computation():
    """The vision tower comes before the decoder, which is before the other by name."""
    found = find(RUN, ("decoder/layers/attention/q/w", 0, np.nan), ("encoder/layers/attention/out/w", 2, np.nan))
    assert "is that of encoder/layers/2/attention/out" in found[1]


PATTERN = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, layers=4, sliding_windows=(8, 0)))


def test_layers_are_counted_as_people_do():
    names = {
        ("decoder/layers/slots_0/mlp", 1): "decoder/layers/2/mlp",
        ("decoder/layers/slots_1", 1): "decoder/layers/3",
        ("encoder/layers/attention/q/w", 2): "encoder/layers/2/attention/q/w",
        ("decoder/embed", 0): "decoder/embed",
    }
    assert {where: layer_name(*where, PATTERN) for where in names} == names


@pytest.mark.slow
def test_layers_of_a_pattern_are_found():
    later = ("decoder/layers/slots_0/norm2/scale", 1, np.inf)
    run = dataclasses.replace(RUN, model=PATTERN)
    found = find(run, ("decoder/layers/slots_1/mlp/down/w", 0, np.nan), later)
    assert found[0] == f"weights: decoder/layers/1/mlp/down/w, decoder/layers/2/norm2/scale {NOT_FINITE}"
    assert found[1].endswith("is that of decoder/layers/1/mlp/down")


@pytest.mark.slow
def test_a_loss_and_a_gradient_that_alone_are_not_finite(monkeypatch):
    in_parts = dataclasses.replace(RUN, train=TrainConfig(grad_accum_steps=2))
    first, *found = find(in_parts, nan_targets=[1])
    assert first == "in part 2 of 2 of the batch:" and found[0].startswith(
        "forward: every layer is finite, but not the loss"
    )

    @jax.custom_vjp
    def silu(x):
        return jax.nn.silu(x)

    silu.defvjp(lambda x: (jax.nn.silu(x), x), lambda x, d: (x * np.nan,))
    monkeypatch.setitem(mlp.ACTIVATIONS, "silu", silu)
    found = find(RUN)
    assert len(found) == 1 and "gradient that is not finite is that of decoder/layers/2/mlp/gate/w" in found[0]


def test_a_run_ends_at_the_first_bad_step_and_leaves_a_trace(tmp_path, monkeypatch):
    """While the third step runs, a weight that the fourth one reads goes bad."""
    place, count = Placer.__call__, itertools.count(1)

    def poison(self, batch):
        if next(count) == 4:
            flat = flatten_dict(training.state.params, sep="/")
            flat["decoder/layers/mlp/down/w"] *= np.inf
            training.state = training.state._replace(params=unflatten_dict(flat, sep="/"))
        return place(self, batch)

    monkeypatch.setattr(Placer, "__call__", poison)
    config = watched_run.get_config()
    training = Training(config, read_run(config), tmp_path, profile_steps=range(2, 4), debug_nans=True)
    with pytest.raises(Diverged, match=r"step 4 is not finite:\n(.*\n)*.* of decoder/layers/0/mlp/down\n"):
        training.run(StopSignal())
    training.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    [trace] = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = {dict(event.stats)["step_num"] for event in events if event.name == "train"}
    assert steps == {2, 3}


@pytest.mark.parametrize("text", ["10", "0:3", "5:4", "a:b"])
def test_steps_to_profile_are_refused_where_they_are_none(text):
    assert steps_of("10:13") == range(10, 14) and len(steps_of(None)) == 0
    with pytest.raises(ConfigError, match="FIRST:LAST"):
        steps_of(text)
