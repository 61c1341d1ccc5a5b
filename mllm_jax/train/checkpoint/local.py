"""Frequent checkpoints on each process's own disk, of the process's own shards, without communication.

They serve a run whose processes restart on the same hosts, with the same devices of the mesh. A lost host loses its
shards: a step counts only if every process has all of its shards.
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
    """The checkpoints of this process in `folder/process-N`; the newest two stay.

    Args:
      folder: of the run, on the process's own disk. abstract, layout: shapes and shardings of the state.
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
                # Else a process writes as soon as any of them has made its folder.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
            item_handlers=_handlers(),
        )

    def steps(self) -> list[int]:
        """Steps of which this process has all that it needs on its present mesh."""
        return [step for step in self._manager.all_steps() if self._holds(step) == self._needed]

    def save(self, step: int, state: TrainState, config: ConfigDict, position: dict, notes: dict[str, Any]) -> None:
        """Starts to save; returns when the state is copied from the devices. ConfigError: not on this mesh."""
        if not all(map(_one_copy_is_whole, jax.tree.leaves(state))):
            raise ConfigError(
                "config.train.local: a process of this mesh holds parts of different copies of a weight, which Orbax "
                "does not save by itself: set train.save_local_every=0, or order the mesh otherwise"
            )
        about = {"config": json.loads(dump(config)), "data": position, "notes": notes, "holds": self._needed}
        about = sealed(about | {"arrays": arrays_of(state, self._verify)})
        arguments = ocp.args.Composite(shards=ocp.args.PyTreeSave(_tree(state)), about=ocp.args.JsonSave(about))
        with saving(self.folder):
            self._manager.save(step, args=arguments)

    def restore(self, step: int) -> TrainState:
        """The state of one of `steps()`. Raises Damaged where it is not what was saved."""
        wanted, layout = _tree(self._abstract), _tree(self._layout)
        place = lambda sharding, x: ocp.ArrayRestoreArgs(sharding=sharding, global_shape=x.shape, dtype=x.dtype)
        arguments = ocp.args.PyTreeRestore(wanted, restore_args=jax.tree.map(place, layout, wanted))
        arrays = self.about(step)["arrays"]
        with reading(self.folder / str(step)):
            found = self._manager.restore(step, args=ocp.args.Composite(shards=arguments)).shards
        state = jax.tree.unflatten(jax.tree.structure(self._abstract), list(found.values()))
        verify(state._asdict(), arrays, self.folder / str(step))
        return state

    def about(self, step: int) -> dict[str, Any]:
        place = self.folder / str(step)
        with reading(place):
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        return read_sealed(about, place)

    def unreadable(self) -> dict[int, Damaged]:
        """Returns {step: fault} of the checkpoints whose config or position in the data cannot be read."""
        faults = {}
        for step in self._manager.all_steps():
            try:
                self.about(step)
            except Damaged as fault:
                faults[step] = fault
        return faults

    def _holds(self, step: int) -> str | None:
        """Digest of what a checkpoint holds, see `_digest`; None if it cannot be read."""
        try:
            return self.about(step)["holds"]
        except ConfigError:
            return None

    def set_aside(self, step: int, into: Path) -> Path:
        """Moves a checkpoint out of the way, into a folder; returns where it is."""
        place = set_aside(self.folder / str(step), into)
        self._manager.reload()
        return place

    def drop_after(self, step: int) -> None:
        """Forgets what is newer: a process that did not get as far has not got it."""
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
    """Orbax's word for a process that neither waits for others nor leaves writing to the first one."""
    number = jax.process_index()
    return ocp.options.MultiprocessingOptions(number, {number}, barrier_sync_key_prefix=f"local_{number}")


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    """Orbax handlers for arrays of which each process writes and reads the shards of its own devices."""
    arrays = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return {
        "shards": ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone(), type_handler_registry=registry),
        "about": ocp.JsonCheckpointHandler(multiprocessing_options=_alone()),
    }


def _one_copy_is_whole(x: jax.Array) -> bool:
    """Returns whether the replica on this process's first device has all shards of this process.

    That replica is saved; missing shards would be read as zeros.
    """
    shards = x.addressable_shards
    copy = {str(shard.index) for shard in shards if shard.replica_id == shards[0].replica_id}
    return copy == {str(shard.index) for shard in shards}


def _tree(state: TrainState) -> dict[str, Any]:
    """Leaves by number: a plain dict, whatever an optimizer's state is made of."""
    return {f"{number:05d}": leaf for number, leaf in enumerate(jax.tree.leaves(state))}


def _digest(abstract: TrainState, layout: TrainState) -> str:
    """Digest of this process's shards: equal if and only if it holds the same shards of the same arrays."""

    def held(path, x, sharding):
        indices = sharding.addressable_devices_indices_map(x.shape).values()
        spans = {tuple(cut.indices(size)[:2] for cut, size in zip(index, x.shape)) for index in indices}
        return [jax.tree_util.keystr(path), str(x.dtype), x.shape, sorted(spans)]

    every = jax.tree_util.tree_map_with_path(held, abstract, layout)
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()
