"""The decoders of published models, by the model_type of a text config, for families that put any of them in."""

from dataclasses import replace
from types import ModuleType

from mllm_jax.families.decoders import gemma, gemma2, gpt2, internlm2, llama, mistral, opt, phi3, qwen2, qwen3
from mllm_jax.families.shared.suggestions import unsupported
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.weights.table import Row

TEXT: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "phi3": phi3,
    "gpt2": gpt2,
    "opt": opt,
    "internlm2": internlm2,
}


def decoder_from_hf(text: dict) -> DecoderConfig:
    """The decoder that a text config describes. Raises ValueError for a model_type that is not known."""
    if not isinstance(kind := text.get("model_type"), str) or kind not in TEXT:
        raise unsupported("the text config's model_type", kind, TEXT)
    return replace(TEXT[kind].decoder_from_hf(text), family=kind)


def decoder_to_hf(decoder: DecoderConfig) -> dict:
    """The inverse: the text config, with its model_type. Raises ValueError for what that of its family cannot say."""
    return _sayings(decoder)[1]


def decoder_weights(decoder: DecoderConfig, prefix: str, head: str) -> list[Row]:
    """Rows of a decoder with the names of its family's tensors; they begin with `prefix`, `head` is the head's."""
    return _sayings(decoder)[0].decoder_weights(decoder, prefix, head)


def whole_weights(decoder: DecoderConfig, before: str) -> list[Row]:
    """Rows of a decoder with all names that its family's own files have, the head's too, after `before`."""
    return [row._replace(theirs=before + row.theirs) for row in _sayings(decoder)[0].decoder_weights(decoder)]


def _sayings(decoder: DecoderConfig) -> tuple[ModuleType, dict]:
    """The decoder's family, or the first that can say all of it, and what it says."""
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
    raise ValueError(f"no text config of {', '.join(kinds)} can say all of this decoder: {decoder}")
