"""State that every process of a run publishes to the others without a collective, while devices and steps continue."""

import json
from typing import Any

import jax
from jax._src import distributed  # the only way to the key-value store of the service that holds the processes together

COUNTS = "PREEMPTION_CURRENT_COUNTER/"  # key under which jax stores each process's step after a preemption notice


def stop_is_agreed() -> bool:
    """Returns whether the processes, after a notice of preemption, have all told jax how far they are.

    Then `reached_preemption_sync_point` knows the step of the stop. It waits for no process. Where jax keeps its counts
    elsewhere the answer is False.
    """
    client = distributed.global_state.client
    return client is not None and len(client.key_value_dir_get(COUNTS)) >= jax.process_count()


class Board:
    """A place for one note of each process. Reading never waits for a process that has not written."""

    def __init__(self, name: str):
        self._folder, self._own = f"mllm_jax/{name}/", {}
        self._client = distributed.global_state.client

    def post(self, note: dict[str, Any]) -> None:
        """Replaces this process's note, of values that JSON knows."""
        self._own = {jax.process_index(): note}
        if self._client is not None:
            self._client.key_value_set(f"{self._folder}{jax.process_index()}", json.dumps(note), allow_overwrite=True)

    def read(self) -> dict[int, dict[str, Any]]:
        """The notes that there are, by process."""
        if self._client is None:
            return self._own
        found = self._client.key_value_dir_get(self._folder)
        return {int(key.rsplit("/", 1)[-1]): json.loads(note) for key, note in found}
