"""Every file format gives the same records, in random order, in threads and in processes, and names its errors."""

import gzip
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import source_files
from PIL import Image
from pyarrow import parquet

from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources import find_files, open_source
from mllm_jax.data.sources.tar import INDEX
from mllm_jax.data.synthetic.scenes import Scenes
from mllm_jax.data.tools.inline_media import embedded


def items(source):
    return [embedded(source[i]) for i in range(len(source))]


def expected():
    """The records of `source_files`, written by hand."""
    made = []
    for record in source_files.conversations():
        images = [{"type": "image", "image": data} for data in record["images"]]
        first, text = record["messages"][0], lambda t: {"type": "text", "text": t}
        if "<image>" in first["content"]:
            parts = [part for i, p in enumerate(images) for part in (text("Look: "), p, text(f" and {i}. Look: "))]
            parts[-1] = text(f" and {len(images) - 1}. How many?")
            parts = [part for i, part in enumerate(parts) if i % 3 or not i]
        else:
            parts = [*images, text(first["content"])]
        asked = {"role": "user", "content": parts if images else first["content"]}
        messages = [asked, *record["messages"][1:]]
        made.append({"messages": messages, "kind": record["kind"], "id": record["id"]})
    return made


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    records = source_files.conversations()
    return {kind: write(folder / kind, records) for kind, write in source_files.WRITERS.items()}


@pytest.mark.parametrize("kind", source_files.WRITERS)
def test_every_kind_of_file_gives_the_same_records(kind, paths):
    source = open_source(paths[kind])
    assert items(source) == expected()
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]
    again = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).integers(0, len(source), 60).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(again.__getitem__, order)) == [source[i] for i in order]
    some = open_source(paths[kind], where={"kind": "count", "id": ("c1", "c5", "c6")})
    assert [item["id"] for item in items(some)] == ["c1", "c5"]
    with pytest.raises(ValueError, match="no records where {'kind': 'none'}"):
        open_source(paths[kind], where={"kind": "none"})


def test_the_embedded_set_is_built_for_tfds_and_read_without_tensorflow(tmp_path):
    from mllm_jax.data.synthetic import tfds_builder

    config = tfds_builder.ScenesConfig(name="tiny", train=24, heldout=3)
    builder = tfds_builder.Scenes(config=config, data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    for split, size in (("train", 24), ("heldout", 3)):
        drawn = Scenes(split, size=size)
        read = open_source(builder.data_path, where={"split": split})
        found = sorted(items(read), key=lambda item: int(item["id"].rpartition("/")[2]))
        assert found == [embedded(drawn[i]) for i in range(size)]
    assert "movement" in {item["kind"] for item in items(open_source(builder.data_path))}
    assert pickle.loads(pickle.dumps(read))[2] == read[2]
    with pytest.raises(ValueError, match="no split 'validation'. Use one of train, heldout"):
        open_source(builder.data_path, where={"split": "validation"})
    with pytest.raises(FileNotFoundError, match="tfds:nothing_here: not prepared"):
        open_source("tfds:nothing_here")


def test_endings_say_what_a_file_is(tmp_path, paths):
    """Lines of JSON under other names and in large letters, and compressed ones, which are read at random, too."""
    data = b"".join(path.read_bytes() + b"\n\r\n" for path in find_files(paths["jsonl"]))
    folder = find_files(paths["jsonl"])[0].parent
    for name in ("a.ndjson", "A.JSONL", "a.jsonl.gz", "A.NDJSON.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
        source = open_source(tmp_path / name, root=folder)
        assert items(source) == expected()
        again = pickle.loads(pickle.dumps(source))
        order = np.random.default_rng(0).integers(0, len(source), 60).tolist()
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(again.__getitem__, order)) == [source[i] for i in order]
        assert len(open_source(tmp_path / name, where={"kind": "count"})) == 5
    numbered = tmp_path / "numbered"
    numbered.mkdir()
    (numbered / "train-00001-of-00002.jsonl.gz").write_bytes(gzip.compress(data))
    with pytest.raises(ValueError, match="of the 2 files train-.*-of-00002 these are missing: 0. Restore them.$"):
        open_source(numbered)


def test_damaged_compression_is_named(tmp_path):
    packed = gzip.compress(np.random.default_rng(0).bytes(9999))
    for data in (packed[:-20], packed[:5000] + b"????" + packed[5004:], b"{}", packed + b"{"):
        (tmp_path / "a.jsonl.gz").write_bytes(data)
        with pytest.raises(ValueError, match="a.jsonl.gz: not a readable gzip file"):
            open_source(tmp_path / "a.jsonl.gz")


ROWS = [("7", "What is it?", "A cat."), ("8", 'Say "one",\nthen\ttwo; é\u2028', "x" * 200_000), ("9", "What?", "")]


def table(path, separator, rows=ROWS, columns=("id", "text", "kind"), start="", end="\r\n"):
    quoted = lambda cell: '"' + cell.replace('"', '""') + '"' if set('",;\t\n') & set(cell) else cell
    text = start + "".join(separator.join(map(quoted, row)) + end for row in [columns, *rows])
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.csv", ";"), ("a.TSV", "\t"), ("a.csv", "\t"),
                                             ("a.tsv.gz", "\t"), ("a.csv.gz", ",")])  # fmt: skip
@pytest.mark.parametrize("start, end", [("", "\n"), ("\ufeff", "\r\n"), ("", "\n\n")])
def test_tables(tmp_path, name, separator, start, end):
    path = table(tmp_path / name, separator, start=start, end=end)
    source = pickle.loads(pickle.dumps(open_source(path)))
    found = [(x["id"], x["messages"][0]["content"][0]["text"], x["kind"]) for x in map(source.__getitem__, (2, 1, 0))]
    assert found == ROWS[::-1]
    assert [shard.read(2)[0] for shard in source.shards] == [{"id": "9", "text": "What?", "kind": None}]
    assert len(open_source(path, where={"id": ("7", "9")})) == 2


def test_a_cell_may_list_several_files(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "[a].png")
    names = ("[a].png", '["[a].png", "[a].png"]', '["[a].png", ""]')
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    (tmp_path / "a.csv").write_text("images,question,answer\n" + "".join(f"{name},Q?,A.\n" for name in quoted))
    parts = [record["messages"][0]["content"] for record in open_source(tmp_path / "a.csv")]
    assert [[part["type"] for part in content].count("image") for content in parts] == [1, 2, 1]


def test_rows_that_do_not_fit_their_table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b',text,id\n0,A cat.,1\n1,A dog.\n2,"x"y,3\n3,\xff,4\n4,A cow.,5\n')
    source = open_source(path)
    assert len(source) == 5 and source[0]["id"] == "1" and source[4]["id"] == "5"
    for index, what in ((1, "csv:3: .*2 cells for 3 columns"), (2, "csv:4: .*expected after"), (3, "csv:5: .*utf-8")):
        with pytest.raises(BadRecord, match=what):
            source[index]
    assert len(open_source(path, where={"id": "5"})) == 4  # broken ones are counted when they are read
    for text, what in {
        "text,text\nA,B\n": "several columns are called text",
        "text\n": "no records",
        'text\nA\n"B\nC\nD\n': "lines 3 to 5: .*Close or double the quote",
        'text\nA\n"B\nC "x" \nD\n': "lines 3 to 4: .*Close or double the quote",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=what):
            open_source(path)


def webdataset(path, *samples):
    """A shard of samples {extension: bytes}."""
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for extension, data in members.items():
                source_files.add(tar, f"{number:04d}.{extension}", data)
    return open_source(path)


def test_captions_and_names_in_a_tar(tmp_path):
    a, b = source_files.image(0), source_files.image(1)
    said = [{"from": "human", "value": "<image><image>\nSame?"}, {"from": "gpt", "value": "No."}]
    names = {"conversations": said, "images": ["coco/0002.b.png", "a.png"]}
    wanted = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A."}]
    shard = webdataset(
        tmp_path / "a.tar",
        {"jpg": a, "txt": b"A cat."},
        {"png": a, "json": json.dumps({"text": "A dog.", "id": "dog"}).encode()},
        {"a.png": a, "b.png": b, "json": json.dumps(names).encode()},
        {"png": a, "json": json.dumps({"image": "other.png", "conversations": wanted}).encode()},
        {"png": a},
        {"png": a, "json": b"{"},
    )
    image = lambda data: {"type": "image", "image": data}
    caption = [{"role": "document", "content": [image(a), {"type": "text", "text": "A cat."}]}]
    assert shard[0] == {"messages": caption, "kind": "", "id": "0000"}
    assert shard[1]["id"] == "dog" and shard[1]["messages"][0]["content"][0] == image(a)
    assert shard[2]["messages"][0]["content"][:2] == [image(b), image(a)]
    for index, message in ((3, "missing file .other.png; the sample has png, json"), (4, "no text"), (5, "valid JSON")):
        with pytest.raises(BadRecord, match=f"000{index}: .*{message}"):
            shard[index]


def test_the_index_of_a_tar_is_kept_and_follows_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    webdataset(path, {"txt": b"one"}, {"txt": b"two"})
    kept = tmp_path / ("a.tar" + INDEX)
    assert kept.is_file()
    monkeypatch.setattr(tarfile, "open", None)  # nothing is scanned
    assert len(open_source(path)) == 2
    monkeypatch.undo()
    kept.write_bytes(kept.read_bytes()[:40])
    assert len(open_source(path)) == 2
    assert len(webdataset(path, {"txt": b"one"}, {"txt": b"two"}, {"txt": b"three"})) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", kept.name]


def archive(path, *members, form=tarfile.PAX_FORMAT):
    """A tar of (name, bytes) or of what `TarInfo` cannot be without."""
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                source_files.add(tar, *member)
    return path


def special(name, kind, link=""):
    about = tarfile.TarInfo(name)
    about.type, about.linkname = kind, link
    return about


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_oddities_of_webdatasets(tmp_path, form):
    a, b, c = map(source_files.image, range(3))
    long = "x" * 90 + "/é" + "y" * 80 if form != tarfile.USTAR_FORMAT else "x/y"
    members = [
        special("./", tarfile.DIRTYPE),
        special("./train.d", tarfile.DIRTYPE),
        ("README", b"about"),
        ("__meta__", b"about"),
        ("train.d/._0.jpg", b"of macOS"),
        ("train.d/.DS_Store", b"of macOS"),
        ("./train.d/0.JPG", a),
        ("train.d/._0.txt", b"of macOS"),
        ("train.d/0.TXT", b"zero"),
        special("train.d/1.link.png", tarfile.SYMTYPE, "0.jpg"),
        ("train.d/1.Jpeg", b),
        (long + ".txt", b"long"),
        (long + ".avif", c),
        ("train.d/1.Json", json.dumps({"images": ["1.JPEG"], "text": "one"}).encode()),
        ("train.d/0.txt", b"zero again"),
    ]
    path = archive(tmp_path / "a.tar", *members, form=form)
    source = open_source(path)
    parts = lambda item: [part.get("text", part.get("image")) for part in item["messages"][0]["content"]]
    expected = [("train.d/0", [a, "zero"]), ("train.d/1", [b, "one"]), (long, [c, "long"])]
    expected += [("train.d/0", ["zero again"])]
    for found in (source, open_source(path), pickle.loads(pickle.dumps(source))):  # of the headers, of the index
        assert [(item["id"], parts(item)) for item in map(found.__getitem__, range(len(found)))] == expected


def test_archives_behind_each_other_are_read(tmp_path):
    first = archive(tmp_path / "a.tar", ("0.txt", b"zero"), ("1.txt", b"one")).read_bytes()
    second = archive(tmp_path / "b.tar", ("0.json", b'{"text": "again"}')).read_bytes()
    (tmp_path / "c.tar").write_bytes(first + second)
    source = open_source(tmp_path / "c.tar")
    assert [item["id"] for item in map(source.__getitem__, range(3))] == ["0", "1", "0"] and len(source) == 3
    with pytest.raises(ValueError, match="no records"):
        open_source(archive(tmp_path / "empty.tar"))


def test_no_record_of_a_damaged_tar_is_lost_silently(tmp_path):
    """Cut anywhere, or with any block of a header damaged, a shard is refused, and names the place."""
    path = archive(tmp_path / "whole.tar", *[(f"{n}.txt", b"text" * 200) for n in range(8)])
    data, step = path.read_bytes(), 512 * 3
    assert len(open_source(path)) == 8
    for cut in [*range(step // 3, 8 * step + 1, step // 3), 8 * step + 100]:
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="cut.tar: not a readable tar"):
            open_source(tmp_path / "cut.tar")
    for number in range(8):
        for place in (0, 100, 130, 150):
            damaged = bytearray(data)
            damaged[number * step + place] ^= 0x15
            (tmp_path / "bad.tar").write_bytes(damaged)
            with pytest.raises(ValueError, match="bad.tar: not a readable tar"):
                open_source(tmp_path / "bad.tar")


def test_sizes_that_a_tar_claims(tmp_path):
    """A sparse member, a negative size, and an index that was made by somebody else."""
    sparse = special("1.jpg", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT)
    fields = bytearray(sparse)
    fields[483:495] = b"%011o\0" % 2**32  # the size of the file, and no block of it is there
    fields[148:156] = b" " * 8
    fields[148:156] = b"%06o\0 " % sum(fields)
    zero = archive(tmp_path / "a.tar", ("0.txt", b"zero"), ("1.txt", b"one")).read_bytes()
    (tmp_path / "b.tar").write_bytes(bytes(fields) + zero)
    source = open_source(tmp_path / "b.tar")
    assert source[1]["messages"][0]["content"] == [{"type": "text", "text": "zero"}]
    with pytest.raises(BadRecord, match="1.jpg is a sparse file"):
        source[0]
    negative = bytearray(zero)
    negative[1024 + 124 : 1024 + 136] = (2**96 - 1024).to_bytes(12, "big")
    negative[1024 + 148 : 1024 + 156] = b" " * 8
    negative[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(negative[1024:1536])
    (tmp_path / "c.tar").write_bytes(negative)
    with pytest.raises(ValueError, match="c.tar: not a readable tar"):
        open_source(tmp_path / "c.tar")
    kept = tmp_path / ("a.tar" + INDEX)
    assert len(open_source(tmp_path / "a.tar")) == 2
    stamp = np.load(kept)[:3].tolist()
    for extents in ([0, 0, 2**62], [0, -512, 512], [5, 0, 512], [0, 512, 0], [0, 0, 512, 2, 512, 1024], [0, 0]):
        np.save(kept, np.array(stamp + extents, np.int64))
        assert len(open_source(tmp_path / "a.tar")) == 2
    claimed = kept.read_bytes().replace(b"(9,), }" + 9 * b" ", b"(9" + 9 * b"0" + b",), }")  # 72 GB of numbers
    assert len(claimed) == kept.stat().st_size and claimed != kept.read_bytes()
    kept.write_bytes(claimed)
    assert len(open_source(tmp_path / "a.tar")) == 2


def test_a_file_that_is_written_anew_is_read_anew(tmp_path):
    for text in ("A cat.", "A dog."):
        parquet.write_table(pa.Table.from_pylist([{"text": text}]), tmp_path / "a.parquet")
        assert open_source(tmp_path / "a.parquet")[0]["messages"][0]["content"] == [{"type": "text", "text": text}]


def test_layouts_of_public_parquet_sets(tmp_path):
    """The Cauldron's, and that of LLaVA-OneVision-Data, some rows of which have no image."""
    data = source_files.image(0)
    cauldron = {"images": [{"bytes": data, "path": None}], "texts": [{"user": "A?", "assistant": "B.", "source": "x"}]}
    parquet.write_table(pa.Table.from_pylist([cauldron]), tmp_path / "cauldron.parquet")
    said = [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]
    shown = [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B."}]
    rows = [
        {"id": "0", "image": {"bytes": data, "path": "a.png"}, "conversations": shown, "data_source": "x"},
        {"id": None, "image": None, "conversations": said, "data_source": "y"},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "onevision.parquet")
    content = [{"type": "image", "image": data}, {"type": "text", "text": "A?"}]
    answer = {"role": "assistant", "content": "B."}
    source = open_source(tmp_path / "cauldron.parquet")
    assert source[0]["messages"] == [{"role": "user", "content": content}, answer]
    source = open_source(tmp_path / "onevision.parquet")
    assert source[0]["messages"] == [{"role": "user", "content": content}, answer]
    assert source[1]["messages"] == [{"role": "user", "content": "A?"}, answer] and source[1]["id"].endswith("quet:1")


def test_damaged_files_are_named(tmp_path, paths):
    for kind in ("array_record", "tar", "parquet", "json"):
        path = find_files(paths[kind])[0]
        data = path.read_bytes()
        cut = tmp_path / f"cut{path.suffix}"
        cut.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"cut{path.suffix}: not "):
            open_source(cut)
    with pytest.raises(ValueError, match="Use a complete, uncompressed file"):
        with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
            source_files.add(tar, "a.txt", b"text")
        open_source(tmp_path / "packed.tar")
    writer = source_files.ArrayRecordWriter(str(tmp_path / "odd.array_record"), "group_size:1")
    writer.write(b"\x0anothing that is known")
    writer.close()
    with pytest.raises(BadRecord, match="odd.array_record:0: neither MessagePack nor JSON .*path=FOLDER"):
        open_source(tmp_path / "odd.array_record")[0]


def test_what_a_path_means(tmp_path, paths):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("train-00000-of-00003", "train-00002-of-00003", "test-00000-of-00001"):
        os.symlink(find_files(paths["parquet"])[0], folder / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"several sets \(test, train\). Select one, as in .*/test-\*.parquet"):
        open_source(folder)
    with pytest.raises(ValueError, match="of the 3 files train-.*-of-00003 these are missing: 1. Restore them.$"):
        open_source(f"{folder}/train-*.parquet")
    assert len(open_source(f"{folder}/test-*.parquet")) == 8
    assert len(open_source(f"{folder}/train-0000[02]-*.parquet")) == 16
    assert len(open_source(folder / "train-00002-of-00003.parquet")) == 8
    (folder / "more.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="several kinds, .parquet, .tar"):
        open_source(folder)
    (folder / "notes.md").write_text("x")
    with pytest.raises(ValueError, match="notes.md: unknown kind of file"):
        open_source(folder / "notes.md")
    for path in (folder / "none.tar", f"{folder}/*.jsonl"):
        with pytest.raises(FileNotFoundError, match="no such file, and no file in it"):
            open_source(path)
    with pytest.raises(ValueError, match="Mount the bucket"):
        open_source("gs://bucket/*.tar")
