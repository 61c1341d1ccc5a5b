"""The training loop: starts or resumes a run, trains, evaluates and saves it.

The host runs at most two steps ahead of the devices. Meanwhile it transfers the next batch and reads the metrics of
finished steps, so that the devices need not wait.
"""

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError, dump
from mllm_jax.common.errors import describe_error
from mllm_jax.common.files import write_atomically, writing
from mllm_jax.common.status import announced, say
from mllm_jax.common.workdir import CONFIG, PROCESSOR
from mllm_jax.model.vlm import count_params
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms import algorithm_of
from mllm_jax.train.checkpoint.frozen_base import completed, note_base, saved
from mllm_jax.train.checkpoint.lock import locked
from mllm_jax.train.checkpoint.manager import Restored
from mllm_jax.train.checkpoint.restore import first_params
from mllm_jax.train.checkpoint.tiers import Tiers
from mllm_jax.train.input.feed import DeviceBatch, InputPipeline
from mllm_jax.train.input.pipeline import Placer, open_data, shares_of
from mllm_jax.train.length import DataEnded, StoppedEarly, check_end, find_length, with_length
from mllm_jax.train.monitor.flops import peak_flops
from mllm_jax.train.monitor.goodput import Clock, summary
from mllm_jax.train.monitor.memory import check_memory, describe, memory_of, trained_share
from mllm_jax.train.monitor.metrics import Meter, Reporter, last_written
from mllm_jax.train.monitor.nonfinite import find_nonfinite
from mllm_jax.train.monitor.processes import Lost, StopSignal, compiled_together, is_loss, noticing_others
from mllm_jax.train.monitor.profiler import Tracer
from mllm_jax.train.monitor.results import Diverged, Results, Started
from mllm_jax.train.monitor.spikes import Spike, SpikeRule
from mllm_jax.train.monitor.watchdog import Watchdog
from mllm_jax.train.runs.config import Run, read_run, train_context
from mllm_jax.train.step.context import TrainContext, state_from_params
from mllm_jax.train.step.state import TrainState
from mllm_jax.types import Batch

LISTEN = 0.5  # seconds between checks for a stop signal while waiting for a batch
ADDRESS = re.compile(r"\w[\w+.-]+:/")  # gs://bucket, s3://bucket, and gs:/bucket after Path


def train(
    config: ConfigDict,
    workdir: str | Path,
    stop: StopSignal | None = None,
    *,
    profile_steps: range = range(0),
    debug_nans: bool = False,
) -> int:
    """Trains until `config.optim.steps`, or until SIGTERM, and returns the last step.

    If `config.optim.steps` is 0, it trains until the end of the data (see `mllm_jax.train.length`).

    The same call resumes from the newest checkpoint in `workdir`. The results are bit-equal to those of an
    uninterrupted run on the same mesh. `mllm_jax.train.run_stages` trains a config with stages: it calls this function
    for each stage, with its own `stop`. If no step ends for `config.train.watchdog` seconds, the process ends.

    Args:
      stop: stop signal of a caller that continues afterwards. None: a new one.
      profile_steps: steps to trace to `workdir/profile`.
      debug_nans: end the run at the first non-finite step, with the name of the layer. Steps run one by one.
    Raises:
      ConfigError: the config is invalid, or `workdir` has a checkpoint of another run. Diverged: the loss or the
        gradient stays non-finite. BadData: too many records are broken. Lost: another process of the run has ended.
        DataEnded: the data ended before `config.optim.steps`; the last step is saved.
    """
    with nullcontext(stop) if stop else StopSignal() as stop:
        try:
            run = read_run(config)
            if run.stages:
                raise ConfigError("the config has stages. Train them with mllm_jax.train.run_stages.")
            folder = made(workdir)
        except (ValueError, OSError) as error:
            raise ConfigError(describe_error(error)) from error
        with locked(folder), noticing_others():
            return _train_in(folder, config, run, stop, profile_steps, debug_nans)


def _train_in(
    folder: Path, config: ConfigDict, run: Run, stop: StopSignal, profile_steps: range, debug_nans: bool
) -> int:
    try:
        training = Training(config, run, folder, profile_steps, debug_nans, lambda: stop.noted)
    except StoppedEarly:
        stop.heeded = True
        return 0
    except DataEnded:
        raise
    except (ValueError, OSError) as error:  # everything that a run is built from comes from its config
        raise ConfigError(describe_error(error)) from error
    try:
        return training.run(stop)
    except (Lost, jax.errors.JaxRuntimeError) as error:
        training.lost = is_loss(error)
        raise
    finally:
        training.close()


class Interrupted:
    """Marker in place of a batch: the run was asked to stop."""


class Training:
    """A run in progress: its components, its state and its position in the data."""

    def __init__(
        self,
        config: ConfigDict,
        run: Run,
        workdir: Path,
        profile_steps: range = range(0),
        debug_nans: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ):
        self.config, self.settings, self.workdir = config, run, workdir
        self.clock, self.debug_nans = Clock(), debug_nans
        self.algorithm = algorithm = algorithm_of(run)
        if debug_nans and algorithm.objective() is None:
            name = type(run.algorithm).__name__
            raise ConfigError(f"--debug_nans: does not support steps of {name}. Remove the flag.")
        processor, heldout = algorithm.processor(), run.data.source("heldout")
        self.mesh = mesh = make_mesh(run.mesh)
        context = train_context(run, mesh)  # the state does not depend on the length, which is computed below
        self.feed = self._open_feed(processor)
        self.evaluate = None if heldout is None else algorithm.evaluator(mesh, processor, heldout)
        states = context.state, context.state_shardings
        self._check_memory(*states)
        saved_parts = (state._replace(params=saved(run, state.params)) for state in states)
        self.checkpoints = Tiers(workdir, run.train.max_to_keep, run.train.local, run.train.verify, *saved_parts)
        self.resumed = self.checkpoints.latest() is not None
        restored = self._resume() if self.resumed else self._begin(context)
        self.length = find_length(run, processor, restored.notes.get("length"), stopped)
        self.settings = run = with_length(run, self.length)
        if self.length is not None:
            context = train_context(run, mesh)
        self.train_step = compiled_together(algorithm.step(context))
        self.frozen = algorithm.frozen(mesh, workdir, self.resumed)
        self.state, self.position, self.step = restored.state, restored.position, int(restored.state.step)
        self.compiled, self.lost = False, False
        self.report = self._reporter()
        self.results = Results(run.train, self.report, self.checkpoints.shared, self.clock, int(restored.state.bad))
        self.results.spikes.set_state(restored.notes["spikes"])
        self.watchdog = Watchdog(self.clock, run.train.watchdog, workdir)
        self.tracer = Tracer(profile_steps, workdir / "profile")
        if jax.process_index() == 0:
            write_atomically(workdir / CONFIG, dump(config))
            with writing(workdir / PROCESSOR):
                processor.save(workdir / PROCESSOR)

    def run(self, stop: StopSignal) -> int:
        """Trains until the end of the run or until it is asked to stop. Returns the last step."""
        self.clock.enter("steps")
        self.watchdog.watch()
        while True:
            try:
                self._train(stop)
                break
            except Spike as spike:
                self._rewind(spike)
        with self.clock.within("save"):
            self.checkpoints.wait()
        self.report.line(summary(self.clock.seconds()))
        if self.length is None and not stop.heeded:
            check_end(self.settings, self.step)
        return self.step

    def _train(self, stop: StopSignal) -> None:
        intervals = self.settings.train
        with self._announced("waiting for the first batch"):
            upcoming = self._fetch(stop)
        while isinstance(upcoming, DeviceBatch):
            self._take_step(upcoming)
            if self.debug_nans:
                self._check_finite(upcoming.batch)
            upcoming = self._fetch_while_computing(stop)
            last, stopping = upcoming is None, isinstance(upcoming, Interrupted)
            if last or _due(intervals.log_every, self.step - 1):
                self.results.read(self.step - 1)
            if last:  # a separate read, because steps that are read together share one time
                self.report.end(self.step)
                self.results.read(self.step)
            if self.evaluate and (last or _due(intervals.evaluate_every, self.step)):
                self._evaluate()
            if last or stopping or _due(intervals.save_every, self.step):
                self._save(self.checkpoints.save, always=last or stopping, ended=last)
            elif _due(intervals.save_local_every, self.step):
                self._save(self.checkpoints.save_local)
        if upcoming is not None:
            stop.heeded = True
            done = f"saved at step {self.step}" if self.compiled else f"no step was taken after step {self.step}"
            self.report.line(f"asked to stop: {done}, from which the same command resumes")

    def close(self) -> None:
        """Closes all components, even if one of them fails."""
        with ExitStack() as stack:
            if not self.lost:  # closing would wait for the lost process
                stack.callback(self.checkpoints.close)
            for component in (self.report, self.feed, self.tracer, self.watchdog):
                stack.callback(component.close)

    def _open_feed(self, processor: Any) -> InputPipeline:
        run, mesh, rules = self.settings, self.mesh, self.settings.model.runtime.rules
        loader = open_data(run.data, processor, mesh, rules, self.algorithm.reading())
        place = Placer(run.data.batch, partial(self.algorithm.batch_shardings, mesh=mesh))
        ends_apart = run.data.epochs is not None and shares_of(run.data.batch, mesh, rules)[1] > 1
        return InputPipeline(loader, place, self.algorithm.cost(), ends_apart)

    def _check_memory(self, state: TrainState, layout: TrainState) -> None:
        """Prints the memory that a device certainly needs, before allocation. Raises ConfigError if it has less."""
        memory = memory_of(self.settings, state, layout)
        check_memory(memory, self.mesh)
        if jax.process_index() == 0:
            say(f"{self.workdir}: {describe(memory)}")

    def _announced(self, text: str) -> AbstractContextManager:
        """Returns a context that announces a step if it takes long, on the first process."""
        return announced(f"{self.workdir}: {text}") if jax.process_index() == 0 else nullcontext()

    def _begin(self, context: TrainContext) -> Restored:
        self.checkpoints.check_new()
        run = self.settings
        source = run.init or run.taken
        with self._announced(f"reading the weights of {source}" if source else "drawing random weights"):
            params = first_params(run, self.mesh)
        note_base(run, self.workdir, params)
        state = state_from_params(context, params)
        return Restored(state, self.feed.get_state(), {"spikes": SpikeRule(run.train.spikes).get_state()})

    def _resume(self) -> Restored:
        with self._announced("reading the newest checkpoint"):
            restored = self._add_base(self.checkpoints.restore(self.config))
        self.feed.set_state(restored.position)
        self.clock.resume(restored.notes["account"], last_written(self.workdir))
        return restored

    def _add_base(self, restored: Restored) -> Restored:
        """Adds the weights that checkpoints do not contain."""
        run, params = self.settings, restored.state.params
        params = completed(run, self.workdir, params, partial(first_params, run, self.mesh))
        return restored._replace(state=restored.state._replace(params=params))

    def _rewind(self, spike: Spike) -> None:
        """Restores the checkpoint before a spike, and continues with the data after it."""
        spikes, rewinds = self.results.spikes, self.results.spikes.rewinds + 1
        with self.clock.within("start"):
            restored = self._add_base(self.checkpoints.back_to(spike.back, self.config))
            self.feed.set_state(spike.position)
        self.clock.lose(restored.notes["account"]["seconds"])
        self.state, self.position, self.step = restored.state, spike.position, spike.back
        self.results.forget(int(restored.state.bad))
        spikes.set_state(restored.notes["spikes"] | {"rewinds": rewinds})
        skipped = f"the data of {spike.step - spike.back} steps are skipped"
        message = f"{spike}: back to step {spike.back}, {skipped} ({rewinds} of {spikes.config.rewinds})"
        self.report.rewind(self.step, message)

    def _reporter(self) -> Reporter:
        run, mesh, device = self.settings, self.mesh, self.mesh.devices.flat[0].device_kind
        budget, peak = run.data.budget, peak_flops(device)
        capacity = {
            "tokens": run.data.batch * budget.tokens,
            "patches": run.data.batch * budget.patch_rows * budget.patches_per_row,
        }
        report = Reporter(
            self.workdir,
            self.step,
            run.optim.steps,
            run.train.log_every,
            Meter(capacity, self.clock),
            peak and peak * mesh.size,
            writes=jax.process_index() == 0,
        )
        part_sizes = {part: f"{count / 1e6:.2f}M" for part, count in count_params(run.model).items()}
        sizes = [f"{part} {size}" for part, size in part_sizes.items() if size != "0.00M"]
        sizes = "; ".join(filter(None, [", ".join(sizes), trained_share(run)]))
        verb = "resumes" if self.resumed else "begins"
        progress = f"at step {self.step} of {run.optim.steps} on {mesh.size} x {device}"
        report.line(f"{self.workdir} {verb} {progress}: {sizes}")
        return report

    def _fetch(self, stop: StopSignal) -> DeviceBatch | Interrupted | None:
        """Returns the next batch, in transfer to the devices. None: the run or the data have ended.

        Interrupted: the run was asked to stop, before or while it waited for the batch.
        """
        if self.length is None and self.step >= self.settings.optim.steps:
            return None
        with self.clock.within("input"):
            self.feed.begin()
            while not self.feed.wait(LISTEN):
                if stop.asked_meanwhile():
                    return Interrupted()
            batch = self.feed.take()
            if batch is None:
                return None
            if stop.asked():  # before `all_ended`, which waits for all processes
                return Interrupted()
            with self.clock.waiting():
                if self.feed.all_ended(batch):
                    return None
        for line in batch.explained:
            self.report.line(line)
        return batch

    def _fetch_while_computing(self, stop: StopSignal) -> DeviceBatch | Interrupted | None:
        input_seconds = self.clock.seconds()["input"]
        upcoming = self._fetch(stop)
        if self.results.running():  # the devices were busy throughout
            self.clock.move(self.clock.seconds()["input"] - input_seconds, "input", "steps")
        self.results.wait()
        return upcoming

    def _take_step(self, fetched: DeviceBatch) -> None:
        """Starts a step on the devices."""
        self.step += 1
        self.watchdog.step = self.step
        with self.clock.within("steps" if self.compiled else "compile"), self.clock.waiting():
            began = time.perf_counter()
            with nullcontext() if self.compiled else self._announced("compiling the step, which may take minutes"):
                self.state, metrics = self.tracer.run(
                    self.step, self.train_step, self.state, fetched.batch, *self.frozen
                )
                if not self.compiled:
                    jax.block_until_ready(metrics)
            if not self.compiled:
                self.report.line(f"the first step took {time.perf_counter() - began:.1f} s, compilation included")
        self.position = fetched.position
        self.results.add(Started(self.step, metrics, fetched.about, fetched.position))
        if not self.compiled:
            self.compiled = True
            self.report.meter.restart(skip=1)

    def _check_finite(self, batch: Batch) -> None:
        """Raises Diverged if the last step, on `batch`, is not finite. Such a step has changed no weight."""
        if not self.results.last_is_finite():
            with self.clock.within("compile"):
                report = find_nonfinite(
                    self.settings, self.algorithm.objective(), self.state, batch, self.mesh, *self.frozen
                )
            self.results.read(self.step - 1)
            raise Diverged("\n  ".join([f"step {self.step} is not finite:", *report]))

    def _evaluate(self) -> None:
        self.results.read(self.step)
        with self.clock.within("evaluate"):
            self.report.heldout(self.step, self.evaluate(self.state.params, self.clock.tick))

    def _save(self, save: Callable, always: bool = False, ended: bool = False) -> None:
        """Saves a checkpoint, unless recent steps are non-finite: they have not changed the weights."""
        self.results.read(self.step)
        if self.results.bad and not always:
            return
        with self.clock.within("save"):
            self.report.flush()  # first, so that the files contain all steps of the checkpoint
            notes = {"account": self.clock.account(ended), "spikes": self.results.spikes.get_state()}
            notes["length"] = self.length and self.length._asdict()
            state = self.state._replace(params=saved(self.settings, self.state.params))
            save(self.step, state, self.config, self.position, notes)


def made(workdir: str | Path) -> Path:
    """Creates the folder and returns its absolute path. Raises ConfigError if it cannot be a folder."""
    if ADDRESS.match(str(workdir)):
        raise ConfigError(
            f"--workdir={workdir} is not a folder. A run writes plain files: use a file system that all hosts share "
            "(NFS, Filestore), or mount the bucket (gcsfuse BUCKET /mnt/runs) and use a folder in it."
        )
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"--workdir={workdir}: is a file or inside one. Name a folder.") from error
    return Path(workdir).resolve()


def _due(every: int, step: int) -> bool:
    return bool(every) and step > 0 and step % every == 0
