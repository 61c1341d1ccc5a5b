"""Compares a training step of a tiny Qwen3-VL, dense and with experts, on five meshes with that on one device.

    python -m mllm_jax.plan certify --config configs/certify.py
    python -m mllm_jax.plan certify --config configs/certify.py:experts     only the model with experts

The argument is "dense" or "experts". Without one, both models are compared.
"""

from mllm_jax.common.config import ConfigError, to_config_dict
from mllm_jax.data.synthetic.scenes import scenes_vision_ids
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.plan.verify.certificate import Certificate
from mllm_jax.train.runs.data import ScenesData

EXPERTS = {"dense": None, "experts": MoeConfig(experts=8, top_k=2, mlp=24)}


def model(moe: MoeConfig | None) -> ModelConfig:
    attention = AttentionConfig(heads=4, kv_heads=4, head_dim=8, rope_theta=10_000.0, rope_sections=(2, 1, 1))
    return ModelConfig(
        encoder=VitConfig(width=32, layers=2, heads=4, mlp=32, patch_size=8, position_grid=8, deepstack_layers=(0,)),
        connector=PatchMergerConfig(merge=2),
        decoder=DecoderConfig(vocab=384, width=32, layers=2, attention=attention, mlp=32, moe=moe),
        tokens=VisionTokenIds(*scenes_vision_ids()),
    )


def get_config(arg: str = ""):
    if arg not in ("", *EXPERTS):
        raise ConfigError(f"configs/certify.py: unknown argument {arg!r}. Pass 'dense', 'experts' or no argument.")
    models = {name: model(moe) for name, moe in EXPERTS.items() if arg in ("", name)}
    data = ScenesData(batch=8, tokens=64, patch_rows=1, patches_per_row=112, min_pixels=256)
    return to_config_dict(Certificate(models, data))
