"""Two tiers of checkpoints: rare ones for all, on the file system that all hosts share, frequent ones on their disks.

The newest one that is whole wins. Of the local tier that is what every process has whole, by a vote at the start.
"""

import uuid
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mllm_jax.train.checkpoint import Checkpoints, Restored, check_same_run, from_all_processes
from mllm_jax.train.local_checkpoint import LocalCheckpoints
from mllm_jax.train.state import TrainState

RUN_ID = "run_id"  # the file in the working directory that tells its local checkpoints from those of other runs


class Tiers:
    """The checkpoints of a run.

    Args:
      workdir: of the run. keep: shared checkpoints that stay.
      local: folder on each process's own disk; empty = no such tier.
      abstract, layout: shapes and shardings of the state.
    """

    def __init__(self, workdir: Path, keep: int, local: str, abstract: TrainState, layout: TrainState):
        self.shared, self.local, self._newest_local = Checkpoints(workdir, keep), None, None
        self._abstract, self._layout = abstract, layout
        if local:
            self.local = LocalCheckpoints(Path(local).expanduser().resolve() / _run_id(workdir), abstract, layout)
            votes = from_all_processes({"steps": self.local.steps()})
            self._newest_local = max(set.intersection(*(set(vote["steps"]) for vote in votes)), default=None)
            self.local.drop_after(-1 if self._newest_local is None else self._newest_local)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint; None where there is none."""
        return max((step for step in (self.shared.latest(), self._newest_local) if step is not None), default=None)

    def save(self, step: int, state: TrainState, config: ConfigDict, data: dict, notes: dict[str, Any]) -> None:
        """Starts to save for all, see `Checkpoints.save`."""
        self.shared.save(step, state, config, data, notes)

    def save_local(self, step: int, state: TrainState, config: ConfigDict, data: dict, notes: dict[str, Any]) -> None:
        """Starts to save on this process's disk, see `Checkpoints.save`."""
        self.local.save(step, state, config, data, notes)

    def restore(self, config: ConfigDict) -> Restored:
        """The newest checkpoint. Raises ConfigError where it is of another model, optimizer or data than `config`."""
        step = self.latest()
        if step != self._newest_local:
            return self.back_to(step, config)
        about = self.local.about(step)
        check_same_run(about["config"], config, self.local.folder)
        return Restored(self.local.restore(step), about["data"], about["notes"])

    def back_to(self, step: int, config: ConfigDict) -> Restored:
        """A shared checkpoint; newer ones, which it will make again, are forgotten."""
        self.wait()
        for tier in (self.shared, self.local):
            if tier is not None:
                tier.drop_after(step)
        return self.shared.restore(config, self._abstract, self._layout, step)

    def wait(self) -> None:
        """Returns when all saves are on disk; raises what went wrong with them."""
        self.shared.wait()
        if self.local is not None:
            self.local.wait()

    def close(self) -> None:
        self.shared.close()
        if self.local is not None:
            self.local.close()


def _run_id(workdir: Path) -> str:
    """The same for all processes and all starts of a run; another one where the working directory was made anew."""
    path = workdir / RUN_ID
    known = path.read_text().strip() if path.exists() else uuid.uuid4().hex[:12]
    known = from_all_processes({"id": known})[0]["id"]
    if jax.process_index() == 0 and not path.exists():
        path.write_text(known)
    return known
