"""Kills a run of several processes at random moments and resumes it: is it, bit for bit, the run that nothing stopped?

    python benchmarks/chaos.py                    20 kills of 4 processes; prints the table of docs/reliability.md
    python benchmarks/chaos.py --kills 2 --processes 2

A small model of text is trained by `launch.local` twice: once undisturbed, keeping every checkpoint, and once with
SIGKILL at random moments, to one process or to all: while the run starts, between saves, and inside saves of both
tiers, which come every other step and every step. After each kill the same command resumes, until it is killed again.
The shared checkpoints that it made until then are compared with the undisturbed run's, every array of the state and the
position in the data, and in the end every loss is. Exit code 1 unless all are equal.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from mllm_jax.common.cli import Parser  # noqa: E402
from mllm_jax.common.config import load  # noqa: E402
from mllm_jax.common.workdir import CHECKPOINTS, saved_steps  # noqa: E402
from mllm_jax.sharding.mesh import make_mesh  # noqa: E402
from mllm_jax.train.checkpoint.manager import Checkpoints, Restored  # noqa: E402
from mllm_jax.train.monitor.metrics import read_metrics  # noqa: E402
from mllm_jax.train.runs.config import read_run, train_context  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
STEPS_OF_A_LIFE = 10
SMALL = {
    "model.encoder.width": 32,
    "model.encoder.layers": 1,
    "model.encoder.heads": 2,
    "model.encoder.mlp": 32,
    "model.decoder.width": 32,
    "model.decoder.layers": 1,
    "model.decoder.mlp": 32,
    "model.decoder.attention.heads": 2,
    "model.decoder.attention.kv_heads": 2,
    "model.decoder.attention.head_dim": 16,
    "model.decoder.attention.rope_sections": (4, 2, 2),
    "data.tokens": 64,
    "data.patch_rows": 0,
    "data.patches_per_row": 0,
    "data.window": 1.0,
    "optim.name": "adamw",
    "optim.warmup": 4,
    "train.log_every": 1,
    "train.evaluate_every": 0,
    "train.num_eval_examples": 4,
    "train.save_every": 2,
    "train.save_local_every": 1,
}
WHEN = ("start", "steps", "steps", "save", "save", "local save")


class Kill(NamedTuple):
    """Progress at a kill, and its outcome."""

    whom: str
    aimed: str  # at which moment
    step: int  # the last step reported
    unfinished: str  # saves that the kill left half-written
    resumed: int = -1  # the step from which the run resumed
    equal: bool = False  # what it then saved


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default 20)")
    parser.add_argument("--processes", type=int, default=4, help="number of processes (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times (default 0)")
    parser.add_argument("--workdir", help="an empty folder to keep both runs in (default: one that is removed)")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(options.workdir or stack.enter_context(tempfile.TemporaryDirectory()))
        runs = Runs(folder, options.processes, STEPS_OF_A_LIFE * (options.kills + 1))
        began = time.time()
        runs.whole()
        print(f"the undisturbed run took {time.time() - began:.0f} s", file=sys.stderr, flush=True)
        return report(runs.kill_all(options.kills, random.Random(options.seed)), runs, options.kills)


def report(kills: Iterator[Kill], runs: "Runs", count: int) -> int:
    print(
        "| | SIGKILL to | aimed at | after step | half-written | went on from | equal |\n|---|---|---|---|---|---|---|"
    )
    equal = 0
    for number, kill in enumerate(kills, 1):
        equal += kill.equal
        print(f"| {' | '.join(map(str, (number, *kill[:-1], 'yes' if kill.equal else 'NO')))} |", flush=True)
    ended = runs.ended_equal()
    print(f"\n{equal} of {count} bit-equal; the end of the run, with all losses: {'equal' if ended else 'NOT EQUAL'}")
    return 0 if equal == count and ended else 1


class Runs:
    """The undisturbed run in `folder/whole`, the other in `folder/killed`."""

    def __init__(self, folder: Path, processes: int, steps: int):
        self.processes, self.steps = processes, steps
        self.workdirs, self.disks = {name: folder / name for name in ("whole", "killed")}, folder / "disks"
        self.log = folder / "log.txt"

    def whole(self) -> None:
        with self._started("whole", {"train.max_to_keep": self.steps, "train.save_local_every": 0}) as launcher:
            if launcher.wait():
                raise SystemExit(f"the undisturbed run ended with {launcher.returncode}:\n{self.log.read_text()}")

    def kill_all(self, count: int, rng: random.Random) -> Iterator[Kill]:
        """Kills one life after another. Whether a life was right is known when it has saved, and died."""
        unproven: list[Kill] = []
        for number in range(count + 1):
            with self._started("killed", {}) as launcher:
                kill = self._disturb(launcher, rng) if number < count else launcher.wait()
            resumed = self._resumed()
            unproven = [kill if kill.resumed >= 0 else kill._replace(resumed=resumed) for kill in unproven]
            new = [step for step in self._shared() if step > resumed >= 0]
            if new:
                equal = all(self._equal(step) for step in new)
                yield from (kill._replace(equal=equal) for kill in unproven)
                unproven = []
            unproven += [kill] if number < count else []

    def ended_equal(self) -> bool:
        whole, killed = (self._losses(name) for name in self.workdirs)
        return len(whole) == self.steps and whole == killed and self._equal(self.steps)

    def _disturb(self, launcher: subprocess.Popen, rng: random.Random) -> Kill:
        aimed, whom = rng.choice(WHEN), "all" if rng.random() < 0.3 else rng.randrange(self.processes)
        if aimed == "start":
            time.sleep(rng.uniform(1, 15))
        else:
            wait_until(launcher, lambda: self._resumed() >= 0 and any(s > self._resumed() for s in self._shared()))
            target = self._last_step() + rng.randrange(3)
            wait_until(launcher, lambda: self._last_step() >= target)
            if aimed == "steps":
                time.sleep(rng.uniform(0, 0.2))
            else:
                wait_until(launcher, lambda: aimed in self._unfinished())
        for number in range(self.processes) if whom == "all" else [whom]:
            kill(self._process(number))
        launcher.wait()
        return Kill(f"process {whom}" if whom != "all" else whom, aimed, self._last_step(), self._unfinished())

    @contextlib.contextmanager
    def _started(self, name: str, settings: dict) -> Iterator[subprocess.Popen]:
        settings = SMALL | {"optim.steps": self.steps, "train.local": str(self.disks)} | settings
        config = ["--config", "configs/scenes.py:blind", "--workdir", str(self.workdirs[name])]
        config += [f"--config.{path}={value}" for path, value in settings.items()]
        launch = ["-m", "launch.local", f"--processes={self.processes}", "--grace=3", "--", *config]
        flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        flags |= {"JAX_COMPILATION_CACHE_DIR": str(self.log.parent / "compiled"), "PYTHONUNBUFFERED": "1"}
        with open(self.log, "w") as log:
            launcher = subprocess.Popen(
                [sys.executable, *launch], cwd=ROOT, env=flags | os.environ, stdout=log, stderr=log
            )
        try:
            yield launcher
        finally:
            while launcher.poll() is None:
                launcher.terminate()  # the second time, it kills
                time.sleep(0.5)

    def _process(self, number: int) -> int | None:
        """The process id of one process of the killed run."""
        listed = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True, check=True).stdout
        workdir = f"--workdir {self.workdirs['killed']} "
        found = [line for line in listed.splitlines() if f"--process={number} " in line and workdir in line]
        return int(found[0].split()[0]) if found else None

    def _resumed(self) -> int:
        """The step from which the last life resumed; -1 if it did not start."""
        found = re.search(r" (?:begins|resumes) at step (\d+) of", self.log.read_text())
        return int(found[1]) if found else -1

    def _last_step(self) -> int:
        return max((record["step"] for record in read_metrics(self.workdirs["killed"])), default=0)

    def _losses(self, name: str) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in read_metrics(self.workdirs[name]) if "loss" in record}

    def _shared(self) -> list[int]:
        return saved_steps(self.workdirs["killed"])

    def _unfinished(self) -> str:
        tiers = {
            "save": self.workdirs["killed"].glob(f"{CHECKPOINTS}/*tmp*"),
            "local save": self.disks.glob("*/*/*tmp*"),
        }
        return ", ".join(name for name, found in tiers.items() if any(found))

    def _equal(self, step: int) -> bool:
        """Returns whether both runs have the same state and the same position in the data."""
        whole, killed = (restored(workdir, step) for workdir in self.workdirs.values())
        same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), whole.state, killed.state)
        return all(jax.tree.leaves(same)) and whole.position == killed.position


def restored(workdir: Path, step: int) -> Restored:
    """A checkpoint, on one device. It is copied first: to open a folder would remove what was left half-written."""
    config = load((workdir / "config.json").read_text())
    run, mesh = read_run(config), make_mesh(devices=jax.devices()[:1])
    context = train_context(run, mesh)
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(workdir / CHECKPOINTS / str(step), Path(copy) / CHECKPOINTS / str(step))
        checkpoints = Checkpoints(copy)
        found = checkpoints.restore(config, context.state, context.state_shardings, step)
        checkpoints.close()
        return found


def wait_until(launcher: subprocess.Popen, condition: Callable[[], bool]) -> None:
    while not condition():
        if launcher.poll() is not None:
            raise SystemExit("the run ended before it was killed")
        time.sleep(0.002)


def kill(process: int | None) -> None:
    with contextlib.suppress(ProcessLookupError, TypeError):  # it has ended, or has not begun
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
