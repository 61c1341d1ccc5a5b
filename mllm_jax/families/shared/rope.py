"""Rotary positions in config.json, in the layouts of transformers 4 and 5, in both directions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax.common.fields import (
    Field,
    FieldError,
    count,
    flag,
    inside,
    listed,
    nullable,
    number,
    positive,
    read,
    section,
    word,
)
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.rope import (
    DynamicNtkRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    YarnRopeScaling,
)

Json = Mapping[str, Any]
LENGTH = "original_max_position_embeddings"
YARN = {
    "factor": "factor",
    "length": LENGTH,
    "fast": "beta_fast",
    "slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
BLENDED = {"factor": "factor", "length": LENGTH, "slow": "low_freq_factor", "fast": "high_freq_factor"}
_PART = {"partial_rotary_factor": number(1.0, 0, 1)}
_SLOTS = listed(positive())
KINDS: dict[str, dict[str, Field]] = {  # fields of each kind of rope scaling
    "default": {},
    "linear": {"factor": positive()},
    "dynamic": {"factor": positive()},
    "llama3": {"factor": positive(), LENGTH: count(), "low_freq_factor": positive(), "high_freq_factor": positive()},
    "yarn": {
        "factor": nullable(positive()),
        LENGTH: count(),
        "beta_fast": nullable(number(32.0, 0), 32.0),
        "beta_slow": nullable(number(1.0, 0), 1.0),
        "mscale": nullable(number(0.0, 0), 0.0),
        "mscale_all_dim": nullable(number(0.0, 0), 0.0),
        "attention_factor": nullable(number(None, 0)),
        "truncate": flag(True),
    },
    "longrope": {
        "factor": nullable(positive(None)),
        LENGTH: count(),
        "attention_factor": nullable(number(None, 0)),
        "short_factor": _SLOTS,
        "long_factor": _SLOTS,
    },
}
AS_NAMED = {kind: kind for kind in KINDS}
_KNOWN = {name for fields in KINDS.values() for name in fields} | _PART.keys()
_KNOWN |= {"rope_type", "type", "rope_theta", "mrope_section", "mrope_interleaved", "finetuned"}


def rope_fields(theta: float) -> dict[str, Field]:
    """Returns the fields of a text_config for rotary positions; `theta` is the default of transformers' class."""
    return {
        "rope_parameters": nullable(section(None)),
        "rope_scaling": nullable(section(None)),
        "rope_theta": nullable(positive(theta)),
        "partial_rotary_factor": nullable(number(None, 0, 1)),
        LENGTH: nullable(count(None)),
    }


def rope_of(text: Json, kinds: Mapping[str, str] = AS_NAMED, partial: bool = False) -> dict[str, Any]:
    """Returns the rotary positions of a text_config as one dict, like `rope_parameters` of transformers 5.

    `rope_scaling` takes precedence over `rope_parameters`, and fields inside them over fields of the text_config,
    except for LENGTH, where the text_config takes precedence. For example:

        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
        -> {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "factor": 2.0, "rope_type": "linear"}

    Args:
      text: values of `rope_fields` and `max_position_embeddings`.
      kinds: one of KINDS by supported value of `rope_type`.
      partial: whether only part of each head may be rotated.
    Returns:
      `rope_type`, `rope_theta`, `partial_rotary_factor`, `mrope_section` if set, and the fields of KINDS[rope_type].
    Raises:
      FieldError: a rope_type that is not in `kinds`, an unknown field, or an invalid value.
    """
    path = "rope_scaling" if text["rope_scaling"] else "rope_parameters"
    defaults = {name: text[name] for name in ("rope_theta", "partial_rotary_factor") if text[name] is not None}
    fields = defaults | (text[path] or {})
    fields.setdefault("rope_type", fields.get("type", "default"))
    with inside(path):
        kind = kinds[read(fields, {"rope_type": word(choices=kinds)})["rope_type"]]
        if LENGTH in KINDS[kind]:
            fields.setdefault(LENGTH, text["max_position_embeddings"])
            fields |= {} if text[LENGTH] is None else {LENGTH: text[LENGTH]}
        for name in sorted(fields.keys() - _KNOWN):
            raise FieldError(name, "is unknown. Remove it if it has no effect.", fields[name])
        sections = {"mrope_section": listed(count(low=0))} if "mrope_section" in fields else {}
        rope = read(fields, {"rope_theta": positive(), **_PART, **sections, **KINDS[kind]})
        if rope["partial_rotary_factor"] != 1 and not partial:
            raise FieldError("partial_rotary_factor", "must be 1 in this family.", rope["partial_rotary_factor"])
    return rope | {"rope_type": kind}


def rope_from_hf(
    text: Json,
    head_dim: int,
    sections: Sequence[int] = (),
    layout: str = AttentionConfig.rope_layout,
    kinds: Mapping[str, str] = AS_NAMED,
    partial: bool = False,
) -> dict[str, Any]:
    """Returns the fields of AttentionConfig for rotary positions.

    Args:
      text: see `rope_of`.
      sections: M-RoPE sections if the config has none. Empty: plain RoPE, even if the config has sections.
      layout: layout of the M-RoPE sections.
      kinds, partial: see `rope_of`.
    Raises:
      FieldError: see `rope_of`.
    """
    rope = rope_of(text, kinds, partial)
    rope_dim = int(head_dim * rope["partial_rotary_factor"])
    if sections:
        sections = tuple(rope.get("mrope_section", sections))
        if len(sections) != 3 or sum(sections) * 2 != rope_dim:
            raise FieldError("mrope_section", f"must be three numbers that add up to {rope_dim // 2}.", sections)
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rope_sections": sections or (rope_dim // 2, 0, 0),
        "rope_layout": layout if any(sections[1:]) else AttentionConfig.rope_layout,
        "rope_dim": 0 if rope_dim == head_dim else rope_dim,
        "rope_scaling": stretch_from_hf(rope, text["max_position_embeddings"], rope_dim // 2),
    }


def axial_theta(vision: Json) -> float:
    """Returns the base of the axial (row and column) rotary positions from a vision_config's `rope_fields`."""
    return float(rope_of(vision, {"default": "default", "axial": "default"})["rope_theta"])


def axial_to_hf(theta: float | None) -> dict[str, Any]:
    """Inverse of `axial_theta`: returns `rope_parameters` of transformers 5."""
    return {"rope_parameters": {"rope_type": "axial", "rope_theta": theta}}


def stretch_from_hf(rope: Json, longest: int, slots: int) -> Any:
    """Returns the rope scaling, a class of nn/rope.py. None: unscaled.

    Args:
      rope: result of `rope_of`.
      longest: `max_position_embeddings`, the maximum number of tokens of a text.
      slots: number of frequencies of a head.
    """
    kind = rope["rope_type"]
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRopeScaling(float(rope["factor"]))
    if kind == "dynamic":
        return DynamicNtkRopeScaling(float(rope["factor"]), longest)
    if kind == "llama3":
        return Llama3RopeScaling(**_numbers(rope, BLENDED))
    factor = longest / rope[LENGTH] if rope["factor"] is None else rope["factor"]
    if kind == "yarn":
        fast, slow = rope["beta_fast"] or 32.0, rope["beta_slow"] or 1.0
        return YarnRopeScaling(**_numbers(rope | {"factor": factor, "beta_fast": fast, "beta_slow": slow}, YARN))
    for name in ("short_factor", "long_factor"):
        if len(rope[name]) != slots:
            raise FieldError(name, f"must be {slots} numbers, not {len(rope[name])}.")
    scale = rope["attention_factor"]
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(rope[LENGTH])) if factor > 1 else 1.0
    short, long = (tuple(map(float, rope[f"{name}_factor"])) for name in ("short", "long"))
    return LongRopeScaling(short, long, rope[LENGTH], float(scale))


def _numbers(rope: Json, names: Mapping[str, str]) -> dict[str, Any]:
    values = {ours: rope[theirs] for ours, theirs in names.items()}
    return {ours: float(value) if type(value) is int and ours != "length" else value for ours, value in values.items()}


def rope_to_hf(attention: AttentionConfig) -> dict[str, Any]:
    """Inverse of `rope_from_hf`: returns `rope_parameters` of transformers 5."""
    rope = {"rope_type": "default", "rope_theta": attention.rope_theta, **stretch_to_hf(attention.rope_scaling)}
    if any(attention.rope_sections[1:]):
        rope |= {"mrope_section": list(attention.rope_sections)}
        rope |= {"mrope_interleaved": True} if attention.rope_layout == "interleaved" else {}
    if attention.rope_dim:
        rope["partial_rotary_factor"] = attention.rope_dim / attention.head_dim
    return rope


def stretch_to_hf(stretch: Any) -> dict[str, Any]:
    """Inverse of `stretch_from_hf`, without `max_position_embeddings`, which the kind "dynamic" also needs."""
    if stretch is None:
        return {}
    if isinstance(stretch, LinearRopeScaling):
        return {"rope_type": "linear", "factor": stretch.factor}
    if isinstance(stretch, DynamicNtkRopeScaling):
        return {"rope_type": "dynamic", "factor": stretch.factor}
    if isinstance(stretch, LongRopeScaling):
        lists = {"short_factor": list(stretch.short), "long_factor": list(stretch.long)}
        return {"rope_type": "longrope", LENGTH: stretch.length, "attention_factor": stretch.table_scale, **lists}
    if isinstance(stretch, Llama3RopeScaling):
        return {"rope_type": "llama3", **{theirs: getattr(stretch, ours) for ours, theirs in BLENDED.items()}}
    fields = {theirs: getattr(stretch, ours) for ours, theirs in YARN.items()}
    defaults = {"mscale": 0, "mscale_all_dim": 0, "attention_factor": None, "truncate": True}
    fields = {name: value for name, value in fields.items() if name not in defaults or value != defaults[name]}
    return {"rope_type": "yarn", **fields}
