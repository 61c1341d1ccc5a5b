"""What happens around a run: it is asked to stop, its reader goes, its workers are killed, its launcher is killed."""

import os
import pathlib
import signal
import subprocess
import sys
import time

from mllm_jax.train.checkpoint import Checkpoints
from mllm_jax.train.metrics import read_metrics
from mllm_jax.train.processes import AGAIN

TESTS = pathlib.Path(__file__).parent


def start(workdir, variant, *settings):
    command = ["-m", "mllm_jax.train", "--config", f"{TESTS}/watched_run.py{variant}", "--workdir", str(workdir)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command, *settings], **pipes)


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def children(pid):
    """The processes that a process has started."""
    stats = [path.read_text().rsplit(")", 1)[1].split() for path in pathlib.Path("/proc").glob("[0-9]*/stat")]
    numbers = [int(path.parent.name) for path in pathlib.Path("/proc").glob("[0-9]*/stat")]
    return [number for number, fields in zip(numbers, stats) if int(fields[1]) == pid and fields[0] != "Z"]


def test_without_a_reader_and_with_a_batch_that_never_comes_sigterm_saves_at_the_last_step(tmp_path):
    process = start(tmp_path, ":hangs", "--config.data.prefetch=1")
    assert process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    seen = [-1, time.monotonic()]

    def hangs():
        step = max((line["step"] for line in read_metrics(tmp_path)), default=0)
        if step != seen[0]:
            seen[:] = step, time.monotonic()
        return step > 4 and time.monotonic() - seen[1] > 3

    until(lambda: process.poll() is not None or hangs())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=240) == AGAIN, process.stderr.read()
    assert Checkpoints(tmp_path).latest() >= seen[0] and "Traceback" not in process.stderr.read()


def test_a_killed_data_worker_is_one_line_and_the_exit_code_of_starting_again(tmp_path):
    process = start(tmp_path, "", "--config.data.processes=1", "--config.optim.steps=100000", "--config.optim.warmup=0")
    until(lambda: process.poll() is not None or len(read_metrics(tmp_path)) > 2)
    workers = [
        pid for pid in children(process.pid) if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert workers and process.returncode == AGAIN, errors
    assert "error: a data worker was killed" in errors and "Traceback" not in errors


def test_a_second_interrupt_is_no_traceback():
    script = """
from ml_collections import config_flags
from mllm_jax.train import command

def main():
    raise KeyboardInterrupt

config_flags.DEFINE_config_file("config")
command.run(main)
"""
    command = [sys.executable, "-c", script, "--config=configs/scenes.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=TESTS.parent)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


def test_processes_end_with_their_launcher(tmp_path):
    command = [sys.executable, "-m", "launch.local", "--processes=2", "--", "--config", "configs/scenes.py"]
    launcher = subprocess.Popen([*command, "--workdir", str(tmp_path)], cwd=TESTS.parent, stdout=subprocess.DEVNULL)
    until(lambda: launcher.poll() is not None or len(children(launcher.pid)) == 2)
    started = children(launcher.pid)
    time.sleep(0.5)  # until they have called prctl
    launcher.kill()
    launcher.wait()
    until(lambda: not any(pathlib.Path(f"/proc/{pid}").exists() for pid in started), seconds=30)
    assert len(started) == 2
