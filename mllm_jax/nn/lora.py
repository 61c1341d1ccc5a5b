"""Low-rank adapters of frozen weights (LoRA, arXiv 2106.09685): x W + scale * (x A) B, where scale = alpha / rank.

The tree of parameters decides: if it has `lora_down` (A), `lora_up` (B) and `lora_scale` next to the `w` of an
`Einsum`, that adds their product; a tree without them is the base model. For a weight with input axes I and output axes
O, A is [I rank] and B [rank O], after any axes that the weight is stacked on.
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
HEAD = "decoder/head/w"  # losses in chunks read it without its layer


@dataclass(frozen=True)
class LoraConfig(Config):
    """Adapters, and storage of the frozen weights.

    rank: rank of the adapters. 0: no adapters, and the fields below have no effect.
    alpha: an adapter's product is multiplied by alpha / rank.
    dropout: fraction of an adapter's input that a training step drops, drawn separately for every adapter.
    target_modules: patterns of the weights `w` that get an adapter.
    rank_pattern, alpha_pattern: (pattern, value) pairs; the first pattern found in a weight's path sets its rank (0: no
      adapter) or alpha.
    modules_to_save: patterns of other weights, which are trained in full; all others are frozen.
    base_dtype: storage of frozen weights: "float32"; "bfloat16"; or "int8", "int4" or "nf4" for the matrices of layers,
      and bfloat16 for other weights of two axes or more (see nn/quantization.py).
    quant_block_size: values along an input axis that share a scale in four bits.

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
        """Returns whether a training step needs a key."""
        return bool(self.rank and self.dropout)

    def freezes(self, freeze: tuple[str, ...]) -> tuple[str, ...]:
        """`OptimConfig.freeze` of a run with these adapters: also all that is neither theirs nor in
        `modules_to_save`."""
        return (*freeze, rf"^(?!.*(?:{'|'.join((TRAINED, *self.modules_to_save))}))") if self.rank else freeze

    def ranks_of(self, boxed: Any) -> dict[str, int]:
        """Rank of the adapter of every weight that has one, by path.

        Raises:
          ValueError: a pattern matches no weight, or `target_modules` one that cannot have an adapter.
        """
        if not self.rank:
            return {}
        paths = flatten(boxed)
        matrices = [path for path in paths if path.endswith("/w")]
        check_patterns(self.target_modules, matrices, "lora.target_modules")
        check_patterns(self.modules_to_save, paths, "lora.modules_to_save")
        found = [path for path in matrices if any(re.search(pattern, path) for pattern in self.target_modules)]
        able = [path for path, box in paths.items() if box.matrix and path != HEAD]
        if unable := [path for path in found if path not in able]:
            raise ValueError(
                f"lora.target_modules match {unable[0]!r}, which cannot have an adapter; {', '.join(able)} can"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            check_patterns([pattern for pattern, _ in getattr(self, name)], found, f"lora.{name}")
        ranks = {path: first_found(self.rank_pattern, path, self.rank) for path in found}
        ranks = {path: rank for path, rank in ranks.items() if rank}
        if self.drops and (experts := [path for path in ranks if "expert" in paths[path].names]):
            raise ValueError(f"lora.dropout must be 0 where experts have adapters, as {experts[0]!r} has: leave it out")
        return ranks


def make_adapters(boxed: Any, config: LoraConfig, key: jax.Array) -> dict:
    """New adapters for the weights of a boxed tree (or its shapes), as a boxed nested dict of their leaves alone.

    A is uniform within 1 / sqrt(fan-in), as PEFT has it, and B zero, so that the model is at first the base model.
    """
    made, boxes = {}, flatten(boxed)
    for path, rank in config.ranks_of(boxed).items():
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        scale = first_found(config.alpha_pattern, path, config.alpha) / rank
        new = _new(boxes[path], rank, scale, 1 - config.dropout, own)
        made |= {f"{path.removesuffix('w')}{name}": box for name, box in new.items()}
    return unflatten(made)


def keep_base(boxed: Any, config: LoraConfig) -> dict:
    """A boxed tree whose frozen weights are as `config.base_dtype` keeps them; those that are trained stay."""
    leaves = {}
    for path, box in flatten(boxed).items():
        leaves |= _kept(path, box, config)
    return unflatten(leaves)


def keep_arrays(params: Mapping, boxed: Any, config: LoraConfig, layout: Any) -> dict:
    """The same of parameters, weight by weight, so that no more than one is there twice.

    Args:
      params: of the base model, f32 or bf16; its arrays must not be used again.
      boxed: their shapes. layout: shardings of the result.
    """
    leaves, boxes, wanted = flatten(params), flatten(boxed), flatten(layout)
    if not config.rank or config.base_dtype == "float32":
        return dict(params)
    for path in list(leaves):
        unboxed = lambda x, path=path: {
            name: part.value for name, part in _kept(path, boxes[path].replace(value=x), config).items()
        }
        shapes = jax.eval_shape(unboxed, leaves[path])
        places = {name: wanted[name] for name in shapes}
        leaves |= jax.jit(unboxed, out_shardings=places)(leaves.pop(path))
    return unflatten(leaves)


def _kept(path: str, box: Partitioned, config: LoraConfig) -> dict[str, Partitioned]:
    trained = not config.rank or any(re.search(pattern, path) for pattern in config.modules_to_save)
    parts = kept(path, box, "float32" if trained else config.base_dtype, config.quant_block_size)
    beside = path.removesuffix(path.rpartition("/")[2])  # empty for a weight at the top level
    return {beside + name: part for name, part in parts.items()}


def _new(box: Partitioned, rank: int, scale: float, keep: float, key: jax.Array) -> dict[str, Partitioned]:
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
    """The axes of a weight that it is stacked on, that its product sums over, and that it gives."""
    inputs, outputs = ([axis + box.value.ndim for axis in axes] for axes in box.matrix)
    return [axis for axis in range(box.value.ndim) if axis not in inputs + outputs], inputs, outputs


def split_adapters(params: Mapping) -> tuple[dict, dict]:
    """A tree of parameters -> (the base model's, those of its adapters), each without the leaves of the other."""
    adapters, base = partition(params, lambda path: path.rpartition("/")[2] in LEAVES)
    return base, adapters


def add_products(params: Mapping, boxed: Any, sign: int = 1) -> dict:
    """The tree whose weights have the products of their adapters in them, w + sign * scale * A B, computed in fp32.

    Args:
      params: with adapters, which stay.
      boxed: shapes of the base model's parameters (`abstract_boxed`).
    """
    flat, boxes = flatten(with_weights(params, boxed)), flatten(boxed)
    for path in [path for path in flat if path.endswith(f"/{DOWN}")]:
        weight, (down, up, scale) = path.removesuffix(DOWN), (path.replace(DOWN, name) for name in (DOWN, UP, SCALE))
        product = _product(boxes[f"{weight}w"], flat[down], flat[up], flat[scale])
        w = flat[f"{weight}w"]
        flat[f"{weight}w"] = (w.astype(jnp.float32) + sign * product).astype(w.dtype)
    return unflatten(flat)


def with_weights(params: Mapping, boxed: Any) -> dict:
    """The tree with weights f32 in place of those that are kept in few bits."""
    flat, found = flatten(params), {}
    for path, box in flatten(boxed).items():
        if path not in flat:
            few = [name for name in flat if name.startswith(f"{path}_")]
            found[path] = dequantize({name.rpartition("/")[2]: flat.pop(name) for name in few}, box.matrix[0])
    return unflatten(flat | found)


def _product(box: Partitioned, down, up, scale):
    """scale * A B, with the axes of the weight."""
    letters = string.ascii_lowercase
    stacked, inputs, outputs = ("".join(letters[axis] for axis in axes) for axes in axes_of(box))
    own = down.ndim - len(stacked + inputs) - 1  # first outputs that have an A each
    equation = (
        f"{stacked}{outputs[:own]}{inputs}z,{stacked}{outputs[:own]}z{outputs[own:]}->{letters[: box.value.ndim]}"
    )
    down, up = down.astype(jnp.float32), up.astype(jnp.float32)
    scaled = down * scale.reshape(scale.shape + (1,) * (down.ndim - scale.ndim))
    return jnp.einsum(equation, scaled, up, precision=jax.lax.Precision.HIGHEST)
