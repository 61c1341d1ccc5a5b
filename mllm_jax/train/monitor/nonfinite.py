"""Finds the first layer whose output or gradient is not finite, in one forward and one backward pass.

A Flax interceptor around every method of every module checks whether its output is finite. For layers in a scan the
results are stacked, one per layer.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.common.errors import first_few
from mllm_jax.common.trees import flatten, join
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.nn.runtime import TAPS
from mllm_jax.nn.stack import segments
from mllm_jax.train.runs.config import Run
from mllm_jax.train.step.objective import Objective
from mllm_jax.train.step.optimizer import split
from mllm_jax.train.step.state import TrainState
from mllm_jax.types import Batch

STACK = re.compile(r"^(?P<stack>(?P<part>.*?)/?layers\d*(?:/slots_\d+)?)(?=/|$)(?P<rest>.*)$")


def find_nonfinite(
    run: Run, objective: Objective, state: TrainState, batch: Batch, mesh: Mesh, frozen: Any = None
) -> list[str]:
    """Describes in lines of text which values are not finite in a step from this state with this batch.

    The lines name all non-finite weights, the first non-finite output of the forward pass, and the first non-finite
    gradient of the backward pass. Later ones follow from these.

    Args:
      frozen: frozen models of the step.
    """
    parts = run.train.grad_accum_steps
    look = jax.jit(_look(run, objective, mesh, orders := {}), out_shardings=NamedSharding(mesh, PartitionSpec()))
    for part in range(parts):
        rows = batch if parts == 1 else jax.tree.map(lambda x, part=part: x[part::parts], batch)  # as in a step
        loss, *checks = jax.device_get(look(state.params, rows, frozen, state.rewards))
        weights, outputs, gradients = (_bad(finite) for finite in checks)
        if weights or outputs or gradients or not np.isfinite(loss):
            break
    else:
        return ["weights, outputs, loss and gradients are all finite when this batch is computed again"]
    place = lambda where: _place(where, orders)
    lines = [f"in part {part + 1} of {parts} of the batch:"] if parts > 1 else []
    name = lambda where: layer_name(*where, run.model)
    if weights:
        lines.append(f"weights: {first_few(sorted(map(name, weights)))} contain values that are not finite")
    if outputs:
        lines.append(f"forward: the first output that is not finite is that of {name(min(outputs, key=place))}")
    elif not np.isfinite(loss):
        lines.append("forward: every layer is finite, but not the loss: check the head and the loss weights of targets")
    if gradients:
        first, count = name(max(gradients, key=place)), len(checks[2])
        lines.append(f"backward: the first gradient that is not finite is that of {first}, of {count} gradients")
    return lines


def _look(run: Run, objective: Objective, mesh: Mesh, orders: dict[str, int]) -> Callable:
    """Returns a function (params, batch, frozen, rewards) -> (loss, finite weights, finite outputs, finite gradients).

    Args:
      orders: receives the order in which modules finish, by path, when the function is traced.
    """

    def tap(method, arguments, options, context):
        """Records whether an output is finite. Numbers modules as they finish, so a module follows those it calls."""
        out, module, name = method(*arguments, **options), context.module, context.method_name
        values = [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)]
        if values and name != "setup":
            path = "/".join(module.path) if name == "__call__" else "/".join((*module.path, name))
            orders.setdefault(path, len(orders))
            finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in values]))
            module.sow(TAPS, f"{TAPS}_{name}", finite, reduce_fn=jnp.logical_and, init_fn=lambda: jnp.array(True))
        return out

    def look(params, batch, frozen, rewards):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            with nn.intercept_methods(tap):
                _, taps = run.model.build().apply({"params": params}, batch, hidden=True, mutable=[TAPS])
            trainable, fixed = split(params, run.optim.freeze)
            sums = lambda trainable: objective.sums(join(trainable, fixed), batch, None, frozen, rewards)[0]
            loss = lambda trainable: sums(trainable)["loss"]
            value, gradients = jax.value_and_grad(loss)(trainable)
            flat = flatten(taps[TAPS])
            return value, _finite(params), {_module(path): x for path, x in flat.items()}, _finite(gradients)

    return look


def _module(path: str) -> str:
    """ "decoder/layers/mlp/taps___call__" -> "decoder/layers/mlp"."""
    *module, tapped = path.split("/")
    method = tapped.removeprefix(f"{TAPS}_")
    return "/".join(module if method == "__call__" else [*module, method])


def _finite(tree: Any) -> dict[str, Any]:
    """Returns whether each leaf is finite, as bool[]. For stacked layers, bool[L]: one value per layer."""
    flat = flatten(tree)
    axes = lambda path, x: tuple(range(1 if STACK.match(path) else 0, x.ndim))
    return {path: jnp.all(jnp.isfinite(x), axis=axes(path, x)) for path, x in flat.items()}


def _bad(finite: Mapping[str, np.ndarray]) -> list[tuple[str, int]]:
    """Returns (path, layer in its stack) of the values that are not finite. The layer is 0 outside of stacks."""
    return [(path, int(i)) for path, of in finite.items() for i in np.flatnonzero(~np.atleast_1d(of))]


def _place(where: tuple[str, int], orders: Mapping[str, int]) -> tuple[int, int, int]:
    """Returns a sort key: the order in which a module, or the module of a weight, finishes in the forward pass.

    A module in a stack of layers sorts by (first order in the stack, layer, own order), so that layers follow each
    other.
    """
    path, index = where
    while path not in orders and "/" in path:
        path = path.rsplit("/", 1)[0]
    own, match = orders.get(path, -1), STACK.match(path)
    if not match:
        return own, 0, own
    stack = re.sub(r"/slots_\d+$", "", match["stack"])
    return min(order for other, order in orders.items() if f"{other}/".startswith(f"{stack}/")), index, own


def layer_name(path: str, index: int, model: ModelConfig) -> str:
    """Returns a path with the number of its layer in the model: ("decoder/layers0/slots_1/mlp", 2) ->
    "decoder/layers/5/mlp"."""
    match = STACK.match(path)
    if not match:
        return path or "the model"
    part, numbers = match["part"], range(index + 1)
    if part == "decoder":
        slot = match["stack"].removeprefix("decoder/")
        numbers = {name: layers for one in segments(model.decoder.kinds) for name, layers, _ in one.slots()}.get(slot)
    number = "*" if numbers is None else numbers[index]
    return f"{part}/layers/{number}{match['rest']}"
