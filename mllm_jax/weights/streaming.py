"""Moves elements of a stacked leaf between host and devices, without a second copy of the leaf anywhere."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

Window = tuple[tuple[int, int], ...]  # (start, stop) on each axis
_PART = 16_000_000  # bytes that are moved at once; held up to three times in addition to a leaf: mapped, copied, sent
_SPLIT, _WHOLE = PartitionSpec("device"), PartitionSpec()


def fill(
    shape: tuple[int, ...],
    depth: int,
    dtype: Any,
    sharding: Sharding,
    element: Callable[[tuple[int, ...]], np.ndarray],
    advance: Callable[[int], None],
    inspect: Callable[[np.ndarray], None],
) -> jax.Array:
    """A leaf that is allocated once and filled element by element.

    The shards of this process's devices are treated as one array over a mesh of these devices alone, concatenated on
    the leading axis. So one compiled write serves all devices and any sharding, without collectives, and a process
    reads what its own devices hold and never waits for another.

    Args:
      shape: of the leaf, its `depth` stacked axes leading.
      dtype: of the leaf; elements are cast on the device.
      element: gives a view of the element at an index of the stack; only the windows that are needed are touched.
      advance: called with the number of parameters that came in with each step.
      inspect: called with every part of the leaf that is read, as it is in the file.
    """
    if 0 in shape:
        return jnp.zeros(shape, dtype, device=sharding)
    if not shape:
        inspect(value := np.array(element(())))
        return jax.make_array_from_callback(shape, sharding, lambda _: value.astype(dtype))
    windows = {
        device: tuple(side.indices(size)[:2] for side, size in zip(window, shape))
        for device, window in sharding.addressable_devices_indices_map(shape).items()
    }
    local = sharding.shard_shape(shape)
    first = tuple(start for start, _ in next(iter(windows.values()))[:depth])
    steps = list(_steps(local, depth, element(first)))
    mesh = Mesh(np.array(list(windows)), ("device",))
    with jax.set_mesh(mesh):  # whatever mesh the caller is under
        leading = len(windows) * local[0]
        stack = jnp.zeros((leading, *local[1:]), dtype, device=NamedSharding(mesh, _SPLIT))
        for step in steps:
            # No name may keep the pieces alive while the next ones are read.
            start = np.array([begin for begin, _ in step], np.int32)
            stack = _write(stack, *_pieces(step, depth, windows, element, inspect, mesh), start, mesh)
            stack.block_until_ready()
            advance(math.prod(shape) // len(steps))
    shards = {shard.device: shard.data for shard in stack.addressable_shards}
    return jax.make_array_from_single_device_arrays(shape, sharding, [shards[device] for device in windows])


def gather(leaf: Any, index: tuple[int, ...], change: Callable) -> np.ndarray:
    """`change(leaf[index])`, in full, on the host of every process; `change` is traced once for leaves of one shape."""
    if not isinstance(leaf, jax.Array):
        leaf, index = np.asarray(leaf)[index], ()
    mesh = whole = None
    if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding):
        # The same shards on a mesh of Auto axes: slicing and merging sharded axes is ambiguous on an Explicit one.
        mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
        shards = [shard.data for shard in leaf.addressable_shards]
        leaf = jax.make_array_from_single_device_arrays(leaf.shape, NamedSharding(mesh, sharding.spec), shards)
        whole = NamedSharding(mesh, _WHOLE)
    with jax.set_mesh(mesh) if mesh else nullcontext():
        element = _element(leaf, np.array(index, np.int32), change, whole)
    return np.asarray(element.addressable_data(0))


def _steps(local: tuple[int, ...], depth: int, view: np.ndarray) -> Iterator[Window]:
    """Windows that fill a shard of shape `local`: one element each, or a part of one where elements are large.

    Parts are cut from the axis that is outermost in memory. All have one shape, for which the last may overlap another.
    """
    element = local[depth:]
    starts, length = [0], 0
    if view.ndim:
        outer = max(range(view.ndim), key=lambda axis: (element[axis] > 1, view.strides[axis]))
        size = element[outer]
        length = math.ceil(size / math.ceil(view.itemsize * math.prod(element) / _PART))
        starts = [min(start, size - length) for start in range(0, size, length)]
    for offset in np.ndindex(local[:depth]):
        place = [(i, i + 1) for i in offset] + [(0, size) for size in element]
        for start in starts:
            if view.ndim:
                place[depth + outer] = (start, start + length)
            yield tuple(place)


def _pieces(
    step: Window, depth: int, windows: dict[jax.Device, Window], element: Callable, inspect: Callable, mesh: Mesh
):
    """Input of each device for one step, [devices, ...], and the transposition into our layout."""
    copies, pieces = {}, []
    for device, window in windows.items():
        place = tuple((start + begin, start + end) for (start, _), (begin, end) in zip(window, step))
        if place not in copies:
            index = tuple(start for start, _ in place[:depth])
            copies[place] = _contiguous(element(index)[tuple(slice(*side) for side in place[depth:])])
            inspect(copies[place][0])
        pieces.append(jax.device_put(copies[place][0][None], device))
    order = copies[place][1]
    shape = (len(pieces), *pieces[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, _SPLIT), pieces), order


def _contiguous(view: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """A copy with axes in the order of memory, and the transposition that undoes the order.

    The device transposes and casts: it is faster at both, and a bf16 file is half as many bytes to send. It is always a
    copy, since jax may keep a host buffer as its own and the file under a mapped one can change.
    """
    order = sorted(range(view.ndim), key=lambda axis: -view.strides[axis])
    return np.array(view.transpose(order), order="C"), tuple(int(axis) for axis in np.argsort(order))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(2, 4))
def _write(stack, pieces, order, start, mesh):
    def write(stack, piece, start):
        piece = piece[0].transpose(order).astype(stack.dtype)
        piece = piece.reshape((1,) * (stack.ndim - piece.ndim) + piece.shape)
        return jax.lax.dynamic_update_slice(stack, piece, tuple(start))

    return jax.shard_map(write, mesh=mesh, in_specs=(_SPLIT, _SPLIT, _WHOLE), out_specs=_SPLIT)(stack, pieces, start)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _element(leaf, index, change, whole):
    for i in index:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return change(leaf) if whole is None else jax.lax.with_sharding_constraint(change(leaf), whole)
