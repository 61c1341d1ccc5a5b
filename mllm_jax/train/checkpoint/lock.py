"""Locks a working directory, so that only one run at a time writes to it.

The lock file identifies its holder, which touches it every `BEAT` seconds. It is created by a hard link, which is
atomic on NFS too. A second run on the holder's machine checks that the holder's process exists; on another machine it
watches the age of the file by the clock of the file system.
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
BEAT = 5.0  # seconds between two touches of the file by its holder
STALE = 60.0  # age of the file in seconds from which on its holder is considered dead


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of a working directory inside the block. Process 0 takes it for all processes of the run.

    A lock is taken over if its process has ended, or if another machine has not touched it for `STALE` seconds.

    Raises:
      ConfigError: another run holds the lock. Every process raises it.
    """
    lock, refusal = Lock(workdir / FILE), ""
    if jax.process_index() == 0:
        try:
            lock.take()
        except (ConfigError, OSError) as error:
            refusal = describe_error(error)
    meet(COMPILING)  # a timeout that exceeds the time for which process 0 watches a lock
    if refusal := from_all_processes({"refusal": refusal})[0]["refusal"]:
        raise ConfigError(refusal)
    try:
        yield
    finally:
        lock.release()


class Lock:
    """Lock file at `path`, with a thread that touches it while this process holds it."""

    def __init__(self, path: Path):
        self.path, self._token, self._done = path, uuid.uuid4().hex, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def take(self) -> None:
        """Takes the lock; waits while its holder may be dead. Raises ConfigError once the holder proves to be alive."""
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
        """Creates a lock file atomically. Returns False if it exists."""
        draft = path.with_name(f"{path.name}.{self._token}")
        try:
            with writing(path):
                draft.write_text(
                    json.dumps(_identity() | {"token": self._token, "since": time.time()}), encoding="utf-8"
                )
            return _link(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        """Returns the content of the lock file, or {} if it is missing or unreadable."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _holder(self) -> str | None:
        return self._read().get("token")

    def _age(self) -> float | None:
        """Returns the seconds since the last touch, by the clock of the file system. None if there is no lock."""
        probe = self.path.with_name(f"{self.path.name}.{self._token}.now")
        probe.write_bytes(b"")
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink()

    def _wait_until_stale(self) -> None:
        """Returns when the holder has ended, or has not touched the lock for `STALE` seconds.

        Raises:
          ConfigError: the holder is alive.
        """
        holder, oldest = self._read(), 0.0
        while (age := self._age()) is not None and self._holder() == holder.get("token"):
            lives = _lives(holder)
            if lives or age < oldest - 1:  # touched since the last iteration
                raise ConfigError(self._refusal(holder))
            if lives is False or age >= STALE:
                return
            if not oldest:
                where = f"{self.path}: {holder.get('host', 'another machine')} held it {age:.0f} s ago"
                print(f"{where}; waiting up to {STALE:.0f} s for a sign of life", file=sys.stderr, flush=True)
            oldest = max(oldest, age)
            time.sleep(1.0)

    def _remove_stale(self) -> None:
        """Removes the lock if it is still stale. Of several waiting runs only one does; the others try again."""
        guard = self.path.with_name(f"{self.path.name}.takeover")
        if not self._create(guard):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - guard.stat().st_mtime > STALE:  # its process was killed during the takeover below
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
            f"{since}. Wait until it ends, or use another --workdir."
        )

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            if (holder := self._holder()) is not None and holder != self._token:
                self._lose()
            with contextlib.suppress(OSError):  # a file system that does not answer now may answer later
                if self.path.exists():
                    os.utime(self.path)
                else:  # another process or a user has removed it
                    self._create(self.path)

    def _lose(self) -> None:
        """Ends this process at once: it was suspended, and another run now writes to the folder."""
        print(
            f"error: another run has taken over {self.path.parent} while this process was suspended for {STALE:.0f} s "
            "or longer. This process ends without saving.",
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
    """Returns the host, its boot ID and its PID namespace. Process ids are comparable only if all three are equal."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "namespace": os.readlink(namespace) if namespace.exists() else "",
    }


def _identity() -> dict[str, Any]:
    return _machine() | {"pid": os.getpid(), "started": _started(os.getpid())}


def _lives(holder: dict[str, Any]) -> bool | None:
    """Returns whether the holder of a lock is alive. None if it runs on another machine."""
    if {name: holder.get(name) for name in _machine()} != _machine():
        return None
    return _started(holder.get("pid")) == holder.get("started")


def _started(pid: Any) -> str | None:
    """Returns the start time of a local process in clock ticks since boot. None if there is no such process.

    The start time distinguishes the process from a later one with the same id.
    """
    if not isinstance(pid, int):
        return None
    if not Path("/proc/self/stat").exists():
        return _answers(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # Z, X: ended, but its parent has not yet reaped it


def _answers(pid: int) -> str | None:
    """Returns "" if a process exists, else None, on systems without /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
