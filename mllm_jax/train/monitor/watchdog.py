"""Ends a run that hangs, and reports which process hangs and where; the same command resumes it.

A process that waits for another one in a collective waits forever and cannot be interrupted. Therefore a thread watches
its clock and ends the process.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mllm_jax.train.monitor.board import Board
from mllm_jax.train.monitor.goodput import Clock
from mllm_jax.train.monitor.processes import AGAIN, COMPILING, GOODBYE

FOLDER = "stacks"
LISTEN = 3.0  # seconds in which the other processes can post their state
ORDER = ("start", "compile", "input", "steps", "evaluate", "save")  # order of the parts within a step
SHORT = ("steps", "input", "evaluate")  # parts with a sign of life at every step or batch


class Watchdog(threading.Thread):
    """Ends this process with exit code 75 (restart) if it shows no sign of life for `limit` seconds.

    Compiling, saving and building the model may take longer: at least `COMPILING` seconds.

    Args:
      clock: clock of this process. limit: seconds. 0: no watchdog. folder: receives `stacks/process-N.txt`.
    """

    def __init__(self, clock: Clock, limit: float, folder: Path):
        super().__init__(name="watchdog", daemon=True)
        self._clock, self._limit, self._folder = clock, limit, folder / FOLDER
        self._board, self._done, self._told = Board("life"), threading.Event(), 0.0
        self.step = 0  # last step that the process has begun

    def watch(self) -> None:
        """Starts the watchdog, unless the limit is 0."""
        if self._limit:
            self.start()

    def run(self) -> None:
        every = min(1.0, self._limit / 10)
        while not self._done.wait(every):
            since, part = self._clock.since, self._clock.part
            if time.monotonic() - since > (self._limit if part in SHORT else max(self._limit, COMPILING)):
                self._end(part, since)
            if time.monotonic() - self._told > self._limit / 10:
                self._tell()

    def close(self) -> None:
        self._done.set()
        if self.is_alive():
            self.join(timeout=LISTEN)  # the thread may be waiting for a process that has ended

    def _tell(self) -> None:
        self._told = time.monotonic()
        try:
            self._board.post({"step": self.step, "part": self._clock.part, "at": time.time()})
        except jax.errors.JaxRuntimeError:  # process 0 has ended, which the main thread will notice
            pass

    def _end(self, part: str, since: float) -> None:
        """Writes the stacks of all threads and ends the process, unless it shows a late sign of life."""
        number, now = jax.process_index(), time.time()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"process-{number}.txt"
        with open(path, "w") as file:
            faulthandler.dump_traceback(file)
        faulthandler.dump_traceback(sys.stderr)
        self._tell()
        time.sleep(min(LISTEN, self._limit / 2))
        if self._clock.since != since:
            return
        listener = threading.Thread(target=self._explain, args=(number, part, since, path, now), daemon=True)
        listener.start()
        listener.join(timeout=2 * LISTEN)  # process 0, which stores the notes, may be the one that hangs
        sys.stderr.flush()
        if number == 0:
            time.sleep(GOODBYE)
        os._exit(AGAIN)

    def _explain(self, number: int, part: str, since: float, path: Path, now: float) -> None:
        silence = time.monotonic() - since
        print(
            f"error: process {number} gave no sign of life for {silence:.0f} s (train.watchdog={self._limit:g}), in "
            f"{part!r} after step {self.step}. Stacks of its threads: {path}. Rerun the same command to resume from "
            "the last checkpoint; if steps are only slow, set a larger train.watchdog.",
            file=sys.stderr,
            flush=True,
        )
        if jax.process_count() > 1:
            print(f"error: {blame(self._board.read(), jax.process_count(), self._limit, now)}", file=sys.stderr)


def blame(notes: Mapping[int, Mapping[str, Any]], count: int, limit: float, now: float) -> str:
    """Describes which of several processes the others wait for.

    Args:
      notes: notes of processes 0 .. count - 1: {"step": last step begun, "part": current part, "at": `time.time()`}.
      limit: seconds of the watchdog. now: `time.time()` when it noticed the silence; notes may be newer.
    """
    silent = [number for number in range(count) if number not in notes or now - notes[number]["at"] > limit / 2]
    if silent:
        return f"{_named(silent)} said nothing for {limit / 2:.0f} s or longer: stopped, dead, or unreachable"
    progress = {number: (note["step"], ORDER.index(note["part"])) for number, note in notes.items()}
    last = [number for number in notes if progress[number] == min(progress.values())]
    note = notes[last[0]]
    if len(last) == count:
        return f"all processes are in {note['part']!r} after step {note['step']}: devices or network hang"
    return f"{_named(last)} hangs in {note['part']!r} after step {note['step']}; the others wait for it"


def _named(processes: list[int]) -> str:
    return f"process {', '.join(map(str, processes))}"
