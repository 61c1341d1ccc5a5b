"""A training run: begins or goes on where it was, and ends whole, whatever stops it.

The host runs at most two steps ahead of the devices. It puts the next batch on them while they work, and reads metrics
of steps that are done, so that they never wait for it.
"""

import collections
import re
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mllm_jax.config import ConfigError, dump, told
from mllm_jax.model import abstract_params, count_params
from mllm_jax.sharding import make_mesh
from mllm_jax.train.base import completed, note_base, saved
from mllm_jax.train.checkpoint import PROCESSOR, Checkpoints
from mllm_jax.train.flops import Counts, count_flops, padded, peak_flops, useful
from mllm_jax.train.initial import first_params, processor_of
from mllm_jax.train.inputs import Placer, make_processor, open_data
from mllm_jax.train.metrics import Meter, Reporter, short
from mllm_jax.train.optim import make_optimizer
from mllm_jax.train.processes import Lost, compiled_together, noticing_others
from mllm_jax.train.retrieval import held_out
from mllm_jax.train.run import Run, read_run, train_step
from mllm_jax.train.state import TrainState, abstract_state, state_from_params, state_shardings
from mllm_jax.types import Batch

ADDRESS = re.compile(r"\w[\w+.-]+:/")  # gs://bucket, s3://bucket, also what Path makes of them


class Diverged(RuntimeError):
    """Too many steps in a row were not finite."""


class Fetched(NamedTuple):
    """A batch on the devices."""

    batch: Batch
    position: dict[str, Any]  # in the data, after this batch
    about: dict[str, float]  # what only the host knows of it


class StopSignal:
    """Whether somebody asked the run to stop: SIGTERM (preemption) or SIGINT. The second one is not held back.

    heeded: the run saved and ended because of it, before its end.
    """

    def __init__(self):
        self.heeded, self._asked, self._before, self._steps = False, False, {}, 0

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:  # several processes agree through jax's own notice of preemption
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """The same answer for all processes. Each calls it after every step, of all stages: jax counts on that."""
        self._steps += 1
        several = jax.process_count() > 1
        return multihost_utils.reached_preemption_sync_point(self._steps) if several else self._asked

    def _note(self, number, _frame) -> None:
        self._asked = True
        signal.signal(number, self._before[number])


def train(config: ConfigDict, workdir: str | Path, stop: StopSignal | None = None) -> int:
    """Trains until `config.optim.steps` and returns the step that was reached, which is less after SIGTERM.

    The same call goes on from the newest checkpoint below `workdir`. The results are, bit for bit, those of a run on
    the same mesh that nothing interrupted. A config with stages is trained by `mllm_jax.train.chain`, which calls this
    for each and passes its own `stop`.

    Args:
      stop: of a caller that goes on afterwards; it tells whether the run was stopped.
    Raises:
      ConfigError: the config, or a checkpoint of another run. Diverged: the loss or the gradient stays non-finite.
      BadData: too many records of the data are broken. Lost: another process of the run has ended.
    """
    with nullcontext(stop) if stop else StopSignal() as stop:
        try:
            run = read_run(config)
            if run.stages:
                raise ConfigError("the config has stages; mllm_jax.train.chain trains them")
            training = Training(config, run, made(workdir))
        except (ValueError, OSError) as error:  # all that a run is built from comes from its config
            raise ConfigError(told(error)) from error
        try:
            with noticing_others():
                return training.run(stop)
        except Lost:
            training.lost = True
            raise
        finally:
            training.close()


class Training:
    """The parts of a run, and where it is."""

    def __init__(self, config: ConfigDict, run: Run, workdir: Path):
        self.config, self.settings, self.workdir = config, run, workdir
        model, rules, data = run.model, run.model.runtime.rules, run.data
        processor, heldout = make_processor(processor_of(run), model, data), data.source("heldout")
        mesh = make_mesh(run.mesh)
        tx, _ = make_optimizer(run.optim, abstract_params(model))
        self.loader, self.place = open_data(data, processor, mesh, rules), Placer(data.batch, mesh, rules)
        self.train_step = compiled_together(train_step(run, tx, mesh))
        self.evaluate = held_out(run, processor, mesh, heldout) if heldout is not None else None
        self.checkpoints = Checkpoints(workdir, run.train.keep)
        self.resumed = self.checkpoints.latest() is not None
        self.state, self.position = self._resume(tx, mesh) if self.resumed else self._begin(tx, mesh)
        self.step, self.bad = int(self.state.step), int(self.state.bad)
        self.pending: collections.deque[tuple[int, dict, dict]] = collections.deque()
        self.compiled, self.lost, self.flops = False, False, flops_of_counts(run)
        self.report = self._reporter(workdir, mesh)
        if jax.process_index() == 0:
            (workdir / "config.json").write_text(dump(config), encoding="utf-8")
            processor.save(workdir / PROCESSOR)

    def run(self, stop: StopSignal) -> int:
        """Steps until the end, or until somebody asks to stop. Returns the step."""
        every = self.settings.train
        upcoming = self._fetch()
        while upcoming is not None:
            self._take(upcoming)
            upcoming = self._fetch_while_computing()
            last, stopping = upcoming is None, stop.asked()
            if last or _due(every.log_every, self.step - 1):
                self._read_metrics(self.step if last else self.step - 1)
            if self.evaluate and (last or _due(every.evaluate_every, self.step)):
                self._evaluate()
            if last or stopping or _due(every.save_every, self.step):
                self._save(always=last or stopping)
            if stopping and not last:
                stop.heeded = True
                self.report.line(f"asked to stop: saved at step {self.step}, from which the same command goes on")
                break
        self.checkpoints.wait()
        return self.step

    def close(self) -> None:
        self.loader.close()
        self.report.close()
        if not self.lost:  # a save would wait for the process that has ended
            self.checkpoints.close()

    def _begin(self, tx, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
        run = self.settings
        params = first_params(run, mesh)
        note_base(run, self.workdir, params)
        return state_from_params(run.model, tx, mesh, params), self.loader.get_state()

    def _resume(self, tx, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
        run, model = self.settings, self.settings.model
        states = abstract_state(model, tx), state_shardings(model, tx, mesh, model.runtime.rules)
        parts = (state._replace(params=saved(run, state.params)) for state in states)
        state, position = self.checkpoints.restore(self.config, *parts)
        state = state._replace(params=completed(run, self.workdir, state.params, partial(first_params, run, mesh)))
        try:
            self.loader.set_state(position)
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error
        return state, position

    def _reporter(self, workdir: Path, mesh: Mesh) -> Reporter:
        run, device = self.settings, mesh.devices.flat[0].device_kind
        room, peak = run.data.budget, peak_flops(device)
        meter = Meter({"tokens": run.data.batch * room.tokens, "patches": run.data.batch * room.rows * room.patches})
        report = Reporter(
            workdir,
            self.step,
            run.optim.steps,
            run.train.log_every,
            meter,
            peak and peak * mesh.size,
            writes=jax.process_index() == 0,
        )
        sizes = {part: f"{count / 1e6:.2f}M" for part, count in count_params(run.model).items()}
        parts = ", ".join(f"{part} {size}" for part, size in sizes.items() if size != "0.00M")
        began = "goes on" if self.resumed else "begins"
        report.line(f"{workdir} {began} at step {self.step} of {run.optim.steps} on {mesh.size} x {device}: {parts}")
        return report

    def _fetch(self) -> Fetched | None:
        """The next batch, on its way to the devices; None at the end of the run or of the data."""
        if self.step >= self.settings.optim.steps:
            return None
        batch, info = next(self.loader, (None, None))
        if batch is None:
            return None
        processes = self.settings.data.batch / batch.rows  # this one's share stands for all
        counts = useful(batch, self.settings.model.decoder.window)
        needed = {part: processes * float(costs @ counts) for part, costs in self.flops.items()}
        if not self.compiled:
            for line in explain(self.settings, batch, processes):
                self.report.line(line)
        left_out = {"dropped": info.dropped, "skipped": sum(info.skipped.values())}
        about = {"flops": sum(needed.values())} | {name: number for name, number in left_out.items() if number}
        return Fetched(self.place(batch), self.loader.get_state(), about)

    def _fetch_while_computing(self) -> Fetched | None:
        began = time.perf_counter()
        upcoming = self._fetch()
        running = self.pending[-1][1]["loss"]
        if running.is_ready():
            self.report.meter.wait(time.perf_counter() - began)
        if len(self.pending) > 1:
            jax.block_until_ready(self.pending[-2][1])
        return upcoming

    def _take(self, fetched: Fetched) -> None:
        """Starts a step on the devices."""
        began = time.perf_counter()
        self.state, metrics = self.train_step(self.state, fetched.batch)
        self.step, self.position = self.step + 1, fetched.position
        self.pending.append((self.step, metrics, fetched.about))
        if not self.compiled:
            self.compiled = True
            jax.block_until_ready(metrics)
            self.report.line(f"the first step took {time.perf_counter() - began:.1f} s, compilation included")
            self.report.meter.restart(skip=1)

    def _read_metrics(self, upto: int) -> None:
        """Reports the steps up to `upto`, fetched at once. Raises Diverged."""
        done = [self.pending.popleft() for _ in range(len(self.pending)) if self.pending[0][0] <= upto]
        for (step, _, about), metrics in zip(done, jax.device_get([metrics for _, metrics, _ in done])):
            values = {name: float(value) for name, value in metrics.items()}
            self.report.step({"step": step} | values | about)
            self.bad = 0 if values["finite"] else self.bad + 1
            if self.bad >= self.settings.train.patience:
                self.report.flush()
                raise Diverged(
                    f"the loss or the gradient was not finite in {self.bad} steps in a row, up to step {step}. They "
                    f"changed nothing; the checkpoint of step {self.checkpoints.latest()} is kept. A lower "
                    "optim.learning_rate, optim.clip or another data.seed may help"
                )

    def _evaluate(self) -> None:
        self._read_metrics(self.step)
        began = time.perf_counter()
        self.report.heldout(self.step, self.evaluate(self.state.params))
        self.report.meter.pause(time.perf_counter() - began)

    def _save(self, always: bool) -> None:
        """Saves, unless the run is in trouble: what the last good checkpoint holds is then as good."""
        self._read_metrics(self.step)
        if self.bad and not always:
            return
        began = time.perf_counter()
        self.report.flush()  # first: a checkpoint must not know of steps that the files do not
        part = self.state._replace(params=saved(self.settings, self.state.params))
        self.checkpoints.save(self.step, part, self.config, self.position)
        self.report.meter.pause(time.perf_counter() - began)


def explain(run: Run, batch: Batch, processes: float = 1) -> Iterator[str]:
    """What a step costs, in lines for people.

    Args:
      batch: one process's share of the first batch; `processes`: how many such shares a batch has.
    """
    window = run.model.decoder.window
    needed, room = (count_flops(run.model, counts(batch, window), run.optim.freeze) for counts in (useful, padded))
    total, room = (processes * sum(part.total for part in flops.values()) for flops in (needed, room))
    parts = ", ".join(f"{part} {processes * flops.total / total:.0%}" for part, flops in needed.items())
    yield f"a step needs {short(total)}FLOP ({parts}); with padding it has up to {short(room)}FLOP"
    if run.model.decoder.moe is not None and run.train.balance.counts_first(run.train.accumulate):
        first = processes * sum(flops.forward for part, flops in needed.items() if part != "head")
        yield (
            f"train.balance.exact: a forward pass counts the choices of a batch first, {short(first)}FLOP or "
            f"{first / total:.0%} besides; without it they are counted up to each accumulated part"
        )


def made(workdir: str | Path) -> Path:
    """The folder, which is there afterwards. ConfigError where it cannot be one."""
    if ADDRESS.match(str(workdir)):
        raise ConfigError(
            f"--workdir={workdir} is not a folder. A run writes plain files: use a file system that all hosts share "
            "(NFS, Filestore), or mount the bucket (gcsfuse BUCKET /mnt/runs) and use a folder in it"
        )
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"--workdir={workdir} is, or lies in, a file; name a folder") from error
    return Path(workdir).resolve()


def _due(every: int, step: int) -> bool:
    return bool(every) and step > 0 and step % every == 0


def flops_of_counts(run: Run) -> dict[str, np.ndarray]:
    """FLOPs of a step in every part of the model for each of `Counts`, in which they are linear."""
    units = [count_flops(run.model, Counts(*unit), run.optim.freeze) for unit in np.eye(len(Counts._fields))]
    return {part: np.array([flops[part].total for flops in units]) for part in units[0]}
