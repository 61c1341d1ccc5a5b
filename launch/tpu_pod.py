"""A run on a Cloud TPU pod, from the request of the pod to the end of the run, through preemptions.

    python -m launch.tpu_pod run --name scenes --zone us-east5-b --tpu v6e:8x8 --spot --bucket BUCKET \\
        -- --config FILE --workdir /runs/scenes
    python -m launch.tpu_pod logs --name scenes --zone us-east5-b --tpu v6e:8x8     also: stop, delete

`run` requests a queued resource, waits until it is ACTIVE, sends the commit of this checkout, mounts the bucket at
/runs on every host, installs, starts the training in the background and checks it every --poll seconds. It ends with
the run. After a preemption it requests the pod again, and the run resumes. Ctrl-C stops only the watching: the same
command continues it. `stop` saves and ends the run; `delete` releases the pod. It needs gcloud, logged in.
"""

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from launch.accelerators import Tpu, tpu
from launch.command import checked, launcher, name, parse, positive, run, training
from launch.exit_codes import FAILED_FOR_GOOD
from launch.hosts import ROOT, committed, tpu_hosts, uncommitted
from mllm_jax.common.cli import run_command
from mllm_jax.common.errors import first_few
from mllm_jax.common.interrupts import INTERRUPTED

MOUNT = "/runs"
ARCHIVE = "/tmp/mllm_jax.tar.gz"
PATIENCE = 3  # times in a row that commands may fail: a host does not answer for a while after it was made
LOST = ("PREEMPTED", "TERMINATED")  # states of nodes, of which the queued resource may not know yet
ANSWERS = re.compile(r"^(none|running|\d+)$", re.MULTILINE)  # of tpu_vm.sh status, one for each host


class Pod(NamedTuple):
    """gcloud commands for a queued resource; each method returns one."""

    name: str
    zone: str
    tpu: Tpu
    project: str | None = None

    @property
    def nodes(self) -> list[str]:
        """A TPU VM for each slice."""
        return [self.name] if self.tpu.slices == 1 else [f"{self.name}-{i}" for i in range(self.tpu.slices)]

    def create(self, *tier: str) -> list[str]:
        several = [f"--node-count={self.tpu.slices}", f"--node-prefix={self.name}"]
        what = [f"--accelerator-type={self.tpu.type}", f"--runtime-version={self.tpu.generation.software}"]
        nodes = several if self.tpu.slices > 1 else [f"--node-id={self.name}"]
        return self._queued("create", *nodes, *what, *tier)

    def state(self) -> list[str]:
        return self._queued("describe", "--format=value(state.state)")

    def node_state(self, node: str) -> list[str]:
        return self._vm("describe", node, "--format=value(state)")

    def delete(self) -> list[str]:
        return self._queued("delete", "--force", "--quiet")

    def send(self, node: str, file: str) -> list[str]:
        return self._vm("scp", file, f"{node}:", "--worker=all")

    def ssh(self, node: str, words: str, worker: str = "all") -> list[str]:
        return self._vm("ssh", node, f"--worker={worker}", f"--command={words}")

    def _queued(self, verb: str, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *words, *self._where()]

    def _vm(self, verb: str, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", verb, *words, *self._where()]

    def _where(self) -> Iterator[str]:
        yield f"--zone={self.zone}"
        if self.project:
            yield f"--project={self.project}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = launcher("launch.tpu_pod", __doc__, "{run,logs,stop,delete} ")
    parser.add_argument("action", choices=("run", "logs", "stop", "delete"))
    parser.add_argument("--name", type=name, required=True, help="name of the queued resource and its nodes")
    parser.add_argument("--zone", required=True, help="zone, as in us-east5-b")
    parser.add_argument("--project", help="project (default: that of gcloud)")
    parser.add_argument("--tpu", type=tpu, required=True, help="generation and topology, as in v6e:8x8; *2: two slices")
    parser.add_argument("--bucket", help=f"without gs://, mounted at {MOUNT} on every host; run needs it")
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument("--spot", action="store_true", help="use a spot pod, which may be preempted")
    tier.add_argument("--reserved", action="store_true", help="use the project's reservation")
    parser.add_argument("--poll", type=positive, default=60, help="seconds between checks of the run (default 60)")
    parser.add_argument(
        "--restarts", type=positive, default=50, help="largest number of restarts, also on new pods (default 50)"
    )
    parser.add_argument("--delete", action="store_true", help="release the pod when the run is complete")
    options = parse(parser, arguments)
    if not options.tpu.generation.software:
        parser.error(f"there are no {options.tpu.name} VMs in the Cloud TPU API; use launch.gke or launch.xpk")
    pod = Pod(options.name, options.zone, options.tpu, options.project)
    if options.action == "run":
        if not options.bucket or "/" in options.bucket:
            parser.error("run needs --bucket=NAME, the bare name of a bucket; folders go into --workdir")
        checked(options.command, lambda: tpu_hosts(options.tpu, committed(MOUNT, options.host_folder)))
        if changed := uncommitted():
            say(f"not sent, since not committed: {first_few(changed)}")
        try:
            return run_to_its_end(pod, options)
        except KeyboardInterrupt:
            say("no longer watched; the run continues, and the same command watches it again")
            return INTERRUPTED
    each = {"logs": "tail -n 200 train.log", "stop": on_host("stop")}
    if options.action == "delete":
        return run(pod.delete(), dry_run=options.dry_run)
    nodes, worker = (pod.nodes[:1], "0") if options.action == "logs" else (pod.nodes, "all")
    return max(run(pod.ssh(node, each[options.action], worker), dry_run=options.dry_run) for node in nodes)


def run_to_its_end(pod: Pod, options: argparse.Namespace) -> int:
    """Looks where the run is, and does what comes next, until it is at its end. Returns its exit code."""
    create = pod.create(*[f"--{tier}" for tier in ("spot", "reserved") if getattr(options, tier)])
    if options.dry_run:
        for command in (create, pod.state(), *install(pod, options.bucket), *start(pod, options.command)):
            run(command, dry_run=True)
        return max(run(pod.ssh(node, on_host("status")), dry_run=True) for node in pod.nodes)
    restarts, failures, told = 0, 0, ""
    while restarts <= options.restarts:
        state, words = answer(pod.state()), set()
        if state == "ACTIVE":
            words = statuses(pod)
            if not words and any(answer(pod.node_state(node)) in LOST for node in pod.nodes):
                state = "SUSPENDED"
        now = ", ".join(sorted(words)) or state or "no pod"
        if now != told:
            say(f"{pod.name}: {now}")
            told = now
        if state == "FAILED":
            say("the request cannot be met: see gcloud compute tpus queued-resources describe, then delete it")
            return 1
        if state is None:
            steps = [create]
        elif state == "SUSPENDED":
            say("the pod was taken away; another one is asked for")
            steps, restarts = [pod.delete()], restarts + 1
        elif "none" in words:
            steps = [*install(pod, options.bucket), *start(pod, options.command)]
        elif not words or "running" in words:
            steps = []
        elif words == {"0"}:
            return run(pod.delete()) if options.delete else 0
        elif words & set(map(str, FAILED_FOR_GOOD)):
            say(f"the run failed and would fail again: python -m launch.tpu_pod logs --name {pod.name} ...")
            return 1
        else:
            say(f"ended with exit code {now}; it resumes from its last checkpoint")
            steps, restarts = start(pod, options.command), restarts + 1
        failures = failures + 1 if any(run(step) for step in steps) else 0
        if failures == PATIENCE:
            say(f"that did not work {PATIENCE} times; fix the error of gcloud above, and start again")
            return 1
        time.sleep(options.poll)
    say(f"ended {restarts} times, which is more than --restarts")
    return 1


def install(pod: Pod, bucket: str) -> list[list[str]]:
    """Sends what is committed and installs it on every host."""
    unpack = f"tar -xzf mllm_jax.tar.gz && {on_host('install', bucket)}"
    pack = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", "--prefix=mllm_jax/", f"--output={ARCHIVE}", "HEAD"]
    return [pack, *(step for node in pod.nodes for step in (pod.send(node, ARCHIVE), pod.ssh(node, unpack)))]


def start(pod: Pod, command: Sequence[str]) -> list[list[str]]:
    """Starts the training on every host where it does not run."""
    return [pod.ssh(node, on_host("start", *training(command, "--distributed"))) for node in pod.nodes]


def statuses(pod: Pod) -> set[str]:
    """Status of the run on every host: "none", "running" or an exit code. Empty: a host does not answer."""
    found = [answer(pod.ssh(node, f"{on_host('status')} || echo none")) for node in pod.nodes]
    return set() if None in found else {word for text in found for word in ANSWERS.findall(text)}


def on_host(*words: str) -> str:
    return shlex.join(["bash", "mllm_jax/launch/tpu_vm.sh", *words])


def answer(command: Sequence[str]) -> str | None:
    """Output of a command. None: it failed, for example since the resource does not exist."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def say(text: str) -> None:
    print(f"launch.tpu_pod: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
