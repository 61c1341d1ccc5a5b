"""SigLIP (arXiv 2303.15343), and SigLIP 2 (arXiv 2502.14786) for square images: sizes, config.json, weight table."""

from dataclasses import replace
from typing import Any

from mllm_jax.common.fields import FieldError, Json, count, flag, inside, nullable, read, section
from mllm_jax.data.vision.resize import Stretch
from mllm_jax.families.shared.rows import linear
from mllm_jax.families.towers import dual_encoders
from mllm_jax.families.towers.in_vlms import SIGLIP
from mllm_jax.families.towers.vision_only import attention_pool, pool_of
from mllm_jax.model.dual_encoder import DualConfig, TokenPool
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.weights.table import Row

_TOKENS = dict(vocab=32000, positions=64, activation="gelu_tanh", prefix=True)
TEXT = dual_encoders.text_tower(768, 12, 12, 3072, **_TOKENS)
_LARGE = dual_encoders.text_tower(1024, 24, 16, 4096, **_TOKENS)
_SO400M = dual_encoders.text_tower(1152, 27, 16, 4304, **_TOKENS)
TEXTS = {"base": TEXT, "large": _LARGE, "so400m": _SO400M, "giant": _SO400M}
GEMMA = 256000  # vocabulary size of SigLIP 2


def _size(name: str) -> DualConfig:
    """Returns the config of a published size; names of SigLIP 2 begin with "2-"."""
    base = name.removeprefix("2-")
    encoder, text = SIGLIP.sizes[base], TEXTS[base.partition("-")[0]]
    if name != base:
        text = replace(text, vocab=GEMMA)
    elif name == "so400m-14-224":
        text = replace(text, positions=16)
    return dual(encoder, text, encoder.width, "siglip")


def dual(encoder: VitConfig, text: Any, width: int, family: str) -> DualConfig:
    """Returns a dual encoder with SigLIP's pools. Raises ValueError unless the text `width` is the encoder's."""
    if width != encoder.width:
        raise ValueError(f"text_config.projection_size={width}: must be vision_config.hidden_size={encoder.width}.")
    return DualConfig(
        encoder, pool_of(encoder), text, TokenPool(width, "last", bias=True), loss="sigmoid", family=family
    )


FIRST = ("base-16-224", "base-16-256", "base-16-384", "base-16-512", "large-16-256", "large-16-384", "so400m-14-224",
         "so400m-14-384")  # fmt: skip
SIZES = {name: _size(name) for name in (*FIRST, *(f"2-{name}" for name in SIGLIP.sizes))}


class Siglip(dual_encoders.DualFamily):
    name = "SigLIP"
    architectures = {"siglip": "SiglipModel"}
    sizes = SIZES
    tower = SIGLIP

    def from_hf(self, config: Json) -> DualConfig:
        part = nullable(section({}), {})
        fields = read(config, {"text_config": part, "vision_config": part})
        with inside("vision_config"):
            if not read(fields["vision_config"], {"vision_use_head": flag(True)})["vision_use_head"]:
                message = "must be true: the head computes the image embeddings."
                raise FieldError("vision_use_head", message, False)
            encoder = self.tower.from_hf(fields["vision_config"])
        with inside("text_config"):
            text = dual_encoders.text_from_hf(fields["text_config"], TEXT)
            width = read(fields["text_config"], {"projection_size": nullable(count(None))})["projection_size"]
        return dual(encoder, text, width or text.width, config["model_type"])

    def fields_to_hf(self, config: DualConfig) -> dict[str, Any]:
        (kind,) = self.architectures
        text = dual_encoders.text_to_hf(config.text, f"{kind}_text_model") | {"projection_size": config.text_pool.width}
        return {
            "model_type": kind,
            "text_config": text,
            "vision_config": self.tower.to_hf(config.encoder),
        }

    def rule(self, config: DualConfig) -> Stretch:
        side = config.encoder.position_grid * config.encoder.patch_size
        return Stretch((side, side))

    def weights(self, config: DualConfig) -> list[Row]:
        return [
            *dual_encoders.weights(config, self.tower),
            *attention_pool("image_pool", "vision_model.head"),
            *linear("text_pool", "text_model.head", "e d -> d e", ""),
            Row("log_scale", "logit_scale", "1 ->", dtype="float32"),
            Row("bias", "logit_bias", "1 ->", dtype="float32"),
        ]
