"""The report renders whatever a run left behind, shows people's text as text, and its charts have round ticks."""

import math

import numpy as np
import pytest
from html_page import Page
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mllm_jax.common.format import percent, short
from mllm_jax.common.html import log_ticks, ticks
from mllm_jax.evaluate.report import Answer, Kind, Line, Run, chart, write_report


def render(folder, *runs, **options) -> Page:
    path = write_report(folder / "report.html", runs, **{"title": "A run"} | options)
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def a_run(name="with images", steps=50, **fields):
    records = [
        {"step": 10 * i, "mean_loss": 5 / i, "tokens_per_second": 9e3, "fill_tokens": 0.98, "fill_patches": 0.9}
        for i in range(1, steps + 1)
    ]
    records.append({"step": 10 * steps, "heldout": {"exact_match": {"color": 0.9, "count": 0.5}}})
    return Run(name, records, {"color": 0.95, "count": 0.5}, **fields)


def test_all_sections(tmp_path):
    video = np.zeros((4, 8, 8, 3), np.uint8)
    video[2:] = 255  # two different frames, each twice
    page = render(
        tmp_path,
        a_run(marks=[(250, "killed here")]),
        a_run("text-only"),
        kinds=[Kind("color", 40, 1 / 6, 0.9), Kind("count", 40, 0.2, 0.9)],
        answers=[
            Answer("color", "What color?", "red", "red", Image.new("RGBA", (5, 9))),
            Answer("movement", "Which way?", "up", "down", video),
            Answer("color", "And without?", "red", "", None),
        ],
        parts={"encoder": 3_000, "decoder": 9_000},
        facts={"Steps": "500"},
        config="width: 96",
    )
    words = " ".join(page.words)
    for word in [
        "killed here",
        "text-only",
        "95 %",
        "16.7 %",
        "✓ red",
        "✗ down",
        "(nothing)",
        "9,000",
        "25 %",
        "width: 96",
    ]:
        assert word in words
    assert page.tags.count("img") == 3
    assert "script" not in page.tags and "link" not in page.tags
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(link.startswith("data:image/png;base64,") for link in links)


@pytest.mark.parametrize(
    "run",
    [
        Run("nothing"),
        Run("one point", [{"step": 1, "mean_loss": 3.0}]),
        Run("step zero", [{"step": 0, "mean_loss": 3.0, "heldout": {"exact_match": {"color": 0.0}}}], {"color": 0.0}),
        Run("flat", [{"step": i, "mean_loss": 1.0, "fill_tokens": 1.0} for i in range(3)]),
        Run(
            "broken",
            [{"step": i, "mean_loss": v} for i, v in enumerate([math.nan, 1.0, math.inf, 0.0, -1.0, None, "x", 2.0])],
        ),
        Run("all broken", [{"step": 1, "mean_loss": math.nan}, {"step": 2, "heldout": None}]),
        Run("other kinds", [{"step": 1, "heldout": {"exact_match": {"color": 0.5}}}], {"shape": math.nan}),
        Run("long", [{"step": i, "mean_loss": 1 / (i + 1)} for i in range(5000)]),
    ],
    ids=lambda run: run.name,
)
def test_odd_runs(tmp_path, run):
    page = render(tmp_path, run, answers=[], parts={}, kinds=[Kind("color", 0, None, 0.9), Kind("shape")])
    positions = "".join(value for name, value in page.attributes if name in ("points", "style"))
    assert "nan" not in positions and "inf" not in positions
    assert len(positions) < 20_000


def test_who_decides_what_is_right(tmp_path):
    answers = [Answer("color", "What color?", "red", "Red.")]
    assert "✗ Red." in render(tmp_path, Run("strict"), answers=answers).words
    assert "✓ Red." in render(tmp_path, Run("kind"), answers=answers, right=lambda said, truth: True).words


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report(tmp_path / "report.html", [], title="")


def test_text_of_people_stays_text(tmp_path):
    evil = "\"><script>alert('1')</script><img src=x onerror=alert(1)> {{ 7 * 7 }} &amp;"
    page = render(
        tmp_path,
        Run(evil, [{"step": 1, "mean_loss": 1.0, "heldout": {"exact_match": {evil: 0.5}}}], {evil: 0.5}, [(1, evil)]),
        title=evil,
        lead=evil,
        kinds=[Kind(evil, 1, 0.5, 0.9)],
        answers=[Answer(evil, evil, evil, evil, Image.new("L", (3, 3)))],
        parts={evil: 1},
        facts={evil: evil},
        config=evil,
    )
    assert "script" not in page.tags and page.tags.count("img") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.words.count(evil) >= 10


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_within(low, span, count):
    high = low + span
    found = ticks(low, high, count)
    assert 1 <= len(found) <= count + 1
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found)
    steps = np.diff(found)
    if len(steps):
        np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
        assert round(steps[0] / 10 ** math.floor(math.log10(steps[0] * 1.0001)), 3) in (1, 2, 5)


def test_ticks_that_people_expect():
    assert ticks(0.4, 2.4, 2) == [1, 2] and ticks(1.1, 1.9, 2) == [1.5]
    assert ticks(0, 2600, 4) == [0, 1000, 2000]
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(3, 3) == [3]
    assert log_ticks(0.04, 6) == [0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    assert log_ticks(1e-6, 1e6)[0] <= 1e-5 and 2 <= len(log_ticks(1e-6, 1e6)) <= 7
    assert log_ticks(0.61, 0.69) == [0.62, 0.64, 0.66, 0.68]


def test_numbers_are_short():
    written = {0: "0", 0.25: "0.25", 0.1 + 0.2: "0.3", 1000: "1,000", 9000: "9,000", 12_340: "12.3k", -35_000: "-35k"}
    written |= {999_999: "1M", 1_234_567: "1.23M", 2.1e9: "2.1G"}
    assert {number: short(number) for number in written} == written
    written = {0: "0 %", 1: "100 %", 0.975: "97.5 %", 2 / 3: "66.7 %", None: "–", math.inf: "–"}
    assert {share: percent(share) for share in written} == written


def test_labels_of_lines_never_cover_one_another():
    lines = [Line(str(i), [(0, 1.0), (1, 0.01 * i)], i, f"line {i}") for i in range(4)]
    drawn = chart("all end low", lines, height=150, low=0.0)
    labels = sorted(line["label"] for line in drawn["lines"])
    assert labels[-1] <= 100 and all(b - a >= 9.9 for a, b in zip(labels, labels[1:]))


def test_gaps_break_a_line():
    drawn = chart("gap", [Line("a", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0)])])
    assert drawn["lines"][0]["pieces"] == ["0.0,100.0 33.33,0.0", "100.0,100.0 100.0,100.0"]


def test_the_load_of_experts(tmp_path):
    """Two layers of four experts, of which text and images chose some; no video."""
    load = [[[4, 0, 0, 0], [1, 1, 1, 1], [0] * 4], [[2, 2, 0, 0], [0, 0, 0, 8], [0] * 4]]
    records = [{"step": 5, "heldout": {"exact_match": {}, "expert_load": load}}]
    page = render(tmp_path, Run("experts", records))
    titles = [value for name, value in page.attributes if name == "title"]
    assert len(titles) == 3 * 2 * 4 and "video" not in page.words
    assert titles[:4] == [f"expert {i}: {x} x the mean" for i, x in enumerate((2.5, 0.5, 0.5, 0.5))]
    assert "expert 3: 4.0 x the mean" in titles


def test_where_the_time_went(tmp_path):
    seconds = {"steps": 3725.0, "compile": 0.0, "lost": 1200.0, "down": 75.0}
    page = render(tmp_path, Run("killed", [{"step": 1, "seconds": {"steps": 1.0}}, {"step": 5, "seconds": seconds}]))
    for word in ("Wall time", "1:02:05", "74.5 %", "0:20:00", "24 %", "nothing ran"):
        assert word in page.words, word
    assert "compile" not in page.words
