"""Inspection of data: counts equal those of the records, and every broken record is named."""

import json
import pathlib
import re

import numpy as np
import pytest
import source_files
from html_page import Page
from packing_examples import MERGE, VALUES, conversation
from paths import ROOT

from mllm_jax.data.__main__ import main
from mllm_jax.data.pipeline.loader import Info
from mllm_jax.data.pipeline.packing import Budget, collate, fill
from mllm_jax.data.tools import inspection_page
from mllm_jax.data.tools.inspection import Inspection
from mllm_jax.data.vision.images import patchify, unpatchify

SCENES = str(ROOT / "configs" / "scenes.py")
HERE = ["--config.data.workers=0", "--config.data.prefetch=0"]
CONFIG = f"""
import runpy
from mllm_jax.train.runs.data_files import FilesData, MixtureData, Part
from mllm_jax.train.runs.config import Run, Stage, run_config

model = runpy.run_path({SCENES!r})["model"]
shape = dict(batch=2, tokens=256, patch_rows=2, patches_per_row=64, min_pixels=256, window=0.01)

def get_config():
    sets = dict(first=Part(path="set-0.jsonl"), second=Part(path="set-1.jsonl", weight=3.0))
    mixed = MixtureData(**shape, sources=sets)
    stages = dict(align=Stage(), mix=Stage(data=mixed))
    data = FilesData(**shape, path="set-*.jsonl")
    return run_config(Run(model=model(), processor="scenes", data=data, stages=stages))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten conversations with images, and one that names a missing file."""
    folder = tmp_path_factory.mktemp("inspect")
    source_files.write_jsonl(folder / "data", source_files.conversations())
    (folder / "data" / "cut.png").write_bytes(b"")
    lost = {"image": "lost.png", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    with open(folder / "data" / "set-1.jsonl", "a") as file:
        file.write(json.dumps(lost | {"id": "lost one"}) + "\n")
    spoken = [{"role": role, "content": "Hm."} for role in ("user", "assistant", "user")]
    more = [{"messages": spoken, "mood": "good"}, lost | {"image": "cut.png", "id": "cut one"}]
    (folder / "data" / "more.jsonl").write_text("".join(json.dumps(record) + "\n" for record in more))
    (folder / "data" / "config.py").write_text(CONFIG)
    return folder / "data"


def words(path) -> tuple[Page, str]:
    page = Page(pathlib.Path(path).read_text(encoding="utf-8"))
    return page, " ".join(" ".join(page.words).split())


def test_scenes(tmp_path, capsys):
    assert main(["inspect", "--config", SCENES, "--count=60", f"--html={tmp_path / 'page.html'}", *HERE]) == 0
    said = capsys.readouterr().out
    assert "fill of tokens" in said and "movement" in said and str(tmp_path / "page.html") in said
    page, text = words(tmp_path / "page.html")
    assert page.tags.count("article") == 12 and page.tags.count("svg") == 16 * 3
    assert "Any " in text and "<|im_start|>user" in text and "left out 0" in text


def test_a_broken_record_and_a_stage(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["inspect", "--config=config.py", "--stage=align", "--html=page.html", *HERE]) == 0
    said = capsys.readouterr().out
    assert "lost one: missing file" in said and "11, all of them" in said
    _, text = words("page.html")
    assert "records read 11, all of them left out 1 conversations packed 10 images 12" in text
    assert "Data of config.py, stage align" in text and "lost one: missing file" in text


def test_what_is_left_out_of_records(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words_of = ["--config=config.py", "--stage=align", "--config.data.path=more.jsonl", "--html=more.html", *HERE]
    assert main(["inspect", *words_of]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert 'the field "mood" is not read 1 turns after the last answer are left out 1' in said and "left out 1" in said
    assert "not readable 1 cut one: not readable (" in said
    assert 'Read in part what is left out records the field "mood" is not read 1 turns after' in words("more.html")[1]


def test_a_record_of_every_reason_is_named(folder, monkeypatch, capsys):
    """Includes reasons whose messages differ in wording, and reasons that follow many of another kind."""
    monkeypatch.chdir(folder)
    answered = lambda text: [{"role": "user", "content": text}, {"role": "assistant", "content": "!"}]
    records = [{"id": f"lost {i}", "image": "lost.png", "messages": answered("?")} for i in range(60)]
    records += [{"id": "long one", "messages": answered("many words " * 99)}]
    records += [{"id": "no image", "image": "bad.png", "messages": answered("?")}]
    records += [{"id": f"good {i}", "messages": answered("?")} for i in range(200)]
    (folder / "bad.png").write_bytes(b"not an image")
    (folder / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words_of = ["--config=config.py", "--stage=align", "--config.data.path=bad.jsonl", "--html=bad.html"]
    assert main(["inspect", *words_of, "--count=300", *HERE]) == 0
    said = capsys.readouterr().out
    for line in ("missing file +60 +lost", "over the budget +1 +long one: ", "not readable +1 +no image: "):
        assert re.search(f"^{line}", said, re.MULTILINE), said
    text = words("bad.html")[1]
    assert "long one: " in text and "no image: " in text and "52 of them" in text


@pytest.mark.parametrize("prefetch", [0, 2])
def test_broken_records_behind_the_last_batch_are_counted(folder, monkeypatch, capsys, prefetch):
    """Whatever their place in the order of training: with few that can be used, most are behind the last batch."""
    monkeypatch.chdir(folder)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    for good in (1, 2, 3):
        records = [{"id": f"lost {i}", "image": "lost.png", "messages": messages} for i in range(40)]
        records += [{"id": f"good {i}", "messages": messages, "mood": "good"} for i in range(good)]
        (folder / "rest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        words_of = ["--config=config.py", "--stage=align", "--config.data.path=rest.jsonl", "--config.data.workers=0"]
        assert main(["inspect", *words_of, f"--config.data.prefetch={prefetch}", "--config.data.batch=1"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"records read {40 + good}, all of them left out 40 conversations packed {good} " in said
        assert "missing file 40 lost " in said and f'the field "mood" is not read {good}' in said


def test_a_part_of_the_records_is_said_to_be_one(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words_of = ["--config=config.py", "--stage=align", "--html=part.html", *HERE]
    assert main(["inspect", *words_of, "--count=1", "--config.data.batch=1"]) == 0
    read = int(re.search(r"records read +(\d+) of 11\n", capsys.readouterr().out)[1])
    assert 1 <= read < 11 and f"The first {read} records in the order of training" in words("part.html")[1]


def test_a_mixture(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["inspect", "--config=config.py", "--stage=mix", "--count=80", *HERE]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["first"][1:4] == ["4", "25", "%"] and 20 < float(lines["first"][4]) < 30
    assert lines["second"][1:4] == ["7", "75", "%"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=lost.py"], "there is no config file lost.py"),
        (["--config=config.py"], "Set one with --stage: align, mix"),
        (
            ["--config=config.py", "--stage=mix", "--config.data.pth=a"],
            "config.data has no 'pth'; did you mean 'path'?",
        ),
        (
            ["--config=config.py", "--stage=align", "--html=no/page.html"],
            "--html=no/page.html: its folder does not exist",
        ),
        (["--config=config.py", "--stage=align", "--config.data.tokens=4", *HERE], "of 11 records only 0 can be used"),
    ],
)
def test_mistakes_are_told_in_a_line(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    assert main(["inspect", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_numbers_are_those_of_the_conversations():
    """Rows packed by hand: two conversations with images, one without, an empty row."""
    rows = [[conversation(7, [(4, 6), (2, 2)], 1), conversation(5)], [], [conversation(3, [(4, 6)], 2)]]
    budget = Budget(32, 2, 32)
    batch = collate(rows, budget, merge=MERGE, values=VALUES)
    info = Info(3, 0, 0, fill(batch), [["a", "b"], [], ["a"]], 0, {})
    seen = Inspection(_Sizes(), rows=2, samples=2)
    seen.add(batch, info)
    seen.add(batch, info, whole=False)
    assert seen.tokens == [14, 5, 9] * 2 and seen.visual == [7, 0, 6] * 2 and seen.images == [2, 0, 1] * 2
    assert seen.learned == [13, 4, 8] * 2 and seen.kinds == {"a": 4, "b": 2}
    assert seen.sizes == {(6, 4): 4, (2, 2): 2} and seen.fill == [{"tokens": 28 / 96, "patches": 52 / 192}]
    first, second = seen.rows
    assert [(s.kind, s.first, s.count, s.number) for s in first.tokens] == [
        ("text", 0, 1, 1), ("learned text", 1, 6, 1), ("image", 7, 7, 1), ("text", 14, 1, 2),
        ("learned text", 15, 4, 2), ("padding", 19, 13, 0),
    ]  # fmt: skip
    assert [[s.count for s in part] for part in first.patches] == [[24, 4, 4], [32]]
    assert [sample.kind for sample in seen.samples] == ["a", "b"]
    shown = [image for part in seen.samples[0].parts for image in part.images]
    pixels = unpatchify(rows[0][0].images[0].patches, (4, 6), 1, MERGE)[0]
    np.testing.assert_array_equal(np.asarray(shown[0]), pixels)


class _Sizes:
    """The attributes that an inspection reads of a processor."""

    video_id = None

    class spec:
        patch, merge, queries = 1, MERGE, 0

    class tokenizer:
        decode = staticmethod(lambda tokens, special: str(tokens))


def test_pixels_come_back_from_patches():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 18, 3), np.uint8)
    patches = patchify(pixels, 3, 2, 2)
    np.testing.assert_array_equal(unpatchify(patches, (4, 6), 3, 2), pixels)


@pytest.mark.parametrize("values", [[], [0, 0], [3], [1, 2, 2, 0, 9], list(range(400)), [1, 10, 100, 1000, 99999]])
def test_histograms(values):
    drawing = inspection_page.histogram("x", values)
    if not any(values):
        assert drawing is None
        return
    assert sum(int(bar["label"].split(": ")[1].replace(",", "")) for bar in drawing["bars"]) == np.count_nonzero(values)
    assert all(0 <= bar["left"] and bar["left"] + bar["width"] < 100.01 for bar in drawing["bars"])
    assert max(bar["height"] for bar in drawing["bars"]) == 100 and drawing["none"] == values.count(0)
    assert all(0 <= x <= 100 for x, _ in drawing["x_ticks"] + drawing["y_ticks"])
