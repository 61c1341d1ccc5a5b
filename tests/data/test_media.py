"""Names of media in records and messages: paths of any system, file and data URIs, base64."""

import base64
import io
import json
import os
import tarfile
import unicodedata
import urllib.parse

import numpy as np
import pytest
import source_files
from PIL import Image

from mllm_jax.data.media import LONGEST_NAME, BadName, locate, resolve, source_name
from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources import open_source
from mllm_jax.data.vision import images


def image(form="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.arange(17 * 23 * 3, dtype=np.uint8).reshape(17, 23, 3)).save(file, form)
    return file.getvalue()


DATA = image()
TEXT = base64.b64encode(DATA).decode()
URL_SAFE = base64.urlsafe_b64encode(DATA).decode()
EMBEDDED = {
    "data URI": f"data:image/png;base64,{TEXT}",
    "large letters": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "no media type": f"data:;base64,{TEXT}",
    "parameters": f"data:image/png;name=a.png;charset=utf-8;base64,{TEXT}",
    "wrong media type": f"data:video/mp4;base64,{TEXT}",
    "line breaks": "data:image/png;base64,\n" + "\r\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)) + "\n",
    "for URLs": f"data:image/png;base64,{URL_SAFE}",
    "no padding": f"data:image/png;base64,{TEXT.rstrip('=')}",
    "percent-encoded": f"data:image/png;base64,{urllib.parse.quote(TEXT, safe='')}",
    "not base64": f"data:image/png,{urllib.parse.quote_from_bytes(DATA)}",
    "without a prefix": TEXT,
    "without a prefix, for URLs": URL_SAFE.rstrip("="),
    "without a prefix, in lines": base64.encodebytes(DATA).decode(),
}


@pytest.mark.parametrize("kind", EMBEDDED)
def test_files_within_names(kind, tmp_path):
    assert locate(tmp_path, EMBEDDED[kind]) == resolve(EMBEDDED[kind]) == DATA
    assert images.load_image(EMBEDDED[kind]).size == (23, 17)


@pytest.mark.parametrize("form", ["JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_base64_without_a_prefix_is_known_by_its_first_bytes(form, tmp_path):
    data = image(form)
    assert locate(tmp_path, base64.b64encode(data).decode()) == data


@pytest.mark.parametrize("name", ["data:image/png;base64,@@@@", "data:image/png;base64,AAAAA", "data:image/png;base64,",
                                  "data:image/png,", "data:image/png;base64,é"])  # fmt: skip
def test_broken_data_uris_are_named(name, tmp_path):
    with pytest.raises(BadName) as caught:
        locate(tmp_path, name)
    assert caught.value.args[0] == "not a readable data URI" and caught.value.args[1].startswith(name + " ")
    with pytest.raises(ValueError, match="^not a readable data URI: data:image/png.* (is not base64|holds no bytes)"):
        images.open_image(name)


def test_errors_do_not_print_what_names_hold(tmp_path):
    text = "data:image/png;base64," + base64.b64encode(b"no image" * 10_000).decode()
    broken = text[:-9] + "?" + text[-8:]
    errors = []
    for source in (text, broken, "a/" * 2000 + "b.png", "x" * 5000, "https://example.org/" + "x" * 10_000):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            images.load_image(source)
        errors.append(str(caught.value))
        if source != text:
            with pytest.raises(BadName) as caught:
                locate(tmp_path, source)
            errors.append(" ".join(caught.value.args))
    assert max(map(len, errors)) < LONGEST_NAME + 150
    assert source_name(broken).startswith("data:image/png;base64,") and f"({len(broken)} characters)" in errors[1]
    assert source_name("a/b.png") == "a/b.png"


@pytest.fixture
def root(tmp_path):
    """Two folders of images; the second is outside of the root."""
    for name in ("data/images/a b%20c.png", "data/images/d.png", "data/x\\y.png", "outside/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(DATA)
    for form in ("NFC", "NFD"):
        (tmp_path / "data" / unicodedata.normalize(form, f"é-{form}.png")).write_bytes(DATA)
    os.symlink(tmp_path / "data/images", tmp_path / "data/inner")
    os.symlink(tmp_path / "outside", tmp_path / "data/outer")
    os.symlink(tmp_path / "data", tmp_path / "other")
    os.symlink("loop", tmp_path / "data/loop")
    return (tmp_path / "data").resolve()


def test_paths_inside_of_the_root(root):
    a, d = root / "images/a b%20c.png", root / "images/d.png"
    names = {
        "images/d.png": d, "./images//d.png": d, "images/../images/d.png": d, "../data/images/d.png": d,
        "inner/d.png": d, "images\\d.png": d, f"{root}/images/d.png": d, f"{root.parent}/other/images/d.png": d,
        "images/a b%20c.png": a, f"file://{a}": a, f"file://{urllib.parse.quote(str(a))}": a,
        f"FILE://localhost{d}": d, "file://images/d.png": d, "x\\y.png": root / "x\\y.png",
    }  # fmt: skip
    assert {name: locate(root, name) for name in names} == {name: str(path) for name, path in names.items()}
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        path = locate(root, unicodedata.normalize(other, f"é-{form}.png"))
        assert path == str(root / unicodedata.normalize(form, f"é-{form}.png"))


@pytest.mark.parametrize(
    "name, reason",
    [
        ("../outside/e.png", "path leaves the data root"),
        ("{parent}/outside/e.png", "path leaves the data root"),
        ("file://{parent}/outside/e.png", "path leaves the data root"),
        ("file:///etc/%70asswd", "path leaves the data root"),
        ("..\\outside\\e.png", "path leaves the data root"),
        ("outer/e.png", "path leaves the data root"),
        ("/etc/passwd", "path leaves the data root"),
        ("{parent}/data-of-others/e.png", "path leaves the data root"),
        ("images/none.png", "missing file"),
        ("images", "missing file"),
        ("{root}", "missing file"),
        ("C:\\images\\d.png", "missing file"),
        ("images/a%20b%2520c.png", "missing file"),
        ("x" * 300, "missing file"),
        ("loop/d.png", "missing file"),
        ("data:a", "missing file"),
        ("https://example.org/d.png", "not a local file"),
        ("s3://bucket/d.png", "not a local file"),
        ("", "not a path"),
        ("images/\0d.png", "not a path"),
        ("images/\ud800.png", "not a path"),
        (7, "not a path"),
    ],
)
def test_names_that_are_refused(root, name, reason):
    name = name.format(root=root, parent=root.parent) if isinstance(name, str) else name
    with pytest.raises(BadName) as caught:
        locate(root, name)
    assert caught.value.args[0] == reason


def test_a_message_names_its_files_like_a_record(root, monkeypatch):
    monkeypatch.chdir(root)
    assert resolve("images/d.png") == "images/d.png" and resolve(f"file://{root}/x\\y.png") == f"{root}/x\\y.png"
    assert images.load_image("images\\d.png").size == (23, 17)
    for other in (DATA, root / "x", None, 7):
        assert resolve(other) is other
    with pytest.raises(ValueError, match="^not a local file: https://example.org/a.png; download it"):
        images.open_image("https://example.org/a.png")
    with pytest.raises(FileNotFoundError, match="none.png: no such image"):
        images.open_image("none.png")


def test_records_hold_files_in_every_layout_and_format(tmp_path):
    """OpenAI's and Hugging Face's, in JSON Lines and in a WebDataset, where other names are members."""
    uri, answer = EMBEDDED["data URI"], {"role": "assistant", "content": "A cat."}
    part = {"type": "image_url", "image_url": {"url": uri, "detail": "low"}}
    asked = {"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}
    turns = [{"role": "user", "content": "What is it?"}, answer]
    records = [{"messages": [asked, answer]}, {"messages": turns, "images": [{"bytes": TEXT, "path": None}]}]
    records += [{"messages": turns, "image": uri}, {"text": "A cat.", "image": {"path": uri}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for number, record in enumerate(records):
            source_files.add(tar, f"{number}.json", json.dumps(record).encode())
            source_files.add(tar, f"{number}.png", b"not this one")
    for name in ("a.jsonl", "b.tar"):
        source = open_source(tmp_path / name)
        for index in range(len(records)):
            assert source[index]["messages"][0]["content"][0] == {"type": "image", "image": DATA}
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "A cat.", "image": uri[:-9] + "?" + uri[-8:]}))
    with pytest.raises(BadRecord, match=r"^c.jsonl:1: not a readable data URI .data:image/png;base64,.* is not base64"):
        open_source(tmp_path / "c.jsonl")[0]
