"""A lock file that keeps a working directory to one run at a time, and shows that its holder lives.

The file is created by a hard link, which is atomic on NFS too. Its holder touches it every few seconds. A second start
on the same machine looks for the holder's process; on another machine it watches the file's modification time.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import describe_error
from mllm_jax.common.files import writing
from mllm_jax.train.checkpoint.manager import from_all_processes
from mllm_jax.train.monitor.processes import COMPILING, meet

FILE = "run.lock"
BEAT = 5.0  # seconds after which the holder touches the file again
STALE = 60.0  # seconds without a touch after which its holder counts as dead


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of a working directory; process 0 does it for all processes.

    The lock of a process that has ended, or of a machine that gives no sign of life for a minute, is taken over.
    Raises ConfigError in every process where another run holds it.
    """
    lock, refusal = Lock(workdir / FILE), ""
    if jax.process_index() == 0:
        try:
            lock.take()
        except (ConfigError, OSError) as error:
            refusal = describe_error(error)
    meet(COMPILING)  # longer than a lock is watched
    if refusal := from_all_processes({"refusal": refusal})[0]["refusal"]:
        raise ConfigError(refusal)
    try:
        yield
    finally:
        lock.release()


class Lock:
    """The lock file at `path`, and the thread that touches it while it is held."""

    def __init__(self, path: Path):
        self.path, self._token, self._done = path, uuid.uuid4().hex, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def take(self) -> None:
        """Waits where the holder may be dead. Raises ConfigError as soon as it is known to live."""
        while not self._create(self.path):
            self._wait_until_stale()
            self._remove_stale()
        self._thread.start()

    def release(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
            if self._holder() == self._token:
                self.path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Creates a lock file atomically; returns False if there is one."""
        own = path.with_name(f"{path.name}.{self._token}")
        try:
            with writing(path):
                own.write_text(json.dumps(_identity() | {"token": self._token, "since": time.time()}), encoding="utf-8")
            return _link(own, path)
        finally:
            own.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        """Content of the lock file; empty if it is gone or not readable."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _holder(self) -> str | None:
        return self._read().get("token")

    def _age(self) -> float | None:
        """Seconds since the last touch, by the clock of the file system; None where there is no lock."""
        probe = self.path.with_name(f"{self.path.name}.{self._token}.now")
        probe.write_bytes(b"")
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink()

    def _wait_until_stale(self) -> None:
        """Returns when the holder has ended, or has not touched the lock for `STALE` seconds."""
        holder, oldest = self._read(), 0.0
        while (age := self._age()) is not None and self._holder() == holder.get("token"):
            lives = _lives(holder)
            if lives or age < oldest - 1:  # touched while we looked
                raise ConfigError(self._refusal(holder))
            if lives is False or age >= STALE:
                return
            if not oldest:
                where = f"{self.path}: {holder.get('host', 'another machine')} held it {age:.0f} s ago"
                print(f"{where}; waiting up to {STALE:.0f} s for a sign of life", file=sys.stderr, flush=True)
            oldest = max(oldest, age)
            time.sleep(1.0)

    def _remove_stale(self) -> None:
        """Removes a lock that is still stale; only one of several starts does, the others look again."""
        guard = self.path.with_name(f"{self.path.name}.takeover")
        if not self._create(guard):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - guard.stat().st_mtime > STALE:  # its process was killed in the two lines below
                    guard.unlink()
            time.sleep(0.2)
            return
        try:
            age, lives = self._age(), _lives(self._read())
            if lives is False or (lives is None and age is not None and age >= STALE):
                self.path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _refusal(self, holder: dict[str, Any]) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("since", 0)))
        return (
            f"--workdir={self.path.parent} is in use by process {holder.get('pid')} on {holder.get('host')} since "
            f"{since}. Wait until it ends, or use another --workdir"
        )

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            if (holder := self._holder()) is not None and holder != self._token:
                self._lose()
            with contextlib.suppress(OSError):  # a file system that does not answer now may answer later
                if self.path.exists():
                    os.utime(self.path)
                else:  # somebody has removed it
                    self._create(self.path)

    def _lose(self) -> None:
        """Ends this process at once: it was asleep, and another run writes into the folder by now."""
        print(
            f"error: another run has taken over {self.path.parent} while this process was stopped for {STALE:.0f} s or "
            "longer; it ends here, and what the other one saves stays",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _link(own: Path, path: Path) -> bool:
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links, such as a mounted bucket
        return _create_exclusively(path, own.read_bytes())
    return True


def _create_exclusively(path: Path, content: bytes) -> bool:
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _machine() -> dict[str, str]:
    """Host, its boot and its namespace of processes (a container's): where these are equal, process numbers compare."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "namespace": os.readlink(namespace) if namespace.exists() else "",
    }


def _identity() -> dict[str, Any]:
    return _machine() | {"pid": os.getpid(), "started": _started(os.getpid())}


def _lives(holder: dict[str, Any]) -> bool | None:
    """Returns whether the holder of a lock lives; None if it is, or was, on another machine."""
    if {name: holder.get(name) for name in _machine()} != _machine():
        return None
    return _started(holder.get("pid")) == holder.get("started")


def _started(pid: Any) -> str | None:
    """Start of a process of this machine, in ticks since the machine's; None if there is no such process.

    A number may be given to another process later, which has begun at another time.
    """
    if not isinstance(pid, int):
        return None
    if not Path("/proc/self/stat").exists():
        return _answers(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # one that has ended stays listed until its parent asks for it


def _answers(pid: int) -> str | None:
    """Start time of a process on systems without /proc: "" if there is such a process, None if there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
