"""Connects the processes of a run, and ends them when one of them fails.

The processes compute every step together, so none can continue after one has died. The others end soon with an error,
and the same command resumes from the last checkpoint, on any number of processes.
"""

import itertools
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mllm_jax.common.config import ConfigError
from mllm_jax.train.monitor.board import stop_is_agreed

HEARTBEAT = 30  # seconds without a heartbeat after which jax considers a process dead and ends the others
GOODBYE = 2  # seconds that process 0 waits before it exits: jax then ends the others, which first print their errors
AGAIN = 75  # exit code of an unfinished run: the same command resumes it (EX_TEMPFAIL of sysexits.h)
COMPILING = 1800  # seconds by which compilation may take longer on the slowest process than on the fastest
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # signals that request a stop
OF_OTHERS = re.compile("gloo|nccl|connection|heartbeat|barrier|unavailable", re.IGNORECASE)

_meetings = itertools.count()  # numbers the barriers, whose keys must be unique and equal in all processes


class Lost(RuntimeError):
    """Another process of the run has ended, or cannot be reached."""

    exit_code = AGAIN


def join(coordinator: str | None, count: int | None, number: int | None, detect: bool) -> None:
    """Joins this process to the others of a run. Must be called before any other use of jax.

    Args:
      coordinator: HOST:PORT of process 0. count: number of processes. number: index of this process.
      detect: let jax detect all three (TPU pod, Slurm, Open MPI).
    Raises:
      ConfigError: the arguments contradict each other, or the coordinator is not HOST:PORT.
    """
    if coordinator is None and (count, number) != (None, None):
        raise ConfigError("--processes and --process need --coordinator=HOST:PORT.")
    if coordinator is not None and (count is None or number is None or not 0 <= number < count):
        raise ConfigError(f"--coordinator needs --processes=N and --process=I, 0 <= I < N, not {count} and {number}.")
    port = re.fullmatch(r"(?:[^\s:]+|\[[\da-fA-F:]+\]):(\d{1,5})", coordinator or "", re.ASCII)
    if coordinator is not None and not (port and 1 <= int(port[1]) <= 65535):
        raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.1:1234.")
    if coordinator is not None or detect:
        jax.distributed.initialize(coordinator, count, number, heartbeat_timeout_seconds=HEARTBEAT)


def compiled_together(function: Callable) -> Callable:
    """Wraps a jitted function so that no process runs it before all have compiled it. Argument shapes must not change.

    Otherwise the fastest processes would time out in its first collective (after 30 s between CPUs).
    """
    if jax.process_count() == 1:
        return function
    compiled = []

    def run(*arguments):
        if not compiled:
            compiled.append(function.lower(*arguments).compile())
            meet(COMPILING)
        return compiled[0](*arguments)

    return run


def meet(seconds: float) -> None:
    """Waits up to `seconds` until all processes have called it, without the devices. All must call it equally often."""
    if jax.process_count() > 1:
        sync = ocp.multihost.get_barrier_sync_fn()
        sync(key=f"mllm_jax-meeting-{next(_meetings)}", timeout_ms=round(1000 * seconds))


class StopSignal:
    """Receives requests to stop the run: SIGTERM (preemption), SIGINT or SIGHUP. A second signal has its usual effect.

    heeded: True if the run saved and stopped early because of a signal.
    """

    def __init__(self):
        self.heeded, self._asked, self._before, self._steps = False, False, {}, 0

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:  # several processes agree through jax's preemption service
            # A signal that is ignored, as under nohup, stays ignored.
            active = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in active}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Returns whether to stop before the next step, the same in all processes.

        Every process must call it before every step, across all stages, because jax counts the calls. A step needs all
        processes, so the run stops after the last step that any of them has begun.
        """
        self._steps += 1
        self._ask_jax(self._steps)
        return self._asked

    def asked_meanwhile(self) -> bool:
        """Returns whether the next call of `asked` will return True, for a process that waits for the step's input.

        If so, no process has begun that step, and none will.
        """
        if stop_is_agreed():  # before, jax would take the query for a begun step, and stop later
            self._ask_jax(self._steps + 1)
        return self._asked

    def _ask_jax(self, step: int) -> None:
        if jax.process_count() > 1 and not self._asked:  # jax returns True only once
            self._asked = multihost_utils.reached_preemption_sync_point(step)

    @property
    def noted(self) -> bool:
        """True as soon as a single-process run is asked to stop, also during a step. Several agree through `asked`."""
        return self._asked

    def _note(self, number, _frame) -> None:
        self._asked = True
        signal.signal(number, self._before[number])


def is_loss(error: Exception) -> bool:
    """Returns whether an error means that another process of the run has ended."""
    of_jax = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
    return isinstance(error, Lost) or (of_jax and bool(OF_OTHERS.search(str(error))))


@contextmanager
def noticing_others() -> Iterator[None]:
    """Turns errors that jax raises when another process has died into `Lost`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_loss(error):
            raise
        raise Lost(
            f"process {jax.process_index()} cannot reach another one, which has ended ({str(error).splitlines()[0]}). "
            "Rerun the same command to resume from the last checkpoint."
        ) from error


def end_unfinished() -> NoReturn:
    """Ends the program with the exit code `AGAIN`, after all processes of the run have called this.

    Unlike Python's usual exit it does not wait for threads, which may be reading a slow disk.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(AGAIN)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Ends one of several processes at once when the block raises an error.

    At a usual exit jax would wait for the others, which may be waiting for this process.
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not code or not jax.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(GOODBYE)
        os._exit(code if isinstance(code, int) else 1)
