"""Rotary positions as a config.json says them, in the words of before and since transformers 5, both ways."""

import math
from collections.abc import Mapping
from typing import Any

from mllm_jax.nn.rope import BlendedStretch, LinearStretch, ListedStretch, NtkStretch, YarnConfig
from mllm_jax.nn.self_attention import AttentionConfig

Json = Mapping[str, Any]
LENGTH = "original_max_position_embeddings"
YARN = {
    "factor": "factor",
    "length": LENGTH,
    "fast": "beta_fast",
    "slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
BLENDED = {"factor": "factor", "length": LENGTH, "slow": "low_freq_factor", "fast": "high_freq_factor"}


def rope_of(text: Json, theta: float = 1e4) -> dict[str, Any]:
    """What a text config says of rotary positions, in one dict; `theta` where it says none."""
    rope = text.get("rope_parameters") or {
        "rope_theta": text.get("rope_theta", theta),
        **(text.get("rope_scaling") or {}),
    }
    return {"rope_theta": theta} | {name: value for name, value in rope.items() if value is not None}


def rope_from_hf(
    text: Json, head_dim: int, theta: float = 1e4, sections: tuple[int, ...] | None = None, layout: str = "interleaved"
) -> dict[str, Any]:
    """The fields of AttentionConfig that say how positions turn.

    Args:
      theta, sections, layout: of a config that does not say; by default all slots read the one position of text.
    Raises:
      ValueError: a kind of rotary positions that is not known.
    """
    rope = rope_of(text, theta)
    turns = int(head_dim * rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0)))
    sections = tuple(rope.get("mrope_section", sections or (turns // 2, 0, 0)))
    if "mrope_interleaved" in rope:
        layout = "interleaved" if rope["mrope_interleaved"] else "chunked"
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rope_sections": sections,
        "rope_layout": layout if any(sections[1:]) else AttentionConfig.rope_layout,
        "rope_dim": 0 if turns == head_dim else turns,
        "stretch": stretch_from_hf(rope, text),
    }


def stretch_from_hf(rope: Json, text: Json) -> Any:
    """How rotary positions reach further than in the first training: one of nn/rope.py, or None."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "mrope"):
        return None
    longest = text.get("max_position_embeddings")
    if kind == "linear":
        return LinearStretch(float(rope["factor"]))
    if kind == "dynamic":
        return NtkStretch(float(rope["factor"]), longest)
    if kind == "llama3":
        return BlendedStretch(**_numbers(rope, BLENDED))
    if kind == "yarn":
        return yarn_from_hf(rope)
    if kind in ("longrope", "su"):
        length = rope.get(LENGTH, text.get(LENGTH, longest))
        grown = rope.get("factor", longest / length)
        scale = rope.get("attention_factor", math.sqrt(1 + math.log(max(grown, 1)) / math.log(length)))
        short, long = (tuple(map(float, rope[f"{name}_factor"])) for name in ("short", "long"))
        return ListedStretch(short, long, length, float(scale))
    raise ValueError(
        f"rope_type {kind!r} is not one of 'default', 'linear', 'dynamic', 'llama3', 'yarn', 'longrope': {dict(rope)}"
    )


def yarn_from_hf(rope: Json) -> YarnConfig:
    if ("mscale" in rope) != ("mscale_all_dim" in rope):
        raise ValueError(f"YaRN with only one of mscale and mscale_all_dim has no agreed meaning: {dict(rope)}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *YARN.values()}
    if unknown := {name for name, value in rope.items() if value is not None} - known:
        raise ValueError(f"of YaRN only {[*YARN.values()]} are known, not {sorted(unknown)}")
    return YarnConfig(**_numbers(rope, YARN))


def _numbers(rope: Json, names: Mapping[str, str]) -> dict[str, Any]:
    stated = {ours: rope[theirs] for ours, theirs in names.items() if rope.get(theirs) is not None}
    return {ours: value if ours == "length" else float(value) for ours, value in stated.items()}


def rope_to_hf(attention: AttentionConfig) -> dict[str, Any]:
    """`rope_parameters` of transformers 5."""
    rope = {"rope_type": "default", "rope_theta": attention.rope_theta, **stretch_to_hf(attention.stretch)}
    if any(attention.rope_sections[1:]):
        rope |= {"mrope_section": list(attention.rope_sections)}
        rope |= {"mrope_interleaved": True} if attention.rope_layout == "interleaved" else {}
    if attention.rope_dim:
        rope["partial_rotary_factor"] = attention.rope_dim / attention.head_dim
    return rope


def stretch_to_hf(stretch: Any) -> dict[str, Any]:
    """The inverse of `stretch_from_hf`; what "dynamic" takes from `max_position_embeddings` is not in it."""
    if stretch is None:
        return {}
    if isinstance(stretch, LinearStretch):
        return {"rope_type": "linear", "factor": stretch.factor}
    if isinstance(stretch, NtkStretch):
        return {"rope_type": "dynamic", "factor": stretch.factor}
    if isinstance(stretch, ListedStretch):
        lists = {"short_factor": list(stretch.short), "long_factor": list(stretch.long)}
        return {"rope_type": "longrope", LENGTH: stretch.length, "attention_factor": stretch.table_scale, **lists}
    kind, names = ("yarn", YARN) if isinstance(stretch, YarnConfig) else ("llama3", BLENDED)
    return {"rope_type": kind, **{theirs: getattr(stretch, ours) for ours, theirs in names.items()}}
