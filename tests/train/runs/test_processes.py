"""Runs of several processes, each with its share of the data and of the devices: the same numbers as one process's.

Sums over devices are taken in another order: losses are compared in fp32, 1e-5 relative.
"""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from paths import HELPERS, ROOT
from watched_run import STALLED, get_config

from mllm_jax import load_adapters, load_workdir, save_adapters
from mllm_jax.common.config import ConfigError
from mllm_jax.train.checkpoint.manager import Checkpoints
from mllm_jax.train.checkpoint.restore import restore_params
from mllm_jax.train.loop import train
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.monitor.processes import AGAIN, join

STEPS = 16


@pytest.fixture
def start():
    """Starts the launcher, training the watched run; nothing is left running after the test."""
    launchers = []

    def start(processes, devices, workdir, *overrides, variant="", watched=None, **options):
        config = ["--config", f"{HELPERS}/watched_run.py{variant}", "--workdir", str(workdir), *overrides]
        command = [sys.executable, "-m", "launch.local", f"--processes={processes}", f"--devices={devices}"]
        settings = {} if watched is None else {"WATCHED": str(watched)}
        launchers.append(subprocess.Popen([*command, "--", *config], cwd=ROOT, env=os.environ | settings, **options))
        return launchers[-1]

    yield start
    for launcher in launchers:
        while launcher.poll() is None:
            launcher.terminate()  # the second time, it kills
            time.sleep(0.5)


def process_of(workdir, number):
    """The process id of one process of a run."""
    listed = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True, check=True).stdout
    lines = [line for line in listed.splitlines() if f"--process={number} " in line and str(workdir) in line]
    return int(lines[0].split()[0])


def wait_for_steps(launcher, workdir, count):
    while len(read_metrics(workdir)) < count:
        assert launcher.poll() is None, "the run ended before it was stopped"
        time.sleep(0.01)


def wait_for_files(launcher, *paths):
    while not all(path.exists() for path in paths):
        assert launcher.poll() is None, "the run ended before it was stopped"
        time.sleep(0.01)


def losses(workdir):
    found = {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}
    return np.array([found[step] for step in range(1, STEPS + 1)])


def tokens(workdir):
    return [line["tokens"] for line in read_metrics(workdir) if "tokens" in line]


def assert_same_run(workdir, expected):
    np.testing.assert_allclose(losses(workdir), losses(expected), rtol=1e-5)
    assert tokens(workdir) == tokens(expected)


def assert_ended_together(launcher, killed):
    """The others ended in time, it is said of each why, and nobody left a traceback."""
    output, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 128 + signal.SIGKILL, errors
    assert f"launch.local: process {killed} was killed by SIGKILL; the others end within 10 s" in errors
    assert "the same command resumes from its last checkpoint" in errors
    for number in range(int(launcher.args[3].partition("=")[2])):
        found = f"error: process {number} cannot reach another one, which has ended"
        waited = f"process {number} still waits for process {killed}, and is killed"
        assert number == killed or found in errors + output or waited in errors, errors + output
    assert "Traceback" not in errors + output


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with eight devices, which nothing interrupted."""
    workdir = tmp_path_factory.mktemp("alone")
    assert train(get_config(), workdir) == STEPS
    return workdir


def test_one_of_two_is_killed_and_one_process_goes_on(start, alone, tmp_path):
    launcher = start(2, 2, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(launcher, tmp_path, 6)
    os.kill(process_of(tmp_path, 1), signal.SIGKILL)
    assert_ended_together(launcher, killed=1)
    assert train(get_config(), tmp_path) == STEPS
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_four_processes_read_shares_save_together_and_go_on_as_two(start, alone, tmp_path):
    watched, workdir = tmp_path / "read", tmp_path / "run"
    watched.mkdir()
    launcher = start(4, 2, workdir, watched=watched, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(launcher, workdir, 6)
    os.kill(process_of(workdir, 2), signal.SIGKILL)
    assert_ended_together(launcher, killed=2)

    read = [set(file.read_text().split()) for file in sorted(watched.iterdir())]
    assert len(read) == 4 and min(map(len, read)) > 30 and len(set().union(*read)) == sum(map(len, read))
    saved = sorted(path.name for path in (workdir / "checkpoints" / "4" / "params").glob("ocdbt.process_*"))
    assert saved == [f"ocdbt.process_{number}" for number in range(4)]

    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    assert start(2, 4, workdir, *mesh).wait(timeout=600) == 0
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_asked_to_stop_processes_save_and_go_on_bit_equal(start, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert start(2, 2, whole).wait(timeout=600) == 0
    launcher = start(2, 2, stopped, variant=":slow")
    wait_for_steps(launcher, stopped, 6)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=600) == AGAIN
    assert list((stopped / "checkpoints").glob("[0-9]*")) and not (stopped / "checkpoints" / str(STEPS)).exists()
    assert start(2, 2, stopped).wait(timeout=600) == 0
    assert list(losses(stopped)) == list(losses(whole))
    jax.tree.map(np.testing.assert_array_equal, restore_params(stopped)[1], restore_params(whole)[1])


@pytest.mark.parametrize(
    "epochs", [(), pytest.param(("--config.data.epochs=9", "--config.optim.steps=0"), marks=pytest.mark.slow)]
)
def test_processes_that_all_wait_for_a_batch_are_stopped_at_once(start, tmp_path, epochs):
    workdir = tmp_path / "run"
    launcher = start(2, 2, workdir, *epochs, variant=":stalls", watched=tmp_path)
    wait_for_files(launcher, tmp_path / "waits-0", tmp_path / "waits-1")
    os.kill(process_of(workdir, 1), signal.SIGTERM)  # any one of them: the others learn it
    assert launcher.wait(timeout=240) == AGAIN, "the batch never comes"
    assert Checkpoints(workdir).latest() == STALLED - 1


@pytest.mark.slow
def test_a_step_that_one_process_has_begun_is_ended_by_all_before_they_stop(start, tmp_path):
    workdir = tmp_path / "run"
    launcher = start(2, 2, workdir, variant=":late", watched=tmp_path)
    wait_for_files(launcher, tmp_path / "waits-1")
    time.sleep(20)  # for the other process to begin the step
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=240) == AGAIN
    assert STALLED <= Checkpoints(workdir).latest() <= STALLED + 1  # the host is at most two steps ahead


@pytest.mark.slow
def test_a_process_that_is_slow_and_then_hangs_is_named_and_the_run_goes_on(start, alone, tmp_path):
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    settings = ["--config.train.watchdog=30", "--config.data.workers=1", "--config.data.prefetch=1"]
    launcher = start(2, 4, tmp_path, *settings, variant=":hangs", **output)
    out, errors = launcher.communicate(timeout=600)
    assert launcher.returncode in (os.EX_TEMPFAIL, 128 + signal.SIGKILL), errors
    assert "process 1 hangs in 'input' after step" in out + errors and "the others wait for it" in out + errors
    assert "in read_and_hang" in (tmp_path / "stacks" / "process-1.txt").read_text()
    assert [line["slowest_process"] for line in read_metrics(tmp_path)[-2:]] == [1, 1]  # of the first step none is
    assert train(get_config(), tmp_path) == STEPS
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_processes_whose_data_end_at_different_steps_end_together(start, tmp_path):
    """61 conversations: a number of streams and of processes that it does not divide into."""
    folders = {count: tmp_path / str(count) for count in (1, 2)}
    settings = ["--config.data.epochs=1", "--config.optim.steps=0"]
    for count, workdir in folders.items():
        assert start(count, 4 // count, workdir, *settings, variant=":short").wait(timeout=600) == 0
    assert 2 < len(tokens(folders[1])) < STEPS and tokens(folders[1]) == tokens(folders[2])
    one, two = ([line for line in read_metrics(workdir) if "loss" in line] for workdir in folders.values())
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-5)
    rates = [line["learning_rate"] for line in one]
    assert [line["learning_rate"] for line in two] == rates and rates[-1] < 0.4 * rates[2], "the schedule ends, too"


@pytest.mark.slow
def test_processes_whose_data_end_too_early_say_so_once(start, tmp_path):
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = start(2, 2, tmp_path, "--config.data.epochs=1", variant=":short", **output)
    out, errors = launcher.communicate(timeout=600)
    assert launcher.returncode == 1, errors
    step = len(tokens(tmp_path))
    said = f"error: config.data.epochs=1: the data ended at step {step} of config.optim.steps={STEPS}"
    assert (out + errors).count(said) == 1 and "Traceback" not in out + errors
    assert (tmp_path / "checkpoints" / str(step)).exists()


@pytest.mark.slow
def test_processes_train_adapters_lose_one_and_go_on(start, tmp_path):
    """The base, which checkpoints leave out, comes again in every process."""
    folders, settings = {count: tmp_path / str(count) for count in (1, 2)}, ["--config.lora.rank=2"]
    assert start(1, 2, folders[1], *settings).wait(timeout=600) == 0
    launcher = start(2, 1, folders[2], *settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(launcher, folders[2], 6)
    os.kill(process_of(folders[2], 1), signal.SIGKILL)
    assert_ended_together(launcher, killed=1)
    assert start(2, 1, folders[2], *settings).wait(timeout=600) == 0
    assert_same_run(folders[2], folders[1])
    adapted = load_workdir(folders[2])
    save_adapters(adapted, tmp_path / "adapter")
    assert load_adapters(adapted, tmp_path / "adapter").params.keys() == adapted.params.keys()


@pytest.mark.slow
def test_processes_go_back_before_a_spike_together(start, tmp_path):
    folders = {count: tmp_path / str(count) for count in (1, 2)}
    settings = [
        f"--config.train.spikes.{name}={value}" for name, value in dict(factor=1.4, window=4, rewinds=2).items()
    ]
    for count, workdir in folders.items():
        assert start(count, 2 // count, workdir, *settings, variant=":spikes").wait(timeout=600) == 0
    told = [[line["rewind"] for line in read_metrics(workdir) if "rewind" in line] for workdir in folders.values()]
    assert len(told[0]) == len(told[1]) > 0 and "back to step 8, the data of 2 steps are skipped (1 of 2)" in told[1][0]
    assert_same_run(folders[2], folders[1])


def test_what_does_not_make_a_cluster_is_refused():
    for arguments in ((None, 2, 0), ("localhost:1", None, 0), ("localhost:1", 2, 2)):
        with pytest.raises(ConfigError, match="--coordinator"):
            join(*arguments, detect=False)
    join(None, None, None, detect=False)
    assert not jax.distributed.is_initialized()


def test_the_launcher_wants_something_to_train():
    done = subprocess.run([sys.executable, "-m", "launch.local"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "after --, the arguments of mllm_jax.train" in done.stderr
