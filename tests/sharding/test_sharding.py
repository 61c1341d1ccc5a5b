"""Meshes of any shape, over slices too; rules that spread names over them; and what is said of those that cannot."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
import pytest
from examples import tiny_config
from jax.sharding import AbstractMesh, PartitionSpec
from tiny_run import load_config

from mllm_jax.common.config import ConfigError, dump, load
from mllm_jax.model.vlm import abstract_params
from mllm_jax.plan.hlo.hlo_text import array_sizes, parse, transfers
from mllm_jax.plan.hlo.replica_groups import axes_of
from mllm_jax.sharding.activations import shard
from mllm_jax.sharding.logical_axes import divisible_axes, freeze_rules, num_shards, partition_spec, rules_of
from mllm_jax.sharding.mesh import MESH_AXES, make_mesh
from mllm_jax.sharding.presets import LOGICAL_AXIS_RULES, PRESETS
from mllm_jax.sharding.weights import Partitioned, shardings
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.step.batches import batch_shardings
from mllm_jax.train.step.state import state_shardings

FSDP = freeze_rules(LOGICAL_AXIS_RULES)


@dataclass(frozen=True)
class Device:
    """The attributes that a mesh reads from a device of several slices."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0
    client: object = None


@pytest.mark.parametrize(
    "shape, sizes",
    [
        (None, (1, 8, 1, 1, 1)),
        ({"data": 2, "context": -1}, (2, 1, 1, 4, 1)),
        ({"tensor": 2, "expert": 2, "fsdp": 2}, (1, 2, 2, 1, 2)),
    ],
)
def test_any_mesh(shape, sizes):
    assert tuple(make_mesh(shape).shape.items()) == tuple(zip(MESH_AXES, sizes))


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"data": 3}, "mesh data=3 does not cover 8 devices"),
        ({"data": -1, "fsdp": -1}, "mesh data=-1 x fsdp=-1 does not cover 8 devices. .* one to -1"),
        ({"model": 8}, "unknown mesh axes .'model'.. Use only data, fsdp, expert, context, tensor"),
        ({"stage": 2, "fsdp": 4}, "'stage': is reserved"),
    ],
)
def test_bad_mesh(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


def slices_along(mesh, axis):
    """The slices that are met on the way along an axis from the first device."""
    devices = mesh.devices[tuple(slice(None) if name == axis else 0 for name in MESH_AXES)]
    return [device.slice_index for device in devices]


def test_slices_are_crossed_by_data_first_then_by_fsdp():
    devices = [Device(i, slice_index=i // 4) for i in range(16)]
    mesh = make_mesh({"data": 4, "fsdp": 2, "tensor": 2}, devices)
    assert slices_along(mesh, "data") == [0, 1, 2, 3]
    assert slices_along(mesh, "fsdp") == slices_along(mesh, "tensor") == [0, 0]
    mesh = make_mesh({"data": 2, "fsdp": 4, "tensor": 2}, devices)
    assert slices_along(mesh, "data") == [0, 2] and slices_along(mesh, "fsdp") == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="tensor=16 does not divide over 4 slices.*tensor stays within a slice"):
        make_mesh({"tensor": 16}, devices)


def test_rules_name_axes_that_exist():
    with pytest.raises(ValueError, match=r"rules.embed=\('fspd', 'expert'\): must be None, a mesh axis"):
        freeze_rules(LOGICAL_AXIS_RULES | {"embed": ("fspd", "expert")})


MESH = AbstractMesh((2, 2, 1, 4, 3), MESH_AXES)


def test_specs_of_weights():
    assert partition_spec(("layers", "embed", "mlp"), FSDP, MESH) == PartitionSpec(None, ("fsdp", "context"), "tensor")
    assert partition_spec(("batch", "length"), FSDP, MESH) == PartitionSpec(("data", "fsdp"), "context")
    replicated = freeze_rules(PRESETS["replicated"]["rules"])
    assert partition_spec(("embed", "mlp"), replicated, MESH) == PartitionSpec(None, None)
    assert (num_shards("embed", FSDP, MESH), num_shards("expert", FSDP, MESH), num_shards("embed", (), MESH)) == (
        8,
        1,
        1,
    )


@pytest.mark.parametrize(
    "names, shape, change, message",
    [
        (
            ("embed", "mlp"),
            (12, 6),
            {},
            "w: its axis 'embed' of size 12 .* fsdp=2 x context=4 .*rules.embed to 'fsdp'",
        ),
        (("embed", "mlp"), (16, 7), {}, "w: its axis 'mlp' of size 7 .* tensor=3 devices.* rules.mlp to None"),
        (
            ("embed", "mlp"),
            (16, 6),
            {"mlp": "fsdp"},
            "w: its axes 'embed' and 'mlp' are both sharded over fsdp. Remove it",
        ),
        (("embed", "embed"), (16, 16), {}, "w: .* are both sharded over context, fsdp. Remove them"),
        (("embed", "width"), (16, 6), {}, "w: its axis 'width' has no sharding rule"),
    ],
)
def test_what_a_weight_cannot_do(names, shape, change, message):
    with pytest.raises(ValueError, match=message):
        partition_spec(names, freeze_rules(LOGICAL_AXIS_RULES | change), MESH, shape, "w")


def test_activations_are_spread_as_far_as_they_divide():
    assert [divisible_axes("batch", size, FSDP, MESH) for size in (8, 2, 3)] == [("data", "fsdp"), ("data",), ()]
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        x = jax.jit(lambda x: shard(x, ("batch", None, "heads"), FSDP))(jnp.zeros((2, 3, 4)))
    assert x.sharding.spec == PartitionSpec("data", None, "tensor")


def test_a_part_of_the_model_has_rules_of_its_own():
    rules = freeze_rules(LOGICAL_AXIS_RULES | {"encoder_embed": None})
    assert partition_spec(("embed",), rules_of("encoder", rules), MESH) == PartitionSpec(None)
    assert partition_spec(("embed",), rules_of("connector", rules), MESH) == PartitionSpec(("fsdp", "context"))
    box = Partitioned(jax.ShapeDtypeStruct((16,), jnp.float32), ("embed",))
    layout = shardings({"encoder": {"w": box}, "decoder": {"w": box}}, make_mesh(), rules)
    assert layout["encoder"]["w"].spec == PartitionSpec(None)
    assert layout["decoder"]["w"].spec == PartitionSpec("fsdp")
    odd = Partitioned(jax.ShapeDtypeStruct((12,), jnp.float32), ("embed",))
    with pytest.raises(
        ValueError, match="weight encoder/w: .* of size 12 .* fsdp=8 devices.* rules.encoder_embed to No"
    ):
        shardings({"encoder": {"w": odd}}, make_mesh(), FSDP)


def test_a_preset_is_where_a_run_begins():
    """A preset gives mesh and rules, and other flags edit these, in any order."""
    config = load_config("scenes")
    config.rules.vocab, config.mesh.tensor = None, 2
    for preset, sizes in {"fsdp": (1, 4, 1, 1, 2), "expert": (1, 1, 4, 1, 2), "long_context": (1, 1, 1, 4, 2)}.items():
        config.preset = preset
        run = read_run(config)
        assert tuple(make_mesh(run.mesh).shape.values()) == sizes
        assert run.rules == PRESETS[preset]["rules"] | {"vocab": None}
        assert read_run(load(dump(config))) == run
    assert read_run(load_config("qwen3_vl_235b_a22b")).mesh == dict(data=1, fsdp=-1, expert=16, context=1, tensor=1)
    config.preset = "exprt"
    with pytest.raises(ConfigError, match="config.preset: there is no 'exprt'; did you mean 'expert'"):
        read_run(config)


def test_presets_differ_and_fit_eight_devices():
    meshes = {name: make_mesh(preset["mesh"]) for name, preset in PRESETS.items()}
    assert len({str(mesh.shape) for mesh in meshes.values()}) == len(PRESETS)
    for preset in PRESETS.values():
        assert set(preset["rules"]) == set(LOGICAL_AXIS_RULES) and freeze_rules(preset["rules"])


def test_tokens_move_over_tensor_and_weights_stay():
    """Sequence parallelism (arXiv 2205.05198):

    tokens are sharded between blocks, heads and mlp inside them. No weight is ever gathered over `tensor`, forward
    or backward.
    """
    rules = freeze_rules(PRESETS["fsdp_tensor"]["rules"])
    config = replace(tiny_config(rules=rules), encoder=None, connector=None)
    batch = jax.tree.map(lambda x: jnp.zeros((8, 160, *x.shape[2:]), x.dtype), config.example())
    params, mesh = abstract_params(config), make_mesh({"fsdp": 4, "tensor": 2})
    layout = batch_shardings(batch, mesh, rules), state_shardings(config, optax.identity(), mesh, rules).params

    def loss(batch, params):
        return config.build().apply({"params": params}, batch, hidden=True).hidden.sum()

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=1), in_shardings=layout, out_shardings=layout[1])
        program = parse(step.lower(batch, params).compile().as_text())
    over = [x for x in transfers(program) if "tensor" in axes_of(x.instruction, mesh.shape)]
    gathered = [x.instruction for x in over if x.kind == "all-gather" and "/layers/" in x.instruction.scope]
    tokens = batch.tokens.size // 4 * config.decoder.width
    assert [array_sizes(instruction.shape) for instruction in gathered] == 4 * [[tokens]]
