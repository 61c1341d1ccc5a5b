"""Fields of a decoder's config.json that many families share, in both directions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mllm_jax.common.fields import (
    Field,
    FieldError,
    count,
    flag,
    layers,
    listed,
    nullable,
    only,
    positive,
    word,
)
from mllm_jax.families.shared.rope import rope_fields, rope_from_hf, rope_to_hf
from mllm_jax.families.shared.suggestions import unsupported
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.rope import DynamicNtkRopeScaling, LongRopeScaling

ACTIVATIONS = {  # theirs -> ours
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def activation_from_hf(name: str) -> str:
    if name not in ACTIVATIONS:
        raise unsupported("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def activation_to_hf(name: str, spelling: str) -> str:
    """Returns the preferred `spelling` of an activation if it means `name`, else the first name that does."""
    return spelling if ACTIVATIONS[spelling] == name else next(key for key, ours in ACTIVATIONS.items() if ours == name)


WINDOWS = {  # fields of families whose layers may differ in their attention window
    "sliding_window": nullable(count(4096)),
    "layer_types": nullable(listed(word(choices=("sliding_attention", "full_attention")), None)),
}


def decoder_fields(
    *,
    vocab: int,
    width: int,
    mlp: int,
    depth: int,
    heads: int,
    kv_heads: int | None,
    length: int,
    theta: float = 1e4,
    norm_eps: float = 1e-6,
    tie: bool = False,
) -> dict[str, Field]:
    """Returns the fields that `read_decoder` reads, with a family's defaults.

    Args:
      kv_heads: number of key-value heads. None: `heads`.
      length: maximum number of tokens of a text.
    """
    return {
        "vocab_size": count(vocab),
        "hidden_size": count(width),
        "intermediate_size": count(mlp),
        "num_hidden_layers": layers(depth),
        "num_attention_heads": count(heads),
        "num_key_value_heads": nullable(count(kv_heads)),
        "head_dim": nullable(count(None)),
        "max_position_embeddings": count(length),
        "rms_norm_eps": positive(norm_eps),
        "tie_word_embeddings": nullable(flag(tie), tie),
        "hidden_act": only("silu"),
        **rope_fields(theta),
    }


def windows_from_hf(text: Mapping[str, Any], kinds: Sequence[str]) -> tuple[int, ...]:
    """Returns `DecoderConfig.sliding_windows`: the shortest repeated pattern of the windows of all layers.

    Four layers that alternate "sliding_attention" and "full_attention" with sliding_window=4096 give (4096, 0).
    """
    if len(kinds) != text["num_hidden_layers"]:
        raise FieldError("layer_types", f"must name {text['num_hidden_layers']} layers, not {len(kinds)}.")
    windows = tuple((text["sliding_window"] or 0) if kind == "sliding_attention" else 0 for kind in kinds)
    periods = (windows[:n] for n in range(1, len(windows) + 1))
    shortest = next(p for p in periods if all(w == p[i % len(p)] for i, w in enumerate(windows)))
    return shortest if any(shortest) else ()


def windows_to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """Inverse of `windows_from_hf`. Raises ValueError for windows of several sizes."""
    windows = [kind.window for kind in decoder.kinds]
    if len(sizes := set(windows) - {0}) > 1:
        raise ValueError(f"decoder.sliding_windows={sorted(sizes)}: config.json has only one window size. Choose one.")
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"sliding_window": max(windows) or None, "layer_types": kinds}


def read_decoder(text: Mapping[str, Any], *, rope: dict[str, Any] | None = None, **fields: Any) -> DecoderConfig:
    """Returns the decoder of a text_config with Llama's field names.

    Args:
      text: values of `decoder_fields`.
      rope: additional arguments of `rope_from_hf`.
      fields: fields of DecoderConfig or AttentionConfig that the config lacks or names differently.
    Raises:
      FieldError: invalid head_dim, num_key_value_heads or rotary positions.
    """
    heads = text["num_attention_heads"]
    head_dim = text["head_dim"] or text["hidden_size"] // heads
    if not head_dim or head_dim % 2:
        raise FieldError("head_dim", "must be even and at least 2: rotary positions turn pairs.", head_dim)
    kv_heads = text["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise FieldError("num_key_value_heads", f"must divide num_attention_heads={heads}.", kv_heads)
    attention = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "qk_norm": False,
        **rope_from_hf(text, head_dim, **(rope or {})),
    }
    attention |= {name: fields.pop(name) for name in AttentionConfig.__dataclass_fields__ if name in fields}
    decoder = {
        "vocab": text["vocab_size"],
        "width": text["hidden_size"],
        "layers": text["num_hidden_layers"],
        "attention": AttentionConfig(**attention),
        "mlp": text["intermediate_size"],
        "norm_eps": text["rms_norm_eps"],
        "tie_embeddings": text["tie_word_embeddings"],
    }
    return DecoderConfig(**decoder | fields)


def tied_at_the_top(decoder: DecoderConfig, config: Mapping[str, Any], default: bool = False) -> DecoderConfig:
    """Returns the decoder with `tie_embeddings` from the top level of config.json, not from its text_config."""
    return replace(decoder, tie_embeddings=bool(config.get("tie_word_embeddings", default)))


def tied_at_either(decoder: DecoderConfig, config: Mapping[str, Any]) -> DecoderConfig:
    """Returns the decoder with `tie_embeddings` set if the top level of config.json or its text_config sets it."""
    return replace(decoder, tie_embeddings=decoder.tie_embeddings or bool(config.get("tie_word_embeddings")))


def write_decoder(decoder: DecoderConfig, length: int) -> dict[str, Any]:
    """Inverse of `read_decoder`: returns the fields that transformers needs.

    Args:
      length: `max_position_embeddings`, unless the rope scaling determines it.
    """
    attention, rope_scaling = decoder.attention, decoder.attention.rope_scaling
    fields = {
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": decoder.mlp,
        "rms_norm_eps": decoder.norm_eps,
        "max_position_embeddings": rope_scaling.length if isinstance(rope_scaling, DynamicNtkRopeScaling) else length,
        "tie_word_embeddings": decoder.tie_embeddings,
        "rope_parameters": rope_to_hf(attention),
    }
    if isinstance(rope_scaling, LongRopeScaling):
        fields["original_max_position_embeddings"] = rope_scaling.length
    return fields
