"""CLIP (arXiv 2103.00020) and OpenCLIP (arXiv 2212.07143): published sizes, config.json, weight table."""

from mllm_jax.common.fields import Json, count, inside, nullable, read, section
from mllm_jax.data.vision.resize import Crop
from mllm_jax.families.shared.rows import linear
from mllm_jax.families.towers import dual_encoders
from mllm_jax.families.towers.in_vlms import CLIP
from mllm_jax.model.dual_encoder import ClassPool, DualConfig, TokenPool
from mllm_jax.weights.table import Row

_TOKENS = dict(vocab=49408, positions=77, norm_eps=1e-5)
_TEXT = dual_encoders.text_tower(512, 12, 8, 2048, activation="quick_gelu", **_TOKENS)
_L = dual_encoders.text_tower(768, 12, 12, 3072, activation="quick_gelu", **_TOKENS)
_H = dual_encoders.text_tower(1024, 24, 16, 4096, activation="gelu", **_TOKENS)
_BIGG = dual_encoders.text_tower(1280, 32, 20, 5120, activation="gelu", **_TOKENS)
TEXTS = {"b32": _TEXT, "b16": _TEXT, "l14": _L, "l14-336": _L, "h14": _H, "bigg14": _BIGG}
END = 49407  # end-of-text token, the highest id of the vocabulary


SIZES = {
    name: DualConfig(CLIP.sizes[name], ClassPool(text.width), text, TokenPool(text.width, "end", END))
    for name, text in TEXTS.items()
}
PART = nullable(section({}), {})
PARTS = ("text_config", "vision_config")
# Old files also have text_config_dict and vision_config_dict, which take precedence.
FIELDS = {"projection_dim": count(512)} | {name: PART for part in PARTS for name in (part, f"{part}_dict")}


class Clip(dual_encoders.DualFamily):
    name = "CLIP"
    architectures = {"clip": "CLIPModel"}
    sizes = SIZES
    tower = CLIP

    def from_hf(self, config: Json) -> DualConfig:
        fields = read(config, FIELDS)
        text, vision = (fields[f"{part}_dict"] or fields[part] for part in PARTS)
        width = fields["projection_dim"]
        with inside("text_config"):
            end = read(text, {"eos_token_id": count(END, low=0)})["eos_token_id"]
            text_tower = dual_encoders.text_from_hf(text, _TEXT)
        with inside("vision_config"):
            encoder = CLIP.from_hf(vision)
        # Old files have the wrong id 2; the end of a text is then its highest token id.
        pool = TokenPool(width, "highest") if end == 2 else TokenPool(width, "end", end)
        return DualConfig(encoder, ClassPool(width), text_tower, pool)

    def fields_to_hf(self, config: DualConfig) -> dict:
        width, pool = config.image_pool.width, config.text_pool
        end = 2 if pool.token == "highest" else pool.end
        return {
            "model_type": "clip",
            "projection_dim": width,
            "text_config": dual_encoders.text_to_hf(config.text, "clip_text_model")
            | {"eos_token_id": end, "projection_dim": width},
            "vision_config": CLIP.to_hf(config.encoder) | {"projection_dim": width},
        }

    def rule(self, config: DualConfig) -> Crop:
        side = config.encoder.position_grid * config.encoder.patch_size
        return Crop(side, (side, side))

    def weights(self, config: DualConfig) -> list[Row]:
        return [
            *dual_encoders.weights(config, CLIP),
            *linear("image_pool/projection", "visual_projection", "e d -> d e"),
            *linear("text_pool", "text_projection", "e d -> d e"),
            Row("log_scale", "logit_scale", dtype="float32"),
        ]
