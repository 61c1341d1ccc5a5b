"""Events around a run: a request to stop, a closed pipe, killed workers, a killed launcher."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
from paths import HELPERS, ROOT

from mllm_jax.common.interrupts import held_back
from mllm_jax.data.pipeline.workers import Workers
from mllm_jax.train.checkpoint.manager import Checkpoints
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.monitor.processes import AGAIN


def start(workdir, variant, *settings):
    command = ["-m", "mllm_jax.train", "--config", f"{HELPERS}/watched_run.py{variant}", "--workdir", str(workdir)]
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
from mllm_jax.train.runs import command

def main():
    raise KeyboardInterrupt

config_flags.DEFINE_config_file("config")
command.run(main)
"""
    command = [sys.executable, "-c", script, "--config=configs/scenes.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


@pytest.mark.parametrize("command", ["mllm_jax.families", "mllm_jax.train", "mllm_jax.data", "launch.slurm"])
def test_an_interrupt_while_a_command_is_imported_is_one_line(command, tmp_path):
    """Wherever it comes: here from a module that all of them import, instead of from the keyboard."""
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("import signal, time; signal.raise_signal(signal.SIGINT)")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = partial(subprocess.run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    done = run([sys.executable, "-m", command])
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


def test_an_import_by_another_program_leaves_interrupts_alone():
    script = "import mllm_jax, launch, signal; assert signal.getsignal(2) is signal.default_int_handler"
    for command in (["-c", script], ["-m", "timeit", "-n1", "-r1", script]):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, timeout=60, stdout=subprocess.DEVNULL)


@pytest.fixture
def raised():
    """Ctrl-C raises KeyboardInterrupt, whatever tests before left behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_held_back(raised):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with held_back():
            signal.raise_signal(signal.SIGINT)
            done.append("in the block")
        done.append("after it")
    assert done == ["in the block"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_data_workers_do_not_hear_interrupts():
    with ProcessPoolExecutor(1, Workers()) as pool:
        assert signal.SIGINT in pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_interrupted_command_leaves_neither_workers_nor_their_warnings():
    script = """
import time
from mllm_jax.common.cli import run_command
from mllm_jax.data.pipeline.workers import Workers

def main():
    context = Workers()
    held = context.Event(), context.Process(target=time.sleep, args=(600,))
    held[1].start()
    print(held[1].pid, flush=True)
    raise KeyboardInterrupt

run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")
    until(lambda: not pathlib.Path(f"/proc/{int(done.stdout)}").exists(), seconds=30)


def test_an_interrupted_conversion_tells_what_is_done_in_one_line(tmp_path):
    messages = [{"role": "user", "content": "hm " * 500}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "set.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 20_000)
    command = [sys.executable, "-m", "mllm_jax.data", "convert", "set.jsonl", "made", "--processes=1", "--records=1000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until(lambda: process.poll() is not None or list((tmp_path / "made").glob("*.array_record")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of its processes
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors.count("\n") == 2, errors
    assert re.fullmatch(r"\ninterrupted: \d+ shards are complete\. Repeat the command to go on\.\n", errors)


def test_processes_end_with_their_launcher(tmp_path):
    command = [sys.executable, "-m", "launch.local", "--processes=2", "--", "--config", "configs/scenes.py"]
    launcher = subprocess.Popen([*command, "--workdir", str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    until(lambda: launcher.poll() is not None or len(children(launcher.pid)) == 2)
    started = children(launcher.pid)
    time.sleep(0.5)  # until they have called prctl
    launcher.kill()
    launcher.wait()
    until(lambda: not any(pathlib.Path(f"/proc/{pid}").exists() for pid in started), seconds=30)
    assert len(started) == 2
