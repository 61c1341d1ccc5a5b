"""Checkpoints of a run (Orbax): written in the background, atomic, readable on another mesh.

A checkpoint holds the training state, the run's config and the position in the data, for any number of processes. With
adapters, it leaves out the frozen base (see `mllm_jax.train.checkpoint.frozen_base`).
A save that is killed leaves a temporary folder, which is ignored and removed by the next run. Damage to a saved
checkpoint is found when it is read (see `mllm_jax.train.checkpoint.damage`).
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

# Fields that a resumed run cannot change: they determine the shapes of its state and the next conversations.
FIXED = ("model.", "algorithm.type", "lora.", "optim.name", "optim.freeze", "processor", "data.")
ANY_DATA = ("epochs", "root", "heldout", "workers", "processes", "prefetch", "fail_on_bad_record", "max_bad_fraction")
FREE = ("model.runtime.", *(f"data.{name}" for name in ANY_DATA))


class Restored(NamedTuple):
    """Contents of a restored checkpoint."""

    state: TrainState
    position: dict[str, Any]  # the state of the loaders of all processes
    notes: dict[str, Any]  # what else was saved


class Checkpoints:
    """The checkpoints below `workdir`; the newest `max_to_keep` stay.

    verify: a checkpoint gets a fingerprint of every array.
    """

    def __init__(self, workdir: str | Path, max_to_keep: int = 3, verify: bool = True):
        self.folder, self._verify = Path(workdir).resolve() / CHECKPOINTS, verify
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True)
        self._manager = CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint. None: there is none."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, config: ConfigDict, data: dict[str, Any], notes: dict[str, Any]
    ) -> None:
        """Starts to save; returns when the state is copied from the devices, so that the next step may overwrite it.

        Args:
          data: the state of this process's loader.
          notes: what else shall be found again, of values that JSON knows.
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
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def set_aside(self, step: int, into: Path) -> Path:
        """Moves a checkpoint out of the way, into a folder; returns where it is. All processes call."""
        place = set_aside(self.folder / str(step), into) if jax.process_index() == 0 else into / str(step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set_aside")
        self._manager.reload()
        return place

    def drop_after(self, step: int) -> None:
        """Removes what is newer."""
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)

    def restore(
        self, config: ConfigDict, abstract: TrainState, layout: TrainState, step: int | None = None
    ) -> Restored:
        """Restores a checkpoint, by default the newest, with its state sharded on the mesh of `layout`.

        Raises:
          ConfigError: the checkpoint is of another model, optimizer or data than `config`. Damaged: it is not complete.
        """
        step = self.latest() if step is None else step
        place = self.folder / str(step)
        with reading(place, everywhere=True):
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        about = read_sealed(about, place)
        check_same_run(about["config"], config, self.folder.parent)
        wanted = jax.tree.map(placed, abstract, layout)
        check_arrays(wanted._asdict(), about["arrays"], place)
        params, progress = _split(wanted)
        with reading(place):
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params), progress=ocp.args.StandardRestore(progress)
                ),
            )
        state = TrainState(params=found.params, **found.progress)
        verify(state._asdict(), about["arrays"], place)
        return Restored(state, about["data"], about["notes"])

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises SaveFailed."""
        with saving(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save. Raises SaveFailed."""
        with saving(self.folder):
            self._manager.close()


def arrays_of(state: TrainState, verify: bool) -> dict[str, int | None]:
    """The names of the arrays of a state, with their fingerprints where they are to be verified."""
    return fingerprints(state._asdict()) if verify else dict.fromkeys(names(state._asdict()))


def set_aside(folder: Path, into: Path) -> Path:
    """Moves a folder into another one, under a name that is free; returns where it is."""
    into.mkdir(parents=True, exist_ok=True)
    taken = {path.name for path in into.iterdir()}
    name = next(name for name in (folder.name, *(f"{folder.name}.{n}" for n in range(1, 10**6))) if name not in taken)
    return folder.rename(into / name)


def _split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    """Parameters, which generation reads alone, and all else."""
    fields = state._asdict()
    return fields.pop("params"), fields


def from_all_processes(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Gathers a value from every process, in the order of processes."""
    if jax.process_count() == 1:
        return [data]
    own = np.frombuffer(json.dumps(data).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(own)))
    texts = multihost_utils.process_allgather(np.pad(own, (0, int(sizes.max()) - len(own))))
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes)]


def check_same_run(before: dict, config: ConfigDict, workdir: Path) -> None:
    """Raises ConfigError if a run of `config` cannot resume in `workdir` from a checkpoint of `before`."""
    if changed := _changes(before, json.loads(dump(config))):
        raise ConfigError(
            f"{workdir} is of another run: {'; '.join(changed)}. Use another --workdir; --config.init={workdir} "
            "begins it with the weights of this run"
        )


def _changes(before: dict, now: dict) -> list[str]:
    """Differences of two configs that a resumed run cannot have, as "path was x, is y"."""
    before, now = flatten(before, "."), flatten(now, ".")
    paths = [path for path in sorted({*before, *now}) if path.startswith(FIXED) and not path.startswith(FREE)]
    different = [path for path in paths if before.get(path) != now.get(path)]
    return [f"config.{path} was {before.get(path)}, is {now.get(path)}" for path in different]


def placed(x, sharding) -> jax.ShapeDtypeStruct:
    """The shape of an array with the sharding that it is restored with."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
