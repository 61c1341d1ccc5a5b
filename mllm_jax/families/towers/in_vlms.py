"""Vision towers that several families share: published sizes, their part of a config.json, weight names.

Tensor names as in the published safetensors files, after a family's own prefix.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mllm_jax.common.fields import Field, FieldError, check_heads, count, flag, layers, listed, positive, read
from mllm_jax.families.base import check_read_back
from mllm_jax.families.shared.rows import layer_norm, linear
from mllm_jax.families.shared.suggestions import unsupported
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.weights.table import Row

CLIP_PIXELS = dict(pixel_mean=(0.48145466, 0.4578275, 0.40821073), pixel_std=(0.26862954, 0.26130258, 0.27577711))
IMAGENET_PIXELS = dict(pixel_mean=(0.485, 0.456, 0.406), pixel_std=(0.229, 0.224, 0.225))
ACTIVATIONS = {name: name for name in ("gelu", "quick_gelu", "silu", "relu")} | {"gelu_pytorch_tanh": "gelu_tanh"}
SAID = {  # what a config.json calls a field of ours, and its values where they differ
    "hidden_size": ("width", None),
    "num_hidden_layers": ("layers", None),
    "num_attention_heads": ("heads", None),
    "intermediate_size": ("mlp", None),
    "patch_size": ("patch_size", None),
    "num_channels": ("channels", None),
    "hidden_act": ("activation", ACTIVATIONS),
    "layer_norm_eps": ("norm_eps", None),
}
# What is a model's choice, or a processor's, and not the tower's.
CHOSEN = ("features", "taps", "pixel_mean", "pixel_std")


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower.

    kind: the model_type of its config.json.
    base: the tower of a config.json that says nothing, with what none can say.
    rows: of the weights of an encoder, theirs after a prefix.
    said: what a config.json says beside SAID, in the same form.
    sizes: published ones.
    head: by itself it ends in a head that makes one vector of a picture; its config.json says where it does not.
    """

    kind: str
    base: VitConfig
    rows: Callable[[VitConfig, str], list[Row]]
    said: Mapping[str, tuple[str, Mapping[Any, Any] | None]] = field(default_factory=dict)
    sizes: Mapping[str, VitConfig] = field(default_factory=dict)
    head: bool = False

    def from_hf(self, vision: Mapping[str, Any]) -> VitConfig:
        """The tower that a `vision_config` describes. Raises ValueError for what the encoder cannot do."""
        stated, changes = read(vision, self.fields), {}
        check_heads(stated, "hidden_size", "num_attention_heads")
        for name in stated.keys() & {"image_size", "patch_size"}:
            stated[name] = _side(name, stated[name])
        for name, (ours, values) in {**SAID, **self.said}.items():
            changes[ours] = stated[name] if values is None else values[stated[name]]
        encoder = replace(self.base, **changes)
        if self.any_size:
            grid = round(stated["num_patches"] ** 0.5)
            if grid**2 != stated["num_patches"]:
                raise FieldError("num_patches", "must be a square.", stated["num_patches"])
            return replace(encoder, position_grid=grid)
        grid, rest = divmod(stated["image_size"], encoder.patch_size)
        if not grid:
            raise FieldError("image_size", f"must be at least patch_size={encoder.patch_size}.", stated["image_size"])
        return replace(encoder, position_grid=grid, image_size=stated["image_size"] if rest else 0)

    @property
    def any_size(self) -> bool:
        """Pictures are read at nearly their own size, and its config.json counts positions, not pixels."""
        return self.base.resampling == "bilinear_antialias"

    @property
    def fields(self) -> dict[str, Field]:
        """Fields of its config.json."""
        base, said = self.base, {**SAID, **self.said}
        exact = {
            "num_hidden_layers": layers(base.layers),
            "patch_size": listed(count(), [base.patch_size], lone=True),
            "image_size": listed(count(), [base.side], lone=True),
        }
        if self.any_size:
            del exact["image_size"]
            exact["num_patches"] = count(base.position_grid**2)
        if self.head:
            exact["vision_use_head"] = flag(True)
        return {name: _field(getattr(base, ours), values) for name, (ours, values) in said.items()} | exact

    def to_hf(self, encoder: VitConfig) -> dict[str, Any]:
        """The inverse of `from_hf`. Raises ValueError for what a config.json of this kind cannot represent."""
        written: dict[str, Any] = {"model_type": self.kind}
        for name, (ours, values) in {**SAID, **self.said}.items():
            own = getattr(encoder, ours)
            written[name] = own if values is None else next((key for key, value in values.items() if value == own), own)
        if self.any_size:
            written["num_patches"] = encoder.position_grid**2
        else:
            written["image_size"] = encoder.side
        plain = replace(encoder, **{name: getattr(self.base, name) for name in CHOSEN})
        check_read_back(self.kind, plain, self.from_hf(written), "encoder")
        return written

    def says(self, encoder: VitConfig) -> bool:
        """Whether a config.json of this kind can represent an encoder."""
        try:
            return bool(self.to_hf(encoder))
        except ValueError:
            return False


def _side(name: str, value: list[int]) -> int:
    """The one side that a size, side or [side, side], has."""
    if len(set(value)) != 1:
        raise FieldError(name, "must be one number, or the same number twice.", value)
    return value[0]


def _field(usual: Any, values: Mapping[Any, Any] | None) -> Field:
    """The field of config.json for one of VitConfig that is usually `usual`; `values` are theirs and ours."""
    if values is not None:
        default = next(theirs for theirs, ours in values.items() if ours == usual)
        return Field(type(default), default, choices=tuple(values))
    if isinstance(usual, bool):
        return flag(usual)
    return positive(usual) if isinstance(usual, float) else count(usual, low=min(usual, 1))


def patches(encoder: VitConfig, theirs: str) -> list[Row]:
    """Rows of the patch embedding, a convolution in torch."""
    sizes = {"c": encoder.channels, "y": encoder.patch_size}
    return [
        Row("encoder/patch_embed/w", f"{theirs}.weight", "d c y x -> (c y x) d", sizes),
        Row("encoder/patch_embed/b", f"{theirs}.bias"),
    ]


def attention(theirs: str, names: Iterable[str]) -> list[Row]:
    """Rows of queries, keys and values that lie one by one: `theirs` with `{part}` for their names."""
    values = {"part": tuple(names)}
    return [
        Row("encoder/layers/attention/qkv/w", f"{theirs}.weight", "(n h) d -> d n h", values=values),
        Row("encoder/layers/attention/qkv/b", f"{theirs}.bias", "(n h) -> n h", values=values),
    ]


def block(theirs: str, out: str, norms: tuple[str, str]) -> list[Row]:
    """Rows of a layer beside queries, keys, values and the MLP: `out` of attention, and the names of its `norms`."""
    return [
        *linear("encoder/layers/attention/out", f"{theirs}.{out}", "d (n h) -> n h d", ""),
        *layer_norm("encoder/layers/norm1", f"{theirs}.{norms[0]}"),
        *layer_norm("encoder/layers/norm2", f"{theirs}.{norms[1]}"),
    ]


def plain_mlp(up: str, down: str) -> list[Row]:
    return [
        *linear("encoder/layers/mlp/up", up, "f d -> d f", ""),
        *linear("encoder/layers/mlp/down", down, "d f -> f d", ""),
    ]


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
    """Patches come as lists of pixels, to a linear layer."""
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
        *linear("encoder/layers/attention/qkv", f"{layer}.self_attn.qkv", "(c n h) d -> c d n h", "(c n h) -> c n h"),
        *block(layer, "self_attn.projection", ("layer_norm1", "layer_norm2")),
        *plain_mlp(f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"),
        *layer_norm("encoder/last_norm", f"{prefix}post_layernorm"),
    ]


_STILL = partial(VitConfig, temporal_patch_size=1, rope_theta=None, resampling="bicubic")
_B = _STILL(768, 12, 12, 3072, patch_size=16, position_grid=14)
_CLIP = replace(
    _B, patch_size=32, position_grid=7, patch_bias=False, class_token=True, norm_eps=1e-5, activation="quick_gelu",
    first_norm=True, last_norm=True, **CLIP_PIXELS,
)  # fmt: skip
_CLIP_L = replace(_CLIP, width=1024, layers=24, heads=16, mlp=4096, patch_size=14, position_grid=16)
_OPEN = replace(_CLIP_L, activation="gelu")
CLIP = Tower(
    "clip_vision_model",
    _CLIP,
    _clip_rows,
    sizes={
        "b32": _CLIP,
        "b16": replace(_CLIP, patch_size=16, position_grid=14),
        "l14": _CLIP_L,
        "l14-336": replace(_CLIP_L, position_grid=24),
        "h14": replace(_OPEN, width=1280, layers=32, mlp=5120),  # OpenCLIP's
        "bigg14": replace(_OPEN, width=1664, layers=48, mlp=8192),
    },
)

_SIGLIP = replace(_B, last_norm=True)
_SIGLIP_L = replace(_SIGLIP, width=1024, layers=24, heads=16, mlp=4096)
_SO400M = replace(_SIGLIP, width=1152, layers=27, heads=16, mlp=4304, patch_size=14)
_GIANT = replace(_SIGLIP, width=1536, layers=40, heads=16, mlp=6144)


def _at(encoder: VitConfig, patch: int, *pictures: int) -> dict[str, VitConfig]:
    """Sizes "patch-picture", for pictures of so many pixels a side."""
    sizes = {f"{patch}-{side}": (side // patch, side if side % patch else 0) for side in pictures}
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
            "base": _at(_SIGLIP, 16, 224, 256, 384, 512) | _at(_SIGLIP, 32, 256),
            "large": _at(_SIGLIP_L, 16, 256, 384, 512),
            "so400m": _at(_SO400M, 14, 224, 384) | _at(_SO400M, 16, 256, 384, 512),
            "giant": _at(_GIANT, 16, 256, 384),
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

_INTERN = _STILL(
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

_EVA = _STILL(
    1408, 39, 16, 6144, patch_size=14, position_grid=16, class_token=True, activation="gelu", last_norm=True,
    **CLIP_PIXELS,
)  # fmt: skip
EVA = Tower("blip_2_vision_model", _EVA, _eva_rows, said={"qkv_bias": ("qkv_bias", None)}, sizes={"g14": _EVA})

TOWERS = {tower.kind: tower for tower in (CLIP, SIGLIP, NAFLEX, INTERN, EVA)}


def tower_for(vision: Mapping[str, Any]) -> Tower:
    """The kind of tower that a `vision_config` is of."""
    kind = vision.get("model_type")
    if not isinstance(kind, str) or kind not in TOWERS:
        raise unsupported("vision_config.model_type", kind, TOWERS)
    return TOWERS[kind]


def part_to_hf(encoder: VitConfig) -> dict[str, Any]:
    """The `vision_config` of a tower in a larger model: without the head that would make one vector of a picture."""
    tower = tower_of(encoder)
    return tower.to_hf(encoder) | ({"vision_use_head": False} if tower.head else {})


def tower_of(encoder: VitConfig) -> Tower:
    """The kind of tower whose config.json can represent an encoder."""
    for tower in TOWERS.values():
        if tower.says(encoder):
            return tower
    raise ValueError(f"no kind of vision tower, {', '.join(TOWERS)}, has an encoder like {encoder}")
