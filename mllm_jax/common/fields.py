"""Fields of JSON files that other programs write: their allowed values, and their meaning when absent or null.

A family lists the fields of config.json that it reads, with the defaults of transformers' config class; it ignores
others. `read` returns all of them, so that later code needs no defaults:

    FIELDS = {"hidden_size": count(4096), "sliding_window": nullable(count(4096)), "hidden_act": only("silu")}
    read({"sliding_window": None}, FIELDS) == {"hidden_size": 4096, "sliding_window": None, "hidden_act": "silu"}

Absent and null differ: Mistral without `sliding_window` has windows of 4096 tokens, with null it has none. Null is an
error unless the field is `nullable`. In files of processors null means absent, and is removed first
(data/pipeline/spec.py).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

Json = Mapping[str, Any]
REQUIRED = object()  # as a default: the field must be there; for null: it is refused
_LARGEST = 2**31 - 1  # largest count that allocates nothing before weights are compared
_TINY, _HUGE = 1e-30, 1e30  # between which fp32 can compute with a positive number
MOST_LAYERS = MOST_EXPERTS = 1024  # every one of them has names that are listed before weights are compared


class FieldError(ValueError):
    """A field that is missing or has an invalid value; `path` is its path, such as "text_config.hidden_size"."""

    def __init__(self, path: str, wrong: str, *value: Any):
        shown = json.dumps(value[0], default=str)[:80] if value else None
        super().__init__(f"{path}={shown}: {wrong}" if value else f"{path}: {wrong}")
        self.path, self.wrong, self.value = path, wrong, value


@dataclass(frozen=True)
class Field:
    """A field of an object in JSON.

    kind: type of its values: int, float (an integer too), bool, str, list or dict.
    default: its value where it is absent. REQUIRED: it must be there.
    low, high: bounds of a number, both included.
    choices: the only values; None: any.
    items: what the items of a list are; None: anything.
    lone: a value that is no list stands for a list of it.
    null: its value where it is null. REQUIRED: null is refused.
    """

    kind: type
    default: Any = REQUIRED
    low: float = -math.inf
    high: float = math.inf
    choices: tuple | None = None
    items: "Field | None" = None
    lone: bool = False
    null: Any = REQUIRED

    def checked(self, path: str, value: Any) -> Any:
        """A value that the file states, as it is read. FieldError for one that cannot be."""
        if value is None:
            if self.null is REQUIRED:
                raise FieldError(path, f"must be {self.words}.", value)
            return self.null
        if self.lone and not isinstance(value, list | tuple):
            return [self.items.checked(path, value)]
        kinds = {float: (int, float), list: (list, tuple)}.get(self.kind, self.kind)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            raise FieldError(path, f"must be {self.words}.", value)
        if self.choices is not None and value not in self.choices:
            raise FieldError(path, f"must be {self.words}.", value)
        if self.kind in (int, float) and not (self.low <= value <= self.high and abs(value) < _HUGE):
            raise FieldError(path, f"must be {self.words}.", value)
        if self.items is not None:
            return [self.items.checked(f"{path}[{place}]", item) for place, item in enumerate(value)]
        return value

    @property
    def words(self) -> str:
        """Description of the values that are allowed, for an error."""
        if self.choices is not None:
            return " or ".join(json.dumps(choice) for choice in self.choices)
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list"}
        bounds = ["over 0"] if self.low == _TINY else [f"of at least {self.low}"] * math.isfinite(self.low)
        bounds += [f"of at most {self.high}"] * (self.high < _LARGEST)
        return " ".join([names.get(self.kind, "an object"), " and ".join(bounds)]).strip()


def count(default: Any = REQUIRED, low: int = 1, high: int = _LARGEST) -> Field:
    return Field(int, default, low, high)


def layers(default: Any = REQUIRED) -> Field:
    return count(default, high=MOST_LAYERS)


def number(default: Any = REQUIRED, low: float = -math.inf, high: float = math.inf) -> Field:
    return Field(float, default, low, high)


def positive(default: Any = REQUIRED) -> Field:
    return number(default, low=_TINY)


def flag(default: Any = REQUIRED) -> Field:
    return Field(bool, default)


def word(default: Any = REQUIRED, choices: Sequence[str] | None = None) -> Field:
    return Field(str, default, choices=None if choices is None else tuple(choices))


def only(value: Any) -> Field:
    """A field that this model can do one value of; an absent one has it."""
    return Field(type(value), value, choices=(value,))


def section(default: Any = REQUIRED) -> Field:
    """A nested object, whose fields another `read` reads."""
    return Field(dict, default)


def listed(items: Field, default: Any = REQUIRED, lone: bool = False) -> Field:
    return Field(list, default, items=items, lone=lone)


def nullable(field: Field, null: Any = None) -> Field:
    """The field, where null is allowed and means `null`."""
    return replace(field, null=null)


def read(stated: Json, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The value of each of `fields`, from the file or by default. FieldError for the first that cannot be."""
    found = {}
    for name, field in fields.items():
        if name in stated:
            found[name] = field.checked(name, stated[name])
        elif field.default is REQUIRED:
            raise FieldError(name, "is missing. Add it to the file.")
        else:
            found[name] = field.default
    return found


def check_heads(stated: Json, width: str, heads: str, multiple: int = 1) -> None:
    """Raises FieldError unless all heads together are as wide as the model, each of a `multiple` of channels."""
    if stated[width] % (stated[heads] * multiple):
        of_each = f", into heads of a multiple of {multiple} channels" if multiple > 1 else ""
        raise FieldError(heads, f"must divide {width}={stated[width]}{of_each}.", stated[heads])


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Context that adds the name of the enclosing object to the path of field errors."""
    try:
        yield
    except FieldError as error:
        raise FieldError(f"{name}.{error.path}", error.wrong, *error.value) from None
