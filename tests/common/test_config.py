"""Dataclasses and ConfigDicts: there and back, and what is said to somebody who writes something wrong."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from mllm_jax.common.config import ConfigError, check_path, dump, from_config_dict, load, to_config_dict


@dataclass(frozen=True)
class Round:
    radius: float = 1.0


@dataclass(frozen=True)
class Square:
    side: int
    corners: tuple[int, int] = (0, 0)

    def __post_init__(self):
        if self.side < 0:
            raise ValueError("side must not be negative")


@dataclass(frozen=True)
class Drawing:
    shape: Any
    border: Square = Square(1)
    names: tuple[str, ...] = ()
    pairs: tuple[tuple[str, float], ...] = ()
    limit: int | None = None
    filled: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


PARTS = {"Round": Round, "Square": Square}
DRAWING = Drawing(
    Round(2.5), Square(3, (4, 5)), ("a", "b"), (("x", 0.5),), None, True, {"axis": ("u", "v"), "no": None}
)


def read(config):
    return from_config_dict(Drawing, config, PARTS, "config")


def test_there_and_back():
    config = to_config_dict(DRAWING)
    assert config.shape.type == "Round" and "type" not in config.border
    assert read(config) == DRAWING


def test_through_json_tuples_stay_tuples():
    config = load(dump(to_config_dict(DRAWING)))
    assert read(config) == DRAWING
    assert isinstance(config.border.corners, tuple) and isinstance(config.options.axis, tuple)


def test_absent_fields_take_their_defaults():
    assert read({"shape": {"type": "Square", "side": 2}}) == Drawing(Square(2))


def test_a_part_is_exchanged_by_its_type():
    config = to_config_dict(DRAWING)
    config.shape = {"type": "Square", "side": 7}
    assert read(config).shape == Square(7)


@pytest.mark.parametrize("value", [5, "Round", (1.0,), {}, {"side": 2}, {"type": ["Square"]}, {"type": None}])
def test_a_field_of_several_parts_takes_nothing_else(value):
    with pytest.raises(ConfigError, match="^config.shape"):
        read({"shape": value})


def test_none_can_be_overridden_by_a_value_of_its_type():
    config = to_config_dict(DRAWING)
    config.limit = 5
    assert read(config).limit == 5
    with pytest.raises(TypeError):
        config.limit = "five"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fillde": True}, r"config: unknown name 'fillde'; did you mean 'filled'\?"),
        ({"border": {"sid": 1}}, r"config.border: unknown name 'sid'; did you mean 'side'\?"),
        ({"border": {}}, "config.border: side must be given"),
        ({"border": {"side": "1"}}, "config.border.side: needs int, not '1'"),
        ({"border": {"side": True}}, "config.border.side: needs int, not True"),
        ({"border": {"side": 1, "corners": (1,)}}, r"config.border.corners: needs tuple\[int, int\], not \(1,\)"),
        ({"border": {"side": -1}}, "config.border: side must not be negative"),
        ({"border": 3}, "config.border: needs a section with the fields of Square, not 3"),
        ({"names": ("a", 1)}, r"config.names\[1\]: needs str, not 1"),
        ({"names": "ab"}, r"config.names: needs tuple\[str, ...\], not 'ab'"),
        ({"pairs": (("x", "y"),)}, r"config.pairs\[0\]\[1\]: needs float, not 'y'"),
        ({"limit": 1.5}, "config.limit: needs int, not 1.5"),
        ({"filled": 1}, "config.filled: needs bool, not 1"),
        ({"shape": {"type": "Rond"}}, r"config.shape.type: no part is called 'Rond'; did you mean 'Round'\?"),
        ({"shape": {"type": "Round", "radius": "big"}}, "config.shape.radius: needs float, not 'big'"),
        ({"options": 3}, "config.options: needs "),
    ],
)
def test_mistakes_name_their_path(change, message):
    with pytest.raises(ConfigError, match=message):
        read({"shape": {"type": "Round"}} | change)


def test_whole_numbers_serve_as_floats():
    assert read({"shape": {"type": "Round", "radius": 3}}).shape.radius == 3.0


def test_dotted_paths_are_checked():
    config = to_config_dict(DRAWING)
    check_path(config, "border.side")
    with pytest.raises(ConfigError, match=r"config.border has no 'sides'; did you mean 'side'\?"):
        check_path(config, "border.sides")
    with pytest.raises(ConfigError, match="config.filled has no 'x'"):
        check_path(config, "filled.x")
