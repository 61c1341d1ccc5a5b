"""A Slurm cluster of one node, of this machine, on its loopback; all of its state lies in one folder."""

import os
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# NoInAddrAny: daemons listen on the loopback and nowhere else.
CONF = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=120
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def install() -> str:
    """Installs Slurm and munge from Debian where they are missing. Returns why that cannot be, or nothing."""
    if os.geteuid():
        return "starting Slurm's daemons needs root"
    if all(map(shutil.which, PROGRAMS)):
        return ""
    if shutil.which("apt-get") is None:
        return "Slurm is not installed, and there is no apt-get"
    quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True, "text": True}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]):
        done = subprocess.run(["apt-get", *command], **quiet)
        if done.returncode:
            return f"apt-get {command[0]} failed: {done.stderr.strip().splitlines()[-1]}"
    return ""


@contextmanager
def cluster(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Starts the daemons and yields the environment for Slurm's commands. Afterwards no job and no daemon is left."""
    ports = [free_port() for _ in range(2)]
    host = socket.gethostname().partition(".")[0]
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONF.format(ports=ports, folder=folder, host=host))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    files = {"key": "munge.key", "socket": "munge.socket", "pid": "munged.pid", "log": "munged.log", "seed": "seed"}
    paths = [f"--{option}{'' if option == 'socket' else '-file'}={folder / file}" for option, file in files.items()]
    with ExitStack() as running:
        running.enter_context(daemon(["munged", "--foreground", "--force", *paths], folder, environment))
        wait_for(lambda: (folder / "munge.socket").exists(), "munged")
        running.enter_context(daemon(["slurmctld", "-D", "-c"], folder, environment))
        running.enter_context(daemon(["slurmd", "-D"], folder, environment))
        wait_for(lambda: "idle" in slurm(environment, "sinfo", "--noheader", "--format=%T"), "the node")
        try:
            yield environment
        finally:
            subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=environment)
            subprocess.run(["scancel", "--user=root"], env=environment)
            wait_for(lambda: not slurm(environment, "squeue", "--noheader"), "the end of all jobs")


@contextmanager
def daemon(command: list[str], folder: pathlib.Path, environment: dict[str, str]) -> Iterator[None]:
    with open(folder / f"{command[0]}.out", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def slurm(environment: dict[str, str], *command: str) -> str:
    """Output of a command; empty if the controller does not answer yet."""
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def wait_for(condition, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
