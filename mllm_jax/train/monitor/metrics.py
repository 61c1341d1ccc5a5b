"""Reports a run: a line per interval, a progress bar, TensorBoard events, and `metrics.jsonl`.

`metrics.jsonl` contains one object per step (loss, learning_rate, grad_norm, finite, counts without padding), one per
evaluation (`heldout`) and one per return to an earlier step (`rewind`). The last step of an interval also has rates and
the run's time account (`goodput`, `seconds`). All but rates and times is the same in every run of one config on one
mesh, however often it was interrupted.
"""

import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mllm_jax.common.files import writing
from mllm_jax.common.format import with_prefix
from mllm_jax.train.monitor.board import Board
from mllm_jax.train.monitor.goodput import Clock, share

FILE = "metrics.jsonl"
JUDGED = ("accuracy", "reward", "kl")  # metrics of preference and PPO runs; an interval's line has the last value


class MetricsFile:
    """`metrics.jsonl` of a run that starts or resumes at `step`, with one JSON object per line.

    Opening the file drops the records of later steps. If lines other than the last are damaged, a copy of the file is
    kept.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / FILE
        fresh = path.with_suffix(".new")
        records, damaged = _read(path)
        if damaged:
            copy = path.with_name(f"damaged-{FILE}")
            shutil.copyfile(path, copy)
            print(f"warning: {path}: {damaged} lines are damaged and left out. See {copy}", file=sys.stderr, flush=True)
        with writing(path), open(fresh, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in records if line["step"] <= step)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        self._path, self._file = path, open(path, "a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        with writing(self._path):
            self._file.write(json.dumps({name: _json_number(value) for name, value in record.items()}) + "\n")

    def show(self) -> None:
        """Makes all lines visible to other processes."""
        with writing(self._path):
            self._file.flush()

    def flush(self) -> None:
        """Waits until all lines are on disk."""
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Returns the records in a run's metrics.jsonl without damaged or incomplete lines. [] if the file is missing."""
    return _read(Path(folder) / FILE)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns (records, number of damaged lines). An incomplete last line is not counted."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    records = [_record(line) for line in lines[:-1]]
    return [record for record in records if record is not None], records.count(None)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def last_written(folder: str | Path) -> float:
    """Returns the time at which a run last wrote metrics, as `time.time()`. 0: never."""
    path = Path(folder) / FILE
    return path.stat().st_mtime if path.exists() else 0.0


def _json_number(value: Any) -> Any:
    """Replaces nan and infinity, which JSON lacks, with None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Meter:
    """Sums up the steps of an interval and their time, without evaluations and saves.

    Args:
      capacity: number of tokens and patches in a full batch.
      clock: clock of this process.
    """

    def __init__(self, capacity: Mapping[str, int], clock: Clock):
        self.capacity, self.clock = capacity, clock
        self._board = Board("pace")
        self.restart()

    def restart(self, skip: int = 0) -> None:
        """Begins an interval. `skip`: number of steps that were done before it but are reported later."""
        self._began, self._own, self._steps, self._skip = self.clock.seconds(), self.clock.own_seconds, 0, skip
        self._sums = dict.fromkeys(("loss", "tokens", "patches", "flops"), 0.0)

    def add(self, record: Mapping[str, float]) -> None:
        """Counts a finished step."""
        if self._skip:
            self._skip -= 1
            return
        self._steps += 1
        for name in self._sums:
            self._sums[name] += record.get(name, 0.0)

    def rates(self, peak: float | None) -> dict[str, Any]:
        """Returns means and rates of the interval, and the run's time account. Empty if no step was counted.

        With several processes also the host time per step: the median and the slowest process, among those that have
        reported.

        Args:
          peak: peak FLOP/s of all devices together. None: unknown.
        """
        if not self._steps:
            return {}
        account = self.clock.seconds()
        waited = account["input"] - self._began["input"]
        seconds = max(account["steps"] - self._began["steps"] + waited, 1e-9)
        rates = {
            "mean_loss": self._sums["loss"] / self._steps,
            "seconds_per_step": seconds / self._steps,
            "tokens_per_second": self._sums["tokens"] / seconds,
            "patches_per_second": self._sums["patches"] / seconds,
            "data_wait": waited / seconds,
        }
        for name, room in self.capacity.items():
            if room:
                rates[f"fill_{name}"] = self._sums[name] / (room * self._steps)
        if peak and self._sums["flops"]:
            rates["mfu"] = self._sums["flops"] / seconds / peak
        return rates | self._pace() | {"goodput": share(account), "seconds": account}

    def _pace(self) -> dict[str, float]:
        """Returns the seconds per step of the hosts' own work (`Clock.own_seconds`): the median and the slowest."""
        self._board.post({"seconds": (self.clock.own_seconds - self._own) / self._steps})
        pace = {process: note["seconds"] for process, note in self._board.read().items()}
        if len(pace) < 2:
            return {}
        slowest = max(pace, key=pace.get)
        median = statistics.median(pace.values())
        return {"slowest_process": slowest, "slowest_host_seconds": pace[slowest], "median_host_seconds": median}


class Display:
    """Prints lines to stdout, with a progress bar below them if stdout is a terminal.

    In a notebook, the line of an interval replaces the previous one.
    """

    def __init__(self, steps: int, step: int):
        self.steps = steps
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar, self._width = None, 0
        if self._console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f} steps"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=steps, completed=step)
            self._bar.start()

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)
        self._console.file.flush()

    def step(self, step: int) -> None:
        """Moves the bar to a step."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def end(self, step: int) -> None:
        """Sets the step at which the bar is full."""
        self.steps = step
        if self._bar:
            self._bar.update(self._task, total=step)

    def interval(self, record: Mapping[str, float]) -> None:
        """Prints the line of an interval."""
        left = max(0, self.steps - record["step"]) * record["seconds_per_step"]
        fill = "/".join(f"{record[name]:.0%}" for name in ("fill_tokens", "fill_patches") if name in record)
        parts = [
            f"step {record['step']:.0f}/{self.steps}",
            f"loss {record['mean_loss']:.4f}",
            *(f"{name} {record[name]:.3f}" for name in JUDGED if name in record),
            f"lr {record['learning_rate']:.2e}",
            f"grad {record['grad_norm']:.2f}",
            f"{with_prefix(record['tokens_per_second'])} tok/s",
            f"{with_prefix(record['patches_per_second'])} patch/s",
            f"fill {fill}",
            f"data wait {record['data_wait']:.0%}",
            *([f"MFU {record['mfu']:.1%}"] if "mfu" in record else []),
            *([self._pace(record)] if "slowest_process" in record else []),
            f"{left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f} left",
        ]
        text = "  ".join(parts)
        if self._console.is_jupyter:
            print("\r" + text.ljust(self._width), end="", flush=True)
            self._width = len(text)
        else:
            self.line(text)

    def _pace(self, record: Mapping[str, float]) -> str:
        slowest, seconds = record["slowest_process"], record["slowest_host_seconds"]
        return f"host {record['median_host_seconds']:.3f} s, slowest {slowest:.0f}: {seconds:.3f} s"

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        if self._width:
            print()


def _event_writer(folder: Path, step: int) -> Any:
    """Returns a writer of TensorBoard events that hides events after `step`, left behind by an interrupted run.

    torch is hidden during the import of tensorboardX, which would otherwise import it and take seconds.
    """
    hidden = sys.modules.setdefault("torch", None) is None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


class Reporter:
    """Writes all reports of a run. Every process may call it; only the one with `writes` writes files and lines.

    Args:
      folder: the run's working directory.
      step: step at which the run starts or resumes. steps: step at which it ends.
      every: steps per interval. 0: one interval until the end.
      peak: peak FLOP/s of all devices together. None: unknown.
      writes: True on process 0.
    """

    def __init__(self, folder: Path, step: int, steps: int, every: int, meter: Meter, peak: float | None, writes: bool):
        self.every, self.steps, self.meter, self.peak, self.writes = every, steps, meter, peak, writes
        self.folder = folder
        if writes:
            self._open(step)
            self._display = Display(steps, step)

    def end(self, step: int) -> None:
        """Changes the step at which the run ends."""
        self.steps = step
        if self.writes:
            self._display.end(step)

    def rewind(self, step: int, why: str) -> None:
        """Drops the records after `step`, since the run repeats those steps with other data.

        Args:
          why: reason, which is reported.
        """
        self.meter.restart()
        if self.writes:
            self._file.close()
            self._events.close()
            self._open(step)
            self._file.write({"step": step, "rewind": why})
            self._display.step(step)
        self.line(why)

    def step(self, record: dict[str, Any]) -> None:
        """Reports the metrics of a finished step. Steps must come in order."""
        self.meter.add(record)
        ends = record["step"] == self.steps or (self.every and record["step"] % self.every == 0)
        rates = self.meter.rates(self.peak) if ends else {}
        if ends:
            self.meter.restart()
        if not self.writes:
            return
        self._file.write(record | rates)
        self._display.step(record["step"])
        if rates:
            self._display.interval(record | rates)
            self._scalars("train", record | rates)
            self._file.show()

    def heldout(self, step: int, found: dict[str, Any]) -> None:
        """Reports an evaluation. `found`: numbers, and a measure's name with a dict of its shares by kind."""
        if self.writes:
            self._file.write({"step": step, "heldout": found})
            measure, shares = next((name, value) for name, value in found.items() if isinstance(value, dict))
            self._scalars("heldout", {"step": step, "loss": found["loss"], **shares})
            shown = "  ".join(f"{kind} {share:.1%}" for kind, share in shares.items())
            among = f" of {found['pairs']:,} pairs" if "pairs" in found else ""
            measured = f"{measure.replace('_', ' ')}{among}: {shown}"
            self._display.line(f"held-out {step}/{self.steps}  loss {found['loss']:.4f}  {measured}")

    def line(self, text: str) -> None:
        """Prints a line of text."""
        if self.writes:
            self._display.line(text)

    def flush(self) -> None:
        """Waits until everything reported so far is on disk."""
        if self.writes:
            self._file.flush()
            self._events.flush()

    def close(self) -> None:
        if self.writes:
            self._file.close()
            self._events.close()
            self._display.close()

    def _open(self, step: int) -> None:
        self._file = MetricsFile(self.folder, step)
        self._events = _event_writer(self.folder, step)

    def _scalars(self, group: str, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._events.add_scalar(f"{group}/{name}", value, record["step"])
