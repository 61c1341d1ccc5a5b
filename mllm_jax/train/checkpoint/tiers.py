"""Two tiers of checkpoints: infrequent ones on the shared file system, frequent ones on the disks of the hosts.

The newest complete checkpoint wins. In the local tier, the processes vote at the start on the newest one that all have.
A damaged checkpoint is moved to the folder `damaged` beside the others, and the one before it is restored.
"""

import sys
import uuid
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError
from mllm_jax.common.files import write_atomically
from mllm_jax.train.checkpoint.damage import Damaged
from mllm_jax.train.checkpoint.local import LocalCheckpoints
from mllm_jax.train.checkpoint.manager import Checkpoints, Restored, check_same_run, from_all_processes, set_aside
from mllm_jax.train.monitor.processes import Lost
from mllm_jax.train.step.state import TrainState

RUN_ID = "run_id"  # file in the working directory that identifies its local checkpoints
DAMAGED = "damaged"  # folder of damaged checkpoints, in the working directory and beside local checkpoints


class Tiers:
    """The checkpoints of a run.

    Args:
      workdir: of the run. keep: shared checkpoints that stay.
      local: folder on each process's own disk; empty = no such tier.
      verify: whether checkpoints get a fingerprint of every array.
      abstract, layout: shapes and shardings of the state.
    """

    def __init__(self, workdir: Path, keep: int, local: str, verify: bool, abstract: TrainState, layout: TrainState):
        self.shared, self.local, self._newest_local = Checkpoints(workdir, keep, verify), None, None
        self._workdir, self._abstract, self._layout = workdir, abstract, layout
        if local:
            folder = Path(local).expanduser().resolve() / _run_id(workdir)
            self.local = LocalCheckpoints(folder, abstract, layout, verify)
            for step, fault in self.local.unreadable().items():
                self._say_moved(fault, self.local.set_aside(step, self._local_damaged))
            self._vote()
            if self.latest() is not None:  # else `check_new` decides
                self.local.drop_after(-1 if self._newest_local is None else self._newest_local)

    def _vote(self) -> None:
        votes = from_all_processes({"steps": self.local.steps()})
        self._newest_local = max(set.intersection(*(set(vote["steps"]) for vote in votes)), default=None)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint. None: there is none."""
        return max((step for step in (self.shared.latest(), self._newest_local) if step is not None), default=None)

    def save(self, step: int, state: TrainState, config: ConfigDict, data: dict, notes: dict[str, Any]) -> None:
        """Starts to save for all, see `Checkpoints.save`."""
        self.shared.save(step, state, config, data, notes)

    def save_local(self, step: int, state: TrainState, config: ConfigDict, data: dict, notes: dict[str, Any]) -> None:
        """Starts to save on this process's disk, see `Checkpoints.save`."""
        self.local.save(step, state, config, data, notes)

    def restore(self, config: ConfigDict) -> Restored:
        """Restores the newest complete checkpoint and sets damaged ones aside.

        Raises:
          ConfigError: it is of another model, optimizer or data than `config`, or none is complete. Lost: a checkpoint
            that only this process could not read was set aside.
        """
        while (step := self.latest()) is not None:
            try:
                return self._restore(step, config)
            except Damaged as fault:
                self._set_aside(step, fault)
        raise ConfigError(self._all_damaged())

    def _restore(self, step: int, config: ConfigDict) -> Restored:
        if step != self._newest_local:
            return self.back_to(step, config)
        about = self.local.about(step)
        check_same_run(about["config"], config, self._workdir)
        return Restored(self.local.restore(step), about["data"], about["notes"])

    def _set_aside(self, step: int, fault: Damaged) -> None:
        local = step == self._newest_local
        tier, into = (self.local, self._local_damaged) if local else (self.shared, self._workdir / DAMAGED)
        if jax.process_count() > 1 and not fault.everywhere:  # the others wait for arrays that will not come
            place = set_aside(tier.folder / str(step), into)
            raise Lost(f"{fault}. It was moved to {place}; the same command resumes from the checkpoint before it")
        place = tier.set_aside(step, into)
        if local:
            self._vote()
        if jax.process_index() == 0:
            self._say_moved(fault, place)

    @staticmethod
    def _say_moved(fault: Damaged, place: Path) -> None:
        print(f"warning: {fault}. It was moved to {place}", file=sys.stderr, flush=True)

    def check_new(self) -> None:
        """Raises ConfigError where a run would begin anew because all of its checkpoints are damaged. All call."""
        if self._damaged_folders():
            raise ConfigError(self._all_damaged())
        if self.local is not None:
            self.local.drop_after(-1)

    def _all_damaged(self) -> str:
        return (
            f"all checkpoints of {self._workdir} are damaged. Put an intact copy into {self.shared.folder}, or remove "
            f"{' and '.join(self._damaged_folders())} to begin anew"
        )

    @property
    def _local_damaged(self) -> Path:
        return self.local.folder.parent / DAMAGED

    def _damaged_folders(self) -> list[str]:
        """Folders that hold damaged checkpoints: of the shared tier, and on the disks of all processes."""
        own = [self._workdir / DAMAGED] + ([self._local_damaged] if self.local else [])
        own = [str(folder) for folder in own if folder.is_dir() and any(folder.iterdir())]
        every = [folder for found in from_all_processes({"folders": own}) for folder in found["folders"]]
        return list(dict.fromkeys(every))

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
        write_atomically(path, known)
    return known
