"""A disk that is full: one line that names the file, exit code 1, what was there before stays, nothing half-written."""

import dataclasses
import errno
import json
import os
import subprocess

import jax
import numpy as np
import pytest
from examples import random_params, tiny_config

import mllm_jax
from mllm_jax import export
from mllm_jax.common import cli
from mllm_jax.common.config import ConfigError
from mllm_jax.common.files import DiskFull, write_atomically, writing
from mllm_jax.common.html import write_page
from mllm_jax.common.trees import join
from mllm_jax.data.__main__ import main as data
from mllm_jax.model.vlm import VLM, init_adapters
from mllm_jax.nn.lora import LoraConfig
from mllm_jax.train.checkpoint.lock import locked
from mllm_jax.train.monitor.metrics import MetricsFile, read_metrics

SAID = "the disk is full; free some space"


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of 16 MB, for those who may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a disk")
    except FileNotFoundError:
        pytest.skip("needs mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave(disk, size):
    """Fills a disk but for so many bytes, in pages of 4096."""
    found = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(found.f_bavail * found.f_bsize - size))


def model(seed, rank=0):
    config = tiny_config()
    vlm = mllm_jax.Pretrained(config, VLM(config), random_params(config, seed), None)
    if not rank:
        return vlm
    config = dataclasses.replace(config, lora=LoraConfig(rank=rank))
    params = join(vlm.params, init_adapters(config, jax.random.key(seed)))
    return dataclasses.replace(vlm, config=config, params=params)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("save, rank", [(mllm_jax.save_pretrained, 0), (mllm_jax.save_adapters, 8)])
def test_a_model_and_an_adapter_stay_as_they_were(save, rank, disk):
    folder = disk / "model"
    save(model(0, rank), folder)
    leave(disk, 8192)
    before = content(disk)
    for target in (folder, disk / "new"):
        with pytest.raises(DiskFull) as error:
            save(model(1, rank), target)
        assert error.value.filename == str(target) and error.value.strerror == SAID
    assert content(disk) == before and {path.name for path in disk.iterdir()} == {"ballast", "model"}
    (disk / "ballast").unlink()
    save(model(1, rank), folder)
    assert content(disk).keys() | {"ballast"} == before.keys() and content(disk) != before


@pytest.mark.parametrize("merged", [False, True])
def test_export_is_one_line(merged, disk, tmp_path, capsys):
    mllm_jax.save_pretrained(model(0), tmp_path / "source")
    mllm_jax.save_adapters(model(0, rank=4), tmp_path / "adapter")
    leave(disk, 8192)
    words = ["--checkpoint", str(tmp_path / "source"), str(disk / "out")]
    assert export.main([*words, *(["--adapters", str(tmp_path / "adapter")] if merged else [])]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {disk / 'out'}: {SAID}"
    assert [path.name for path in disk.iterdir()] == ["ballast"]


@pytest.mark.parametrize("processes", [0, 1])
def test_a_conversion_is_one_line_and_goes_on(processes, disk, tmp_path, capsys):
    rng = np.random.default_rng(0)  # of text that does not become small
    lines = [json.dumps({"id": f"n{i}", "text": rng.bytes(2000).hex()}) for i in range(60)]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    folder = disk / "converted"
    command = ["convert", str(tmp_path / "set.jsonl"), str(folder), "--records=30", f"--processes={processes}"]
    leave(disk, 300_000)  # room for one shard of two
    assert data(command) == 1
    shard = "conversations-0000{}-of-00002.array_record"
    assert capsys.readouterr().err == f"error: {folder / shard.format(1)}: {SAID}\n"
    assert {path.name for path in folder.glob("[!.]*")} == {"conversion.json", shard.format(0)}
    assert not list(folder.glob(".*.partial"))
    (disk / "ballast").unlink()
    assert data(command) == 0 and "60 records in 2 shards" in capsys.readouterr().out


def test_pages_and_texts_are_replaced_whole_or_not(disk):
    page, text = disk / "report.html", disk / "answers.jsonl"
    write_page(page, "common/page.html", title="t", lead="old")
    write_atomically(text, "old\n")
    leave(disk, 8192)
    before = content(disk)
    with pytest.raises(DiskFull, match=f"{text}"):
        write_atomically(text, "new\n" * 10_000)
    with pytest.raises(DiskFull, match=f"{page}"):
        write_page(page, "common/page.html", title="t", lead="new" * 10_000)
    assert content(disk) == before


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    if os.path.exists("/dev/full"):
        with pytest.raises(DiskFull, match="/dev/full"):
            write_atomically("/dev/full", "text")
        assert os.path.exists("/dev/full") and not os.path.isfile("/dev/full")
    with pytest.raises(FileNotFoundError, match="absent/file'$"):
        write_atomically(tmp_path / "absent" / "file", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_the_lines_of_a_run_name_their_file(disk):
    file = MetricsFile(disk, 0)
    leave(disk, 0)
    with pytest.raises(DiskFull, match="metrics.jsonl"):
        file.write({"step": 1, "loss": 0.0})
        file.flush()
    (disk / "ballast").unlink()
    file.close()
    assert [line["step"] for line in read_metrics(disk)] == [1]


def test_a_run_that_cannot_begin_leaves_nothing(disk):
    leave(disk, 0)
    with pytest.raises(ConfigError, match=f"run.lock: {SAID}"), locked(disk):
        pass
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_a_command_says_which_file_could_not_be_written(capsys):
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write() failed: No space left")):

        def main(error=error):
            with writing("/some/file"):
                raise error

        with pytest.raises(SystemExit) as ended:
            cli.run_command(main)
        assert ended.value.code == 1 and capsys.readouterr().err == f"error: /some/file: {SAID}\n"
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"), writing("/some/file"):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")  # of a device
