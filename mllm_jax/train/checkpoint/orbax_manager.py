"""Subclasses Orbax's CheckpointManager, so that only the run itself decides when to stop."""

import orbax.checkpoint as ocp


class CheckpointManager(ocp.CheckpointManager):
    """A CheckpointManager that never queries jax's preemption service.

    The service treats the number of the last query as the step that a process has begun, and answers yes only to the
    one agreed number. Orbax queries it at every save with other step numbers, so the run would miss its stop.
    """

    def reached_preemption(self, step: int) -> bool:
        """Returns False; see `mllm_jax.train.monitor.processes.StopSignal`."""
        return False
