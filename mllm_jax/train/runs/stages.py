"""Stages of a run, such as alignment and instruction tuning: each is an ordinary run in its own folder.

`config.stages.NAME` sets the data, optimizer, trained weights, adapters, algorithm or mesh in which a stage differs
from the run. Stage NAME of the run in DIR is in DIR/NAME, with its own checkpoints, metrics, events and config, so
every tool that reads a run can read a stage.

A stage starts from the weights of the stage `after` which it comes, with **a new optimizer** and its own schedule:
frozen weights have no moments, other moments belong to another loss, and published recipes restart the schedule. If
both stages have the same adapters, training continues on them. If only the previous one has adapters, they are merged
into the weights; if only this one has adapters, they are new.
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
    """Returns the stages in an order of training: each after the stages that it depends on, branches by name.

    Example: with b after a, c after a, and d after b, the order is a b d c.

    Raises:
      ConfigError: a stage comes after an unknown one, or in a circle, or its name is no valid folder and setting.
    """
    after = {name: stage.after or "" for name, stage in config.stages.items()}
    stages = {name: stage.algorithm for name, stage in config.stages.items()}
    dependencies = {name: [stage[field] for field in runs_of(stage)] for name, stage in stages.items()}
    for name, previous in after.items():
        if not name.isidentifier() or name == CHECKPOINTS:
            raise ConfigError(f"config.stages: {name!r} cannot be the name of a stage. Use a word without dashes.")
        if previous and previous not in after:
            raise ConfigError(
                f"config.stages.{name}.after: no stage is called {previous!r}; {suggestion(previous, after)}"
            )
    order: list[str] = []

    def add(name: str, waiting: tuple[str, ...] = ()) -> None:
        """Appends a stage to the order, after the stages that it depends on."""
        if name in waiting:
            raise ConfigError(f"config.stages need each other in a circle: {', '.join([*waiting, name])}. Change one.")
        for previous in (after[name], *dependencies[name]):
            if previous in after:
                add(previous, (*waiting, name))
        if name not in order:
            order.append(name)

    for name in sorted(after, key=lambda name: branch(name, after)):
        add(name)
    return order


def stage_config(config: ConfigDict, name: str, workdir: str | Path | None = None) -> ConfigDict:
    """Returns stage `name` as the config of an ordinary run.

    Args:
      workdir: folder of the staged run. If it contains the previous stage, this one starts from its weights, otherwise
        from `config.init` or `config.parts`. A stage that trains its reward model is there, too.
    """
    if name not in config.stages:
        raise ConfigError(f"config.stages has no {name!r}; {suggestion(name, config.stages)}")
    fields = config.to_dict()
    stage = fields["stages"][name]
    stage_fields = fields | {part: stage[part] for part in PARTS_OF_STAGES if stage[part] is not None} | {"stages": {}}
    stage_fields["processor"] = processor_source(
        stage_fields["processor"], stage_fields["init"], stage_fields.get("parts", {})
    )
    if workdir is not None and stage["after"] and saved_steps(folder := Path(workdir).resolve() / stage["after"]):
        stage_fields |= {"init": str(folder), "parts": {}}
    if workdir is not None:
        stages = {name: str(Path(workdir).resolve() / name) for name in fields["stages"]}
        algorithm = stage_fields["algorithm"]
        folders = {field: stages.get(algorithm[field], algorithm[field]) for field in runs_of(algorithm)}
        stage_fields["algorithm"] = algorithm | folders
    return ConfigDict(stage_fields)


def runs_of(algorithm: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the fields of a `config.algorithm` that name the folder of another run, or a stage."""
    config_type = PARTS.get(algorithm.get("type"))
    return config_type.runs if config_type is not None and issubclass(config_type, AlgorithmConfig) else ()


def one_run(config: ConfigDict, stage: str | None) -> ConfigDict:
    """Returns the config of a single run: the config itself, or one of its stages.

    Raises:
      ConfigError: the config has stages and `stage` is None, or it has no such stage.
    """
    if stage is not None and not config.get("stages"):
        raise ConfigError(f"--stage={stage}: the config has no stages. Remove the flag.")
    if stage is None and config.get("stages"):
        raise ConfigError(f"the config has stages. Set one with --stage: {', '.join(names_in_order(config))}.")
    return config if stage is None else stage_config(config, stage)


def branch(name: str, after: Mapping[str, str]) -> list[str]:
    """Returns the chain of stages that ends with `name`. after: previous stage of each. "": none."""
    chain = [name]
    while previous := after[chain[0]]:
        if previous in chain:
            raise ConfigError(
                f"config.stages come after each other in a circle: {', '.join([previous, *chain])}. Change one."
            )
        chain.insert(0, previous)
    return chain
