"""One model for all families: encode -> connect -> fuse -> decode. The types of the configs select the parts."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax.core import meta

from mllm_jax.common.settings import Config, Int, NonNegative, NonNegativeInt, PositiveInt, TokenId
from mllm_jax.common.trees import join
from mllm_jax.model.decoder import Decoder, DecoderConfig
from mllm_jax.model.fusion import splice
from mllm_jax.nn.lora import LoraConfig, keep_base, make_adapters
from mllm_jax.nn.runtime import Runtime
from mllm_jax.nn.value_head import ValueHead
from mllm_jax.types import MODALITIES, Batch, Cache, Output, Vision, VisionTokens

TEXT, IMAGE, VIDEO = range(len(MODALITIES))


@dataclass(frozen=True)
class VisionTokenIds(Config):
    """Ids of the tokens that represent vision in a prompt: placeholders of images and videos, and their brackets.

    -1: the model has no such token. An `image` outside the vocabulary is negative, too.
    """

    image: Int
    video: TokenId = -1
    start: TokenId = -1
    end: TokenId = -1


@dataclass(frozen=True)
class InputRules(Config):
    """Settings of a config.json that affect only how conversations become batches: no part of the model reads them.

    pinpoints: (height, width) in pixels of the canvases that images are placed on and split into tiles (AnyRes), see
      data/vision/tiles.py.
    square: whether images are padded to a square with the encoder's mean color.
    tiles: smallest and largest number of tiles of an image. (): those of the processor's files.
    most_tiles: number of tiles above which a grid of visual tokens is resampled, and videos are pooled. 0: never.
    shows_prefix_tokens: whether the class token and the registers of an image are visual tokens too, before its
      patches.
    position_rate: rotary positions per second of a video. 0: one per temporal patch.
    chat: name of the chat format. "": a template in the processor's files.
    """

    pinpoints: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    square: bool = False
    tiles: tuple[PositiveInt, ...] = ()
    most_tiles: NonNegativeInt = 0
    shows_prefix_tokens: bool = False
    position_rate: NonNegative = 0.0
    chat: str = ""


@dataclass(frozen=True)
class ModelConfig(Config):
    """An encoder, a connector and a decoder, each a config whose type chooses the module; any may be exchanged.

    A model of text alone has None for the first two and for `tokens`; a tower alone has None for all but the first.
    pool: of a tower alone: what makes one vector of an image (see dual.py), in addition to its features.
    value_head: a head that gives every token a number, for reward models and for PPO; runs set it where they need it.
    family: the table of weight names and the rules of the processor (families/), used for reading and writing only.
    inputs: rules of the processor that stand in config.json.
    lora: the adapters that parameters are made with; given ones bring their own.
    """

    encoder: Any
    connector: Any = None
    decoder: DecoderConfig | None = None
    tokens: VisionTokenIds | None = None
    runtime: Runtime = Runtime()
    family: str = "qwen3_vl"
    inputs: InputRules = InputRules()
    pool: Any = None
    value_head: bool = False
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.encoder is not None and self.decoder is not None and self.connector is None:
            raise ValueError("a model of an encoder and a decoder needs a connector between them; it is None")
        pinpoints = self.inputs.pinpoints
        if pinpoints and not getattr(self.connector, "newline", False):
            raise ValueError(
                f"inputs.pinpoints={pinpoints} need a newline after every row of tiles, which {self.connector} has "
                "not: use MlpConnectorConfig(newline=True), or inputs.pinpoints=()"
            )
        if self.inputs.shows_prefix_tokens and (self.merge > 1 or self.queries or pinpoints):
            raise ValueError(
                "inputs.shows_prefix_tokens makes visual tokens of a class token and registers, which neither a "
                "connector that "
                "merges patches nor images in tiles (inputs.pinpoints) have a place for; set "
                "inputs.shows_prefix_tokens=False"
            )

    @property
    def merge(self) -> int:
        """Side of the square of patches that becomes one visual token. 1: the model reads no images."""
        return 1 if self.connector is None else self.connector.merge

    @property
    def queries(self) -> int:
        """Visual tokens of an image, whatever its size. 0: they are made of squares of patches."""
        return 0 if self.connector is None else self.connector.queries

    @property
    def patch_values(self) -> int:
        """Number of values in a patch. 0: the model reads no images."""
        return 0 if self.encoder is None else self.encoder.patch_values

    @property
    def num_prefix_tokens(self) -> int:
        """Number of empty patches before an image's own: class token and registers, rounded up to visual tokens."""
        return 0 if self.encoder is None else -(-self.encoder.num_prefix_tokens // self.merge**2) * self.merge**2

    @property
    def shown(self) -> int:
        """Visual tokens of an image that stand before those of its patches."""
        return self.num_prefix_tokens if self.inputs.shows_prefix_tokens else 0

    @property
    def prefix(self) -> bool:
        """True if all tokens of a conversation attend to its first tokens."""
        return self.decoder is not None and self.decoder.prefix

    @property
    def layout(self) -> dict[str, Any]:
        """Arguments of `data.pack.collate` that lay out batches for this model."""
        return dict(
            merge=self.merge,
            values=self.patch_values,
            prefix=self.prefix,
            mixes=self.inputs.most_tiles > 0,
            queries=self.queries,
        )

    def build(self) -> nn.Module:
        return VLM(self)

    def example(self) -> Batch:
        """The smallest batch that touches every weight: one row, one image of one visual token."""
        text = np.zeros((1, 2), np.int32)
        if self.encoder is None:
            vision_index, vision = np.full((1, 2), -1, np.int32), None
        else:
            vision_index = np.array([[-1, 0]], np.int32)
            vision = example_image(self.patch_values, self.merge**2, slots=self.queries > 0)
        return Batch(
            tokens=text,
            targets=text,
            weight=np.zeros((1, 2), np.float32),
            segment=np.ones((1, 2), np.int32),
            position=np.zeros((1, 2, 3), np.int32),
            vision_index=vision_index,
            vision=vision,
            prefix=np.zeros((1, 2), bool) if self.prefix else None,
        )


def example_image(values: int, patches: int, slots: bool = False) -> Vision:
    """One row with one image of this many patches of this many values; `slots`: for a connector with queries."""
    return Vision(
        patches=np.zeros((1, 1, patches, values), np.float32),
        image=np.ones((1, 1, patches), np.int32),
        coords=np.zeros((1, 1, patches, 3), np.int32),
        grid=np.ones((1, 1, patches, 2), np.int32),
        slots=np.ones((1, 1, 1), np.int32) if slots else None,
    )


class VLM(nn.Module):
    config: ModelConfig

    def setup(self):
        config = self.config
        if config.encoder is not None:
            self.encoder = config.encoder.build(config.runtime, name=None)
        if config.connector is not None:
            self.connector = config.connector.build(config.decoder.width, config.runtime, name=None)
        if config.pool is not None:
            self.pool = config.pool.build(config.runtime.within("encoder"), name=None)
        if config.decoder is not None:
            self.decoder = Decoder(config.decoder, config.runtime)
        if config.value_head:
            self.value_head = ValueHead()

    def encode(self, vision: Vision) -> VisionTokens:
        """Packed images -> visual tokens [B M D]. ValueError where the connector makes nothing of the DeepStack
        features."""
        config, tokens = self.config, self.connector(self.encoder(vision), vision)
        deepstack, layers = config.encoder.deepstack_layers, config.decoder.layers
        if deepstack and (tokens.deep is None or len(deepstack) > layers):
            raise ValueError(
                f"encoder.deepstack_layers={deepstack} are features for as many decoder layers; there are {layers}, "
                "behind "
                "the "
                f"connector {config.connector}: use PatchMergerConfig, or encoder.deepstack_layers=()"
            )
        return tokens

    def __call__(self, batch: Batch, cache: Cache | None = None, hidden: bool = False) -> Output:
        """A pure function of parameters, batch and cache.

        Args:
          batch: rows of packed conversations; all of it but targets and weight is read.
          cache: keys and values so far; the batch continues it. See `init_cache`.
          hidden: return hidden states instead of logits (a loss in chunks, or the last position alone, needs no more).
        """
        if self.config.decoder is None:
            features = rearrange(self.encoder(batch.vision).value, "B R P D -> B (R P) D")
            return Output(features=features, pooled=self._pooled(features, batch.vision))
        x = self.decoder.embed(batch.tokens)
        deep = None
        if batch.vision is not None:
            visual = self.encode(batch.vision)
            x, deep = splice(x, visual.embeddings, batch.vision_index, batch.mix), visual.deep
        modality = jnp.full_like(batch.tokens, TEXT)
        if self.config.tokens is not None:
            visual_kind = jnp.where(batch.tokens == self.config.tokens.video, VIDEO, IMAGE)
            modality = jnp.where(batch.vision_index >= 0, visual_kind, TEXT)
        x, cache, routing = self.decoder(
            x,
            batch.position,
            batch.segment,
            modality,
            cache=cache,
            deep=deep,
            vision_index=batch.vision_index,
            prefix=batch.prefix,
            mix=batch.mix,
        )
        if hidden:
            return Output(hidden=x, cache=cache, routing=routing)
        value = self.value_head(x) if self.config.value_head else None
        return Output(logits=self.decoder.logits(x), cache=cache, routing=routing, value=value)

    def _pooled(self, features, vision: Vision):
        """One vector [B D] of the first image of every row; None without a pool."""
        if self.config.pool is None:
            return None
        image = rearrange(vision.image, "B R P -> B (R P)")
        first = jnp.where(jnp.any(image == 1, axis=1), jnp.argmax(image == 1, axis=1), -1)
        return self.pool(features, image, first[:, None])[:, 0]

    def logits(self, hidden):
        """Hidden states [... D] -> f32[... V]; `apply(..., method="logits")`."""
        return self.decoder.logits(hidden)

    def values(self, hidden):
        """Hidden states [... D] -> f32[...] of the value head; `apply(..., method="values")`."""
        return self.value_head(hidden)


def head_table(params) -> jax.Array:
    """The weight [V D] that turns hidden states into logits: the head's own, or the tied embedding."""
    decoder = params["decoder"]
    return decoder["head"]["w"] if "head" in decoder else decoder["embed"]


def init_cache(config: ModelConfig, rows: int, slots: int, dtype: str | None = None) -> Cache:
    """An empty cache for `rows` rows of `slots` tokens."""
    layers, dtype = config.decoder.layers, dtype or config.runtime.dtype
    k, v = (jnp.zeros((layers, rows, heads, slots, values), dtype) for heads, values in config.decoder.attention.cached)
    return Cache(
        k=k,
        v=v,
        segment=jnp.zeros((rows, slots), jnp.int32),
        index=jnp.zeros((), jnp.int32),
        position=jnp.zeros((rows,), jnp.int32),
    )


def cache_bytes_per_token(config: ModelConfig, dtype: str | None = None) -> int:
    """Bytes that a cache keeps of one token, over all layers."""
    values = sum(heads * values for heads, values in config.decoder.attention.cached)
    return config.decoder.layers * values * jnp.dtype(dtype or config.runtime.dtype).itemsize


def init_boxed(config: ModelConfig, key):
    """Random parameters, every weight in a box with the names of its axes. Under `jax.eval_shape` it costs nothing."""
    base = config.build().init(key, jax.tree.map(jnp.asarray, config.example()))["params"]
    return join(keep_base(base, config.lora), make_adapters(base, config.lora, key))


@functools.lru_cache(maxsize=16)  # a trace of a large model takes half a second, and planning asks a dozen times
def abstract_boxed(config: ModelConfig):
    """The boxed tree of ShapeDtypeStructs, without computing anything."""
    return jax.eval_shape(lambda: init_boxed(config, jax.random.key(0)))


def init_params(config: ModelConfig, key):
    """Random fp32 parameters as a nested dict of arrays."""
    return meta.unbox(init_boxed(config, key))


def init_adapters(config: ModelConfig, key):
    """The adapters of `init_params` alone, to be joined with a base model's parameters."""
    base = abstract_boxed(replace(config, lora=LoraConfig()))
    return meta.unbox(make_adapters(base, config.lora, key))


def abstract_params(config: ModelConfig):
    """Shapes and dtypes of the parameters as a nested dict."""
    return meta.unbox(abstract_boxed(config))


def without_values(config: Any) -> Any:
    """The config of the same model without its value head; one that cannot have any stays."""
    return replace(config, value_head=False) if isinstance(config, ModelConfig) else config


def in_full(config: ModelConfig) -> ModelConfig:
    """The config with every weight as one array of its own shape, which quantized weights do not have."""
    return replace(config, lora=replace(config.lora, base_dtype="float32"))


def count_params(config: ModelConfig) -> dict[str, int]:
    """Number of parameters of each part."""
    shapes = abstract_params(in_full(config))
    return {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}
