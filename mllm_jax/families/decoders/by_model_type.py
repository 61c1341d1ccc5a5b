"""The decoders of published models, by the model_type of a text config, for families that put any of them in."""

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

# The first that can represent a decoder writes one that names no family.
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
    """The decoder that a text config describes. Raises ValueError for a model_type that is not known."""
    if not isinstance(kind := text.get("model_type"), str) or kind not in TEXT:
        raise unsupported("decoder model_type", kind, TEXT)
    return replace(TEXT[kind].decoder_from_hf(text), family=kind)


def decoder_to_hf(decoder: DecoderConfig) -> dict:
    """The inverse: the text config, with its model_type. Raises ValueError where its family's cannot represent it."""
    return _written(decoder)[1]


def decoder_weights(decoder: DecoderConfig, prefix: str, head: str) -> list[Row]:
    """Rows of a decoder with the names of its family's tensors; they begin with `prefix`, `head` is the head's."""
    return _written(decoder)[0].decoder_weights(decoder, prefix, head)


def whole_weights(decoder: DecoderConfig, before: str) -> list[Row]:
    """Rows of a decoder with all names that its family's own files have, the head's too, after `before`."""
    return [row._replace(theirs=before + row.theirs) for row in _written(decoder)[0].decoder_weights(decoder)]


def _written(decoder: DecoderConfig) -> tuple[DecoderFamily, dict]:
    """The decoder's family, or the first that can represent all of it, and the text config."""
    kinds = [decoder.family] if decoder.family else list(TEXT)
    if unknown := set(kinds) - set(TEXT):
        raise unsupported("decoder.family", unknown.pop(), TEXT)
    for kind in kinds:
        try:
            written = {"model_type": kind, **TEXT[kind].decoder_to_hf(decoder)}
            if TEXT[kind].decoder_from_hf(written) == decoder:
                return TEXT[kind], written
        except (ValueError, AttributeError):  # AttributeError: of a part that the family does not know
            continue
    raise ValueError(f"no text config of {', '.join(kinds)} can represent all of this decoder: {decoder}")
