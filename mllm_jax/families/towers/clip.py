"""CLIP (arXiv 2103.00020), OpenAI's and OpenCLIP's (arXiv 2212.07143): published sizes, config.json, weight names."""

from mllm_jax.common.fields import Json, count, inside, nullable, read, section
from mllm_jax.data.pipeline.dual_batches import one_each
from mllm_jax.data.pipeline.hf_inputs import Arrays
from mllm_jax.data.vision.resize import Crop
from mllm_jax.families.shared.rows import linear
from mllm_jax.families.towers import dual_encoders
from mllm_jax.families.towers.in_vlms import CLIP
from mllm_jax.families.towers.vision_only import SQUARE, square_pictures
from mllm_jax.model.dual_encoder import ClassPool, DualConfig, TokenPool
from mllm_jax.types import DualBatch
from mllm_jax.weights.table import Row

_TOKENS = dict(vocab=49408, positions=77, norm_eps=1e-5)
_TEXT = dual_encoders.text_tower(512, 12, 8, 2048, activation="quick_gelu", **_TOKENS)
_L = dual_encoders.text_tower(768, 12, 12, 3072, activation="quick_gelu", **_TOKENS)
_H = dual_encoders.text_tower(1024, 24, 16, 4096, activation="gelu", **_TOKENS)
_BIGG = dual_encoders.text_tower(1280, 32, 20, 5120, activation="gelu", **_TOKENS)
TEXTS = {"b32": _TEXT, "b16": _TEXT, "l14": _L, "l14-336": _L, "h14": _H, "bigg14": _BIGG}
SIZES = tuple(TEXTS)
END = 49407  # the end of a text, and the highest number of all tokens


def sizes(name: str) -> DualConfig:
    """The config of a published size: "b32", "b16", "l14", "l14-336"; OpenCLIP's "h14", "bigg14"."""
    if name not in TEXTS:
        raise ValueError(f"CLIP has no size {name!r}; sizes: {', '.join(TEXTS)}")
    width = TEXTS[name].width
    return DualConfig(CLIP.sizes[name], ClassPool(width), TEXTS[name], TokenPool(width, "end", END))


PART = nullable(section({}), {})
PARTS = ("text_config", "vision_config")
# The second are of old files, and count before the first.
FIELDS = {"projection_dim": count(512)} | {name: PART for part in PARTS for name in (part, f"{part}_dict")}


def from_hf(config: Json) -> DualConfig:
    """The model that a `config.json` of model_type "clip" describes. ValueError for what this model cannot do."""
    stated = read(config, FIELDS)
    text, vision = (stated[f"{part}_dict"] or stated[part] for part in PARTS)
    width = stated["projection_dim"]
    with inside("text_config"):
        end = read(text, {"eos_token_id": count(END, low=0)})["eos_token_id"]
        tokens = dual_encoders.text_from_hf(text, _TEXT)
    with inside("vision_config"):
        encoder = CLIP.from_hf(vision)
    # 2 is what files say that were written before the end of a text was looked for by its number.
    pool = TokenPool(width, "highest") if end == 2 else TokenPool(width, "end", end)
    return DualConfig(encoder, ClassPool(width), tokens, pool)


def to_hf(config: DualConfig) -> dict:
    """The inverse of `from_hf`. Raises ValueError for what a config.json of CLIP cannot say."""
    width, pool = config.image_pool.width, config.text_pool
    end = 2 if pool.token == "highest" else pool.end
    written = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "text_config": dual_encoders.text_to_hf(config.text, "clip_text_model")
        | {"eos_token_id": end, "projection_dim": width},
        "vision_config": CLIP.to_hf(config.encoder) | {"projection_dim": width},
    }
    return dual_encoders.checked(config, written, from_hf)


INPUTS = SQUARE


def pictures(config: DualConfig, arrays: Arrays) -> DualBatch:
    """Pictures of one size, each in a row of its own."""
    return one_each(square_pictures(config, arrays))


def rule(config: DualConfig) -> Crop:
    """How pictures are cut where no preprocessor_config.json says it."""
    side = config.encoder.position_grid * config.encoder.patch_size
    return Crop(side, (side, side))


IGNORE, RENAME = dual_encoders.IGNORE, dual_encoders.RENAME


def weights(config: DualConfig) -> list[Row]:
    """Our names and theirs, for this config; see weights/table.py."""
    return [
        *dual_encoders.weights(config, CLIP),
        *linear("image_pool/projection", "visual_projection", "e d -> d e"),
        *linear("text_pool", "text_projection", "e d -> d e"),
        Row("log_scale", "logit_scale", dtype="float32"),
    ]
