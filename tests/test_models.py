"""The command that lists published models."""

import pytest

from mllm_jax import models
from mllm_jax.families import FAMILIES, llava, llava_onevision, qwen3_vl


def test_what_a_picture_costs():
    assert models.picture_tokens(llava.sizes("next-mistral-7b"), 672, 672) == (2880, 48)  # 5 x 576, and 48 rows
    assert models.picture_tokens(llava.sizes("1.5-7b"), 100, 3000) == (576, 0)
    one = llava_onevision.sizes("7b")
    assert models.picture_tokens(one, 2304, 2304) == (729 + 81 * 81, 81)  # 36 tiles and the whole, pooled to nine tiles
    assert models.picture_tokens(qwen3_vl.sizes("2b"), 1080, 1920) == (34 * 60, 0)


def test_every_family_lists_its_sizes():
    found = {config.family for _, config in models.published()}
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
    assert {name for name, _ in models.published("qwen3_vl_moe")} == {"30b-a3b", "235b-a22b"}


def test_command(capsys):
    assert models.main(["--family", "llava_next", "--image", "672x672"]) == 0
    said = capsys.readouterr().out
    assert "2,880 + 48" in said and "7,566,747,648" in said and "qwen" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--image", "0x7"], "1920x1080"), (["--family", "lava"], "did you mean 'llava'")],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        models.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
