"""Fields of JSON files that other programs write: their allowed values, and their meaning when absent or null.

A family lists the fields of config.json that it reads, with the defaults of transformers' config class, and ignores
others. `read` returns all listed fields, so that later code needs no defaults:

    FIELDS = {"hidden_size": count(4096), "sliding_window": nullable(count(4096)), "hidden_act": only("silu")}
    read({"sliding_window": None}, FIELDS) == {"hidden_size": 4096, "sliding_window": None, "hidden_act": "silu"}

Absent and null differ: Mistral without `sliding_window` has windows of 4096 tokens, with null it has none. Null is an
error unless the field is `nullable`. In processor configs null means absent and is removed first
(data/pipeline/spec.py).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

Json = Mapping[str, Any]
REQUIRED = object()  # as `default`: the field must be present; as `null`: null is an error
_LARGEST = 2**31 - 1  # largest count; checked before anything is allocated
_TINY, _HUGE = 1e-30, 1e30  # range of positive numbers that fp32 can compute with
MOST_LAYERS = MOST_EXPERTS = 1024  # limits of the weight names that are listed before weights are compared


class FieldError(ValueError):
    """A field is missing or has an invalid value. `path` is its path, such as "text_config.hidden_size"."""

    def __init__(self, path: str, wrong: str, *value: Any):
        text = json.dumps(value[0], default=str)[:80] if value else None
        super().__init__(f"{path}={text}: {wrong}" if value else f"{path}: {wrong}")
        self.path, self.wrong, self.value = path, wrong, value


@dataclass(frozen=True)
class Field:
    """A field of an object in JSON.

    kind: type of the value: int, float (accepts integers), bool, str, list or dict.
    default: value of an absent field. REQUIRED: the field must be present.
    low, high: inclusive bounds of a number.
    choices: allowed values. None: any.
    items: field that describes the items of a list. None: any items.
    lone: whether a single value is read as a list of one item.
    null: value that null stands for. REQUIRED: null is an error.
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
        """Returns a value of the file, checked and converted. Raises FieldError for an invalid value."""
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
        """Description of the allowed values, for an error."""
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
    """Returns a field for which the model supports a single value, which is also the default."""
    return Field(type(value), value, choices=(value,))


def section(default: Any = REQUIRED) -> Field:
    """Returns a field for a nested object, whose fields are read by another `read`."""
    return Field(dict, default)


def listed(items: Field, default: Any = REQUIRED, lone: bool = False) -> Field:
    return Field(list, default, items=items, lone=lone)


def nullable(field: Field, null: Any = None) -> Field:
    """Returns the field with null allowed, which is read as the argument `null`."""
    return replace(field, null=null)


def read(stated: Json, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Returns the values of all `fields`, from the file or by default. Raises FieldError for the first invalid one."""
    values = {}
    for name, field in fields.items():
        if name in stated:
            values[name] = field.checked(name, stated[name])
        elif field.default is REQUIRED:
            raise FieldError(name, "is missing. Add it to the file.")
        else:
            values[name] = field.default
    return values


def check_heads(stated: Json, width: str, heads: str, multiple: int = 1) -> None:
    """Raises FieldError unless the heads divide the width evenly, each into a multiple of `multiple` channels."""
    if stated[width] % (stated[heads] * multiple):
        suffix = f", into heads of a multiple of {multiple} channels" if multiple > 1 else ""
        raise FieldError(heads, f"must divide {width}={stated[width]}{suffix}.", stated[heads])


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Adds the name of the enclosing object to the paths of field errors in the block."""
    try:
        yield
    except FieldError as error:
        raise FieldError(f"{name}.{error.path}", error.wrong, *error.value) from None
