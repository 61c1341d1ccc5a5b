"""Stages of a run: align, instruct, long context ... each an ordinary run in its own folder.

A config names them, `config.stages.NAME`, and sets the data, optimizer, trained parts, adapters, budgets, loss or mesh
that differ from the run. Stage NAME of the run in DIR is in DIR/NAME, with its own checkpoints, metrics, events and
config, so that every reader of a run reads a stage.

A stage starts from the weights of the stage that it comes `after`, with **a new optimizer** and its own schedule:
moments of weights that were frozen do not exist, the others belong to another loss, and every published recipe restarts
its schedule. Only weights are carried over. Adapters of the stage before continue if this one has the same, and are
merged into their weights if it has none; if only this one has adapters, they are new.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import suggestion
from mllm_jax.common.workdir import CHECKPOINTS, saved_steps
from mllm_jax.train.losses.algorithm_config import AlgorithmConfig
from mllm_jax.train.runs.config import PARTS, PARTS_OF_STAGES, processor_source


def names_in_order(config: ConfigDict) -> list[str]:
    """The stages, each behind the one that it comes after and those that its algorithm needs, branches by name.

    Raises:
      ConfigError: a stage comes after none, or in a circle, or its name cannot be that of a folder and of a setting.
    """
    after = {name: stage.after or "" for name, stage in config.stages.items()}
    stages = {name: stage.algorithm for name, stage in config.stages.items()}
    needed = {name: [stage[field] for field in runs_of(stage)] for name, stage in stages.items()}
    for name, before in after.items():
        if not name.isidentifier() or name == CHECKPOINTS:
            raise ConfigError(f"config.stages: {name!r} cannot be the name of a stage; take a word without dashes")
        if before and before not in after:
            raise ConfigError(f"config.stages.{name}.after: no stage is called {before!r}; {suggestion(before, after)}")
    order: list[str] = []

    def add(name: str, waiting: tuple[str, ...] = ()) -> None:
        """Puts a stage behind the one that it comes after, and those whose runs its algorithm needs."""
        if name in waiting:
            raise ConfigError(f"config.stages need each other in a circle: {', '.join([*waiting, name])}")
        for before in (after[name], *needed[name]):
            if before in after:
                add(before, (*waiting, name))
        if name not in order:
            order.append(name)

    for name in sorted(after, key=lambda name: branch(name, after)):
        add(name)
    return order


def stage_config(config: ConfigDict, name: str, workdir: str | Path | None = None) -> ConfigDict:
    """Returns stage `name` as the config of an ordinary run.

    Args:
      workdir: folder of the staged run. If it contains the stage before this one, this one starts from its weights, and
        otherwise from `config.init` or `config.parts`. The stage that trains its reward model is there, too.
    """
    if name not in config.stages:
        raise ConfigError(f"config.stages has no {name!r}; {suggestion(name, config.stages)}")
    whole = config.to_dict()
    stage = whole["stages"][name]
    alone = whole | {part: stage[part] for part in PARTS_OF_STAGES if stage[part] is not None} | {"stages": {}}
    alone["processor"] = processor_source(alone["processor"], alone["init"], alone.get("parts", {}))
    if workdir is not None and stage["after"] and saved_steps(folder := Path(workdir).resolve() / stage["after"]):
        alone |= {"init": str(folder), "parts": {}}
    if workdir is not None:
        stages = {name: str(Path(workdir).resolve() / name) for name in whole["stages"]}
        algorithm = alone["algorithm"]
        found = {field: stages.get(algorithm[field], algorithm[field]) for field in runs_of(algorithm)}
        alone["algorithm"] = algorithm | found
    return ConfigDict(alone)


def runs_of(algorithm: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a `config.algorithm` that name the folder of another run, or a stage."""
    part = PARTS.get(algorithm.get("type"))
    return part.runs if part is not None and issubclass(part, AlgorithmConfig) else ()


def one_run(config: ConfigDict, stage: str | None) -> ConfigDict:
    """The one run that a command is about: the config itself, or the stage of it that is named.

    Raises:
      ConfigError: it has stages and none is named, or it has no such stage.
    """
    if stage is not None and not config.get("stages"):
        raise ConfigError(f"--stage={stage}: the config has no stages")
    if stage is None and config.get("stages"):
        raise ConfigError(f"the config has stages; name one with --stage: {', '.join(names_in_order(config))}")
    return config if stage is None else stage_config(config, stage)


def branch(name: str, after: Mapping[str, str]) -> list[str]:
    """The stages that lead to one, ending with it; `after` names the stage before each, "" = none."""
    line = [name]
    while before := after[line[0]]:
        if before in line:
            raise ConfigError(f"config.stages come after each other in a circle: {', '.join([before, *line])}")
        line.insert(0, before)
    return line
