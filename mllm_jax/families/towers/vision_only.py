"""Vision towers of CLIP, SigLIP and SigLIP 2 as models of their own.

Their features are transformers' `last_hidden_state`; the output of SigLIP's head is its `pooler_output`.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from einops import rearrange

from mllm_jax.common.fields import Json, flag, read
from mllm_jax.data.pipeline.hf_inputs import Arrays, Supply
from mllm_jax.families.base import Family
from mllm_jax.families.shared.hf_images import counted_like_text, cut
from mllm_jax.families.shared.rows import layer_norm, linear
from mllm_jax.families.towers.in_vlms import CLIP, NAFLEX, SIGLIP
from mllm_jax.families.towers.tower import Tower
from mllm_jax.model.dual_encoder import AttentionPool
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.types import ImagePatches
from mllm_jax.weights.table import Row

PREFIX = "vision_model."
SQUARE = ("pixel_values",)
ANY_SIZE = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


def square_images(config: Any, arrays: Arrays) -> list[ImagePatches]:
    """Returns the images of `pixel_values` f[n c h w], all of one size; `config` has an encoder."""
    pixels, encoder = arrays.get("pixel_values", np.zeros((0, 0, 0, 0))), config.encoder
    if pixels.ndim != 4:
        raise ValueError(
            f"pixel_values: shape {pixels.shape} is not [images c h w]. Pass images of one size in one array."
        )
    return [cut(image, encoder.patch_size, encoder.num_prefix_tokens) for image in pixels]


def images_of_any_size(config: Any, arrays: Arrays) -> list[ImagePatches]:
    """Returns the images in arrays of NaFlex processors.

    `pixel_values` f[n p C] has values in (y, x, c) order, `spatial_shapes` i[n 2] is in patches. The padding follows
    from the shapes; `pixel_attention_mask` [n p] is only compared with them.
    """
    names = [name for name in ANY_SIZE if name in arrays]
    if not names:
        return []
    if missing := {"pixel_values", "spatial_shapes"} - set(names):
        raise ValueError(f"{missing.pop()}: is missing. Pass pixel_values and spatial_shapes together.")
    pixels, shapes = arrays["pixel_values"], arrays["spatial_shapes"]
    counts = shapes.prod(axis=1)
    mask = arrays.get("pixel_attention_mask", np.arange(pixels.shape[1]) < counts[:, None])
    if pixels.ndim != 3 or len(shapes) != len(pixels) or (mask.sum(axis=1) != counts).any():
        raise ValueError(
            f"pixel_values: shape {pixels.shape}, with {mask.sum(axis=1).tolist()} patches in pixel_attention_mask and "
            f"{counts.tolist()} in spatial_shapes. Pass [images patches values] with as many patches in both."
        )
    side = config.encoder.patch_size
    values = rearrange(pixels.astype(np.float32), "n p (y x c) -> n p (c y x)", y=side, x=side)
    return [
        ImagePatches(patches[:count], tuple(map(int, shape))) for patches, count, shape in zip(values, counts, shapes)
    ]


def pool_of(encoder: VitConfig) -> AttentionPool:
    """Returns SigLIP's head, which has the widths of its tower."""
    return AttentionPool(encoder.heads, encoder.mlp, encoder.activation, encoder.norm_eps)


def attention_pool(ours: str, theirs: str) -> list[Row]:
    """Rows of an AttentionPool."""
    return [
        Row(f"{ours}/probe", f"{theirs}.probe", "1 1 d -> d"),
        Row(f"{ours}/qkv/w", f"{theirs}.attention.in_proj_weight", "(c n h) d -> c d n h"),
        Row(f"{ours}/qkv/b", f"{theirs}.attention.in_proj_bias", "(c n h) -> c n h"),
        *linear(f"{ours}/out", f"{theirs}.attention.out_proj", "d (n h) -> n h d", ""),
        *layer_norm(f"{ours}/norm", f"{theirs}.layernorm"),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1", "f d -> d f", ""),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2", "d f -> f d", ""),
    ]


class TowerFamily(Family):
    """A vision tower as a model.

    tower: kind of the tower.
    features: layers whose features the encoder returns, see VitConfig.
    """

    tower: Tower
    features: tuple[int, ...] = ()
    ignore = (r"visual_projection\.weight",)  # projection after CLIP's tower
    rename = ((r"^(?!vision_model\.)(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.", r"vision_model.\1."),)
    modules = ((r"^vision_model\.", ""),)
    input_names = SQUARE

    @cached_property
    def sizes(self) -> dict[str, ModelConfig]:
        return {name: self._model(encoder, self.tower.head) for name, encoder in self.tower.sizes.items()}

    def _model(self, encoder: VitConfig, head: bool) -> ModelConfig:
        pool = pool_of(encoder) if head else None
        return ModelConfig(replace(encoder, features=self.features), family=self.tower.kind, pool=pool)

    def from_hf(self, config: Json) -> ModelConfig:
        fields = read(config, {"vision_use_head": flag(True)})
        return self._model(self.tower.from_hf(config), self.tower.head and fields["vision_use_head"])

    def fields_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        head = {"vision_use_head": config.pool is not None} if self.tower.head else {}
        return self.tower.to_hf(config.encoder) | head

    def images(self, config: ModelConfig, arrays: Arrays) -> list[ImagePatches]:
        """Returns the images in arrays of `input_names`."""
        return square_images(config, arrays)

    def visuals(self, config: ModelConfig, arrays: Arrays) -> Supply:
        """Returns the images under the placeholder 0, as there is no text."""
        images = self.images(config, arrays)
        return {
            0: [counted_like_text((image,), range(len(image.patches) - image.num_prefix_tokens)) for image in images]
        }

    def weights(self, config: ModelConfig) -> list[Row]:
        return [*self.tower.rows(config.encoder, PREFIX), *attention_pool("pool", f"{PREFIX}head")]


class ClipTower(TowerFamily):
    name = "CLIP vision tower"
    architectures = {"clip_vision_model": "CLIPVisionModel"}
    tower = CLIP
    features = (-1,)


class SiglipTower(TowerFamily):
    name = "SigLIP vision tower"
    architectures = {"siglip_vision_model": "SiglipVisionModel"}
    tower = SIGLIP


class Siglip2Tower(TowerFamily):
    name = "SigLIP 2 (NaFlex) vision tower"
    architectures = {"siglip2_vision_model": "Siglip2VisionModel"}
    tower = NAFLEX
    input_names = ANY_SIZE

    def images(self, config: ModelConfig, arrays: Arrays) -> list[ImagePatches]:
        return images_of_any_size(config, arrays)
