"""Orbax's manager of checkpoints, which leaves the question of when to stop to the run."""

import orbax.checkpoint as ocp


class CheckpointManager(ocp.CheckpointManager):
    """A CheckpointManager that never asks jax's preemption service.

    The service takes the number in the last question for the step that a process has begun, and answers yes only for
    the next number. Orbax asks at every save, with its own numbers, so that the run would miss its stop.
    """

    def reached_preemption(self, step: int) -> bool:
        """Returns False; see `mllm_jax.train.monitor.processes.StopSignal`."""
        return False
