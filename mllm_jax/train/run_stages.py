"""Trains a run, or its stages one after the other (see `mllm_jax.train.runs.stages`)."""

import re
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError, dump
from mllm_jax.common.errors import describe_error
from mllm_jax.common.files import write_atomically
from mllm_jax.common.workdir import CONFIG, ended, note_ended
from mllm_jax.model.vlm import abstract_params
from mllm_jax.train.algorithms import algorithm_of
from mllm_jax.train.checkpoint.lock import locked
from mllm_jax.train.checkpoint.restore import check_adapters
from mllm_jax.train.length import DataEnded
from mllm_jax.train.loop import made, train
from mllm_jax.train.monitor.processes import StopSignal
from mllm_jax.train.runs.config import PARTS_OF_STAGES, read_run
from mllm_jax.train.runs.stages import names_in_order, one_run, stage_config
from mllm_jax.train.step.optimizer import make_optimizer


def train_run(config: ConfigDict, workdir: str | Path, stage: str | None = None, **options: Any) -> bool:
    """Trains a run, or its stages one after the other, each in its own folder below `workdir`.

    The same call resumes an interrupted stage and skips completed ones. SIGTERM saves and ends the current stage, and
    no other begins.

    Args:
      stage: name of the only stage to train, also a completed one whose `optim.steps` were raised. It starts from the
        weights of the previous stage if `workdir` has them, else from those of `config.init`. None: all stages.
      options: arguments of `mllm_jax.train.loop.train`, for every stage.
    Returns:
      True if the run is complete, False if SIGTERM ended it.
    Raises:
      The errors of `mllm_jax.train.loop.train`. ConfigError of any stage is raised before the first one begins.
    """
    if not config.get("stages"):
        with StopSignal() as stop:
            train(one_run(config, stage), workdir, stop, **options)
        return not stop.heeded
    read_run(config)
    order = names_in_order(config)
    done = ended(workdir)
    names = [stage] if stage else [name for name in order if name not in done]
    for name in names:
        _check(config, name)
    folder = made(workdir)
    with locked(folder):
        return _train_stages(config, folder, order, names, done, single_stage=stage is not None, **options)


def _train_stages(
    config: ConfigDict,
    folder: Path,
    order: list[str],
    names: list[str],
    done: dict[str, int],
    single_stage: bool,
    **options,
) -> bool:
    if jax.process_index() == 0:
        write_atomically(folder / CONFIG, dump(config))
        note_ended(folder, order, done)
    for name in () if single_stage else done:
        _print(f"stage {name} has ended at step {done[name]}")
    with StopSignal() as stop:
        for name in names:
            run = stage_config(config, name, folder)
            sources = [run.init] if run.init else [source for source in run.parts.values() if source]
            origin = f"the weights of {' and '.join(sources)}" if sources else "random weights"
            _print(f"stage {name}, {order.index(name) + 1} of {len(order)}, from {origin}")
            try:
                step = train(run, folder / name, stop, **options)
            except DataEnded as error:
                raise DataEnded(_error_text(error, name)) from error
            if stop.heeded:
                return False
            done = done | {name: step}
            if jax.process_index() == 0:
                note_ended(folder, order, done)
            if name != names[-1] and stop.asked():
                return False
    return True


def _check(config: ConfigDict, name: str) -> None:
    """Raises ConfigError for faults that would end a stage at its start, hours after the first one began."""
    run_of = lambda name: read_run(stage_config(config, name))
    run, after = run_of(name), config.stages[name].after
    try:
        if after:
            check_adapters(run_of(after).lora, run.lora, f"of stage {after}")
        make_optimizer(run.optim, abstract_params(run.model))
        run.data.source("train")
        if not any(getattr(run.algorithm, field) in config.stages for field in run.algorithm.runs):
            algorithm_of(run).check_sources()
    except ConfigError as error:
        raise ConfigError(_error_text(error, name)) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.stages.{name}: {describe_error(error)}") from error


def _error_text(error: ConfigError, name: str) -> str:
    """Returns the text of an ordinary run's error with the setting paths of the stage."""
    return re.sub(rf"\bconfig\.(?=({'|'.join(PARTS_OF_STAGES)})\b)", f"config.stages.{name}.", str(error))


def _print(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
