"""Types of settings: numbers in a range, one of several words, regular expressions. Configs are checked on creation.

    @dataclass(frozen=True)
    class OptimConfig(Config):
        learning_rate: NonNegative = 1e-4
        max_grad_norm: Annotated[float, Range(least=0, hint="Set 0 for no clipping.")] = 1.0

    OptimConfig(max_grad_norm=-1)  # ValueError: OptimConfig.max_grad_norm=-1: must be at least 0. Set 0 for no
    clipping.

`mllm_jax.common.config` checks the same annotations with the path of a setting, and command lines with the name of a
flag.
"""

import argparse
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import numpy as np

from mllm_jax.common.errors import value_text

LARGEST = 2**31 - 1  # default upper bound of integers: arrays are indexed by int32
TINY, HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # range of normal numbers in fp32
KINDS = {int: (numbers.Integral, "an integer"), float: (numbers.Real, "a number"), str: (str, "a text")}


class Constraint:
    """A condition that an annotation adds to a type, as `Annotated[type, constraint]`."""

    def fault(self, value: Any) -> str | None:
        """Returns the fault of a value of the right type, as a sentence without a subject, or None if it is valid."""
        raise NotImplementedError


@dataclass(frozen=True)
class Range(Constraint):
    """Numbers within bounds after conversion to the types of devices: int32 and fp32.

    So NaN, infinity and 1e39 are outside all bounds, 1e-50 is not above 0, and 0.99999999999 is not below 1.

    least, most: inclusive bounds. above, below: exclusive bounds.
    also: other allowed values.
    hint: sentence for the error, with the value to set instead.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    also: tuple[float, ...] = ()
    hint: str = ""

    def fault(self, value: Any) -> str | None:
        least, most, rounded = self.least, self.most, value
        if isinstance(value, float):
            rounded = in_fp32(value)
        elif abs(value) > LARGEST:
            least, most = max(least, -LARGEST), LARGEST if most == math.inf else most
        inside = lambda value, rounded: least <= value <= most and self.above < rounded < self.below
        if inside(value, rounded) or value in self.also:
            return None
        words = {"at least": least, "more than": self.above, "at most": most, "less than": self.below}
        bounds = " and ".join(f"{word} {bound}" for word, bound in words.items() if abs(bound) < math.inf)
        if not -math.inf < rounded < math.inf:
            bounds = f"finite and {bounds}" if bounds else "finite"
        if inside(value, value):
            bounds += " in fp32"
        allowed = ", or ".join([bounds, *map(str, self.also)])
        return f"must be {allowed}. {self.hint}".rstrip()


def in_fp32(value: float) -> float:
    """Returns a number as fp32 computes with it: infinite if it overflows, 0 if it underflows."""
    if abs(value) < TINY:
        return 0.0
    return float(np.float32(value)) if abs(value) <= HUGE else math.copysign(math.inf, value)


def as_float(value: float) -> float:
    """Returns a number as a float; infinite if it overflows."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@dataclass(frozen=True)
class OneOf(Constraint):
    """One of several words. `words` may be a function, if their table is defined after the config."""

    words: tuple[str, ...] | Callable[[], Iterable[str]]

    def fault(self, value: Any) -> str | None:
        words = self.words() if callable(self.words) else self.words
        return None if value in words else f"must be one of {', '.join(words)}."


@dataclass(frozen=True)
class Regex(Constraint):
    """Regular expressions of Python's `re`."""

    def fault(self, value: Any) -> str | None:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            return f"is not a regular expression: {error}."


Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]
PositiveInt = Annotated[int, Range(least=1)]
NonNegativeInt = Annotated[int, Range(least=0)]
Int = Annotated[int, Range()]
TokenId = Annotated[int, Range(least=-1, hint="Set -1 for none.")]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]
Pattern = Annotated[str, Regex()]


class Config:
    """Base class of settings. Checks every field whose annotation has a constraint.

    A subclass with a `__post_init__` of its own, for constraints between fields, calls this one first.

    Raises:
      ValueError: a value has a wrong type or violates its constraint. The message begins with `Class.field=value`.
    """

    def __post_init__(self):
        for name, path, check in _checks(type(self)):
            check(getattr(self, name), path)


@functools.cache
def _checks(cls: type) -> list[tuple[str, str, Callable[[Any, str], None]]]:
    """Returns (name, name with the class, check) of the fields with a constraint."""
    hints = typing.get_type_hints(cls, include_extras=True)
    checks = ((field.name, checker(hints[field.name])) for field in fields(cls))
    return [(name, f"{cls.__name__}.{name}", check) for name, check in checks if check]


@functools.cache
def checker(hint: Any) -> Callable[[Any, str], None] | None:
    """Returns `check(value, path)` for an annotation, which raises ValueError, or None without a constraint.

    Constraints may be inside optional types, tuples and the values of mappings.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return functools.partial(_check_value, hint.__origin__, hint.__metadata__)
    if not any(map(checker, options)):
        return None
    if origin in (typing.Union, types.UnionType):
        (option,) = (option for option in options if option is not types.NoneType)
        return functools.partial(_check_optional, checker(option))
    if origin is tuple:
        return functools.partial(_check_tuple, tuple(map(checker, options)), options[-1] is Ellipsis, type_name(hint))
    return functools.partial(_check_mapping, checker(options[1]))


def _check_value(kind: type, constraints: tuple[Constraint, ...], value: Any, path: str) -> None:
    if type(value) is not kind and kind in KINDS:
        abstract_type, name = KINDS[kind]
        if not isinstance(value, abstract_type) or isinstance(value, bool):
            raise ValueError(f"{path}={value_text(value)}: needs {name}.")
    number = as_float(value) if kind is float else value
    for constraint in constraints:
        if fault := constraint.fault(number):
            raise ValueError(f"{path}={value_text(value)}: {fault}")


def _check_optional(check: Callable, value: Any, path: str) -> None:
    if value is not None:
        check(value, path)


def _check_tuple(checks: tuple[Callable | None, ...], any_length: bool, hint: str, value: Any, path: str) -> None:
    if not isinstance(value, (tuple, list)) or not (any_length or len(value) == len(checks)):
        raise ValueError(f"{path}={value_text(value)}: needs {hint}.")
    for number, item in enumerate(value):
        if check := checks[0 if any_length else number]:
            check(item, f"{path}[{number}]")


def _check_mapping(check: Callable, value: Any, path: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}={value_text(value)}: needs names with values.")
    for name, item in value.items():
        check(item, f"{path}.{name}")


def type_name(hint: Any) -> str:
    """Returns the text of an annotation without constraints, such as "int | None"."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return type_name(hint.__origin__)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, options))
    if options:
        return f"{origin.__name__}[{', '.join(map(type_name, options))}]"
    return {Ellipsis: "...", types.NoneType: "None"}.get(hint) or getattr(hint, "__name__", str(hint))


def check(hint: Any, value: Any, name: str) -> None:
    """Raises ValueError, beginning with `name=value`, for a value that violates the constraint of an annotation."""
    checker(hint)(value, name)


def argument(hint: Any) -> Callable[[str], Any]:
    """Returns the `type` of an argparse flag for a number with a constraint, such as `PositiveInt`."""

    def read(text: str) -> Any:
        kind = hint.__origin__
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: needs {KINDS[kind][1]}.") from error
        try:
            check(hint, value, "")
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("=")) from error
        return value

    return read
