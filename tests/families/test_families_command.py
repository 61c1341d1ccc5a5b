"""The command that lists published models."""

import pytest
from rich.console import Console

from mllm_jax.families import FAMILIES, __main__


def test_what_a_image_costs():
    one = FAMILIES["llava"].config("next-mistral-7b")
    assert __main__.image_tokens(one, 672, 672) == (2880, 48)  # 5 x 576, and 48 rows
    assert __main__.image_tokens(FAMILIES["llava"].config("1.5-7b"), 100, 3000) == (576, 0)
    one = FAMILIES["llava_onevision"].config("7b")
    assert __main__.image_tokens(one, 2304, 2304) == (
        729 + 81 * 81,
        81,
    )  # 36 tiles and the whole, pooled to nine tiles
    assert __main__.image_tokens(FAMILIES["qwen3_vl"].config("2b"), 1080, 1920) == (34 * 60, 0)


def test_every_family_lists_its_sizes():
    found = {config.family for _, config in __main__.published()}
    assert found == set(FAMILIES) or found < set(FAMILIES)
    assert {
        "llava",
        "llava_next",
        "llava_onevision",
        "qwen2_vl",
        "qwen2_5_vl",
        "clip",
        "dinov2",
        "paligemma",
        "internvl",
    } <= found
    assert {name for name, _ in __main__.published("qwen3_vl_moe")} == {"30b-a3b", "235b-a22b"}


def test_command(capsys):
    assert __main__.main(["--family", "llava_next", "--image", "672x672"]) == 0
    said = capsys.readouterr().out
    assert "2,880 + 48" in said and "7,566,747,648" in said and "qwen" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *((["--image", size], "1920x1080") for size in ("0x7", "0x5", "10x", "abc", "", "4x4x4", "1e3x2", "９x９")),
        (["--image=-3x4"], "1920x1080"),
        (["--image", "80000x40"], "80000x40 has an aspect ratio over 200. Choose another size"),
        (["--image", "1x100000"], "1x100000 has an aspect ratio over 200. Choose another size"),
        (["--image", "100000x100000"], "100000x100000 has over 134217728 pixels. Choose another size"),
        (["--family", "lava"], "did you mean 'llava'"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (11585, 11585)])
def test_every_family_reads_odd_sizes(size):
    """Sizes at the bounds of what is read give at least one visual token."""
    reading = {config.family: config for _, config in __main__.published() if getattr(config, "connector", None)}
    assert all(__main__.image_tokens(config, *size).patches > 0 for config in reading.values()) and len(reading) > 9


@pytest.mark.parametrize("columns", [80, 100, 120, 160])
def test_no_terminal_cuts_a_number(columns):
    console = Console(width=columns, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(__main__.table((2304, 2304), "llava_onevision"))
        console.print(__main__.table((768, 1024), "deepseek_v3"))
    said = captured.get()
    assert max(map(len, said.splitlines())) <= columns and "…" not in said
    for number in ("8,030,807,584", "7,290 + 81", "671,026,419,200"):
        assert number in said
