"""The machines that a launcher asks for, as far as training depends on them: devices, processes, and files."""

import fnmatch
import posixpath
import re
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launch.accelerators import Gpu, Tpu
from mllm_jax.common.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Files:
    """Files that the hosts have.

    mount: folder of the file system that all hosts share; empty: this machine's, all of whose files they see.
    folders: further folders that every host has.
    sent: files that the hosts have in their working folder as they are in this checkout, relative to it. Not used
      without a mount.
    how: how they get these, for messages.
    """

    mount: str = ""
    folders: tuple[str, ...] = ()
    sent: Collection[str] = ()
    how: str = ""

    def is_sent(self, path: str) -> bool:
        """Returns whether the hosts have this relative file, folder or pattern of files in their working folder."""
        plain = posixpath.normpath(path)
        return any(file == plain or file.startswith(f"{plain}/") or fnmatch.fnmatch(file, plain) for file in self.sent)

    def is_within(self, path: str) -> bool:
        """Returns whether an absolute path is inside a folder that all hosts have."""
        path = PurePosixPath(posixpath.normpath(path))
        return any(path.is_relative_to(folder) for folder in (self.mount, *self.folders) if folder)


@dataclass(frozen=True)
class Hosts:
    """
    processes: of the run, over all slices. devices: jax's, of all processes.
    slices: parts that a slower network joins: TPU slices, or hosts of GPUs.
    """

    processes: int
    devices: int
    files: Files
    slices: int = 1


def tpu_hosts(tpu: Tpu, files: Files) -> Hosts:
    """Slices of TPUs, with one process for each host."""
    return Hosts(tpu.slices * tpu.hosts, tpu.slices * tpu.chips * tpu.generation.devices, files, tpu.slices)


def gpu_hosts(gpu: Gpu, files: Files) -> Hosts:
    """Hosts of GPUs, with one process for each."""
    return Hosts(gpu.hosts, gpu.hosts * gpu.each, files, gpu.hosts)


def committed(mount: str, folders: Sequence[str] = ()) -> Files:
    """Files of hosts that get what is committed in this checkout.

    Raises:
      ConfigError: it is not a git checkout.
    """
    listed = _git("ls-tree", "-r", "-z", "--name-only", "HEAD")
    if listed is None:
        raise ConfigError(f"{ROOT} is not a git checkout, from which files are sent. Clone the repository, and commit")
    sent = frozenset(filter(None, listed.split("\0"))) - frozenset(uncommitted())
    return Files(mount, tuple(folders), sent, "what is committed here is sent: commit it")


def in_image(dockerfile: str, mount: str, folders: Sequence[str] = ()) -> Files:
    """Files of hosts that run an image of this Dockerfile, which copies a part of this checkout."""
    lines = (ROOT / "launch" / dockerfile).read_text(encoding="utf-8").splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    files = {
        file for name in copied for file in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name])
    }
    how = f"the image has {', '.join(sorted(copied))} of this checkout: put it there before the image is made"
    return Files(mount, tuple(folders), frozenset(str(file.relative_to(ROOT)) for file in files), how)


def uncommitted() -> list[str]:
    """The files of this checkout that differ from what is committed, or are not committed at all."""
    return re.findall(r"(?:^|\0)..\s([^\0]+)", _git("status", "--porcelain", "-z", "--no-renames") or "")


def _git(*words: str) -> str | None:
    """Output of git in this checkout; None where it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
