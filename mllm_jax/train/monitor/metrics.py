"""Reports of a run: a line per interval, a progress bar on a terminal, TensorBoard events, and `metrics.jsonl`.

`metrics.jsonl` has one object per step (loss, learning_rate, grad_norm, finite, counts without padding). The last step
of an interval also has rates and the wall time by part (`goodput`, `seconds`). An evaluation adds one object under
`heldout`, and a return to an earlier step one under `rewind`. Rates and times are measured; all other values are equal
in every run of one config on one mesh, however often it was interrupted.
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
JUDGED = ("accuracy", "reward", "kl")  # of runs that learn from judgements; the line of an interval has its last step's


class MetricsFile:
    """A file with one line of JSON per step, also when a run is killed and resumes from an earlier step.

    Opening drops the lines of steps after `step`, from which the run resumes. If any line but the last is damaged, a
    copy of the file is kept beside it.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / FILE
        fresh = path.with_suffix(".new")
        records, damaged = _read(path)
        if damaged:
            kept = path.with_name(f"damaged-{FILE}")
            shutil.copyfile(path, kept)
            print(f"warning: {path}: {damaged} lines are damaged and left out. See {kept}", file=sys.stderr, flush=True)
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
        """Lets other processes read all lines."""
        with writing(self._path):
            self._file.flush()

    def flush(self) -> None:
        """Returns when all lines are on disk."""
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records in a run's metrics.jsonl, damaged lines and a last one that was cut off left out; [] without it."""
    return _read(Path(folder) / FILE)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records, and the number of damaged lines, a last one that was cut off not counted."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    found = [_record(line) for line in lines[:-1]]
    return [record for record in found if record is not None], found.count(None)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def last_written(folder: str | Path) -> float:
    """Time of a run's last metrics, as `time.time()`; 0 if there are none."""
    path = Path(folder) / FILE
    return path.stat().st_mtime if path.exists() else 0.0


def _json_number(value: Any) -> Any:
    """JSON has no nan and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Meter:
    """Adds up the steps of an interval and the time that they took, without that of evaluations and saves.

    Args:
      capacity: tokens and patches that a batch has room for.
      clock: of the process.
    """

    def __init__(self, capacity: Mapping[str, int], clock: Clock):
        self.capacity, self.clock = capacity, clock
        self._board = Board("pace")
        self.restart()

    def restart(self, skip: int = 0) -> None:
        """An interval begins now. `skip`: steps that are not reported yet but were done before."""
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
        """Means and rates of the interval, and where the run's time went; empty where no step was counted.

        Of several processes also which one kept its devices waiting longest, as far as they have told.

        Args:
          peak: FLOP/s of all devices, if known.
        """
        if not self._steps:
            return {}
        spent = self.clock.seconds()
        waited = spent["input"] - self._began["input"]
        seconds = max(spent["steps"] - self._began["steps"] + waited, 1e-9)
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
        return rates | self._pace() | {"goodput": share(spent), "seconds": spent}

    def _pace(self) -> dict[str, float]:
        """Seconds a step that hosts work while their devices wait for them, or could: median and the slowest one's."""
        self._board.post({"seconds": (self.clock.own_seconds - self._own) / self._steps})
        pace = {process: note["seconds"] for process, note in self._board.read().items()}
        if len(pace) < 2:
            return {}
        slowest = max(pace, key=pace.get)
        median = statistics.median(pace.values())
        return {"slowest_process": slowest, "slowest_host_seconds": pace[slowest], "median_host_seconds": median}


class Display:
    """Lines on stdout, and below them a bar where stdout is a terminal.

    In a notebook, where nothing scrolls away, the line of an interval replaces that of the one before.
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
        """Moves the bar."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def end(self, step: int) -> None:
        """The bar is full at this step."""
        self.steps = step
        if self._bar:
            self._bar.update(self._task, total=step)

    def interval(self, record: Mapping[str, float]) -> None:
        """The line of an interval."""
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
    """A writer of events that hides those after `step`, which an interrupted run left behind.

    tensorboardX imports torch where it finds it, which takes seconds and is of no use here: so it does not find it.
    """
    hidden = sys.modules.setdefault("torch", None) is None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


class Reporter:
    """All reports together. Every process may call it; only process 0 (`writes`) has files and prints lines.

    Args:
      folder: the run's working directory.
      step: step from which the run resumes; `steps` that at which it ends.
      every: steps of an interval.
      peak: FLOP/s of all devices together, if known.
    """

    def __init__(self, folder: Path, step: int, steps: int, every: int, meter: Meter, peak: float | None, writes: bool):
        self.every, self.steps, self.meter, self.peak, self.writes = every, steps, meter, peak, writes
        self.folder = folder
        if writes:
            self._open(step)
            self._display = Display(steps, step)

    def end(self, step: int) -> None:
        """The run ends at this step, which may be another one than it was told."""
        self.steps = step
        if self.writes:
            self._display.end(step)

    def rewind(self, step: int, why: str) -> None:
        """Withdraws the reports of later steps, which will be repeated with other data."""
        self.meter.restart()
        if self.writes:
            self._file.close()
            self._events.close()
            self._open(step)
            self._file.write({"step": step, "rewind": why})
            self._display.step(step)
        self.line(why)

    def step(self, record: dict[str, Any]) -> None:
        """Takes the metrics of a finished step, in order."""
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
        """Takes the result of an evaluation: numbers, and under the name of a measure its shares by kind."""
        if self.writes:
            self._file.write({"step": step, "heldout": found})
            measure, shares = next((name, value) for name, value in found.items() if isinstance(value, dict))
            self._scalars("heldout", {"step": step, "loss": found["loss"], **shares})
            shown = "  ".join(f"{kind} {share:.1%}" for kind, share in shares.items())
            among = f" of {found['pairs']:,} pairs" if "pairs" in found else ""
            measured = f"{measure.replace('_', ' ')}{among}: {shown}"
            self._display.line(f"held-out {step}/{self.steps}  loss {found['loss']:.4f}  {measured}")

    def line(self, text: str) -> None:
        """Says something."""
        if self.writes:
            self._display.line(text)

    def flush(self) -> None:
        """Returns when everything so far is on disk."""
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
