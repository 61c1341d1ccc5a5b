"""Ends a run that hangs, and names the process that hangs; the same command resumes from the last save.

A process that waits in a collective waits forever and cannot be interrupted. So a thread watches the clock and ends the
process.
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
LISTEN = 3.0  # seconds to wait for the others' states
ORDER = ("start", "compile", "input", "steps", "evaluate", "save")  # in which a process comes through a step
SHORT = ("steps", "input", "evaluate")  # parts that give a sign of life with every step or batch


class Watchdog(threading.Thread):
    """Ends this process where it gives no sign of life for `limit` seconds, with exit code 75: start it again.

    Compiling, saving and building may take as long as one process may be later than another from its compiler.

    Args:
      clock: of the process. limit: in seconds; 0 = no watchdog. folder: receives `stacks/process-N.txt`.
    """

    def __init__(self, clock: Clock, limit: float, folder: Path):
        super().__init__(name="watchdog", daemon=True)
        self._clock, self._limit, self._folder = clock, limit, folder / FOLDER
        self._board, self._done, self._told = Board("life"), threading.Event(), 0.0
        self.step = 0  # that the process has begun

    def watch(self) -> None:
        """Starts to watch."""
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
            self.join(timeout=LISTEN)  # it may be waiting for a process that has ended

    def _tell(self) -> None:
        self._told = time.monotonic()
        try:
            self._board.post({"step": self.step, "part": self._clock.part, "at": time.time()})
        except jax.errors.JaxRuntimeError:  # the first process has ended; the others notice where they wait for it
            pass

    def _end(self, part: str, since: float) -> None:
        """Unless the process shows that it lives, if late."""
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
        listener.join(timeout=2 * LISTEN)  # the first process, which keeps the notes, may be the one that hangs
        sys.stderr.flush()
        if number == 0:
            time.sleep(GOODBYE)
        os._exit(AGAIN)

    def _explain(self, number: int, part: str, since: float, path: Path, now: float) -> None:
        silence = time.monotonic() - since
        print(
            f"error: process {number} gave no sign of life for {silence:.0f} s (train.watchdog={self._limit:g}), in "
            f"{part!r} after step {self.step}. Stacks of its threads: {path}. The same command resumes from the last "
            "checkpoint; if nothing hangs and steps are that slow, set a larger train.watchdog",
            file=sys.stderr,
            flush=True,
        )
        if jax.process_count() > 1:
            print(f"error: {blame(self._board.read(), jax.process_count(), self._limit, now)}", file=sys.stderr)


def blame(notes: Mapping[int, Mapping[str, Any]], count: int, limit: float, now: float) -> str:
    """Returns the process that the others wait for.

    Args:
      notes: state of processes 0 .. count - 1: {"step" that it has begun, "part" that it is in, "at" time}.
      limit: limit of the watchdog, in seconds. now: `time.time()` when it noticed; notes may be newer.
    """
    silent = [number for number in range(count) if number not in notes or now - notes[number]["at"] > limit / 2]
    if silent:
        return f"{_named(silent)} said nothing for {limit / 2:.0f} s or longer: stopped, dead, or out of reach"
    place = {number: (note["step"], ORDER.index(note["part"])) for number, note in notes.items()}
    last = [number for number in notes if place[number] == min(place.values())]
    note = notes[last[0]]
    if len(last) == count:
        return f"all processes are in {note['part']!r} after step {note['step']}: devices, or the network between them"
    return f"{_named(last)} hangs in {note['part']!r} after step {note['step']}; the others wait for it"


def _named(processes: list[int]) -> str:
    return f"process {', '.join(map(str, processes))}"
