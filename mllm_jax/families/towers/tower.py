"""Kinds of vision towers: their part of a config.json, both ways, and rows that many tables of weights share."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mllm_jax.common.fields import Field, FieldError, check_heads, count, flag, layers, listed, positive, read
from mllm_jax.families.base import check_read_back
from mllm_jax.families.shared.rows import layer_norm, linear
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.weights.table import Row

ACTIVATIONS = {name: name for name in ("gelu", "quick_gelu", "silu", "relu")} | {"gelu_pytorch_tanh": "gelu_tanh"}
SAID = {  # our field -> its name in config.json, and its values if they differ
    "hidden_size": ("width", None),
    "num_hidden_layers": ("layers", None),
    "num_attention_heads": ("heads", None),
    "intermediate_size": ("mlp", None),
    "patch_size": ("patch_size", None),
    "num_channels": ("channels", None),
    "hidden_act": ("activation", ACTIVATIONS),
    "layer_norm_eps": ("norm_eps", None),
}
# Fields that a model or a processor sets, not the tower.
CHOSEN = ("features", "deepstack_layers", "pixel_mean", "pixel_std")


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower.

    kind: the model_type of its config.json.
    base: the tower of a config.json without fields, with the values that none can have.
    rows: rows of an encoder's weights, theirs after a prefix.
    said: fields of config.json beside SAID, in the same form.
    sizes: published sizes.
    head: whether the published tower ends in a head that pools an image to one vector, unless its config.json has none.
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
        """Images are read at nearly their own size, and its config.json counts positions, not pixels."""
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
        """Returns whether a config.json of this kind can represent an encoder."""
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
    """Rows of separate queries, keys and values: `theirs` with `{part}` for their names."""
    values = {"part": tuple(names)}
    return [
        Row("encoder/layers/attention/qkv/w", f"{theirs}.weight", "(n h) d -> d n h", values=values),
        Row("encoder/layers/attention/qkv/b", f"{theirs}.bias", "(n h) -> n h", values=values),
    ]


def joint_attention(theirs: str) -> list[Row]:
    """Rows of queries, keys and values joined in one tensor."""
    return linear("encoder/layers/attention/qkv", theirs, "(c n h) d -> c d n h", "(c n h) -> c n h")


def block(theirs: str, out: str, norms: tuple[str, str]) -> list[Row]:
    """Rows of a layer without queries, keys, values and the MLP: `out` of attention, and the names of its `norms`."""
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
