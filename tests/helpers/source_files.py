"""One small set of conversations with images, written in every format that is read."""

import io
import json
import pathlib
import tarfile

import numpy as np
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from pyarrow import parquet

from mllm_jax.data.sources.array_record import pack

IMAGES = (1, 0, 2, 1, 3, 1, 0, 1, 2, 1)  # of each conversation


def image(number: int) -> bytes:
    """A PNG file."""
    rng = np.random.default_rng(number)
    size = (16 + 8 * (number % 3), 16 + 8 * (number % 4), 3)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(file, "PNG")
    return file.getvalue()


def conversations() -> list[dict]:
    """Records in one layout, whose "images" are bytes. In some, placeholders say where; others have two turns."""
    made, number = [], 0
    for index, count in enumerate(IMAGES):
        asked = "Any red?" if index % 3 else "".join(f"Look: <image> and {i}. " for i in range(count)) + "How many?"
        turns = [asked, "yes"] + (["What shape?", "square"] if index % 4 == 1 else [])
        made.append(
            {
                "id": f"c{index}",
                "kind": ("presence", "count")[index % 2],
                "images": [image(number + i) for i in range(count)],
                "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)],
            }
        )
        number += count
    return made


def write_jsonl(folder: pathlib.Path, records: list[dict]) -> str:
    """Two files that name images beside them."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for record in records:
        names = [f"images/{record['id']}-{i}.png" for i in range(len(record["images"]))]
        for name, data in zip(names, record["images"]):
            (folder / name).write_bytes(data)
        lines.append(json.dumps(record | {"images": names}))
    for number, part in enumerate((lines[:4], lines[4:])):
        (folder / f"set-{number}.jsonl").write_text("\n".join(part) + "\n")
    return f"{folder}/*.jsonl"


def write_json(folder: pathlib.Path, records: list[dict]) -> str:
    pattern = write_jsonl(folder, records)
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    (folder / "all.json").write_text(json.dumps([json.loads(line) for line in lines]))
    return pattern.replace("*.jsonl", "all.json")


def write_array_record(folder: pathlib.Path, records: list[dict]) -> str:
    """Two shards of a numbered set."""
    folder.mkdir(parents=True)
    for number, part in enumerate((records[:3], records[3:])):
        writer = ArrayRecordWriter(str(folder / f"set-{number:05d}-of-00002.array_record"), "group_size:1")
        for record in part:
            writer.write(pack(record))
        writer.close()
    return str(folder)


def write_tar(folder: pathlib.Path, records: list[dict]) -> str:
    """Two shards whose members are KEY.json, KEY.0.png, KEY.1.png ..."""
    folder.mkdir(parents=True)
    for number, part in enumerate((records[:7], records[7:])):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index, record in enumerate(part):
                fields = {name: value for name, value in record.items() if name != "images"}
                key = f"train/{index:06d}"
                add(tar, f"{key}.json", json.dumps(fields).encode())
                for i, data in enumerate(record["images"]):
                    add(tar, f"{key}.{i}.png", data)
    return f"{folder}/*.tar"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(data)
    tar.addfile(about, io.BytesIO(data))


def write_parquet(folder: pathlib.Path, records: list[dict]) -> str:
    """Two files of three rows a group, with images as Hugging Face's datasets have them."""
    folder.mkdir(parents=True)
    rows = [record | {"images": [{"bytes": data, "path": None} for data in record["images"]]} for record in records]
    for number, part in enumerate((rows[:8], rows[8:])):
        path = folder / f"train-{number:05d}-of-00002.parquet"
        parquet.write_table(pa.Table.from_pylist(part), path, row_group_size=3)
    return f"{folder}/train-*.parquet"


WRITERS = {
    "jsonl": write_jsonl,
    "json": write_json,
    "array_record": write_array_record,
    "tar": write_tar,
    "parquet": write_parquet,
}
