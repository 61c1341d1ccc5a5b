"""docs/reliability.md: its commands run, and a run that is killed again and again is the one that nothing stopped."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from compiler import QUICKLY
from paths import ROOT

from mllm_jax.train.monitor.goodput import PARTS
from mllm_jax.train.monitor.metrics import read_metrics

TEXT = (ROOT / "docs" / "reliability.md").read_text()
COMMANDS = [shlex.split(block.replace("\\\n", " ")) for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)]
FEW_STEPS = (
    "--config.optim.steps=3 --config.optim.warmup=1 --config.data.batch=8 --config.data.tokens=64 "
    "--config.data.patch_rows=1 "
    "--config.data.patches_per_row=112 --config.train.num_eval_examples=4 --config.train.log_every=1 "
    "--config.optim.name=adamw "
    "--config.model.encoder.layers=1 --config.model.decoder.layers=1 --config.data.window=1.0"
).split()


def run(command, **options):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1500, **options)


def test_the_flags_of_all_commands_in_one_short_run(tmp_path):
    training = [command[1:] for command in COMMANDS if command[1:3] == ["-m", "mllm_jax.train"]]
    assert len(training) == 4 and all(command[2:6] == training[0][2:6] for command in training)
    flags = [flag for command in training for flag in command[6:]]
    flags = [re.sub(r"=10:13$", "=2:3", flag).replace("/tmp/disk", str(tmp_path / "disk")) for flag in flags]
    flags += ["--config.train.save_local_every=1"]
    command = [*training[0][:6], *flags, *FEW_STEPS]
    command[command.index("/tmp/scenes")] = str(tmp_path / "scenes")
    done = run(command, env=os.environ | {"XLA_FLAGS": QUICKLY})
    assert done.returncode == 0, done.stderr
    assert re.search(r"^goodput \d+\.\d% of 0:\d\d:\d\d: steps", done.stdout, re.MULTILINE)
    last = [line for line in read_metrics(tmp_path / "scenes") if "loss" in line][-1]
    assert set(last["seconds"]) == set(PARTS) and 0 < last["goodput"] < 1
    assert list((tmp_path / "scenes" / "profile").rglob("*.xplane.pb"))
    assert {path.name for path in (tmp_path / "disk").glob("*/process-0/*")} == {"1", "2"}


def test_the_table_of_parts_is_complete():
    table = TEXT.partition("| part | contents |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == list(PARTS)


@pytest.mark.slow
def test_killed_twice_a_run_of_two_processes_goes_on_bit_equal():
    assert ["python", "benchmarks/chaos.py"] in COMMANDS
    done = run(["benchmarks/chaos.py", "--kills=2", "--processes=2"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 bit-equal; the end of the run, with all losses: equal" in done.stdout


@pytest.mark.slow
def test_saves_that_are_killed_leave_the_old_model_the_new_one_or_a_refusal():
    assert ["python", "benchmarks/chaos_saves.py"] in COMMANDS
    done = run(["benchmarks/chaos_saves.py", "--kills=3"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 are old, new or refused" in done.stdout
