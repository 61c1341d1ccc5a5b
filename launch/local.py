"""A training run of several processes on this machine, as on several hosts, for trials and tests.

    python -m launch.local --processes 4 --devices 2 -- --config configs/scenes.py --workdir DIR

The arguments after `--` are those of `python -m mllm_jax.train`. Each process has `--devices` virtual CPU devices, and
they communicate over the loopback (gloo). The first one's output is printed as is, lines of the others begin with their
number. SIGTERM and Ctrl-C are passed on: the run saves and ends. If one process dies, the others cannot continue: they
have `--grace` seconds to report it, and are killed. The exit code is the highest of all: 75 if the same command
resumes, 128 + n if signal n killed a process.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from launch.exit_codes import FAILED_FOR_GOOD
from mllm_jax.common.cli import Parser, run_command
from mllm_jax.common.settings import NonNegative, PositiveInt, argument

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m launch.local", __doc__)
    parser.add_argument("--processes", type=argument(PositiveInt), default=2, help="number of processes (default 2)")
    parser.add_argument(
        "--devices", type=argument(PositiveInt), default=1, help="virtual CPU devices of each process (default 1)"
    )
    parser.add_argument(
        "--grace",
        type=argument(NonNegative),
        default=10,
        help="seconds that processes have to end after another one died (default 10)",
    )
    parser.add_argument("command", nargs="*", metavar="-- --config FILE --workdir DIR ...", help="what to train")
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("needs, after --, the arguments of mllm_jax.train")
    asked: list[int] = []
    note = lambda number, _: asked.append(number)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run = (options.processes, options.devices, free_port(), options.command)
        processes = [Process(number, *run) for number in range(options.processes)]
        return watch(processes, options.grace, asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Process:
    """One process of a run, in its own session: Ctrl-C reaches only this program, which passes it on."""

    def __init__(self, number: int, count: int, devices: int, port: int, command: Sequence[str]):
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "JAX_NUM_CPU_DEVICES": str(devices),
        }
        cluster = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={number}"]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if number else {}
        self.number = number
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mllm_jax.train", *cluster, *command],
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_launcher,
            **output,
        )
        self._printer = threading.Thread(target=self._print, daemon=True)
        self._printer.start()

    def __str__(self) -> str:
        code = self._process.returncode
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"process {self.number} {ended}"

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def code(self) -> int:
        """The exit code of a process that has ended, as shells give it."""
        self._printer.join()
        code = self._process.returncode
        return code if code >= 0 else 128 - code

    def send(self, number: int) -> None:
        if self.running:
            self._process.send_signal(number)

    def _print(self) -> None:
        for line in self._process.stdout or ():
            print(f"[{self.number}] {line}", end="", flush=True)


def _end_with_launcher() -> None:
    """Makes Linux kill this process when the launcher has ended, which may have been killed and cannot do it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def watch(processes: Sequence[Process], grace: float, asked: Sequence[int]) -> int:
    """Waits until all have ended, and ends the others where one fails. Returns the worst exit code.

    Args:
      asked: signals that this program was sent; the list grows.
    """
    failed, deadline, passed_on = None, float("inf"), 0
    while any(process.running for process in processes):
        time.sleep(0.05)
        if len(asked) > passed_on:
            for process in processes:
                process.send(signal.SIGKILL if passed_on else signal.SIGTERM)
            passed_on = len(asked)
        if failed is None and (failed := next((p for p in processes if not p.running and p.code), None)):
            deadline = time.monotonic() + grace
            say(f"{failed}; the others end within {grace:g} s")
        if time.monotonic() > deadline:
            for process in (process for process in processes if process.running):
                say(f"process {process.number} still waits for process {failed.number}, and is killed")
                process.send(signal.SIGKILL)
            deadline = float("inf")
    failed = failed or next((process for process in processes if process.code), None)
    if failed and failed.code in FAILED_FOR_GOOD:
        say(f"the run ended because {failed}; the same command would fail again: its last line has the fix")
    elif failed:
        say(f"the run ended because {failed}; the same command resumes from its last checkpoint")
    return max(process.code for process in processes)


def say(text: str) -> None:
    print(f"launch.local: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


if __name__ == "__main__":
    run_command(main)
