"""A run that hangs is ended, with the stacks of its threads and the name of the process that hangs."""

import os
import subprocess
import sys

from paths import HELPERS

from mllm_jax.train.checkpoint.manager import Checkpoints
from mllm_jax.train.monitor.goodput import PARTS, Clock, share, summary
from mllm_jax.train.monitor.watchdog import blame


def test_a_source_that_blocks_ends_the_run_and_its_stack_is_shown(tmp_path):
    command = ["-m", "mllm_jax.train", "--config", f"{HELPERS}/watched_run.py:hangs", "--workdir", str(tmp_path)]
    settings = ["--config.train.watchdog=4", "--config.data.prefetch=1"]
    done = subprocess.run([sys.executable, *command, *settings], capture_output=True, text=True, timeout=240)
    assert done.returncode == os.EX_TEMPFAIL, done.stderr
    assert "error: process 0 gave no sign of life for" in done.stderr and "in 'input' after step" in done.stderr
    stacks = (tmp_path / "stacks" / "process-0.txt").read_text()
    assert "in read_and_hang" in stacks and "in read_and_hang" in done.stderr
    assert "_fetch_while_computing" in stacks, "the main thread's stack is there too"
    assert Checkpoints(tmp_path).latest() >= 4
    assert os.listdir(tmp_path / "stacks") == ["process-0.txt"]


def test_the_process_that_the_others_wait_for_is_named():
    note = lambda step, part, at=100.0: {"step": step, "part": part, "at": at}
    waiting = {process: note(15, "steps") for process in range(4)}
    cases = {
        "process 2 hangs in 'input' after step 13; the others wait": waiting | {2: note(13, "input")},
        "process 2 hangs in 'save' after step 14; the others wait": waiting | {2: note(14, "save")},
        "process 2 hangs in 'input' after step 15; the others wait": dict.fromkeys(range(4), note(15, "save"))
        | {2: note(15, "input")},
        "process 1, 3 hangs in 'steps' after step 14": waiting | {1: note(14, "steps"), 3: note(14, "steps")},
        "all processes are in 'steps' after step 15: devices": waiting,
        "process 0 said nothing for 30 s": waiting | {0: note(15, "steps", at=60.0)},
        "process 3 said nothing": {process: waiting[process] for process in range(3)},
    }
    for expected, notes in cases.items():
        assert blame(notes, 4, limit=60.0, now=101.0).startswith(expected), blame(notes, 4, 60.0, 101.0)


def test_goodput_is_kept_over_restarts(monkeypatch):
    now = 1000.0
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(f"mllm_jax.train.monitor.goodput.time.{name}", lambda: now)
    first = Clock()
    now += 10
    first.enter("steps")
    now += 60
    saved = first.account(ended=False)
    now += 20  # twenty seconds of steps after the save, then it dies; nothing runs for five minutes
    died, now = now, now + 300
    second = Clock()
    now += 5
    second.resume(saved, last_sign=died)
    second.enter("steps")
    now += 5
    found = second.seconds()
    assert found == dict.fromkeys(PARTS, 0.0) | {"start": 15, "steps": 65, "lost": 20, "down": 300}
    assert share(found) == 65 / 400 and sum(found.values()) == now - 1000
    assert summary(found) == "goodput 16.2% of 0:06:40: steps 16.2%, start 3.8%, lost 5.0%, down 75.0%"

    second.lose(saved["seconds"])
    assert second.seconds()["lost"] == 25 and second.seconds()["steps"] == 60
    done = second.account(ended=True)
    now += 1e6
    third = Clock()
    third.resume(done, last_sign=0.0)
    assert third.seconds() == second.seconds() | {"steps": 60}, "a run that is complete is not down"
