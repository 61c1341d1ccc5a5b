"""DINOv2 (arXiv 2304.07193), also with registers (arXiv 2309.16588): a vision tower whose output is features.

Tensor names as in the published safetensors files.
"""

from dataclasses import replace

from mllm_jax.common.fields import count, flag, read
from mllm_jax.families.shared.rows import joint_gate_up, layer_norm, linear
from mllm_jax.families.towers.in_vlms import IMAGENET_PIXELS
from mllm_jax.families.towers.tower import Tower, attention, block, patches, plain_mlp
from mllm_jax.families.towers.vision_only import TowerFamily
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.weights.table import Row

_LAYER = "encoder.layer.{n}"


def _rows(encoder: VitConfig, prefix: str) -> list[Row]:
    layer, mlp = f"{prefix}{_LAYER}", f"{prefix}{_LAYER}.mlp"
    joint = joint_gate_up("encoder/layers/mlp", f"{mlp}.weights_in", encoder.mlp, "f -> f")
    separate = [row.theirs.replace("weights_in", f"{row.ours.split('/')[-2]}_proj") for row in joint]
    gated = [
        *(row._replace(others=[{"theirs": theirs, "part": None}]) for row, theirs in zip(joint, separate)),
        *linear("encoder/layers/mlp/down", f"{mlp}.weights_out", "d f -> f d", ""),
    ]
    return [
        Row("encoder/class_token", f"{prefix}embeddings.cls_token", "1 1 d -> d"),
        Row("encoder/registers", f"{prefix}embeddings.register_tokens", "1 r d -> r d"),
        Row("encoder/mask_token", f"{prefix}embeddings.mask_token", "1 d -> d"),
        *patches(encoder, f"{prefix}embeddings.patch_embeddings.projection"),
        Row("encoder/position_embed", f"{prefix}embeddings.position_embeddings", "1 p d -> p d"),
        *attention(f"{layer}.attention.attention.{{part}}", ("query", "key", "value")),
        *block(layer, "attention.output.dense", ("norm1", "norm2")),
        Row("encoder/layers/scale1", f"{layer}.layer_scale1.lambda1"),
        Row("encoder/layers/scale2", f"{layer}.layer_scale2.lambda1"),
        *(gated if encoder.gated else plain_mlp(f"{mlp}.fc1", f"{mlp}.fc2")),
        *layer_norm("encoder/last_norm", f"{prefix}layernorm"),
    ]


_BASE = VitConfig(
    768, 12, 12, 3072, patch_size=14, temporal_patch_size=1, position_grid=37, resampling="bicubic", rope_theta=None,
    class_token=True, mask_token=True, activation="gelu", layer_scale=1.0, last_norm=True, **IMAGENET_PIXELS,
)  # fmt: skip
_WIDTHS = {
    "small": dict(width=384, heads=6, mlp=1536),
    "base": {},
    "large": dict(width=1024, layers=24, heads=16, mlp=4096),
    "giant": dict(width=1536, layers=40, heads=24, mlp=4096, gated=True, activation="silu"),
}
_WITH_REGISTERS = dict(registers=4, resampling="bicubic_antialias")
_SAID = {"qkv_bias": ("qkv_bias", None), "layerscale_value": ("layer_scale", None), "use_swiglu_ffn": ("gated", None)}
PLAIN = Tower("dinov2", replace(_BASE, position_grid=16), _rows, {**_SAID, "use_mask_token": ("mask_token", None)})
REGISTERS = Tower(
    "dinov2_with_registers",
    replace(_BASE, patch_size=16, position_grid=14, **_WITH_REGISTERS),
    _rows,
    {**_SAID, "num_register_tokens": ("registers", None)},
)
TOWERS = {tower.kind: tower for tower in (PLAIN, REGISTERS)}
SIZES = {
    f"{name}{suffix}": replace(_BASE, **widths, **registers)
    for suffix, registers in {"": {}, "-registers": _WITH_REGISTERS}.items()
    for name, widths in _WIDTHS.items()
}


def _kind(encoder: VitConfig) -> str:
    return REGISTERS.kind if encoder.registers else PLAIN.kind


def _mlp(width: int, ratio: int, gated: bool) -> int:
    """Returns the MLP's width: `width * ratio`, or 2/3 of it, rounded up to a multiple of 8, if it is gated."""
    mlp = int(width * ratio)
    return (int(mlp * 2 / 3) + 7) // 8 * 8 if gated else mlp


class Dinov2(TowerFamily):
    name = "DINOv2"
    architectures = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
    sizes = {name: ModelConfig(encoder, family=_kind(encoder)) for name, encoder in SIZES.items()}
    ignore = ()
    rename = (  # module names of transformers 5
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.down_proj\.", ".mlp.weights_out."),
    )
    modules = (
        (r"\.attention\.attention\.query", ".attention.q_proj"),
        (r"\.attention\.attention\.key", ".attention.k_proj"),
        (r"\.attention\.attention\.value", ".attention.v_proj"),
        (r"\.attention\.output\.dense", ".attention.o_proj"),
        (r"\.mlp\.weights_out", ".mlp.down_proj"),
    )

    def from_hf(self, config: dict) -> ModelConfig:
        fields = read(config, {"use_swiglu_ffn": flag(False), "hidden_size": count(_BASE.width), "mlp_ratio": count(4)})
        gated = fields["use_swiglu_ffn"]
        vision = config | {"intermediate_size": _mlp(fields["hidden_size"], fields["mlp_ratio"], gated)}
        if gated:
            vision["hidden_act"] = "silu"  # transformers ignores the file's value
        return ModelConfig(TOWERS[config["model_type"]].from_hf(vision), family=config["model_type"])

    def fields_to_hf(self, config: ModelConfig) -> dict:
        encoder = config.encoder
        fields = TOWERS[_kind(encoder)].to_hf(encoder)
        width = fields.pop("intermediate_size")
        ratio = next((ratio for ratio in range(1, 17) if _mlp(encoder.width, ratio, encoder.gated) == width), None)
        if ratio is None:
            raise ValueError(
                f"encoder.mlp={width}: DINOv2's config.json cannot represent it. Choose a multiple of "
                f"encoder.width={encoder.width}, or two thirds of one for a gated MLP."
            )
        return fields | {"mlp_ratio": ratio}

    def weights(self, config: ModelConfig) -> list[Row]:
        return _rows(config.encoder, "")
