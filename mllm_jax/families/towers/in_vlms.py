"""Vision towers that several families share: published sizes, vision_config, weight tables.

Tensor names follow the published safetensors files, after a family's own prefix.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mllm_jax.families.shared.rows import layer_norm
from mllm_jax.families.shared.suggestions import unsupported
from mllm_jax.families.towers.tower import Tower, attention, block, joint_attention, patches, plain_mlp
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.weights.table import Row

CLIP_PIXELS = dict(pixel_mean=(0.48145466, 0.4578275, 0.40821073), pixel_std=(0.26862954, 0.26130258, 0.27577711))
IMAGENET_PIXELS = dict(pixel_mean=(0.485, 0.456, 0.406), pixel_std=(0.229, 0.224, 0.225))


def _clip_rows(encoder: VitConfig, prefix: str) -> list[Row]:
    layer = f"{prefix}encoder.layers.{{n}}"
    return [
        Row("encoder/class_token", f"{prefix}embeddings.class_embedding"),
        *patches(encoder, f"{prefix}embeddings.patch_embedding"),
        Row("encoder/position_embed", f"{prefix}embeddings.position_embedding.weight"),
        *layer_norm("encoder/first_norm", f"{prefix}pre_layrnorm"),
        *attention(f"{layer}.self_attn.{{part}}_proj", "qkv"),
        *block(layer, "self_attn.out_proj", ("layer_norm1", "layer_norm2")),
        *plain_mlp(f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"),
        *layer_norm("encoder/last_norm", f"{prefix}post_layernorm"),
    ]


def _naflex_rows(encoder: VitConfig, prefix: str) -> list[Row]:
    """Rows of CLIP, with a linear patch embedding of pixels in (y, x, c) order instead of a convolution."""
    weight, sizes = "encoder/patch_embed/w", {"c": encoder.channels, "y": encoder.patch_size}
    theirs = f"{prefix}embeddings.patch_embedding.weight"
    rows = [row for row in _clip_rows(encoder, prefix) if row.ours != weight]
    return [Row(weight, theirs, "d (y x c) -> (c y x) d", sizes), *rows]


def _intern_rows(encoder: VitConfig, prefix: str) -> list[Row]:
    layer = f"{prefix}encoder.layer.{{n}}"
    return [
        Row("encoder/class_token", f"{prefix}embeddings.cls_token", "1 1 d -> d"),
        Row("encoder/mask_token", f"{prefix}embeddings.mask_token", "1 1 d -> d"),
        *patches(encoder, f"{prefix}embeddings.patch_embeddings.projection"),
        Row("encoder/position_embed", f"{prefix}embeddings.position_embeddings", "1 p d -> p d"),
        *attention(f"{layer}.attention.{{part}}_proj", "qkv"),
        Row("encoder/layers/attention/q_norm/scale", f"{layer}.attention.q_norm.weight"),
        Row("encoder/layers/attention/k_norm/scale", f"{layer}.attention.k_norm.weight"),
        *block(layer, "attention.projection_layer", ("layernorm_before", "layernorm_after")),
        *plain_mlp(f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"),
        Row("encoder/layers/scale1", f"{layer}.lambda_1"),
        Row("encoder/layers/scale2", f"{layer}.lambda_2"),
        *layer_norm("encoder/last_norm", f"{prefix}layernorm"),
    ]


def _eva_rows(encoder: VitConfig, prefix: str) -> list[Row]:
    layer = f"{prefix}encoder.layers.{{n}}"
    return [
        Row("encoder/class_token", f"{prefix}embeddings.class_embedding", "1 1 d -> d"),
        *patches(encoder, f"{prefix}embeddings.patch_embedding"),
        Row("encoder/position_embed", f"{prefix}embeddings.position_embedding", "1 p d -> p d"),
        *joint_attention(f"{layer}.self_attn.qkv"),
        *block(layer, "self_attn.projection", ("layer_norm1", "layer_norm2")),
        *plain_mlp(f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"),
        *layer_norm("encoder/last_norm", f"{prefix}post_layernorm"),
    ]


_IMAGE_VIT = partial(VitConfig, temporal_patch_size=1, rope_theta=None, resampling="bicubic")
_B = _IMAGE_VIT(768, 12, 12, 3072, patch_size=16, position_grid=14)
_CLIP = replace(
    _B, patch_size=32, position_grid=7, patch_bias=False, class_token=True, norm_eps=1e-5, activation="quick_gelu",
    first_norm=True, last_norm=True, **CLIP_PIXELS,
)  # fmt: skip
_CLIP_L = replace(_CLIP, width=1024, layers=24, heads=16, mlp=4096, patch_size=14, position_grid=16)
_OPENCLIP_L = replace(_CLIP_L, activation="gelu")
CLIP = Tower(
    "clip_vision_model",
    _CLIP,
    _clip_rows,
    sizes={
        "b32": _CLIP,
        "b16": replace(_CLIP, patch_size=16, position_grid=14),
        "l14": _CLIP_L,
        "l14-336": replace(_CLIP_L, position_grid=24),
        "h14": replace(_OPENCLIP_L, width=1280, layers=32, mlp=5120),  # OpenCLIP
        "bigg14": replace(_OPENCLIP_L, width=1664, layers=48, mlp=8192),
    },
)

_SIGLIP = replace(_B, last_norm=True)
_SIGLIP_L = replace(_SIGLIP, width=1024, layers=24, heads=16, mlp=4096)
_SO400M = replace(_SIGLIP, width=1152, layers=27, heads=16, mlp=4304, patch_size=14)
_GIANT = replace(_SIGLIP, width=1536, layers=40, heads=16, mlp=6144)


def _image_sizes(encoder: VitConfig, patch: int, *images: int) -> dict[str, VitConfig]:
    """Returns encoders named "patch-side" for square images with these sides in pixels."""
    sizes = {f"{patch}-{side}": (side // patch, side if side % patch else 0) for side in images}
    return {
        name: replace(encoder, patch_size=patch, position_grid=grid, image_size=size)
        for name, (grid, size) in sizes.items()
    }


SIGLIP = Tower(
    "siglip_vision_model",
    _SIGLIP,
    _clip_rows,
    head=True,
    sizes={
        f"{name}-{size}": encoder
        for name, sizes in {
            "base": _image_sizes(_SIGLIP, 16, 224, 256, 384, 512) | _image_sizes(_SIGLIP, 32, 256),
            "large": _image_sizes(_SIGLIP_L, 16, 256, 384, 512),
            "so400m": _image_sizes(_SO400M, 14, 224, 384) | _image_sizes(_SO400M, 16, 256, 384, 512),
            "giant": _image_sizes(_GIANT, 16, 256, 384),
        }.items()
        for size, encoder in sizes.items()
    },
)

_NAFLEX = replace(_SIGLIP, position_grid=16, resampling="bilinear_antialias")
NAFLEX = Tower(
    "siglip2_vision_model",
    _NAFLEX,
    _naflex_rows,
    head=True,
    sizes={"base-16": _NAFLEX, "so400m-16": replace(_NAFLEX, width=1152, layers=27, heads=16, mlp=4304)},
)

_INTERN = _IMAGE_VIT(
    1024, 24, 16, 4096, patch_size=14, position_grid=32, class_token=True, qkv_bias=False, activation="gelu",
    layer_scale=0.1, **IMAGENET_PIXELS,
)  # fmt: skip
_6B = replace(_INTERN, width=3200, layers=45, heads=25, mlp=12800, norm="rms", qk_norm=True)
INTERN = Tower(
    "internvl_vision",
    _INTERN,
    _intern_rows,
    said={
        "attention_bias": ("qkv_bias", None),
        "use_qk_norm": ("qk_norm", None),
        "norm_type": ("norm", {"layer_norm": "layer", "rms_norm": "rms"}),
        "layer_scale_init_value": ("layer_scale", None),
        "use_mask_token": ("mask_token", None),
        "use_mean_pooling": ("last_norm", {True: False, False: True}),
    },
    sizes={"300m": replace(_INTERN, qkv_bias=True), "6b": _6B, "6b-224": replace(_6B, layers=48, position_grid=16)},
)

_EVA = _IMAGE_VIT(
    1408, 39, 16, 6144, patch_size=14, position_grid=16, class_token=True, activation="gelu", last_norm=True,
    **CLIP_PIXELS,
)  # fmt: skip
EVA = Tower("blip_2_vision_model", _EVA, _eva_rows, said={"qkv_bias": ("qkv_bias", None)}, sizes={"g14": _EVA})

TOWERS = {tower.kind: tower for tower in (CLIP, SIGLIP, NAFLEX, INTERN, EVA)}


def tower_for(vision: Mapping[str, Any]) -> Tower:
    """Returns the kind of tower of a vision_config. Raises ValueError for an unsupported model_type."""
    kind = vision.get("model_type")
    if not isinstance(kind, str) or kind not in TOWERS:
        raise unsupported("vision_config.model_type", kind, TOWERS)
    return TOWERS[kind]


def part_to_hf(encoder: VitConfig) -> dict[str, Any]:
    """Returns the vision_config of a tower in a larger model, without its pooling head."""
    tower = tower_of(encoder)
    return tower.to_hf(encoder) | ({"vision_use_head": False} if tower.head else {})


def tower_of(encoder: VitConfig) -> Tower:
    """Returns the first kind of tower whose config.json can represent an encoder. Raises ValueError if none can."""
    for tower in TOWERS.values():
        if tower.says(encoder):
            return tower
    raise ValueError(
        f"encoder: no kind of vision tower ({', '.join(TOWERS)}) can represent it. Change its fields: {encoder}"
    )
