"""Counts the FLOPs of a traced program by part of the model, exactly for matrix products.

XLA's own count takes the body of a loop once and ignores kernels. A multiply-add is two FLOPs. Only matrix products are
counted.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core

PARTS = ("experts", "encoder", "connector", "decoder")  # scopes of the model, inner ones first
NOISE = re.compile(
    r"|VLM.*|while|body|closed_call|checkpoint|rematted_computation|\w+\.body|jit\(.*|(?:times|share)_.*"
)  # components of a scope that are not shown
SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")


class Operation(NamedTuple):
    """An equation of a jaxpr that calls no other jaxpr."""

    equation: Any
    scope: str  # transformations and named scopes around it
    times: float  # number of runs, on all devices together


class Product(NamedTuple):
    """Matrix products of one operation, in FLOPs of all its runs on all devices."""

    part: str
    flops: float
    recomputed: float  # FLOPs among them that repeat earlier ones to save memory


def operations(jaxpr: Any, outer: Any = None, times: float = 1.0) -> Iterator[Operation]:
    """Yields all operations of a (closed) jaxpr and of the jaxprs that it calls.

    The body of a scan is multiplied by its length, and the body of a `shard_map` by the number of devices. For a
    `cond`, the branch with the most FLOPs counts. A loop whose length depends on data is multiplied by the number in
    its scope (`nn.runtime.expect_runs`), and counts once without such a scope (see `unknown_loops`).
    """
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        stack = equation.source_info.name_stack if outer is None else outer + equation.source_info.name_stack
        inner = [] if name == "pallas_call" else _called(params)
        if name == "cond":
            branches = [list(operations(branch, stack, times)) for branch in params["branches"]]
            yield from max(branches, key=lambda branch: sum(sum(flops(x)) for x in branch))
        elif inner:
            more = times * _runs(name, params, str(stack))
            for called in inner:
                yield from operations(called, stack, more)
        else:
            yield Operation(equation, str(stack), times)
        if name == "while":
            yield Operation(equation, str(stack), times)  # for `unknown_loops`


def _called(params: dict[str, Any]) -> list[Any]:
    """Returns the jaxprs among the parameters of an equation."""
    flat = [x for value in params.values() for x in (value if isinstance(value, tuple | list) else (value,))]
    return [x for x in flat if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]


def _runs(name: str, params: dict[str, Any], scope: str) -> float:
    """Returns the number of runs of a called jaxpr per run of its equation, on all devices together."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return (_expected("times", scope) or 1) * used_share(scope) if name == "while" else 1


def used_share(scope: str) -> float:
    """Returns the share of the rows of grouped products that a full batch uses (`nn.runtime.expect_share`)."""
    return _expected("share", scope) or 1


def _expected(what: str, scope: str) -> float | None:
    """Returns the number in the innermost scope named `what`: ("times", "times_8.0/while") -> 8.0. None without one."""
    numbers = re.findall(rf"\b{what}_(\d+(?:\.\d+)?)", scope)
    return float(numbers[-1]) if numbers else None


def unknown_loops(steps: list[Operation]) -> list[str]:
    """Returns the scopes of loops that were counted once because their number of runs is unknown."""
    loops = {step.scope for step in steps if step.equation.primitive.name == "while"}
    return sorted(scope for scope in loops if _expected("times", scope) is None)


def products(steps: list[Operation]) -> list[Product]:
    """Returns the matrix products among operations, see `part_of` for their parts."""
    results = []
    for step in steps:
        once, again = flops(step)
        if once + again:
            repeated = once + again if "rematted_computation" in step.scope else again
            results.append(Product(part_of(step.scope), step.times * (once + again), step.times * repeated))
    return results


def part_of(scope: str) -> str:
    """Returns the part of the model that a scope belongs to.

    Scopes outside of encoder, connector and decoder belong to the "head" (logits and loss) if they are differentiated,
    else to the "optimizer".
    """
    words = set(re.findall(r"\w+", scope))
    return next((part for part in PARTS if part in words), "head" if words & {"jvp", "transpose"} else "optimizer")


def place(scope: str) -> str:
    """Returns a readable scope, such as "decoder/layers/attention/q, recomputed", without the names that jax adds."""
    phase = "recomputed" if "rematted_computation" in scope else "backward" if "transpose(" in scope else ""
    words = re.sub(r"jit\(step\)/|\b(?:jvp|transpose|vmap)\(|\)", "", scope).split("/")
    path = "/".join(word for word in words if not NOISE.fullmatch(word))
    path = f"head/{path}" if part_of(scope) == "head" else path
    return f"{path}, {phase}" if phase else path


def flops(step: Operation) -> tuple[float, float]:
    """Returns (new FLOPs, FLOPs that a kernel recomputes) of one run of an operation on one device."""
    equation = step.equation
    name, shapes = equation.primitive.name, [getattr(x.aval, "shape", ()) for x in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted), 0
    if name == "ragged_dot_general":
        return _ragged_dot(equation, shapes), 0
    if name == "conv_general_dilated":
        numbers, weight = equation.params["dimension_numbers"], shapes[1]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(weight) / weight[numbers.rhs_spec[0]], 0
    if name.startswith("dot_product_attention_"):
        return _cudnn(equation, shapes)
    if name == "pallas_call":
        return _pallas(equation, used_share(step.scope))
    return 0, 0


def _ragged_dot(equation: Any, shapes: list) -> float:
    """Returns the FLOPs of a ragged product, in which each row of the left side uses the matrix of one group."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    taken = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return 2.0 * math.prod(shapes[0]) * math.prod(size for axis, size in enumerate(shapes[1]) if axis not in taken)


def _cudnn(equation: Any, shapes: list) -> tuple[float, float]:
    """Returns the FLOPs of cuDNN's attention, q [B T N H], which skips the pairs that a causal mask hides."""
    (rows, length, heads, head_dim), (_, keys, *_), (*_, value_dim) = shapes[:3]
    causal = "causal" in str(equation.params["mask_type"]).lower()
    pairs = rows * heads * length * keys * (0.5 if causal else 1)
    return _attention("bwd" if "_bwd" in equation.primitive.name else "fwd", pairs, head_dim, value_dim)


def _pallas(equation: Any, share: float) -> tuple[float, float]:
    """Returns the FLOPs of a Pallas kernel: from its cost estimate or, for splash attention, from its shapes.

    Args:
      share: share of the rows of a grouped product that is used; its cost estimate counts all rows.
    """
    kernel = SPLASH.match(equation.params["name"] or "")
    if kernel is None:
        cost = equation.params["cost_estimate"]
        return (cost.flops * share, 0) if cost else (0, 0)
    q, k, v = [x.aval.shape for x in equation.invars if x.aval.ndim > 2 and x.aval.dtype.kind not in "iub"][:3]
    grid = equation.params["grid_mapping"].grid[-2:]
    queries, keys = grid if kernel[1] != "dkv" else grid[::-1]
    # Segments are two arrays; a causal mask needs one more, the positions of the queries.
    causal = len([x for x in equation.invars if x.aval.dtype == "int32" and x.aval.ndim > 1]) % 2
    share_of_blocks = _causal_blocks(queries, keys) / (queries * keys) if causal else 1
    return _attention(kernel[1], math.prod(q[:-1]) * k[-2] * share_of_blocks, q[-1], v[-1])


def _causal_blocks(queries: int, keys: int) -> int:
    """Returns the number of blocks on or below the diagonal in a grid of `queries` x `keys` blocks.

    2 x 4 blocks: the first row of blocks has 2, the second 4, together 6.
    """
    return sum(math.ceil((block + 1) * keys / queries) for block in range(queries))


def _attention(phase: str, pairs: float, head_dim: int, value_dim: int) -> tuple[float, float]:
    """Returns (new FLOPs, recomputed FLOPs) of a flash attention kernel (arXiv 2205.14135).

    The forward pass computes q k and p v. In the backward pass do v, ds k, ds q and p do are new, and q k is repeated.
    If two kernels compute the gradients of queries ("dq") and of keys ("dkv"), both compute q k and do v.
    """
    new, again = {
        "fwd": ((1, 1), (0, 0)),
        "bwd": ((2, 2), (1, 0)),
        "dq": ((1, 1), (1, 0)),
        "dkv": ((1, 1), (1, 1)),
    }[phase]
    cost = lambda counts: 2.0 * pairs * (counts[0] * head_dim + counts[1] * value_dim)
    return cost(new), cost(again)
