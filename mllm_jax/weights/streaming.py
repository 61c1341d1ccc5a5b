"""Moves the elements of stacked leaves between host and devices without a second copy of a leaf."""

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
_PART = 16_000_000  # bytes that are moved at once; up to three copies exist beside a leaf: mapped, copied, sent
_SHARDED, _REPLICATED = PartitionSpec("device"), PartitionSpec()


def fill(
    shape: tuple[int, ...],
    depth: int,
    dtype: Any,
    sharding: Sharding,
    element: Callable[[tuple[int, ...]], np.ndarray],
    advance: Callable[[int], None],
    inspect: Callable[[np.ndarray], None],
) -> jax.Array:
    """Allocates a leaf once and fills it element by element.

    The shards of this process's devices are treated as one array, concatenated on the leading axis, over a mesh of
    these devices alone. So one compiled write serves all devices and all shardings without collectives, and a process
    reads only the data of its own devices and never waits for other processes.

    Args:
      shape: shape of the leaf.
      depth: number of leading axes of `shape` that are stacked.
      dtype: dtype of the leaf; elements are cast on the device.
      sharding: sharding of the leaf.
      element: returns a view of the element at an index of the stack. Only the necessary windows of it are read.
      advance: called after each step with the number of parameters read.
      inspect: called with every part that is read, in the dtype of the file.
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
    with jax.set_mesh(mesh):  # replaces the caller's mesh
        leading = len(windows) * local[0]
        stack = jnp.zeros((leading, *local[1:]), dtype, device=NamedSharding(mesh, _SHARDED))
        for step in steps:
            # The pieces have no variable, which would keep them alive while the next ones are read.
            start = np.array([begin for begin, _ in step], np.int32)
            stack = _write(stack, *_pieces(step, depth, windows, element, inspect, mesh), start, mesh)
            stack.block_until_ready()
            advance(math.prod(shape) // len(steps))
    shards = {shard.device: shard.data for shard in stack.addressable_shards}
    return jax.make_array_from_single_device_arrays(shape, sharding, [shards[device] for device in windows])


def gather(leaf: Any, index: tuple[int, ...], change: Callable) -> np.ndarray:
    """Returns `change(leaf[index])`, unsharded, on the host of every process. Leaves of equal shape compile once."""
    if not isinstance(leaf, jax.Array):
        leaf, index = np.asarray(leaf)[index], ()
    mesh = replicated = None
    if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding):
        # Uses the same shards on a mesh of Auto axes, because slicing and merging sharded Explicit axes is ambiguous.
        mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
        shards = [shard.data for shard in leaf.addressable_shards]
        leaf = jax.make_array_from_single_device_arrays(leaf.shape, NamedSharding(mesh, sharding.spec), shards)
        replicated = NamedSharding(mesh, _REPLICATED)
    with jax.set_mesh(mesh) if mesh else nullcontext():
        element = _element(leaf, np.array(index, np.int32), change, replicated)
    return np.asarray(element.addressable_data(0))


def _steps(local: tuple[int, ...], depth: int, view: np.ndarray) -> Iterator[Window]:
    """Yields windows that fill a shard of shape `local`: one element each, or a part of a large element.

    Large elements are cut along the axis that is outermost in memory. All parts have one shape, so that the last may
    overlap the one before: an axis of 10 in parts of 4 has the windows 0:4, 4:8 and 6:10.
    """
    element = local[depth:]
    starts, length = [0], 0
    if view.ndim:
        outer = max(range(view.ndim), key=lambda axis: (element[axis] > 1, view.strides[axis]))
        size = element[outer]
        length = math.ceil(size / math.ceil(view.itemsize * math.prod(element) / _PART))
        starts = [min(start, size - length) for start in range(0, size, length)]
    for offset in np.ndindex(local[:depth]):
        window = [(i, i + 1) for i in offset] + [(0, size) for size in element]
        for start in starts:
            if view.ndim:
                window[depth + outer] = (start, start + length)
            yield tuple(window)


def _pieces(
    step: Window, depth: int, windows: dict[jax.Device, Window], element: Callable, inspect: Callable, mesh: Mesh
):
    """Returns the input of all devices for one step, [devices, ...], and the transposition to the leaf's axes."""
    copies, pieces = {}, []
    for device, window in windows.items():
        part = tuple((start + begin, start + end) for (start, _), (begin, end) in zip(window, step))
        if part not in copies:
            index = tuple(start for start, _ in part[:depth])
            copies[part] = _contiguous(element(index)[tuple(slice(*side) for side in part[depth:])])
            inspect(copies[part][0])
        pieces.append(jax.device_put(copies[part][0][None], device))
    order = copies[part][1]
    shape = (len(pieces), *pieces[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, _SHARDED), pieces), order


def _contiguous(view: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Returns a copy with axes in memory order, and the transposition that restores the order of `view`.

    The device transposes and casts, because it is faster at both, and bf16 halves the bytes to transfer. A copy is
    always made: jax may use a host buffer without copying, and a mapped file can change.
    """
    order = sorted(range(view.ndim), key=lambda axis: -view.strides[axis])
    return np.array(view.transpose(order), order="C"), tuple(int(axis) for axis in np.argsort(order))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(2, 4))
def _write(stack, pieces, order, start, mesh):
    def write(stack, piece, start):
        piece = piece[0].transpose(order).astype(stack.dtype)
        piece = piece.reshape((1,) * (stack.ndim - piece.ndim) + piece.shape)
        return jax.lax.dynamic_update_slice(stack, piece, tuple(start))

    return jax.shard_map(write, mesh=mesh, in_specs=(_SHARDED, _SHARDED, _REPLICATED), out_specs=_SHARDED)(
        stack, pieces, start
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _element(leaf, index, change, sharding):
    for i in index:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return change(leaf) if sharding is None else jax.lax.with_sharding_constraint(change(leaf), sharding)
