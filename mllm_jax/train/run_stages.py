"""Trains a run at once, or stage by stage if its config has stages (see `mllm_jax.train.runs.stages`)."""

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

    The same call resumes the stage that was interrupted; completed stages are not touched. SIGTERM ends the current
    stage, which can be resumed, and no other begins.

    Args:
      stage: name of the only stage to train, further if its `optim.steps` were raised. It starts from the weights of
        the stage before it if `workdir` has them, else from those of `config.init`.
      options: arguments of `mllm_jax.train.loop.train`, for every stage.
    Returns:
      whether the run is complete; False if SIGTERM ended it before.
    Raises:
      The errors of `mllm_jax.train.loop.train`. ConfigError of any stage comes before the first one begins.
    """
    if not config.get("stages"):
        with StopSignal() as stop:
            train(one_run(config, stage), workdir, stop, **options)
        return not stop.heeded
    read_run(config)
    order = names_in_order(config)
    done = ended(workdir)
    chosen = [stage] if stage else [name for name in order if name not in done]
    for name in chosen:
        _check(config, name)
    folder = made(workdir)
    with locked(folder):
        return _train_stages(config, folder, order, chosen, done, alone=stage is not None, **options)


def _train_stages(
    config: ConfigDict, folder: Path, order: list[str], chosen: list[str], done: dict[str, int], alone: bool, **options
) -> bool:
    if jax.process_index() == 0:
        write_atomically(folder / CONFIG, dump(config))
        note_ended(folder, order, done)
    for name in () if alone else done:
        _say(f"stage {name} has ended at step {done[name]}")
    with StopSignal() as stop:
        for name in chosen:
            run = stage_config(config, name, folder)
            sources = [run.init] if run.init else [source for source in run.parts.values() if source]
            origin = f"the weights of {' and '.join(sources)}" if sources else "random weights"
            _say(f"stage {name}, {order.index(name) + 1} of {len(order)}, from {origin}")
            try:
                step = train(run, folder / name, stop, **options)
            except DataEnded as error:
                raise DataEnded(_of_stage(error, name)) from error
            if stop.heeded:
                return False
            done = done | {name: step}
            if jax.process_index() == 0:
                note_ended(folder, order, done)
            if name != chosen[-1] and stop.asked():
                return False
    return True


def _check(config: ConfigDict, name: str) -> None:
    """Raises ConfigError for what would end a stage before its first step, hours after the chain began."""
    alone = lambda name: read_run(stage_config(config, name))
    run, after = alone(name), config.stages[name].after
    try:
        if after:
            check_adapters(alone(after).lora, run.lora, f"of stage {after}")
        make_optimizer(run.optim, abstract_params(run.model))
        run.data.source("train")
        if not any(getattr(run.algorithm, field) in config.stages for field in run.algorithm.runs):
            algorithm_of(run).check_sources()
    except ConfigError as error:
        raise ConfigError(_of_stage(error, name)) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.stages.{name}: {describe_error(error)}") from error


def _of_stage(error: ConfigError, name: str) -> str:
    """Text of an ordinary run's error with the paths of the stage."""
    return re.sub(rf"\bconfig\.(?=({'|'.join(PARTS_OF_STAGES)})\b)", f"config.stages.{name}.", str(error))


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
