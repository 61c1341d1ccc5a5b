"""Rotary positions in config.json, in the layouts before and since transformers 5, in both directions."""

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
KINDS: dict[str, dict[str, Field]] = {  # the fields of each kind of rotary positions
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
    """The fields of a text config for rotary positions; `theta` is the default of transformers' class."""
    return {
        "rope_parameters": nullable(section(None)),
        "rope_scaling": nullable(section(None)),
        "rope_theta": nullable(positive(theta)),
        "partial_rotary_factor": nullable(number(None, 0, 1)),
        LENGTH: nullable(count(None)),
    }


def rope_of(text: Json, kinds: Mapping[str, str] = AS_NAMED, partial: bool = False) -> dict[str, Any]:
    """Rotary positions of a text config in one dict, as transformers 5 fills in its `rope_parameters`.

    `rope_scaling` takes precedence over `rope_parameters`, and fields inside them over fields beside them, except for
    LENGTH, whose value beside them takes precedence.

    Args:
      text: the values of `rope_fields` and `max_position_embeddings`.
      kinds: supported values of `rope_type`, each with one of KINDS.
      partial: whether heads may be rotated in part.
    Returns:
      `rope_type`, `rope_theta`, `partial_rotary_factor`, `mrope_section` if it is set, and the kind's own fields.
    Raises:
      FieldError: a kind that is not in `kinds`, a field that no kind has, or an invalid value.
    """
    where = "rope_scaling" if text["rope_scaling"] else "rope_parameters"
    beside = {name: text[name] for name in ("rope_theta", "partial_rotary_factor") if text[name] is not None}
    stated = beside | (text[where] or {})
    stated.setdefault("rope_type", stated.get("type", "default"))
    with inside(where):
        kind = kinds[read(stated, {"rope_type": word(choices=kinds)})["rope_type"]]
        if LENGTH in KINDS[kind]:
            stated.setdefault(LENGTH, text["max_position_embeddings"])
            stated |= {} if text[LENGTH] is None else {LENGTH: text[LENGTH]}
        for name in sorted(stated.keys() - _KNOWN):
            raise FieldError(name, "is unknown. Remove it if it has no effect.", stated[name])
        sections = {"mrope_section": listed(count(low=0))} if "mrope_section" in stated else {}
        rope = read(stated, {"rope_theta": positive(), **_PART, **sections, **KINDS[kind]})
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
    """The fields of AttentionConfig for rotary positions.

    Args:
      text: see `rope_of`.
      sections: sections of M-RoPE if the config has none. Empty: all slots read the one position of text in any case.
      layout: layout of M-RoPE.
      kinds, partial: see `rope_of`.
    Raises:
      FieldError: see `rope_of`.
    """
    rope = rope_of(text, kinds, partial)
    turns = int(head_dim * rope["partial_rotary_factor"])
    if sections:
        sections = tuple(rope.get("mrope_section", sections))
        if len(sections) != 3 or sum(sections) * 2 != turns:
            raise FieldError("mrope_section", f"must be three numbers that add up to {turns // 2}.", sections)
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rope_sections": sections or (turns // 2, 0, 0),
        "rope_layout": layout if any(sections[1:]) else AttentionConfig.rope_layout,
        "rope_dim": 0 if turns == head_dim else turns,
        "rope_scaling": stretch_from_hf(rope, text["max_position_embeddings"], turns // 2),
    }


def axial_theta(vision: Json) -> float:
    """The base of rotary positions of rows and columns in a `vision_config`: the values of `rope_fields`."""
    return float(rope_of(vision, {"default": "default", "axial": "default"})["rope_theta"])


def axial_to_hf(theta: float | None) -> dict[str, Any]:
    """The inverse: `rope_parameters` of transformers 5."""
    return {"rope_parameters": {"rope_type": "axial", "rope_theta": theta}}


def stretch_from_hf(rope: Json, longest: int, slots: int) -> Any:
    """The extension of rotary positions beyond the length of pretraining: one of nn/rope.py, or None.

    Args:
      rope: result of `rope_of`.
      longest: largest number of tokens of a text, `max_position_embeddings`.
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
    grown = longest / rope[LENGTH] if rope["factor"] is None else rope["factor"]
    if kind == "yarn":
        fast, slow = rope["beta_fast"] or 32.0, rope["beta_slow"] or 1.0
        return YarnRopeScaling(**_numbers(rope | {"factor": grown, "beta_fast": fast, "beta_slow": slow}, YARN))
    for name in ("short_factor", "long_factor"):
        if len(rope[name]) != slots:
            raise FieldError(name, f"must be {slots} numbers, not {len(rope[name])}.")
    scale = rope["attention_factor"]
    if scale is None:
        scale = math.sqrt(1 + math.log(grown) / math.log(rope[LENGTH])) if grown > 1 else 1.0
    short, long = (tuple(map(float, rope[f"{name}_factor"])) for name in ("short", "long"))
    return LongRopeScaling(short, long, rope[LENGTH], float(scale))


def _numbers(rope: Json, names: Mapping[str, str]) -> dict[str, Any]:
    values = {ours: rope[theirs] for ours, theirs in names.items()}
    return {ours: float(value) if type(value) is int and ours != "length" else value for ours, value in values.items()}


def rope_to_hf(attention: AttentionConfig) -> dict[str, Any]:
    """`rope_parameters` of transformers 5."""
    rope = {"rope_type": "default", "rope_theta": attention.rope_theta, **stretch_to_hf(attention.rope_scaling)}
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
    if isinstance(stretch, LinearRopeScaling):
        return {"rope_type": "linear", "factor": stretch.factor}
    if isinstance(stretch, DynamicNtkRopeScaling):
        return {"rope_type": "dynamic", "factor": stretch.factor}
    if isinstance(stretch, LongRopeScaling):
        lists = {"short_factor": list(stretch.short), "long_factor": list(stretch.long)}
        return {"rope_type": "longrope", LENGTH: stretch.length, "attention_factor": stretch.table_scale, **lists}
    if isinstance(stretch, Llama3RopeScaling):
        return {"rope_type": "llama3", **{theirs: getattr(stretch, ours) for ours, theirs in BLENDED.items()}}
    written = {theirs: getattr(stretch, ours) for ours, theirs in YARN.items()}
    unsaid = {"mscale": 0, "mscale_all_dim": 0, "attention_factor": None, "truncate": True}
    kept = {name: value for name, value in written.items() if name not in unsaid or value != unsaid[name]}
    return {"rope_type": "yarn", **kept}
