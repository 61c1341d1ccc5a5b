"""Checks the training command before any host is requested.

Checks that need the hosts' files are left to them: whether data are in a bucket, and the content of records.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict, config_flags

from launch.hosts import ROOT, Files, Hosts
from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import describe_error
from mllm_jax.data.sources import TFDS, find_files
from mllm_jax.model.vlm import ModelConfig, abstract_boxed, abstract_params
from mllm_jax.sharding.logical_axes import num_shards, partition_spec
from mllm_jax.sharding.mesh import mesh_without_devices
from mllm_jax.sharding.weights import shardings
from mllm_jax.train.input.pipeline import check_streams
from mllm_jax.train.monitor.profiler import steps_of
from mllm_jax.train.runs.command import read_config
from mllm_jax.train.runs.config import Run, read_run
from mllm_jax.train.runs.data_files import EMBEDDED, MixtureData
from mllm_jax.train.runs.data_files import Files as DataFiles
from mllm_jax.train.runs.stages import names_in_order, one_run
from mllm_jax.train.step.optimizer import make_optimizer

CLUSTER = ("distributed", "coordinator", "processes", "process")  # flags of training that launchers give
AFTER = "-- --config FILE --workdir DIR ..."  # the arguments of the training


class Training(NamedTuple):
    """The arguments of `python -m mllm_jax.train`, read."""

    config: ConfigDict
    file: str  # as --config names it, without its argument
    workdir: str
    stage: str | None


def read_training(command: Sequence[str]) -> Training:
    """Reads the arguments of the training as training does, but for files that are named relative to the checkout.

    Raises:
      ConfigError: what is wrong with them.
    """
    if "--dry_run" in command:
        raise ConfigError("--dry_run must be before the --; after it, it is an argument of the training")
    values = flags.FlagValues()
    for name in ("workdir", "stage", "profile_steps", "coordinator", "processes", "process"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name in ("debug_nans", "distributed"):
        flags.DEFINE_bool(name, False, "", flag_values=values)
    with contextlib.chdir(ROOT):
        config = read_config(command, values)
    if given := [name for name in CLUSTER if values[name].present]:
        raise ConfigError(f"--{given[0]} is given by the launcher. Leave it out")
    if missing := [name for name in ("config", "workdir") if not values[name].value]:
        raise ConfigError(f"--{' and --'.join(missing)} must be given to the training, as in: {AFTER}")
    steps_of(values.profile_steps)
    file = config_flags.get_config_filename(values["config"]).partition(":")[0]
    return Training(config, file, values.workdir, values.stage)


def check_training(training: Training, hosts: Hosts) -> None:
    """Raises ConfigError for what training would refuse on these hosts."""
    _check_workdir(training.workdir, hosts.files)
    if hosts.files.mount:
        _check_sent(training.file, hosts.files)
    with contextlib.suppress(RuntimeError):  # too late if jax is initialized, which is fine
        jax.config.update("jax_platforms", "cpu")
    for path, run in _runs(training.config, training.stage):
        try:
            _check_paths(run, hosts.files, training.config.get("stages") or ())
            _check_mesh(run, hosts)
        except (ConfigError, ValueError) as error:
            raise ConfigError(str(error).replace("config.", f"{path}.", 1)) from error


def _check_workdir(workdir: str, files: Files) -> None:
    if "://" in workdir:
        raise ConfigError(
            f"--workdir={workdir} is not a folder: mount the bucket on every host, and name a folder in it"
        )
    if files.mount and not Files(files.mount).is_within(workdir):
        raise ConfigError(
            f"--workdir={workdir} is lost with its host: the file system that all hosts share is {files.mount}"
        )


def _check_sent(config: str, files: Files) -> None:
    """Checks the config file, which the hosts read again."""
    path = Path(config)
    if not (ROOT / path).resolve().is_relative_to(ROOT):
        raise ConfigError(f"--config={config}: the hosts do not have it. Put it into {ROOT}/configs; {files.how}")
    if path.is_absolute():
        raise ConfigError(
            f"--config={config}: the hosts have this checkout elsewhere. Write --config={path.relative_to(ROOT)}"
        )
    if not files.is_sent(config):
        raise ConfigError(f"--config={config}: the hosts do not get this file as it is here; {files.how}")


def _runs(config: ConfigDict, stage: str | None) -> Iterator[tuple[str, Run]]:
    """(path in the config, run) of all that is trained."""
    if stage is not None or not config.get("stages"):
        yield "config" if stage is None else f"config.stages.{stage}", read_run(one_run(config, stage))
        return
    read_run(config)
    for name in names_in_order(config):
        yield f"config.stages.{name}", read_run(one_run(config, name))


def _check_mesh(run: Run, hosts: Hosts) -> None:
    """The mesh, and what must divide over it. Raises ConfigError and ValueError."""
    rules = run.model.runtime.rules
    try:
        mesh = mesh_without_devices(run.mesh, hosts.devices, hosts.slices)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    make_optimizer(run.optim, abstract_params(run.model))
    partition_spec(("batch",), rules, mesh, (run.data.batch,), "config.data.batch")
    if isinstance(run.model, ModelConfig):
        partition_spec(("length",), rules, mesh, (run.data.tokens,), "config.data.tokens")
    shardings(abstract_boxed(run.model), mesh, rules)
    check_streams(run.data, _shares(run, mesh, hosts.processes))


def _shares(run: Run, mesh: AbstractMesh, processes: int) -> int:
    """Number of processes with separate rows, if neighbors hold the same rows; otherwise 1."""
    rows = num_shards("batch", run.model.runtime.rules, mesh)
    return min(rows, processes) if max(rows, processes) % min(rows, processes) == 0 else 1


def _check_paths(run: Run, files: Files, stages: Collection[str]) -> None:
    """The folders and files that the run reads, but for what its other stages write. Raises ConfigError."""
    sets = {"config.data": run.data} if isinstance(run.data, DataFiles) else {}
    if isinstance(run.data, MixtureData):
        sets = {f"config.data.sources.{name}": part for name, part in run.data.sources.items()}
    for name, data in sets.items():
        if not data.path:
            raise ConfigError(f"{name}.path must name the conversations: a file, a pattern, a folder or tfds:NAME")
        for field in ("path", "heldout"):
            if (path := getattr(data, field)) and not path.startswith((TFDS, EMBEDDED)):
                _check_data(f"{name}.{field}", path, files)
        if data.root:
            _check_path(f"{name}.root", data.root, files)
    models = {"config.init": run.init, "config.processor": run.processor}
    models |= {f"config.parts.{part}": source for part, source in run.taken.items()}
    for name, source in models.items():
        if _is_folder(source):
            _check_path(name, source, files)
    read = run.algorithm.files | {field: getattr(run.algorithm, field) for field in run.algorithm.runs}
    for field, source in read.items():
        if source not in stages:
            _check_path(f"config.algorithm.{field}", source, files)


def _is_folder(source: str) -> bool:
    """Returns whether a model is named by its folder, not by a name of the hub, or of the embedded processor."""
    return bool(source) and (source[0] in "/.~" or source.count("/") > 1 or (ROOT / source).is_dir())


def _check_data(name: str, path: str, files: Files) -> None:
    try:
        if not files.mount and not files.is_within(path):
            with contextlib.chdir(ROOT):
                find_files(path)
            return
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {describe_error(error)}") from error
    _check_path(name, path, files)


def _check_path(name: str, path: str, files: Files) -> None:
    """A file or a folder that the hosts must have."""
    if "://" in path:
        raise ConfigError(f"{name}={path} is not a folder. Mount the bucket on every host, and name a folder in it")
    if files.is_within(path):
        return
    if not files.mount:
        if not (ROOT / Path(path).expanduser()).exists():
            raise ConfigError(f"{name}={path}: does not exist. Name a path of all nodes, or a folder of --host_folder")
    elif Path(path).is_absolute() or path.startswith("~"):
        raise ConfigError(
            f"{name}={path}: the hosts do not have it. Copy it into the bucket and name it below {files.mount}, "
            f"or give --host_folder={Path(path).parent} if every host has this folder"
        )
    elif not files.is_sent(path):
        raise ConfigError(
            f"{name}={path}: the hosts do not have it. Name it below {files.mount}; of this checkout, {files.how}"
        )
