"""The model of all families: encoder, connector and decoder, each selected by the type of its config."""

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
    """Ids of the vision tokens in a prompt.

    image: placeholder of a visual token of an image. Negative: not in the vocabulary.
    video: placeholder of a visual token of a video. -1: none.
    start: token before the visual tokens of an image or video. -1: none.
    end: token after them. -1: none.
    """

    image: Int
    video: TokenId = -1
    start: TokenId = -1
    end: TokenId = -1


@dataclass(frozen=True)
class InputRules(Config):
    """Settings of a config.json that only the processor reads; they affect batches, not the model.

    pinpoints: (height, width) in pixels of the canvases on which images are tiled (AnyRes, data/vision/tiles.py).
    square: whether images are padded to a square with the encoder's mean color.
    tiles: smallest and largest number of tiles of an image. (): the numbers in the processor's files.
    most_tiles: number of tiles above which a grid of visual tokens is resampled, and videos are pooled. 0: never.
    shows_prefix_tokens: whether an image's class token and registers become visual tokens, before its patches.
    position_rate: rotary positions per second of a video. 0: one per temporal patch.
    chat: name of the chat format. "": the template in the processor's files.
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
    """An encoder, a connector and a decoder; the type of each config selects the module.

    encoder: vision transformer. None: a text-only model.
    connector: module between encoder and decoder. None: a text-only model or an encoder alone.
    decoder: language model. None: an encoder alone.
    tokens: ids of the vision tokens. None: a text-only model or an encoder alone.
    runtime: execution of the model.
    family: name of the weight table and processor rules (families/), for reading and writing only.
    inputs: settings of the processor that config.json stores.
    pool: pool of an encoder alone (dual_encoder.py), which adds one vector per image to its output. None: no pool.
    value_head: whether a linear head predicts a scalar per token, for reward models and PPO. Runs set it.
    lora: adapters that `init_params` creates; `load_adapters` replaces them.
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
            raise ValueError(
                "connector=None: a model with an encoder and a decoder needs a connector. Set one, such as "
                "MlpConnectorConfig()."
            )
        pinpoints = self.inputs.pinpoints
        if pinpoints and not getattr(self.connector, "newline", False):
            raise ValueError(
                f"inputs.pinpoints={pinpoints}: rows of tiles end with a newline, which {self.connector} does not "
                "have. Set connector=MlpConnectorConfig(newline=True), or inputs.pinpoints=()."
            )
        if self.inputs.shows_prefix_tokens and (self.merge > 1 or self.queries or pinpoints):
            raise ValueError(
                "inputs.shows_prefix_tokens=True: neither a connector that merges patches nor tiled images "
                "(inputs.pinpoints) support visual tokens of class token and registers. Set "
                "inputs.shows_prefix_tokens=False."
            )

    @property
    def merge(self) -> int:
        """Side in patches of the square that becomes one visual token. 1 without a connector."""
        return 1 if self.connector is None else self.connector.merge

    @property
    def queries(self) -> int:
        """Visual tokens of an image, whatever its size. 0: they are made of squares of patches."""
        return 0 if self.connector is None else self.connector.queries

    @property
    def reads_instructions(self) -> bool:
        """True if the visual tokens of an image depend on a text."""
        return self.connector is not None and self.connector.reads_instructions

    @property
    def patch_values(self) -> int:
        """Number of values in a patch. 0: no encoder."""
        return 0 if self.encoder is None else self.encoder.patch_values

    @property
    def num_prefix_tokens(self) -> int:
        """Number of empty patches before an image: class token and registers, rounded up to whole visual tokens."""
        return 0 if self.encoder is None else -(-self.encoder.num_prefix_tokens // self.merge**2) * self.merge**2

    @property
    def shown(self) -> int:
        """Number of visual tokens of class token and registers, before those of an image's patches."""
        return self.num_prefix_tokens if self.inputs.shows_prefix_tokens else 0

    @property
    def prefix(self) -> bool:
        """True if all tokens of a conversation attend to its first tokens (`DecoderConfig.prefix`)."""
        return self.decoder is not None and self.decoder.prefix

    @property
    def layout(self) -> dict[str, Any]:
        """Arguments of `packing.collate` (data/pipeline/) that depend on the model."""
        return dict(
            merge=self.merge,
            values=self.patch_values,
            prefix=self.prefix,
            mixes=self.inputs.most_tiles > 0,
            queries=self.queries,
            instructions=self.reads_instructions,
        )

    def build(self) -> nn.Module:
        return VLM(self)

    def example(self) -> Batch:
        """Returns the smallest batch that uses every weight: one row of two tokens, one of them visual."""
        text = np.zeros((1, 2), np.int32)
        if self.encoder is None:
            vision_index, vision = np.full((1, 2), -1, np.int32), None
        else:
            vision_index = np.array([[-1, 0]], np.int32)
            vision = example_image(self.patch_values, self.merge**2, self.queries > 0, self.reads_instructions)
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


def example_image(values: int, patches: int, slots: bool = False, instruction: bool = False) -> Vision:
    """Returns a batch row with one image of `patches` patches of `values` values.

    slots, instruction: whether the row has a slot for it, and an instruction of one token, as some connectors need.
    """
    return Vision(
        patches=np.zeros((1, 1, patches, values), np.float32),
        image=np.ones((1, 1, patches), np.int32),
        coords=np.zeros((1, 1, patches, 3), np.int32),
        grid=np.ones((1, 1, patches, 2), np.int32),
        slots=np.ones((1, 1, 1), np.int32) if slots else None,
        instruction=np.zeros((1, 1, 1, 1), np.int32) if instruction else None,
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
        """Returns the visual tokens [B M D] of packed images. Raises ValueError if DeepStack features have no use."""
        config, tokens = self.config, self.connector(self.encoder(vision), vision)
        deepstack, layers = config.encoder.deepstack_layers, config.decoder.layers
        if deepstack and (tokens.deep is None or len(deepstack) > layers):
            raise ValueError(
                f"encoder.deepstack_layers={deepstack}: needs a connector with DeepStack mergers and as many decoder "
                f"layers; the model has {config.connector} and decoder.layers={layers}. Use PatchMergerConfig, or "
                "encoder.deepstack_layers=()."
            )
        return tokens

    def __call__(self, batch: Batch, cache: Cache | None = None, hidden: bool = False) -> Output:
        """Runs the model on a batch.

        Args:
          batch: rows of packed conversations; `targets` and `weight` are not read.
          cache: keys and values of the previous tokens (`init_cache`). None: the batch is complete.
          hidden: whether to return hidden states instead of logits (a chunked loss computes logits itself).
        Returns:
          Output: logits or hidden states, the extended cache and the routing; of an encoder alone, features and pooled.
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
        """Returns one vector [B D] of the first image of every row, or None without a pool."""
        if self.config.pool is None:
            return None
        image = rearrange(vision.image, "B R P -> B (R P)")
        first = jnp.where(jnp.any(image == 1, axis=1), jnp.argmax(image == 1, axis=1), -1)
        return self.pool(features, image, first[:, None])[:, 0]

    def logits(self, hidden):
        """Returns logits f32[... V] of hidden states [... D]; `apply(..., method="logits")`."""
        return self.decoder.logits(hidden)

    def values(self, hidden):
        """Returns the value head's scalars f32[...] of hidden states [... D]; `apply(..., method="values")`."""
        return self.value_head(hidden)


def head_table(params) -> jax.Array:
    """Returns the weight [V D] that maps hidden states to logits: the head, or the tied embedding."""
    decoder = params["decoder"]
    return decoder["head"]["w"] if "head" in decoder else decoder["embed"]


def init_cache(config: ModelConfig, rows: int, slots: int, dtype: str | None = None) -> Cache:
    """Returns an empty cache for `rows` rows of `slots` tokens. dtype: of keys and values. None: the runtime's."""
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
    """Returns the bytes of a cache per token, over all layers."""
    values = sum(heads * values for heads, values in config.decoder.attention.cached)
    return config.decoder.layers * values * jnp.dtype(dtype or config.runtime.dtype).itemsize


def init_boxed(config: ModelConfig, key):
    """Returns random parameters, each a Partitioned with the names of its axes. Under `jax.eval_shape` it is free."""
    base = config.build().init(key, jax.tree.map(jnp.asarray, config.example()))["params"]
    return join(keep_base(base, config.lora), make_adapters(base, config.lora, key))


@functools.lru_cache(maxsize=16)  # tracing a large model takes half a second, and the planner needs it a dozen times
def abstract_boxed(config: ModelConfig):
    """Returns the tree of `init_boxed` with ShapeDtypeStructs in place of arrays, without computing any."""
    return jax.eval_shape(lambda: init_boxed(config, jax.random.key(0)))


def init_params(config: ModelConfig, key):
    """Returns random fp32 parameters as a nested dict of arrays."""
    return meta.unbox(init_boxed(config, key))


def init_adapters(config: ModelConfig, key):
    """Returns only the adapters of `init_params`, to be joined with a base model's parameters."""
    base = abstract_boxed(replace(config, lora=LoraConfig()))
    return meta.unbox(make_adapters(base, config.lora, key))


def abstract_params(config: ModelConfig):
    """Returns the shapes and dtypes of the parameters as a nested dict."""
    return meta.unbox(abstract_boxed(config))


def without_values(config: Any) -> Any:
    """Returns the config without a value head. Configs of dual encoders, which have none, are returned unchanged."""
    return replace(config, value_head=False) if isinstance(config, ModelConfig) else config


def in_full(config: ModelConfig) -> ModelConfig:
    """Returns the config without quantization, so that every weight is one array of its own shape."""
    return replace(config, lora=replace(config.lora, base_dtype="float32"))


def count_params(config: ModelConfig) -> dict[str, int]:
    """Returns the number of parameters of each part ("encoder", "connector", "decoder", ...)."""
    shapes = abstract_params(in_full(config))
    return {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}
