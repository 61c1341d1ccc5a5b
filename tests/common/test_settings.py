"""Every numeric setting states its range, and what lies outside is refused by its path before anything starts."""

import argparse
import dataclasses
import importlib
import math
import pkgutil
import time
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import numpy as np
import pytest

import mllm_jax
from mllm_jax.common.config import ConfigError, from_config_dict, to_config_dict
from mllm_jax.common.settings import (
    Config,
    Constraint,
    Finite,
    Fraction,
    NonNegative,
    OneOf,
    Pattern,
    Positive,
    PositiveInt,
    Range,
    argument,
    check,
    type_name,
)
from mllm_jax.data.vision.resize import Crop, EndedSquare, Halved, Keep, Square, Stretch
from mllm_jax.data.vision.tiles import AnyRes, Tiles
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.dual_encoder import AttentionPool, ClassPool, DualConfig, TokenPool
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.attention.mla import MlaConfig
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.nn.rope import (
    DynamicNtkRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    YarnRopeScaling,
)
from mllm_jax.plan.hardware.chips import CHIPS, Chip
from mllm_jax.plan.verify.certificate import Certificate
from mllm_jax.train.losses.preference import PreferenceConfig
from mllm_jax.train.runs.config import PARTS, Run, read_run, run_config
from mllm_jax.train.runs.data import ScenesData
from mllm_jax.train.step.optimizer import OptimConfig

COMMANDS = ("__main__", "plan.cli", "verify.certify", "tfds_builder")  # define flags, or need a package
for module in pkgutil.walk_packages(mllm_jax.__path__, "mllm_jax."):
    if not module.name.endswith(COMMANDS):
        importlib.import_module(module.name)

ATTENTION = AttentionConfig(2, 1, 8, rope_sections=(2, 1, 1))
DECODER = DecoderConfig(vocab=8, width=4, layers=1, attention=ATTENTION, mlp=4)
ENCODER = VitConfig(8, 1, 1, 8)
NEEDED = {  # what configs need that have no default for all of their fields
    AttentionConfig: ATTENTION,
    AttentionPool: AttentionPool(1, 4),
    AnyRes: AnyRes(((8, 8),), 8),
    Llama3RopeScaling: Llama3RopeScaling(2.0, 8),
    Certificate: Certificate({}, None),
    Chip: CHIPS["v5e"],
    ClassPool: ClassPool(4),
    Crop: Crop(8, (8, 8)),
    DecoderConfig: DECODER,
    PreferenceConfig: PreferenceConfig(dpo=1.0),
    DualConfig: DualConfig(ENCODER, ClassPool(4), DECODER, TokenPool(4, "end")),
    EndedSquare: EndedSquare(8, (0, 0, 0)),
    Halved: Halved((8, 8)),
    Keep: Keep(2, 8),
    LinearRopeScaling: LinearRopeScaling(2.0),
    LongRopeScaling: LongRopeScaling((1.0,), (1.0,), 8),
    MlaConfig: MlaConfig(2),
    ModelConfig: ModelConfig(ENCODER, PatchMergerConfig(), DECODER),
    MoeConfig: MoeConfig(4, 1, 4),
    DynamicNtkRopeScaling: DynamicNtkRopeScaling(2.0, 8),
    Run: Run(model=None, data=None),
    Square: Square(8, (0, 0, 0)),
    Stretch: Stretch((8, 8)),
    Tiles: Tiles(8),
    TokenPool: TokenPool(4, "end"),
    VisionTokenIds: VisionTokenIds(1),
    VitConfig: ENCODER,
    YarnRopeScaling: YarnRopeScaling(2.0, 8),
}


def configs(cls=Config):
    """All dataclasses of settings."""
    found = {cls} if dataclasses.is_dataclass(cls) else set()
    return found.union(*map(configs, cls.__subclasses__()))


CONFIGS = sorted((cls for cls in configs() if cls.__module__.startswith("mllm_jax.")), key=lambda cls: cls.__name__)
WITHOUT_SAMPLE = {"DualProcessor"}  # takes a tokenizer, and comes from files alone
NUMBERS = (int, float)


def leaves(hint, path=()):
    """(annotation, how it is wrapped) of what an annotation is made of."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated or not options:
        yield hint, path
    elif origin in (typing.Union, types.UnionType):
        for option in options:
            yield from leaves(option, path)
    elif origin is tuple:
        for number, option in enumerate(options):
            if option is not Ellipsis:
                yield from leaves(option, (*path, (number, hint)))
    elif issubclass(origin, Mapping):
        yield from leaves(options[1], (*path, ("name", hint)))


def example(hint):
    """A value that an annotation allows."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return inside(hint)
    if origin is tuple:
        return () if options[-1] is Ellipsis else tuple(map(example, options))
    return {str: "x", bool: True}.get(hint, {})


def inside(hint):
    kind, constraint = hint.__origin__, hint.__metadata__[0]
    if isinstance(constraint, Range):
        near = (constraint.least, constraint.most, constraint.above + 1, (constraint.above + constraint.below) / 2, 1)
        return next(kind(x) for x in near if abs(x) < math.inf and constraint.fault(x) is None)
    return "x"


def wrapped(value, path):
    """A value as an element of what stands around it."""
    for where, hint in reversed(path):
        if where == "name":
            value = {"name": value}
            continue
        options = typing.get_args(hint)
        items = [value] if options[-1] is Ellipsis else [example(option) for option in options]
        items[where] = value
        value = tuple(items)
    return value


def outside(hint):
    """Values that an annotation does not allow."""
    kind, constraint = hint.__origin__, hint.__metadata__[0]
    if isinstance(constraint, OneOf):
        return ["no such word"]
    if hint == Pattern:
        return ["("]
    if kind is Any:
        return [5, "nowhere", ("fsdp", "fsdp")]
    edges = (constraint.least - 1, constraint.most + 1, constraint.above, constraint.below)
    given = [kind(x) for x in edges if abs(x) < math.inf and x not in constraint.also]
    unheld = [math.nan, math.inf, -math.inf, 1e39, -1e39] if kind is float else [1.5]  # by fp32
    unheld += [1e-50] * (kind is float and constraint.above == 0) + [1 - 1e-12] * (constraint.below == 1)
    return given + unheld + [10**400] * (constraint.most == math.inf) + [True, "1"]


def settings(cls):
    """(field, annotation, how it is wrapped) of all numbers and of all that states a constraint."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        for hint, path in leaves(hints[field.name]):
            if hint in NUMBERS or typing.get_origin(hint) is Annotated:
                yield field.name, hint, path


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_every_number_has_a_range_and_is_refused_outside(cls):
    stated = list(settings(cls))
    assert [name for name, hint, _ in stated if hint in NUMBERS] == [], (
        "state their ranges, see mllm_jax/common/settings.py"
    )
    if cls.__name__ in WITHOUT_SAMPLE:
        return
    sample = NEEDED.get(cls) or cls()
    section = to_config_dict(sample).to_dict()
    for name, hint, path in stated:
        for value in outside(hint):
            given = wrapped(value, path)
            with pytest.raises(ValueError, match=rf"^{cls.__name__}\.{name}"):
                dataclasses.replace(sample, **{name: given})
            with pytest.raises(ConfigError, match=rf"^here\.{name}") as caught:
                from_config_dict(cls, section | {name: given}, PARTS | {"Chip": Chip}, "here")
            assert "\n" not in str(caught.value)


def reachable(hint, seen):
    """All dataclasses that annotations of a config lead to."""
    for part in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(part) and part not in seen:
            seen.add(part)
            for inner in typing.get_type_hints(part).values():
                reachable(inner, seen)
        elif part is not hint:
            reachable(part, seen)
    return seen


def test_whatever_a_run_reads_is_checked():
    found = set().union(*(reachable(cls, set()) for cls in (Run, Certificate, *PARTS.values())))
    assert len(found) > 30 and [cls.__name__ for cls in found if not issubclass(cls, Config)] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_grad_norm": -1.0}, r"config.optim.max_grad_norm=-1.0: must be at least 0. Set 0 for no clipping."),
        ({"learning_rate": math.nan}, "config.optim.learning_rate=nan: must be finite and at least 0."),
        ({"learning_rate": math.inf}, "config.optim.learning_rate=inf: must be finite and at least 0."),
        ({"b1": 1.0}, "config.optim.b1=1.0: must be at least 0 and less than 1."),
        ({"eps": 0.0}, "config.optim.eps=0.0: must be more than 0."),
        ({"name": "adamx"}, "config.optim.name='adamx': must be one of adamw, muon, adafactor."),
        (
            {"lr_multipliers": (("a", 1.0), ("b", -1.0))},
            r"config.optim.lr_multipliers\[1\]\[1\]=-1.0: must be at least 0.",
        ),
        ({"freeze": ("(",)}, r"config.optim.freeze\[0\]='\(': is not a regular expression: missing \)"),
        ({"eps": 1e-50}, "config.optim.eps=1e-50: must be more than 0 in fp32."),
        ({"b1": 0.99999999999}, "config.optim.b1=0.99999999999: must be at least 0 and less than 1 in fp32."),
        ({"steps": 10**400}, r"config.optim.steps=1000+\.\.\.: must be at least 0 and at most 2147483647."),
        ({"warmup": 2000}, "config.optim: warmup=2000: longer than the run, steps=1000. Set warmup=100"),
    ],
)
def test_a_run_names_the_path(change, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_run({"model": None, "data": None, "optim": change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": dataclasses.replace(NEEDED[ModelConfig], family="x")},
            "config.model.family='x': must be one of blip-2,",
        ),
        (
            {"model": ModelConfig(None, None, dataclasses.replace(DECODER, family="x"), family="llama")},
            "config.model.decoder.family='x': must be one of llama,",
        ),
    ],
)
def test_a_model_of_no_family_is_refused(change, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_run(run_config(Run(**{"data": ScenesData(text_only=True)} | change)))


def test_rows_are_no_longer_than_learned_positions():
    """Beyond them is nothing to look up."""
    model = ModelConfig(None, None, dataclasses.replace(DECODER, positions=32), family="gpt2")
    read_run(run_config(Run(model, ScenesData(text_only=True, tokens=32))))
    with pytest.raises(ConfigError, match="^config.data.tokens=33: must be at most config.model.decoder.positions=32"):
        read_run(run_config(Run(model, ScenesData(text_only=True, tokens=33))))


def test_a_batch_is_counted_in_32_bits():
    with pytest.raises(ValueError, match=r"^batch=1000000 rows of tokens=4096 must be at most 2147483647 tokens\.$"):
        ScenesData(batch=1000000)


@dataclass(frozen=True)
class Odd(Config):
    share: Fraction = 0.5
    sizes: tuple[PositiveInt, PositiveInt] = (1, 1)
    weights: Mapping[str, NonNegative] = dataclasses.field(default_factory=dict)
    limit: Annotated[float, Range(above=1, also=(0,))] | None = None
    plain: str = ""


@dataclass(frozen=True)
class Odder(Odd):
    more: Finite = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.more == self.share:
            raise ValueError("more must differ from share")


def test_what_is_inside_is_kept_as_it_is():
    made = Odder(np.float32(1), (np.int64(3), 2), {"a": 0}, 0, more=-5)
    assert made.sizes == (3, 2) and made.limit == 0 and Odder(limit=None).limit is None
    with pytest.raises(ValueError, match="more must differ from share"):
        Odder(more=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 1.1}, "Odder.share=1.1: must be at least 0 and at most 1."),
        ({"share": None}, "Odder.share=None: needs a number."),
        ({"sizes": (1,)}, r"Odder.sizes=\(1,\): needs tuple\[int, int\]."),
        ({"sizes": (1, 0)}, r"Odder.sizes\[1\]=0: must be at least 1."),
        ({"weights": {"a": 1, "b": -1}}, "Odder.weights.b=-1: must be at least 0."),
        ({"weights": 3}, "Odder.weights=3: needs names with values."),
        ({"limit": 1}, "Odder.limit=1: must be more than 1, or 0."),
        ({"more": -math.inf}, "Odder.more=-inf: must be finite."),
        ({"more": 1e39}, r"Odder.more=1e\+39: must be finite in fp32."),
        ({"limit": 1 + 1e-9}, "Odder.limit=1.000000001: must be more than 1 in fp32, or 0."),
        ({"sizes": (2**31, 1)}, r"Odder.sizes\[0\]=2147483648: must be at least 1 and at most 2147483647."),
        ({"more": "x" * 500}, "Odder.more='x{79}...: needs a number."),
    ],
)
def test_what_is_outside_is_named(given, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Odder(**given)


def test_names_of_types_are_without_constraints():
    hints = typing.get_type_hints(Odd, include_extras=True)
    names = [type_name(hint) for hint in hints.values()]
    assert names == ["float", "tuple[int, int]", "Mapping[str, float]", "float | None", "str"]


def test_numbers_of_command_lines_are_checked_alike():
    assert argument(PositiveInt)("3") == 3 and argument(Fraction)("1") == 1.0
    for hint, text, message in (
        (PositiveInt, "0", "0: must be at least 1."),
        (PositiveInt, "1.5", "'1.5': needs an integer."),
        (Positive, "nan", "nan: must be finite and more than 0."),
        (NonNegative, "1e999", "inf: must be finite and at least 0."),
        (NonNegative, "much", "'much': needs a number."),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{message}$"):
            argument(hint)(text)


def test_constraints_can_be_added():
    class Even(Constraint):
        def fault(self, value):
            return "must be even." if value % 2 else None

    check(Annotated[int, Even()], 4, "number")
    with pytest.raises(ValueError, match="^number=3: must be even.$"):
        check(Annotated[int, Even()], 3, "number")


def test_a_config_is_made_in_microseconds():
    """Tests and searches make thousands: types are looked at once for a class, not for every one of its objects."""
    OptimConfig()
    began = time.process_time()
    for _ in range(1000):
        OptimConfig()
    assert time.process_time() - began < 1
