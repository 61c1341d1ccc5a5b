"""Joins a process to the others of its run, and ends it when it, or another one, fails.

The processes of a run compute every step together, so none can continue when one dies. All end soon with the reason,
and the same command resumes from the last checkpoint, on as many processes as there are then.
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

HEARTBEAT = 30  # seconds of silence after which jax counts a process as dead, and ends the others
GOODBYE = 2  # seconds that the first process waits for the others to print their errors: jax ends them when it exits
AGAIN = 75  # exit code of an incomplete run that the same command resumes (EX_TEMPFAIL of sysexits.h)
COMPILING = 1800  # seconds that the slowest process may take longer to compile than the fastest
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that ask a run to stop
OF_OTHERS = re.compile("gloo|nccl|connection|heartbeat|barrier|unavailable", re.IGNORECASE)

_meetings = itertools.count()  # each needs a unique name, equal in all processes


class Lost(RuntimeError):
    """Another process of the run has ended, or cannot be reached."""

    exit_code = AGAIN


def join(coordinator: str | None, count: int | None, number: int | None, detect: bool) -> None:
    """Makes this process one of several, before jax is used for anything else.

    Args:
      coordinator: HOST:PORT of process 0. count: number of processes. number: index of this one.
      detect: jax detects all three (TPU pod, Slurm, Open MPI).
    Raises:
      ConfigError: they contradict each other, or the coordinator is not HOST:PORT.
    """
    if coordinator is None and (count, number) != (None, None):
        raise ConfigError("--processes and --process need --coordinator=HOST:PORT")
    if coordinator is not None and (count is None or number is None or not 0 <= number < count):
        raise ConfigError(f"--coordinator needs --processes=N and --process=I, 0 <= I < N, not {count} and {number}")
    port = re.fullmatch(r"(?:[^\s:]+|\[[\da-fA-F:]+\]):(\d{1,5})", coordinator or "", re.ASCII)
    if coordinator is not None and not (port and 1 <= int(port[1]) <= 65535):
        raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.1:1234")
    if coordinator is not None or detect:
        jax.distributed.initialize(coordinator, count, number, heartbeat_timeout_seconds=HEARTBEAT)


def compiled_together(function: Callable) -> Callable:
    """A jitted function, of arguments of one shape, that no process runs before all have compiled it.

    Otherwise those that are done wait in its first collective, which has a limit (30 s between CPUs).
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
    """Returns when all processes are here; the devices are not asked. Each process calls it equally often."""
    if jax.process_count() > 1:
        sync = ocp.multihost.get_barrier_sync_fn()
        sync(key=f"mllm_jax-meeting-{next(_meetings)}", timeout_ms=round(1000 * seconds))


class StopSignal:
    """Requests to stop the run: SIGTERM (preemption), SIGINT or SIGHUP. The second one is not held back.

    heeded: the run saved and ended because of it, before its end.
    """

    def __init__(self):
        self.heeded, self._asked, self._before, self._steps = False, False, {}, 0

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:  # several processes agree through jax's own notice of preemption
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup does
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Returns the same for all processes. Each calls it before every step, of all stages: jax counts the calls.

        A step that one process has begun ends only with all of them: the run stops after the last one that any of them
        has begun.
        """
        self._steps += 1
        self._ask_jax(self._steps)
        return self._asked

    def asked_meanwhile(self) -> bool:
        """Returns whether `asked` will answer yes, while this process still waits for the input of the step.

        If so, no process has begun that step, and none will.
        """
        if stop_is_agreed():  # jax would take an earlier question for a step that was begun, which moves the stop
            self._ask_jax(self._steps + 1)
        return self._asked

    def _ask_jax(self, step: int) -> None:
        if jax.process_count() > 1 and not self._asked:  # jax answers yes only once
            self._asked = multihost_utils.reached_preemption_sync_point(step)

    @property
    def noted(self) -> bool:
        """True if the only process of a run was asked to stop, between steps too. Several must agree, see `asked`."""
        return self._asked

    def _note(self, number, _frame) -> None:
        self._asked = True
        signal.signal(number, self._before[number])


def is_loss(error: Exception) -> bool:
    """Returns whether an error says that another process of the run has ended."""
    of_jax = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
    return isinstance(error, Lost) or (of_jax and bool(OF_OTHERS.search(str(error))))


@contextmanager
def noticing_others() -> Iterator[None]:
    """Context that turns jax's error about a dead process into `Lost`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_loss(error):
            raise
        raise Lost(
            f"process {jax.process_index()} cannot reach another one, which has ended ({str(error).splitlines()[0]}). "
            "The same command resumes from the last checkpoint"
        ) from error


def end_unfinished() -> NoReturn:
    """Ends the program with `AGAIN`, after all processes of the run have come here.

    It is not the usual exit of Python, which would wait for threads that read a slow disk.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(AGAIN)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Ends one of several processes with an error that comes out of the block.

    At a usual exit jax would wait for the others, and they may be waiting for this one.
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
