"""`python -m mllm_jax.data convert`: any source to ArrayRecord, the same records and batches; interrupted, resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import source_files
from paths import HELPERS, ROOT

from mllm_jax.data.__main__ import main
from mllm_jax.data.pipeline.loader import make_loader
from mllm_jax.data.pipeline.packing import Budget
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources import open_source
from mllm_jax.data.synthetic.scenes import SCENES_TEMPLATE, scenes_tokenizer
from mllm_jax.data.text.chat_template import ChatTemplate
from mllm_jax.data.text.tokenizer import Tokenizer
from mllm_jax.data.tools.convert import convert
from mllm_jax.data.tools.inline_media import embedded
from mllm_jax.train.monitor.metrics import read_metrics


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    records = source_files.conversations()
    return {kind: write(folder / kind, records) for kind, write in source_files.WRITERS.items()}


def batches(source, count=3):
    tokenizer = Tokenizer(scenes_tokenizer(), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    processor = Processor(tokenizer, ChatTemplate(SCENES_TEMPLATE), ProcessorSpec(patch=8, min_pixels=256))
    loader = make_loader(source, processor, Budget(128, 2, 64), 2, seed=3, workers=0, prefetch=0)
    return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("kind", source_files.WRITERS)
def test_every_source_becomes_the_same_shards_and_batches(kind, paths, tmp_path, capsys):
    folder = tmp_path / "converted"
    assert main(["convert", paths[kind], str(folder), "--records=4", "--processes=0"]) == 0
    assert "10 records in 3 shards" in capsys.readouterr().out
    names = [f"conversations-0000{i}-of-00003.array_record" for i in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "conversion.json"]
    source, converted = open_source(paths[kind]), open_source(folder)
    assert [converted[i] for i in range(10)] == [embedded(source[i]) for i in range(10)]
    for (one, info), (two, other) in zip(batches(source), batches(converted), strict=True):
        assert info == other
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_array_equal(a, b)


class Numbers:
    """A source of records without images that remembers what was read."""

    def __init__(self, size, broken=(), stop=None):
        self.size, self.broken, self.stop, self.read = size, broken, stop, []

    def __len__(self):
        return self.size

    def labeled(self, index):
        self.read.append(index)
        if index == self.stop:
            raise KeyboardInterrupt
        if index in self.broken:
            raise BadRecord("missing file", f"n{index}", "a.png")
        return {"messages": [{"role": "document", "content": str(index)}], "kind": "", "id": f"n{index}"}


def ids(folder):
    source = open_source(folder)
    return [source[i]["id"] for i in range(len(source))]


def test_an_interrupted_conversion_goes_on_with_the_missing_shards(tmp_path):
    folder, about, told = tmp_path / "out", {"source": "numbers"}, []
    with pytest.raises(KeyboardInterrupt):
        convert(Numbers(23, broken=(3, 20), stop=14), folder, about, records=5)
    assert sorted(p.name for p in folder.glob("*.array_record")) == [
        f"conversations-0000{i}-of-00005.array_record" for i in range(2)
    ]
    with pytest.raises(ValueError, match="of the 5 files .* these are missing: 2, 3, 4. Restore them."):
        open_source(folder)
    (folder / "conversations-00000-of-00005.array_record").unlink()
    source = Numbers(23, broken=(3, 20))
    held = convert(source, folder, about, records=5, progress=told.append)
    assert source.read == [*range(5), *range(10, 23)] and told == [5, 10, 15, 20, 23]
    assert held == (21, 5, {"missing file": 2}, {})
    assert ids(folder) == [f"n{i}" for i in range(23) if i not in (3, 20)]
    assert (folder / "broken.txt").read_text() == "n3: missing file (a.png)\nn20: missing file (a.png)\n"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    again = Numbers(23)
    assert convert(again, folder, about, records=5) == held and not again.read
    (folder / "conversations-00003-of-00005.array_record").unlink()
    with pytest.raises(ValueError, match="was complete, and lacks conversations-00003-of-00005.array_record now"):
        convert(Numbers(23), folder, about, records=5)


def test_other_conversions_are_left_alone(tmp_path):
    folder, about = tmp_path / "out", {"source": "numbers"}
    convert(Numbers(5), folder, about)
    for changed, size, records in (({"source": "others"}, 5, 4096), (about, 6, 4096), (about, 5, 2)):
        with pytest.raises(ValueError, match="holds another conversion; .there, now. differ in"):
            convert(Numbers(size), folder, changed, records)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(ValueError, match="not empty, and not a conversion"):
        convert(Numbers(5), tmp_path / "mine", about)
    assert ids(folder) == [f"n{i}" for i in range(5)]

    class Meanwhile(Numbers):
        def labeled(self, index):
            with pytest.raises(ValueError, match="another conversion is writing there"):
                convert(Numbers(2), tmp_path / "shared", about)
            return super().labeled(index)

    assert convert(Meanwhile(2), tmp_path / "shared", about).records == 2


def test_shards_without_a_usable_record(tmp_path):
    held = convert(Numbers(6, broken=(2, 3)), tmp_path / "one", {}, records=2)
    assert held.records == 4 and ids(tmp_path / "one") == ["n0", "n1", "n4", "n5"]
    with pytest.raises(ValueError, match="of 4 records none can be used: {'missing file': 4}"):
        convert(Numbers(4, broken=range(4)), tmp_path / "two", {}, records=2)


def test_broken_images_are_named(tmp_path, capsys):
    folder = tmp_path / "set"
    source_files.write_jsonl(folder, source_files.conversations())
    (folder / "images" / "c0-0.png").write_bytes(b"nothing")
    (folder / "images" / "c2-1.png").unlink()
    assert main(["convert", str(folder), str(tmp_path / "out"), "--processes=0", "--where", "kind=presence"]) == 0
    assert "2 broken records left out" in capsys.readouterr().out
    broken = (tmp_path / "out" / "broken.txt").read_text()
    assert "c0: not readable" in broken and "c2: missing file (images/c2-1.png)" in broken
    assert ids(tmp_path / "out") == ["c4", "c6", "c8"]


def test_what_is_left_out_of_records_is_counted(tmp_path, capsys):
    turns = [{"role": role, "content": "x"} for role in ("assistant", "user", "assistant")]
    lines = [json.dumps({"messages": turns, "boxes": [number]}) for number in range(3)]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    assert main(["convert", str(tmp_path / "set.jsonl"), str(tmp_path / "out"), "--processes=0", "--records=2"]) == 0
    said = capsys.readouterr().out
    assert 'the field "boxes" is not read: 3 records' in said
    assert "turns before the first question are left out: 3 records" in said
    found = open_source(str(tmp_path / "out"))[0]
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"] and "notes" not in found


def test_settings_that_tell_records_apart_are_kept(tmp_path):
    """A config with `where` needs only another path."""
    asked = [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]
    lines = [
        {"id": i, "split": ("train", "test")[i % 2], "year": 2000 + i, "tags": ["x"], "image": None, **fields}
        for i, fields in enumerate(({"conversations": asked}, {"text": "A page."}, {"conversations": asked}))
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["convert", str(tmp_path / "set.jsonl"), str(tmp_path / "out"), "--processes=0"]) == 0
    for where in ({}, {"split": "test"}, {"split": "train", "year": (2002, 2003)}):
        one, two = (open_source(path, where=where) for path in (tmp_path / "set.jsonl", tmp_path / "out"))
        assert [one[i] for i in range(len(one))] == [two[i] for i in range(len(two))]
    assert len(two) == 1


def test_mistakes_in_the_command(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "none.jsonl"), str(tmp_path / "out")]) == 1
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()
    for wrong, said in ((["--where", "split"], "needs FIELD=VALUE"), (["--records", "0"], "must be at least 1")):
        with pytest.raises(SystemExit):
            main(["convert", "a", "b", *wrong])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--help"])
    assert ended.value.code == 0 and "to resume after an interruption" in capsys.readouterr().out


def test_a_killed_conversion_of_several_processes_goes_on(tmp_path):
    """SIGKILL in the middle ends all processes, and the same command completes the set."""
    lines = [json.dumps({"id": f"n{i}", "text": f"page {i} " * 300}) for i in range(20_000)]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "mllm_jax.data", "convert", "set.jsonl", "out", "--records=500", "--processes=2"]
    shards = lambda: list((tmp_path / "out").glob("*.array_record"))
    first = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    while not shards() and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    group_is_there = lambda: subprocess.run(["pgrep", "-g", str(first.pid)], capture_output=True).returncode == 0
    for _ in range(200):
        if not group_is_there():
            break
        time.sleep(0.05)
    assert not group_is_there()
    there = {path.name: path.stat().st_mtime_ns for path in shards()}
    assert 0 < len(there) < 40
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "20,000 records in 40 shards" in done.stdout, done.stderr
    assert {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in there} == there
    assert ids(tmp_path / "out") == [f"n{i}" for i in range(20_000)]


@pytest.mark.slow
def test_a_run_trains_the_same_on_what_was_converted(paths, tmp_path):
    """Nothing but the path changes, and every loss is equal."""
    assert main(["convert", paths["tar"], str(tmp_path / "converted"), "--processes=2"]) == 0
    code = "from tiny_run import get_config as tiny, load_config\n"
    code += "def get_config():\n    config = tiny()\n    config.data = load_config('sft').data\n"
    code += "    config.data.update(tokens=64, patch_rows=1, patches_per_row=112, batch=8, min_pixels=256)\n"
    code += "    return config\n"
    (tmp_path / "run.py").write_text(code)
    losses = []
    for number, path in enumerate((paths["tar"], tmp_path / "converted")):
        command = [sys.executable, "-m", "mllm_jax.train", f"--config={tmp_path}/run.py", f"--config.data.path={path}"]
        command += [f"--workdir={tmp_path}/{number}", "--config.optim.steps=6", "--config.train.log_every=1"]
        places = os.pathsep.join([str(HELPERS), str(ROOT)])
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": places})
        losses.append([line["loss"] for line in read_metrics(tmp_path / str(number)) if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 6
