"""Q-Former: a BERT whose tokens are queries, with cross-attention to an image's patches (BLIP-2, arXiv 2301.12597).

It may also read an instruction, whose tokens the queries attend to (InstructBLIP, arXiv 2305.06500).
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from mllm_jax.common.settings import NonNegativeInt, OneOf, Positive, PositiveInt
from mllm_jax.model.connectors.base import ConnectorConfig, ImageCounts
from mllm_jax.model.connectors.queries import Queries, to_query_tokens
from mllm_jax.nn.attention.cross import CrossAttention
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.mlp import ACTIVATIONS, Mlp
from mllm_jax.nn.norm import LayerNorm
from mllm_jax.nn.runtime import Runtime, rematted
from mllm_jax.nn.stack import layers_of, scan_segment, segments
from mllm_jax.sharding.activations import shard
from mllm_jax.sharding.weights import partitioned
from mllm_jax.types import Vision, VisionTokens


@dataclass(frozen=True)
class QFormerConfig(ConnectorConfig):
    """A Q-Former and a linear layer to the decoder's width. The defaults are those of BLIP-2.

    queries: visual tokens of an image.
    width, layers, heads, mlp: sizes of a BERT.
    cross_every: every n-th layer attends to the patches, the first one included.
    vocab, positions: vocabulary and largest number of tokens of an instruction. 0: no instruction is read.
    prefix_tokens: whether queries attend to the class token and the registers of an image, too.
    """

    queries: PositiveInt = 32
    width: PositiveInt = 768
    layers: PositiveInt = 12
    heads: PositiveInt = 12
    mlp: PositiveInt = 3072
    cross_every: PositiveInt = 2
    activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "gelu"
    norm_eps: Positive = 1e-12
    vocab: NonNegativeInt = 0
    positions: NonNegativeInt = 0
    prefix_tokens: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"connector.width={self.width} is not a multiple of connector.heads={self.heads}")
        if (self.vocab > 0) != (self.positions > 0):
            raise ValueError(
                f"connector.vocab={self.vocab} and connector.positions={self.positions} must both be 0, or none of them"
            )

    @property
    def reads_instructions(self) -> bool:
        return self.vocab > 0

    @property
    def kinds(self) -> tuple[bool, ...]:
        """True for the layers that attend to the patches."""
        return tuple(number % self.cross_every == 0 for number in range(self.layers))

    def weight_rows(self, path: str, counts: ImageCounts) -> float:
        queries, text = counts.images * self.queries, counts.instruction_tokens
        if "/cross_attention/k/" in path or "/cross_attention/v/" in path:
            return counts.patches
        if "/mlp_text/" in path:
            return text
        return queries + text * ("/attention/" in path)

    def attention_flops(self, counts: ImageCounts) -> float:
        own = self.queries + (counts.instruction_tokens / counts.images if counts.images else 0)  # tokens of an image
        pairs = self.layers * counts.images * own**2 + sum(self.kinds) * self.queries * counts.patches
        return 4 * self.width * pairs

    def build(self, out: int, runtime: Runtime, name: str | None) -> nn.Module:
        return QFormer(self, out, runtime, name=name)


class QFormerLayer(nn.Module):
    """Blocks whose norms come after the addition, as in BERT; queries and text share only the self-attention."""

    config: QFormerConfig
    runtime: Runtime
    cross: bool

    @nn.compact
    def __call__(self, x, text, patches, segments, patch_segment):
        """Returns the queries `x` and the instructions `text` after this layer.

        Args:
          x: [rows I*Q D]; text: [rows I*W D], or None without instructions.
          patches: [rows P E].
          segments: image numbers i32[rows I*Q] of the queries, and behind them i32[rows I*W] of the text.
          patch_segment: i32[rows P].
        """
        config, runtime, count = self.config, self.runtime, x.shape[1]
        norm = lambda name: LayerNorm(config.norm_eps, name=name)
        sizes = (config.heads, config.heads, config.width // config.heads)
        attention = lambda name: CrossAttention(*sizes, runtime, bias=True, name=name)
        mlp = lambda name: Mlp(config.mlp, config.width, config.activation, runtime.dtype, name=name)
        both = x if text is None else jnp.concatenate([x, text], axis=1)
        both = norm("norm1")(both + attention("attention")(both, both, segments, segments))
        x = both[:, :count]
        if self.cross:
            added = attention("cross_attention")(x, patches, segments[:, :count], patch_segment)
            x = norm("norm_cross")(x + added)
        x = norm("norm2")(x + mlp("mlp")(x))
        if text is not None:
            text = both[:, count:]
            text = norm("norm_text")(text + mlp("mlp_text")(text))
        return x, text


class Instructions(nn.Module):
    """Embedded instructions: one for every slot of a patch row."""

    config: QFormerConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, vision: Vision):
        """Returns the embedded tokens [rows I*W D], and the image number i32[rows I*W] of each; 0 at padding."""
        config, init = self.config, nn.initializers.normal(self.config.width**-0.5)
        # BERT's vocabulary has an odd number of words, which no mesh divides.
        words = self.param("words", partitioned(init, None, "embed"), (config.vocab, config.width))
        places = self.param("positions", partitioned(init, "position", "embed"), (config.positions, config.width))
        # The table is gathered first: a lookup in a sharded one makes XLA rematerialize it.
        words = shard(words.astype(self.runtime.dtype), (None, None), self.runtime.rules)
        images, length = vision.instruction.shape[1:]
        ids = rearrange(vision.instruction, "rows I W -> rows (I W)")
        text = jnp.take(words, jnp.maximum(ids, 0), axis=0)
        place = jnp.minimum(jnp.arange(length), config.positions - 1)  # those behind the table are padding
        text = text + jnp.tile(places[place].astype(text.dtype), (images, 1))
        return text, jnp.where(ids >= 0, repeat(vision.slots, "rows I -> rows (I W)", W=length), 0)


class QFormer(nn.Module):
    config: QFormerConfig
    out: int
    runtime: Runtime

    @nn.compact
    def __call__(self, features, vision: Vision) -> VisionTokens:
        config, runtime = self.config, self.runtime.within("connector")
        if config.vocab and vision.instruction is None:
            raise ValueError("this connector reads an instruction for every image, which the batch does not have")

        def layers(patches, vision: Vision):
            x, segments_of = Queries(config.queries, config.width, runtime, name="queries")(vision.slots)
            text, norm = None, LayerNorm(config.norm_eps, name="norm")
            if config.vocab:
                text, of_text = Instructions(config, runtime, name="instructions")(vision)
                text, segments_of = norm(text), jnp.concatenate([segments_of, of_text], axis=1)
            x = norm(x)

            def step(layer, carry, number):
                del number
                return layer(*carry, patches, segments_of, vision.image), None

            for part in segments(config.kinds):
                build = partial(rematted(QFormerLayer, runtime), config, runtime)
                (x, text), _ = scan_segment(step, layers_of(build, part, part.name), (x, text), part, runtime)
            shape = (config.width, self.out)
            return Einsum("...D,DF->...F", shape, ("embed", "mlp"), runtime.dtype, bias=True, name="output")(x)

        return VisionTokens(to_query_tokens(features.value, vision, layers, self.runtime, config.prefix_tokens))
