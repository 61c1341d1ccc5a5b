"""Saves and restores the checkpoints of a run with Orbax: asynchronously, atomically, readable on any mesh.

A checkpoint contains the training state, the run's config and the position in the data, for any number of processes.
Runs with adapters leave out the frozen base (see `mllm_jax.train.checkpoint.frozen_base`). The partial checkpoint of a
killed save is ignored and deleted on the next start. Reading detects later damage (see `damage.py`).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError, dump
from mllm_jax.common.trees import flatten
from mllm_jax.common.workdir import CHECKPOINTS
from mllm_jax.data.pipeline.loader import join_states
from mllm_jax.train.checkpoint.damage import check_arrays, read_sealed, reading, saving, sealed, verify
from mllm_jax.train.checkpoint.fingerprint import fingerprints, names
from mllm_jax.train.checkpoint.orbax_manager import CheckpointManager
from mllm_jax.train.step.state import TrainState

# Settings that a resumed run cannot change: they determine the shapes of its state, or which conversations come next.
FIXED = ("model.", "algorithm.type", "lora.", "optim.name", "optim.freeze", "processor", "data.")
ANY_DATA = ("epochs", "root", "heldout", "workers", "processes", "prefetch", "fail_on_bad_record", "max_bad_fraction")
FREE = ("model.runtime.", *(f"data.{name}" for name in ANY_DATA))


class Restored(NamedTuple):
    """Content of a checkpoint."""

    state: TrainState
    position: dict[str, Any]  # state of the loaders of all processes
    notes: dict[str, Any]  # the `notes` passed to `save`


class Checkpoints:
    """Checkpoints below `workdir`. The newest `max_to_keep` are kept.

    Args:
      verify: store a fingerprint of every array.
    """

    def __init__(self, workdir: str | Path, max_to_keep: int = 3, verify: bool = True):
        self.folder, self._verify = Path(workdir).resolve() / CHECKPOINTS, verify
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True)
        self._manager = CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, config: ConfigDict, data: dict[str, Any], notes: dict[str, Any]
    ) -> None:
        """Starts to save; returns when the state is copied from the devices, so that the next step may overwrite it.

        Args:
          data: state of this process's loader.
          notes: further values to restore, as JSON.
        """
        params, progress = _split(state)
        about = {"config": json.loads(dump(config)), "data": join_states(from_all_processes(data))}
        about = sealed(about | {"notes": notes, "arrays": arrays_of(state, self._verify)})
        with saving(self.folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    progress=ocp.args.StandardSave(progress),
                    about=ocp.args.JsonSave(about),
                ),
            )

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, sorted."""
        return sorted(self._manager.all_steps())

    def set_aside(self, step: int, into: Path) -> Path:
        """Moves a checkpoint into the folder `into` and returns its new path. All processes must call it."""
        path = set_aside(self.folder / str(step), into) if jax.process_index() == 0 else into / str(step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set_aside")
        self._manager.reload()
        return path

    def drop_after(self, step: int) -> None:
        """Deletes checkpoints that are newer than `step`."""
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)

    def restore(
        self, config: ConfigDict, abstract: TrainState, layout: TrainState, step: int | None = None
    ) -> Restored:
        """Restores a checkpoint, by default the newest, with its state sharded as in `layout`.

        Raises:
          ConfigError: model, optimizer or data of the checkpoint differ from `config`. Damaged: the checkpoint is
            damaged.
        """
        step = self.latest() if step is None else step
        folder = self.folder / str(step)
        with reading(folder, everywhere=True):
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        about = read_sealed(about, folder)
        check_same_run(about["config"], config, self.folder.parent)
        wanted = jax.tree.map(placed, abstract, layout)
        check_arrays(wanted._asdict(), about["arrays"], folder)
        params, progress = _split(wanted)
        with reading(folder):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params), progress=ocp.args.StandardRestore(progress)
                ),
            )
        state = TrainState(params=items.params, **items.progress)
        verify(state._asdict(), about["arrays"], folder)
        return Restored(state, about["data"], about["notes"])

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises SaveFailed."""
        with saving(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and releases Orbax's resources. Raises SaveFailed."""
        with saving(self.folder):
            self._manager.close()


def arrays_of(state: TrainState, verify: bool) -> dict[str, int | None]:
    """Returns {name: fingerprint} of the arrays of a state. The fingerprints are None unless `verify`."""
    return fingerprints(state._asdict()) if verify else dict.fromkeys(names(state._asdict()))


def set_aside(folder: Path, into: Path) -> Path:
    """Moves a folder into the folder `into`, with a number appended if its name is taken. Returns the new path."""
    into.mkdir(parents=True, exist_ok=True)
    taken = {path.name for path in into.iterdir()}
    name = next(name for name in (folder.name, *(f"{folder.name}.{n}" for n in range(1, 10**6))) if name not in taken)
    return folder.rename(into / name)


def _split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    """Returns (parameters, other fields): generation reads only the parameters."""
    fields = state._asdict()
    return fields.pop("params"), fields


def from_all_processes(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Gathers a JSON object from every process. Returns them in the order of processes. All processes must call it."""
    if jax.process_count() == 1:
        return [data]
    encoded = np.frombuffer(json.dumps(data).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(encoded)))
    texts = multihost_utils.process_allgather(np.pad(encoded, (0, int(sizes.max()) - len(encoded))))
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes)]


def check_same_run(before: dict, config: ConfigDict, workdir: Path) -> None:
    """Raises ConfigError if a run of `config` cannot resume in `workdir` from a checkpoint with the config `before`."""
    if changed := _changes(before, json.loads(dump(config))):
        raise ConfigError(
            f"{workdir} is of another run: {'; '.join(changed)}. Use another --workdir; --config.init={workdir} "
            "begins with the weights of this one."
        )


def _changes(before: dict, now: dict) -> list[str]:
    """Returns the differences of two configs in settings that a resumed run cannot change, as "path was x, is y"."""
    before, now = flatten(before, "."), flatten(now, ".")
    paths = [path for path in sorted({*before, *now}) if path.startswith(FIXED) and not path.startswith(FREE)]
    different = [path for path in paths if before.get(path) != now.get(path)]
    return [f"config.{path} was {before.get(path)}, is {now.get(path)}" for path in different]


def placed(x, sharding) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an array with the sharding to restore it with."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
