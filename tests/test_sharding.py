"""Meshes of any shape, over slices too; rules that spread names over them; and what is said of those that cannot."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from mllm_jax.sharding import (
    MESH_AXES,
    RULES,
    Named,
    fitting_axes,
    freeze_rules,
    make_mesh,
    partition_spec,
    rules_of,
    shard,
    shardings,
    ways,
)

FSDP = freeze_rules(RULES["fsdp"])


@dataclass(frozen=True)
class Device:
    """What a mesh asks of a device of several slices."""

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
        ({"data": -1, "fsdp": -1}, "at most one size may be -1"),
        ({"model": 8}, "unknown mesh axes .'model'.; the axes are data, fsdp, expert, context, tensor"),
        ({"stage": 2, "fsdp": 4}, "'stage' is reserved"),
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
    with pytest.raises(ValueError, match="tensor=16 does not lie on 4 slices.*tensor stays within a slice"):
        make_mesh({"tensor": 16}, devices)


def test_rules_name_axes_that_exist():
    with pytest.raises(ValueError, match="rule of 'embed' names .'fspd'.; the axes of a mesh are data, fsdp"):
        freeze_rules(RULES["fsdp"] | {"embed": ("fspd", "expert")})


MESH = AbstractMesh((2, 2, 1, 4, 3), MESH_AXES)


def test_specs_of_weights():
    assert partition_spec(("layers", "embed", "mlp"), FSDP, MESH) == PartitionSpec(None, ("fsdp", "context"), "tensor")
    assert partition_spec(("batch", "length"), FSDP, MESH) == PartitionSpec(("data", "fsdp"), "context")
    assert partition_spec(("embed", "mlp"), freeze_rules(RULES["replicated"]), MESH) == PartitionSpec(None, None)
    assert (ways("embed", FSDP, MESH), ways("expert", FSDP, MESH), ways("embed", (), MESH)) == (8, 1, 1)


@pytest.mark.parametrize(
    "names, shape, change, message",
    [
        (("embed", "mlp"), (12, 6), {}, "w: its axis 'embed' of size 12 .* fsdp=2 x context=4 .* of 'embed' to 'fsdp'"),
        (("embed", "mlp"), (16, 7), {}, "w: its axis 'mlp' of size 7 .* tensor=3 devices.* of 'mlp' to None"),
        (
            ("embed", "mlp"),
            (16, 6),
            {"mlp": "fsdp"},
            "w: its axes 'embed' and 'mlp' are both spread over fsdp; take it",
        ),
        (("embed", "embed"), (16, 16), {}, "w: .* are both spread over context, fsdp; take them"),
        (("embed", "width"), (16, 6), {}, "w: its axis 'width' has no sharding rule"),
    ],
)
def test_what_a_weight_cannot_do(names, shape, change, message):
    with pytest.raises(ValueError, match=message):
        partition_spec(names, freeze_rules(RULES["fsdp"] | change), MESH, shape, "w")


def test_activations_are_spread_as_far_as_they_divide():
    assert [fitting_axes("batch", size, FSDP, MESH) for size in (8, 2, 3)] == [("data", "fsdp"), ("data",), ()]
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        x = jax.jit(lambda x: shard(x, ("batch", None, "heads"), FSDP))(jnp.zeros((2, 3, 4)))
    assert x.sharding.spec == PartitionSpec("data", None, "tensor")


def test_a_part_of_the_model_has_rules_of_its_own():
    rules = freeze_rules(RULES["fsdp"] | {"encoder_embed": None})
    assert partition_spec(("embed",), rules_of("encoder", rules), MESH) == PartitionSpec(None)
    assert partition_spec(("embed",), rules_of("connector", rules), MESH) == PartitionSpec(("fsdp", "context"))
    box = Named(jax.ShapeDtypeStruct((16,), jnp.float32), ("embed",))
    layout = shardings({"encoder": {"w": box}, "decoder": {"w": box}}, make_mesh(), rules)
    assert layout["encoder"]["w"].spec == PartitionSpec(None)
    assert layout["decoder"]["w"].spec == PartitionSpec("fsdp")
    odd = Named(jax.ShapeDtypeStruct((12,), jnp.float32), ("embed",))
    with pytest.raises(
        ValueError, match="weight encoder/w: .* of size 12 .* fsdp=8 devices.* of 'encoder_embed' to No"
    ):
        shardings({"encoder": {"w": odd}}, make_mesh(), FSDP)
