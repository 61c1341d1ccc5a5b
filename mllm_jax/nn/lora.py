"""Low-rank adapters of frozen weights (LoRA, arXiv 2106.09685): x W + scale * (x A) B, where scale = alpha / rank.

An `Einsum` adds the product of an adapter if the parameters have `lora_down` (A), `lora_up` (B) and `lora_scale` beside
its `w`. Parameters without these are the base model. For a weight with input axes I and output axes O, A is [I rank]
and B [rank O], after the axes that the weight is stacked on.
"""

import math
import re
import string
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from mllm_jax.common.settings import Config, NonNegativeInt, OneOf, Pattern, Positive, Range, check
from mllm_jax.common.trees import check_patterns, first_found, flatten, partition, unflatten
from mllm_jax.nn.quantization import KINDS, dequantize, kept
from mllm_jax.sharding.weights import Partitioned

DOWN, UP, SCALE, KEEP = LEAVES = ("lora_down", "lora_up", "lora_scale", "lora_keep")
TRAINED = "/lora_(down|up)$"
BASES = ("float32", "bfloat16", *KINDS)
HEAD = "decoder/head/w"  # cannot have an adapter: chunked losses read it without its layer


@dataclass(frozen=True)
class LoraConfig(Config):
    """Adapters, and storage of the frozen weights.

    rank: rank of the adapters. 0: no adapters, and the fields below have no effect.
    alpha: numerator of an adapter's scale, alpha / rank.
    dropout: fraction of an adapter's input that a training step drops, drawn separately for every adapter.
    target_modules: patterns of the weights `w` that get an adapter.
    rank_pattern, alpha_pattern: (pattern, value) pairs; the first pattern found in a weight's path sets its rank (0: no
      adapter) or alpha.
    modules_to_save: patterns of other weights, which are trained in full; all others are frozen.
    base_dtype: storage of frozen weights: "float32"; "bfloat16"; or "int8", "int4" or "nf4" for matrices of layers,
      with bfloat16 for other weights of two axes or more (see nn/quantization.py).
    quant_block_size: number of values along an input axis that share a scale in 4 bits.

    Patterns are regular expressions searched for in paths such as "decoder/layers/mlp/gate/w".
    """

    rank: NonNegativeInt = 0
    alpha: Positive = 16.0
    dropout: Annotated[float, Range(least=0, below=1)] = 0.0
    target_modules: tuple[Pattern, ...] = (r"^decoder/layers.*/(q|k|v|out|gate|up|down|q_down|q_up|kv_down)/w$",)
    rank_pattern: tuple[tuple[Pattern, NonNegativeInt], ...] = ()
    alpha_pattern: tuple[tuple[Pattern, Positive], ...] = ()
    modules_to_save: tuple[Pattern, ...] = ()
    base_dtype: Annotated[str, OneOf(BASES)] = "float32"
    quant_block_size: Annotated[int, Range(least=2)] = 64

    def __post_init__(self):
        super().__post_init__()
        check(Pattern, self.freezes(())[-1] if self.rank else "", "lora.modules_to_save, joined to one pattern,")

    @property
    def drops(self) -> bool:
        """Returns whether a training step needs a key for dropout."""
        return bool(self.rank and self.dropout)

    def freezes(self, freeze: tuple[str, ...]) -> tuple[str, ...]:
        """Returns `freeze` and a pattern of all weights that are neither adapters nor in `modules_to_save`.

        `freeze`: patterns of `OptimConfig.freeze`. Without adapters they are returned unchanged.
        """
        return (*freeze, rf"^(?!.*(?:{'|'.join((TRAINED, *self.modules_to_save))}))") if self.rank else freeze

    def ranks_of(self, boxed: Any) -> dict[str, int]:
        """Returns the ranks of all adapters by the path of their weight.

        Raises:
          ValueError: a pattern matches no weight, `target_modules` match a weight that cannot have an adapter, or
            `dropout` is set and experts have adapters.
        """
        if not self.rank:
            return {}
        paths = flatten(boxed)
        matrices = [path for path in paths if path.endswith("/w")]
        check_patterns(self.target_modules, matrices, "lora.target_modules")
        check_patterns(self.modules_to_save, paths, "lora.modules_to_save")
        targets = [path for path in matrices if any(re.search(pattern, path) for pattern in self.target_modules)]
        supported = [path for path, box in paths.items() if box.matrix and path != HEAD]
        if unsupported := [path for path in targets if path not in supported]:
            raise ValueError(
                f"lora.target_modules: match {unsupported[0]!r}, which cannot have an adapter. "
                f"Match only these weights: {', '.join(supported)}"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            check_patterns([pattern for pattern, _ in getattr(self, name)], targets, f"lora.{name}")
        ranks = {path: first_found(self.rank_pattern, path, self.rank) for path in targets}
        ranks = {path: rank for path, rank in ranks.items() if rank}
        if self.drops and (experts := [path for path in ranks if "expert" in paths[path].names]):
            raise ValueError(
                f"lora.dropout={self.dropout}: adapters of experts, as of {experts[0]!r}, have no dropout. Set it to 0."
            )
        return ranks


def make_adapters(boxed: Any, config: LoraConfig, key: jax.Array) -> dict:
    """Returns new adapters for the weights of a boxed tree (or its shapes), as a boxed nested dict of adapters alone.

    A is uniform in +- 1 / sqrt(fan-in), as in PEFT, and B is zero, so that the model initially equals the base model.
    """
    leaves, boxes = {}, flatten(boxed)
    for path, rank in config.ranks_of(boxed).items():
        weight_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        scale = first_found(config.alpha_pattern, path, config.alpha) / rank
        adapter = _new_adapter(boxes[path], rank, scale, 1 - config.dropout, weight_key)
        leaves |= {f"{path.removesuffix('w')}{name}": box for name, box in adapter.items()}
    return unflatten(leaves)


def keep_base(boxed: Any, config: LoraConfig) -> dict:
    """Returns a boxed tree with frozen weights stored as `config.base_dtype`. Trained weights are unchanged."""
    leaves = {}
    for path, box in flatten(boxed).items():
        leaves |= _stored(path, box, config)
    return unflatten(leaves)


def keep_arrays(params: Mapping, boxed: Any, config: LoraConfig, layout: Any) -> dict:
    """Returns parameters with frozen weights stored as `config.base_dtype`.

    Weights are converted one by one, so that memory holds at most one of them in both formats.

    Args:
      params: parameters of the base model, f32 or bf16. Their arrays must not be used again.
      boxed: boxed shapes of the parameters.
      layout: shardings of the result.
    """
    leaves, boxes, shardings = flatten(params), flatten(boxed), flatten(layout)
    if not config.rank or config.base_dtype == "float32":
        return dict(params)
    for path in list(leaves):
        unboxed = lambda x, path=path: {
            name: part.value for name, part in _stored(path, boxes[path].replace(value=x), config).items()
        }
        shapes = jax.eval_shape(unboxed, leaves[path])
        out_shardings = {name: shardings[name] for name in shapes}
        leaves |= jax.jit(unboxed, out_shardings=out_shardings)(leaves.pop(path))
    return unflatten(leaves)


def _stored(path: str, box: Partitioned, config: LoraConfig) -> dict[str, Partitioned]:
    """Returns the leaves, by path, in which the base model stores a weight."""
    trained = not config.rank or any(re.search(pattern, path) for pattern in config.modules_to_save)
    parts = kept(path, box, "float32" if trained else config.base_dtype, config.quant_block_size)
    beside = path.removesuffix(path.rpartition("/")[2])  # empty for a weight at the top level
    return {beside + name: part for name, part in parts.items()}


def _new_adapter(box: Partitioned, rank: int, scale: float, keep: float, key: jax.Array) -> dict[str, Partitioned]:
    """Returns the leaves of a new adapter by name. `keep`: 1 - dropout."""
    stacked, inputs, outputs = axes_of(box)
    shape = lambda axes: tuple(box.value.shape[axis] for axis in axes)
    names = lambda axes: tuple(box.names[axis] for axis in axes)
    limit = math.prod(shape(inputs)) ** -0.5
    down = jax.random.uniform(key, (*shape(stacked + inputs), rank), minval=-limit, maxval=limit)
    up = jnp.zeros((*shape(stacked), rank, *shape(outputs)))
    constants = {SCALE: scale} | ({KEEP: keep} if keep < 1 else {})
    return {
        DOWN: Partitioned(down, (*names(stacked + inputs), None)),
        UP: Partitioned(up, (*names(stacked), None, *names(outputs))),
        **{name: Partitioned(jnp.full(shape(stacked), value), names(stacked)) for name, value in constants.items()},
    }


def axes_of(box: Partitioned) -> tuple[list[int], list[int], list[int]]:
    """Returns (stacked axes, input axes, output axes) of a weight.

    Example: a weight [layers D N H] with `matrix` ((-3,), (-2, -1)) has ([0], [1], [2, 3]).
    """
    inputs, outputs = ([axis + box.value.ndim for axis in axes] for axes in box.matrix)
    return [axis for axis in range(box.value.ndim) if axis not in inputs + outputs], inputs, outputs


def split_adapters(params: Mapping) -> tuple[dict, dict]:
    """Splits parameters into (those of the base model, those of the adapters)."""
    adapters, base = partition(params, lambda path: path.rpartition("/")[2] in LEAVES)
    return base, adapters


def add_products(params: Mapping, boxed: Any, sign: int = 1) -> dict:
    """Returns parameters with merged weights w + sign * scale * A B, computed in fp32.

    Args:
      params: parameters with adapters. The result contains the adapters, too.
      boxed: shapes of the base model's parameters (`abstract_boxed`).
      sign: 1 to merge adapters, -1 to undo it.
    """
    flat, boxes = flatten(with_weights(params, boxed)), flatten(boxed)
    for path in [path for path in flat if path.endswith(f"/{DOWN}")]:
        weight, (down, up, scale) = path.removesuffix(DOWN), (path.replace(DOWN, name) for name in (DOWN, UP, SCALE))
        product = _product(boxes[f"{weight}w"], flat[down], flat[up], flat[scale])
        w = flat[f"{weight}w"]
        flat[f"{weight}w"] = (w.astype(jnp.float32) + sign * product).astype(w.dtype)
    return unflatten(flat)


def with_weights(params: Mapping, boxed: Any) -> dict:
    """Returns parameters with quantized weights replaced by f32 weights. `boxed`: shapes of the base model."""
    flat, weights = flatten(params), {}
    for path, box in flatten(boxed).items():
        if path not in flat:
            quantized = [name for name in flat if name.startswith(f"{path}_")]
            weights[path] = dequantize({name.rpartition("/")[2]: flat.pop(name) for name in quantized}, box.matrix[0])
    return unflatten(flat | weights)


def _product(box: Partitioned, down, up, scale):
    """Returns scale * A B with the axes of the weight."""
    letters = string.ascii_lowercase
    stacked, inputs, outputs = ("".join(letters[axis] for axis in axes) for axes in axes_of(box))
    lead = down.ndim - len(stacked + inputs) - 1  # number of leading output axes with an A per index
    equation = (
        f"{stacked}{outputs[:lead]}{inputs}z,{stacked}{outputs[:lead]}z{outputs[lead:]}->{letters[: box.value.ndim]}"
    )
    down, up = down.astype(jnp.float32), up.astype(jnp.float32)
    scaled = down * scale.reshape(scale.shape + (1,) * (down.ndim - scale.ndim))
    return jnp.einsum(equation, scaled, up, precision=jax.lax.Precision.HIGHEST)
