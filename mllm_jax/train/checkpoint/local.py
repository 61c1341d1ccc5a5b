"""Saves frequent checkpoints on the local disk of each process: only its own shards, without communication.

They serve runs that restart on the same hosts with the same mesh. A step can be restored only if every process still
has all shards that it needs, so a lost host invalidates its steps.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError, dump
from mllm_jax.train.checkpoint.damage import Damaged, read_sealed, reading, saving, sealed, verify
from mllm_jax.train.checkpoint.manager import arrays_of, set_aside
from mllm_jax.train.checkpoint.orbax_manager import CheckpointManager
from mllm_jax.train.step.state import TrainState

KEEP = 2


class LocalCheckpoints:
    """Checkpoints of this process in `folder/process-N`. The newest `KEEP` are kept.

    Args:
      folder: the run's folder on the local disk. abstract, layout: shapes and shardings of the state.
      verify: store a fingerprint of every array.
    """

    def __init__(self, folder: Path, abstract: TrainState, layout: TrainState, verify: bool = True):
        number = jax.process_index()
        self.folder = folder / f"process-{number}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._abstract, self._layout, self._verify = abstract, layout, verify
        self._needed = _digest(abstract, layout)
        self._manager = CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEEP,
                create=False,
                cleanup_tmp_directories=True,
                multiprocessing_options=_alone(),
                # Otherwise a process starts to write as soon as any process has created its folder.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
            item_handlers=_handlers(),
        )

    def steps(self) -> list[int]:
        """Returns the steps of which this process has all shards that it needs on the current mesh."""
        return [step for step in self._manager.all_steps() if self._holds(step) == self._needed]

    def save(self, step: int, state: TrainState, config: ConfigDict, position: dict, notes: dict[str, Any]) -> None:
        """Starts to save; returns when the state is copied from the devices.

        Raises:
          ConfigError: on this mesh a process cannot save its shards alone.
        """
        if not all(map(_one_copy_is_whole, jax.tree.leaves(state))):
            raise ConfigError(
                "config.train.local: on this mesh a process holds shards of different replicas of a weight, which "
                "Orbax does not save locally. Set train.save_local_every=0, or change the order of the devices."
            )
        about = {"config": json.loads(dump(config)), "data": position, "notes": notes, "holds": self._needed}
        about = sealed(about | {"arrays": arrays_of(state, self._verify)})
        arguments = ocp.args.Composite(shards=ocp.args.PyTreeSave(_tree(state)), about=ocp.args.JsonSave(about))
        with saving(self.folder):
            self._manager.save(step, args=arguments)

    def restore(self, step: int) -> TrainState:
        """Returns the state at one of `steps()`. Raises Damaged if it differs from what was saved."""
        wanted, layout = _tree(self._abstract), _tree(self._layout)
        place = lambda sharding, x: ocp.ArrayRestoreArgs(sharding=sharding, global_shape=x.shape, dtype=x.dtype)
        arguments = ocp.args.PyTreeRestore(wanted, restore_args=jax.tree.map(place, layout, wanted))
        arrays = self.about(step)["arrays"]
        with reading(self.folder / str(step)):
            shards = self._manager.restore(step, args=ocp.args.Composite(shards=arguments)).shards
        state = jax.tree.unflatten(jax.tree.structure(self._abstract), list(shards.values()))
        verify(state._asdict(), arrays, self.folder / str(step))
        return state

    def about(self, step: int) -> dict[str, Any]:
        """Reads config, data position, notes and array names of a checkpoint. Raises Damaged if they cannot be read."""
        folder = self.folder / str(step)
        with reading(folder):
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        return read_sealed(about, folder)

    def unreadable(self) -> dict[int, Damaged]:
        """Returns {step: fault} for the checkpoints whose config or position in the data cannot be read."""
        faults = {}
        for step in self._manager.all_steps():
            try:
                self.about(step)
            except Damaged as fault:
                faults[step] = fault
        return faults

    def _holds(self, step: int) -> str | None:
        """Returns the digest of the shards in a checkpoint, see `_digest`. None if it cannot be read."""
        try:
            return self.about(step)["holds"]
        except ConfigError:
            return None

    def set_aside(self, step: int, into: Path) -> Path:
        """Moves a checkpoint into the folder `into`. Returns its new path."""
        path = set_aside(self.folder / str(step), into)
        self._manager.reload()
        return path

    def drop_after(self, step: int) -> None:
        """Deletes checkpoints that are newer than `step`, which other processes may lack."""
        for newer in self._manager.all_steps():
            if newer > step:
                self._manager.delete(newer)

    def wait(self) -> None:
        with saving(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with saving(self.folder):
            self._manager.close()


def _alone() -> ocp.options.MultiprocessingOptions:
    """Returns Orbax options by which a process writes its own files and waits for no other process."""
    number = jax.process_index()
    return ocp.options.MultiprocessingOptions(number, {number}, barrier_sync_key_prefix=f"local_{number}")


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    """Returns Orbax handlers with which each process writes and reads only the shards on its own devices."""
    arrays = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return {
        "shards": ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone(), type_handler_registry=registry),
        "about": ocp.JsonCheckpointHandler(multiprocessing_options=_alone()),
    }


def _one_copy_is_whole(x: jax.Array) -> bool:
    """Returns whether the replica on this process's first device includes every shard that the process holds.

    Only that replica is saved; shards that it lacks would be restored as zeros.
    """
    shards = x.addressable_shards
    replica = {str(shard.index) for shard in shards if shard.replica_id == shards[0].replica_id}
    return replica == {str(shard.index) for shard in shards}


def _tree(state: TrainState) -> dict[str, Any]:
    """Returns the leaves by number: a plain dict, independent of the classes in an optimizer's state."""
    return {f"{number:05d}": leaf for number, leaf in enumerate(jax.tree.leaves(state))}


def _digest(abstract: TrainState, layout: TrainState) -> str:
    """Returns a digest of the array shards on this process: equal if and only if it holds the same shards."""

    def held(path, x, sharding):
        indices = sharding.addressable_devices_indices_map(x.shape).values()
        spans = {tuple(cut.indices(size)[:2] for cut, size in zip(index, x.shape)) for index in indices}
        return [jax.tree_util.keystr(path), str(x.dtype), x.shape, sorted(spans)]

    shards = jax.tree_util.tree_map_with_path(held, abstract, layout)
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()
