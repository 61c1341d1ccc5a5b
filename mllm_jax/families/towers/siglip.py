"""SigLIP (arXiv 2303.15343), and SigLIP 2 (arXiv 2502.14786) for square pictures: sizes, config.json, weight names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_jax.common.fields import FieldError, count, flag, inside, nullable, section
from mllm_jax.common.fields import read as read_fields
from mllm_jax.data.pipeline.dual_batches import one_each
from mllm_jax.data.pipeline.hf_inputs import Arrays
from mllm_jax.data.vision.resize import Stretch
from mllm_jax.families.shared.rows import linear
from mllm_jax.families.towers import dual_encoders
from mllm_jax.families.towers.in_vlms import SIGLIP, Tower
from mllm_jax.families.towers.vision_only import SQUARE, attention_pool, pool_of, square_pictures
from mllm_jax.model.dual_encoder import DualConfig, TokenPool
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.types import DualBatch
from mllm_jax.weights.table import Row

_TOKENS = dict(vocab=32000, positions=64, activation="gelu_tanh", prefix=True)
TEXT = dual_encoders.text_tower(768, 12, 12, 3072, **_TOKENS)
_LARGE = dual_encoders.text_tower(1024, 24, 16, 4096, **_TOKENS)
_SO400M = dual_encoders.text_tower(1152, 27, 16, 4304, **_TOKENS)
TEXTS = {"base": TEXT, "large": _LARGE, "so400m": _SO400M, "giant": _SO400M}
FIRST = ("base-16-224", "base-16-256", "base-16-384", "base-16-512", "large-16-256", "large-16-384", "so400m-14-224",
         "so400m-14-384")  # fmt: skip
SECOND = tuple(f"2-{name}" for name in SIGLIP.sizes)
SIZES = FIRST + SECOND
GEMMA = 256000  # tokens of SigLIP 2's vocabulary


def sizes(name: str) -> DualConfig:
    """The config of a published size: "base-16-224" and others of FIRST; SigLIP 2's are "2-base-16-224" ..., SECOND."""
    if name not in FIRST + SECOND:
        raise ValueError(f"SigLIP has no size {name!r}; sizes: {', '.join(FIRST + SECOND)}")
    encoder, text = SIGLIP.sizes[name.removeprefix("2-")], TEXTS[name.removeprefix("2-").partition("-")[0]]
    if name in SECOND:
        text = replace(text, vocab=GEMMA)
    elif name == "so400m-14-224":
        text = replace(text, positions=16)
    return dual(encoder, text, encoder.width, "siglip")


def dual(encoder: VitConfig, text: Any, width: int, family: str) -> DualConfig:
    """Both towers with SigLIP's pools; `width` is that of texts, which must be that of pictures."""
    if width != encoder.width:
        raise ValueError(f"text_config.projection_size={width} must be vision_config.hidden_size={encoder.width}")
    return DualConfig(
        encoder, pool_of(encoder), text, TokenPool(width, "last", bias=True), loss="sigmoid", family=family
    )


def from_hf(config: Mapping[str, Any]) -> DualConfig:
    """The model that a `config.json` of model_type "siglip" describes. ValueError for what this model cannot do."""
    return read(config, SIGLIP)


def read(config: Mapping[str, Any], tower: Tower) -> DualConfig:
    """`from_hf`, for both kinds of towers."""
    part = nullable(section({}), {})
    stated = read_fields(config, {"text_config": part, "vision_config": part})
    with inside("vision_config"):
        if not read_fields(stated["vision_config"], {"vision_use_head": flag(True)})["vision_use_head"]:
            raise FieldError("vision_use_head", "must be true: without it there are no embeddings of pictures.", False)
        encoder = tower.from_hf(stated["vision_config"])
    with inside("text_config"):
        tokens = dual_encoders.text_from_hf(stated["text_config"], TEXT)
        width = read_fields(stated["text_config"], {"projection_size": nullable(count(None))})["projection_size"]
    return dual(encoder, tokens, width or tokens.width, config["model_type"])


def to_hf(config: DualConfig) -> dict:
    """The inverse of `from_hf`. Raises ValueError for what a config.json of SigLIP cannot say."""
    return write(config, SIGLIP, "Siglip")


def write(config: DualConfig, tower: Tower, name: str) -> dict:
    """`to_hf`, for both kinds of towers; `name` as transformers' classes begin."""
    kind = name.lower()
    text = dual_encoders.text_to_hf(config.text, f"{kind}_text_model") | {"projection_size": config.text_pool.width}
    written = {
        "architectures": [f"{name}Model"],
        "model_type": kind,
        "text_config": text,
        "vision_config": tower.to_hf(config.encoder),
    }
    return dual_encoders.checked(config, written, lambda written: read(written, tower))


INPUTS = SQUARE


def pictures(config: DualConfig, arrays: Arrays) -> DualBatch:
    """Pictures of one size, each in a row of its own."""
    return one_each(square_pictures(config, arrays))


def rule(config: DualConfig) -> Stretch:
    """How pictures are resized where no preprocessor_config.json says it."""
    side = config.encoder.position_grid * config.encoder.patch_size
    return Stretch((side, side))


IGNORE, RENAME = dual_encoders.IGNORE, dual_encoders.RENAME


def weights(config: DualConfig) -> list[Row]:
    """Our names and theirs, for this config; see weights/table.py."""
    return rows(config, SIGLIP)


def rows(config: DualConfig, tower: Tower) -> list[Row]:
    """`weights`, for both kinds of towers."""
    return [
        *dual_encoders.weights(config, tower),
        *attention_pool("image_pool", "vision_model.head"),
        *linear("text_pool", "text_model.head", "e d -> d e", ""),
        Row("log_scale", "logit_scale", "1 ->", dtype="float32"),
        Row("bias", "logit_bias", "1 ->", dtype="float32"),
    ]
