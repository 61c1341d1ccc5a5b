"""Decoder families by model_type, for multimodal families that accept any decoder."""

from dataclasses import replace

from mllm_jax.families.base import DecoderFamily
from mllm_jax.families.decoders.gemma import Gemma
from mllm_jax.families.decoders.gemma2 import Gemma2
from mllm_jax.families.decoders.gpt2 import Gpt2
from mllm_jax.families.decoders.internlm2 import Internlm2
from mllm_jax.families.decoders.llama import Llama
from mllm_jax.families.decoders.mistral import Mistral
from mllm_jax.families.decoders.opt import Opt
from mllm_jax.families.decoders.phi3 import Phi3
from mllm_jax.families.decoders.qwen2 import Qwen2
from mllm_jax.families.decoders.qwen3 import Qwen3
from mllm_jax.families.shared.suggestions import unsupported
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.weights.table import Row

# In order of preference: the first family that can represent a decoder without a family writes it.
TEXT: dict[str, DecoderFamily] = {
    model_type: family
    for family in (
        Llama(),
        Mistral(),
        Qwen2(),
        Qwen3(),
        Gemma(),
        Gemma2(),
        Phi3(),
        Gpt2(),
        Opt(),
        Internlm2(),
    )
    for model_type in family.architectures
}


def decoder_from_hf(text: dict) -> DecoderConfig:
    """Returns the decoder of a text_config. Raises ValueError for an unknown model_type."""
    if not isinstance(kind := text.get("model_type"), str) or kind not in TEXT:
        raise unsupported("decoder model_type", kind, TEXT)
    return replace(TEXT[kind].decoder_from_hf(text), family=kind)


def decoder_to_hf(decoder: DecoderConfig) -> dict:
    """Inverse of `decoder_from_hf`: returns a text_config with its model_type. Raises ValueError if none fits."""
    return _family_and_config(decoder)[1]


def decoder_weights(decoder: DecoderConfig, prefix: str, head: str) -> list[Row]:
    """Rows of a decoder with its family's tensor names, after `prefix`; `head` is the tensor name of the head."""
    return _family_and_config(decoder)[0].decoder_weights(decoder, prefix, head)


def whole_weights(decoder: DecoderConfig, before: str) -> list[Row]:
    """Rows of a decoder with the full tensor names of its family's own files, the head included, after `before`."""
    return [row._replace(theirs=before + row.theirs) for row in _family_and_config(decoder)[0].decoder_weights(decoder)]


def _family_and_config(decoder: DecoderConfig) -> tuple[DecoderFamily, dict]:
    """Returns the decoder's family, or the first that can represent it, and its text_config."""
    kinds = [decoder.family] if decoder.family else list(TEXT)
    if unknown := set(kinds) - set(TEXT):
        raise unsupported("decoder.family", unknown.pop(), TEXT)
    for kind in kinds:
        try:
            fields = {"model_type": kind, **TEXT[kind].decoder_to_hf(decoder)}
            if TEXT[kind].decoder_from_hf(fields) == decoder:
                return TEXT[kind], fields
        except (ValueError, AttributeError):  # AttributeError: a part that the family does not support
            continue
    raise ValueError(f"decoder: no text_config of {', '.join(kinds)} can represent it. Change its fields: {decoder}")
