"""A run of two processes, each with its share of the data and of the devices."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mllm_jax.train.checkpoint import restore_params
from mllm_jax.train.metrics import read_metrics

PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from tiny_run import get_config
from mllm_jax.train.loop import train
train(get_config(), sys.argv[3])
"""


def start(workdir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
    }
    command = [sys.executable, "-c", PROCESS, address]
    return [subprocess.Popen([*command, str(i), str(workdir)], env=os.environ | settings) for i in range(2)]


@pytest.mark.slow
def test_two_processes_save_on_a_notice_and_go_on_bit_equal(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert [process.wait(timeout=300) for process in start(whole)] == [0, 0]
    steps = [line for line in read_metrics(whole) if "heldout" not in line]
    assert [line["step"] for line in steps] == list(range(1, 25)) and steps[-1]["loss"] < 0.6 * steps[0]["loss"]

    processes = start(stopped)
    while len(read_metrics(stopped)) < 8 and all(process.poll() is None for process in processes):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # one of them is told; both stop at the same step
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert len(list((stopped / "checkpoints").glob("[0-9]*"))) and not (stopped / "checkpoints" / "24").exists()
    assert [process.wait(timeout=300) for process in start(stopped)] == [0, 0]

    losses = lambda folder: [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]
    assert losses(stopped) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, restore_params(stopped)[1], restore_params(whole)[1])
