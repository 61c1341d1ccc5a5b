"""docs/data.md: its commands run, its example records are read, its Python is a config."""

import ast
import json
import pathlib
import re
import shlex

import pytest
import source_files
from absl import flags
from ml_collections import config_flags
from paths import ROOT

from mllm_jax.data.__main__ import main
from mllm_jax.data.pipeline.workers import OVER_BUDGET
from mllm_jax.data.records.records import read_record
from mllm_jax.data.sources import open_source
from mllm_jax.data.synthetic import tfds_builder
from mllm_jax.train.runs.config import read_run

PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    shlex.split(line)[2:]
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of a reader of the page, and the results of its commands, in order."""
    folder = tmp_path_factory.mktemp("docs")
    records = [
        record | {"task": ("vqa", "ocr", "chat")[i % 3]} for i, record in enumerate(source_files.conversations())
    ]
    source_files.write_jsonl(folder / "plain", records)
    (folder / "plain" / "images").rename(folder / "images")
    lines = "".join((folder / "plain" / f"set-{i}.jsonl").read_text() for i in range(2))
    (folder / "conversations.jsonl").write_text(lines.replace("images/", ""))
    source_files.write_tar(folder / "shards", records)
    source_files.write_parquet(folder / "charts", records)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"Page {i}."}) + "\n" for i in range(20)))
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def test_the_commands_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for split, size in (("train", 3), ("heldout", 4)):
        monkeypatch.setattr(tfds_builder.Scenes.BUILDER_CONFIGS[0], split, size)
    trained = []
    for program, *words in COMMANDS:
        if program == "mllm_jax.data.synthetic.tfds_builder":
            tfds_builder.main(words)
        elif program == "mllm_jax.data":
            alone = "--config.data.workers=0" if words[0] == "inspect" else "--processes=0"
            assert main([*words, alone]) == 0, capsys.readouterr().err
        else:
            assert program == "mllm_jax.train"
            trained.append(source_of(words))
    sizes = {name: len(open_source(name)) for name in ("converted", "from-tar", "from-parquet", "from-tfds")}
    assert sizes == {"converted": 10, "from-tar": 10, "from-parquet": 7, "from-tfds": 4}
    assert len(trained[0]) == 10 and [len(source) for source in trained[1].sources] == [10, 20]
    assert "Packed rows" in pathlib.Path("scenes.html").read_text()
    assert trained[1].weights == {0: (1.0, 0.25), 2000: (1.0, 1.0)}


def source_of(words):
    """Source of a command of `mllm_jax.train`, whose model is too large to train here."""
    values = flags.FlagValues()
    replaced = [word for word in words if word.startswith("--config.")]
    argv = ["", f"--config={words[words.index('--config') + 1]}", *replaced]
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    values(argv)
    return read_run(values.config).data.source()


def test_the_records_are_read():
    lines = [line for language, text in BLOCKS if language == "json" for line in text.splitlines()]
    items = [read_record(json.loads(line), "r", lambda name: f"/data/{name}") for line in lines]
    roles = [item["messages"][0]["role"] for item in items]
    assert roles == ["user"] * 7 + ["system"] + ["user"] * 5 + ["document"] * 4
    shown = [str(item["messages"]).count("/data/") for item in items]
    assert shown == [1, 1, 1, 2, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 2, 1]
    assert items[0]["messages"] == items[1]["messages"] == items[2]["messages"] == items[5]["messages"]


def test_the_python_is_the_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    (text,) = [text for language, text in BLOCKS if language == "python"]
    scope = {}
    exec(text, scope)
    assert scope["data"].weights([10, 20]) == {0: [1.0, 0.25], 2000: [1.0, 1.0]}


def test_every_reason_to_leave_out_a_record_is_listed():
    said = set()
    for path in (ROOT / "mllm_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args
            if named and node.func.id in ("Bad", "BadName", "BadRecord") and isinstance(node.args[0], ast.Constant):
                said.add(node.args[0].value)
    rows = PAGE.partition("| reason |")[2].partition("\n\n")[0].splitlines()[2:]
    listed = [reason for row in rows for reason in re.findall("`(.*?)`", row.split("|")[1])]
    assert len(said) > 30 and sorted(listed) == sorted(said | {OVER_BUDGET})
