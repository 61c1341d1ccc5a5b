"""Qwen1.5, Qwen2 (arXiv 2407.10671) and Qwen2.5 (arXiv 2412.15115): text-only models, and the decoder of Qwen2-VL."""

from dataclasses import replace

from mllm_jax.common.fields import count, flag, nullable, read
from mllm_jax.families.base import DecoderFamily
from mllm_jax.families.shared.decoder_config import (
    WINDOWS,
    decoder_fields,
    read_decoder,
    windows_from_hf,
    windows_to_hf,
    write_decoder,
)
from mllm_jax.families.shared.rope import AS_NAMED
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.nn.attention.layer import AttentionConfig

_TEXT = AttentionConfig(28, 4, 128, rope_theta=1e6, rope_sections=(64, 0, 0), qk_norm=False, qkv_bias=True)


def _size(width: int, layers: int, heads: tuple[int, int], mlp: int, vocab: int = 152064, **fields) -> DecoderConfig:
    attention = replace(_TEXT, heads=heads[0], kv_heads=heads[1])
    return DecoderConfig(vocab, width, layers, attention, mlp, family="qwen2", **fields)


_TIED = dict(vocab=151936, tie_embeddings=True)
_HALF, _1_5B = _size(896, 24, (14, 2), 4864, **_TIED), _size(1536, 28, (12, 2), 8960, **_TIED)
_HALF = replace(_HALF, attention=replace(_HALF.attention, head_dim=64, rope_sections=(32, 0, 0)))
_7B, _72B = _size(3584, 28, (28, 4), 18944), _size(8192, 80, (64, 8), 29568, norm_eps=1e-5)

SIZES = {
    "1.5-72b": _size(8192, 80, (64, 64), 24576),
    "1.5-110b": _size(8192, 80, (64, 8), 49152),
    "0.5b": _HALF,
    "1.5b": _1_5B,
    "7b": _7B,
    "72b": _72B,
    "2.5-0.5b": _HALF,
    "2.5-1.5b": _1_5B,
    "2.5-3b": _size(2048, 36, (16, 2), 11008, **_TIED),
    "2.5-7b": _7B,
    "2.5-14b": _size(5120, 48, (40, 8), 13824, norm_eps=1e-5),
    "2.5-32b": _size(5120, 64, (40, 8), 27648, norm_eps=1e-5),
    "2.5-72b": _72B,
}


FIELDS = (
    decoder_fields(vocab=151936, width=4096, mlp=22016, depth=32, heads=32, kv_heads=32, length=32768)
    | WINDOWS
    | {
        "use_sliding_window": flag(False),
        "max_window_layers": count(28, low=0),
    }
)
SEEING_FIELDS = (
    decoder_fields(
        vocab=152064, width=8192, mlp=29568, depth=80, heads=64, kv_heads=8, length=32768, theta=1e6, norm_eps=1e-5
    )
    | WINDOWS
    | {
        "use_sliding_window": nullable(flag(False), False),
        "max_window_layers": count(80, low=0),
    }
)
# Default M-RoPE. Files from before transformers 5 have rope_type "mrope".
SEEING_ROPE = {"sections": (16, 24, 24), "layout": "chunked", "kinds": AS_NAMED | {"mrope": "default"}}


def seeing_decoder_from_hf(text: dict) -> DecoderConfig:
    """Returns the decoder of a text_config of Qwen2-VL or Qwen2.5-VL. Raises ValueError for unsupported values."""
    return _decoder(read(text, SEEING_FIELDS), SEEING_ROPE)


def _decoder(text: dict, rope: dict) -> DecoderConfig:
    if not text["use_sliding_window"]:
        text["sliding_window"] = None
    kinds, depth = text["layer_types"], text["num_hidden_layers"]
    if kinds is None:
        full = min(text["max_window_layers"], depth)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (depth - full)
    return read_decoder(text, rope=rope, qkv_bias=True, sliding_windows=windows_from_hf(text, kinds))


class Qwen2(DecoderFamily):
    name = "Qwen2"
    architectures = {"qwen2": "Qwen2ForCausalLM"}
    decoders = SIZES

    def decoder_from_hf(self, text: dict) -> DecoderConfig:
        return _decoder(read(text, FIELDS), {})

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        windows = windows_to_hf(decoder)
        sliding = {"use_sliding_window": windows["sliding_window"] is not None, **windows}
        return write_decoder(decoder, length=32768) | {"hidden_act": "silu"} | sliding
