"""Kinds of vision towers: their vision_config in both directions, and rows that several weight tables share."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mllm_jax.common.fields import Field, FieldError, check_heads, count, flag, layers, listed, positive, read
from mllm_jax.families.base import check_read_back
from mllm_jax.families.shared.rows import layer_norm, linear
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.weights.table import Row

ACTIVATIONS = {name: name for name in ("gelu", "quick_gelu", "silu", "relu")} | {"gelu_pytorch_tanh": "gelu_tanh"}
SAID = {  # field of config.json -> (field of VitConfig, map of their values to ours; None: equal values)
    "hidden_size": ("width", None),
    "num_hidden_layers": ("layers", None),
    "num_attention_heads": ("heads", None),
    "intermediate_size": ("mlp", None),
    "patch_size": ("patch_size", None),
    "num_channels": ("channels", None),
    "hidden_act": ("activation", ACTIVATIONS),
    "layer_norm_eps": ("norm_eps", None),
}
# Fields of VitConfig that a model or a processor sets, not the tower.
CHOSEN = ("features", "deepstack_layers", "pixel_mean", "pixel_std")


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower.

    kind: model_type of its config.json.
    base: encoder of an empty config.json; also sets the fields that config.json cannot represent.
    rows: returns the rows of an encoder, given the prefix of the tensor names.
    said: fields of config.json in addition to SAID, in the same format.
    sizes: encoders of the published sizes by name.
    head: whether the published tower has a head that pools an image to one vector. config.json may disable it.
    """

    kind: str
    base: VitConfig
    rows: Callable[[VitConfig, str], list[Row]]
    said: Mapping[str, tuple[str, Mapping[Any, Any] | None]] = field(default_factory=dict)
    sizes: Mapping[str, VitConfig] = field(default_factory=dict)
    head: bool = False

    def from_hf(self, vision: Mapping[str, Any]) -> VitConfig:
        """Returns the encoder of a vision_config. Raises ValueError for unsupported values."""
        fields, changes = read(vision, self.fields), {}
        check_heads(fields, "hidden_size", "num_attention_heads")
        for name in fields.keys() & {"image_size", "patch_size"}:
            fields[name] = _side(name, fields[name])
        for name, (ours, values) in {**SAID, **self.said}.items():
            changes[ours] = fields[name] if values is None else values[fields[name]]
        encoder = replace(self.base, **changes)
        if self.any_size:
            grid = round(fields["num_patches"] ** 0.5)
            if grid**2 != fields["num_patches"]:
                raise FieldError("num_patches", "must be a square.", fields["num_patches"])
            return replace(encoder, position_grid=grid)
        grid, remainder = divmod(fields["image_size"], encoder.patch_size)
        if not grid:
            raise FieldError("image_size", f"must be at least patch_size={encoder.patch_size}.", fields["image_size"])
        return replace(encoder, position_grid=grid, image_size=fields["image_size"] if remainder else 0)

    @property
    def any_size(self) -> bool:
        """True for towers that read images at nearly their own size: config.json has `num_patches`, no `image_size`."""
        return self.base.resampling == "bilinear_antialias"

    @property
    def fields(self) -> dict[str, Field]:
        """The fields of config.json with their defaults."""
        base, names = self.base, {**SAID, **self.said}
        fields = {
            "num_hidden_layers": layers(base.layers),
            "patch_size": listed(count(), [base.patch_size], lone=True),
            "image_size": listed(count(), [base.side], lone=True),
        }
        if self.any_size:
            del fields["image_size"]
            fields["num_patches"] = count(base.position_grid**2)
        if self.head:
            fields["vision_use_head"] = flag(True)
        return {name: _field(getattr(base, ours), values) for name, (ours, values) in names.items()} | fields

    def to_hf(self, encoder: VitConfig) -> dict[str, Any]:
        """Inverse of `from_hf`. Raises ValueError if a config.json of this kind cannot represent the encoder."""
        fields: dict[str, Any] = {"model_type": self.kind}
        for name, (ours, values) in {**SAID, **self.said}.items():
            value = getattr(encoder, ours)
            fields[name] = value if values is None else next((key for key, v in values.items() if v == value), value)
        if self.any_size:
            fields["num_patches"] = encoder.position_grid**2
        else:
            fields["image_size"] = encoder.side
        plain = replace(encoder, **{name: getattr(self.base, name) for name in CHOSEN})
        check_read_back(self.kind, plain, self.from_hf(fields), "encoder")
        return fields

    def says(self, encoder: VitConfig) -> bool:
        """Returns whether a config.json of this kind can represent an encoder."""
        try:
            return bool(self.to_hf(encoder))
        except ValueError:
            return False


def _side(name: str, value: list[int]) -> int:
    """Returns the side of a square size, given as [side] or [side, side]."""
    if len(set(value)) != 1:
        raise FieldError(name, "must be one number, or the same number twice.", value)
    return value[0]


def _field(default: Any, values: Mapping[Any, Any] | None) -> Field:
    """Returns the field of config.json for a field of VitConfig with a default; `values` maps their values to ours."""
    if values is not None:
        theirs = next(theirs for theirs, ours in values.items() if ours == default)
        return Field(type(theirs), theirs, choices=tuple(values))
    if isinstance(default, bool):
        return flag(default)
    return positive(default) if isinstance(default, float) else count(default, low=min(default, 1))


def patches(encoder: VitConfig, theirs: str) -> list[Row]:
    """Rows of the patch embedding, a convolution in torch."""
    sizes = {"c": encoder.channels, "y": encoder.patch_size}
    return [
        Row("encoder/patch_embed/w", f"{theirs}.weight", "d c y x -> (c y x) d", sizes),
        Row("encoder/patch_embed/b", f"{theirs}.bias"),
    ]


def attention(theirs: str, names: Iterable[str]) -> list[Row]:
    """Rows of separate queries, keys and values; `{part}` in `theirs` stands for their `names`."""
    values = {"part": tuple(names)}
    return [
        Row("encoder/layers/attention/qkv/w", f"{theirs}.weight", "(n h) d -> d n h", values=values),
        Row("encoder/layers/attention/qkv/b", f"{theirs}.bias", "(n h) -> n h", values=values),
    ]


def joint_attention(theirs: str) -> list[Row]:
    """Rows of queries, keys and values concatenated in one tensor."""
    return linear("encoder/layers/attention/qkv", theirs, "(c n h) d -> c d n h", "(c n h) -> c n h")


def block(theirs: str, out: str, norms: tuple[str, str]) -> list[Row]:
    """Rows of a layer's norms and of its attention output, named `out`; without qkv and MLP."""
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
