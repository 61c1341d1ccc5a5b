"""Exchanges notes between the processes of a run through a key-value store, without blocking devices or steps."""

import json
from typing import Any

import jax
from jax._src import distributed  # the only access to the key-value store of jax's coordination service

COUNTS = "PREEMPTION_CURRENT_COUNTER/"  # key under which jax stores each process's step after a preemption notice


def stop_is_agreed() -> bool:
    """Returns whether all processes have reported their step to jax after a preemption notice. Does not wait.

    From then on `reached_preemption_sync_point` knows the step at which to stop. Returns False if a jax version stores
    its counters under another key.
    """
    client = distributed.global_state.client
    return client is not None and len(client.key_value_dir_get(COUNTS)) >= jax.process_count()


class Board:
    """Store of one note per process. Reading never waits for a process that has not written."""

    def __init__(self, name: str):
        self._folder, self._own = f"mllm_jax/{name}/", {}
        self._client = distributed.global_state.client

    def post(self, note: dict[str, Any]) -> None:
        """Replaces this process's note, a JSON object."""
        self._own = {jax.process_index(): note}
        if self._client is not None:
            self._client.key_value_set(f"{self._folder}{jax.process_index()}", json.dumps(note), allow_overwrite=True)

    def read(self) -> dict[int, dict[str, Any]]:
        """Returns the notes written so far, by process."""
        if self._client is None:
            return self._own
        notes = self._client.key_value_dir_get(self._folder)
        return {int(key.rsplit("/", 1)[-1]): json.loads(note) for key, note in notes}
