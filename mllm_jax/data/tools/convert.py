"""Converts any source to ArrayRecord, with the images inside: in parallel, and resumable.

A conversion is a folder of numbered shards. Shard k has the source's records from k x R on, in order, without broken
ones. It is written under a temporary name and renamed when complete, so that a shard's name marks a complete one, and
missing shards are the remaining work.
"""

import collections
import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter

from mllm_jax.common.files import write_atomically, writing
from mllm_jax.data.pipeline.workers import Workers, end_with_parent
from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources.array_record import pack
from mllm_jax.data.sources.shards import Conversations
from mllm_jax.data.tools.inline_media import embedded

ABOUT, BROKEN = "conversion.json", "broken.txt"
PARTIAL = ".partial"
OPTIONS = "group_size:1,zstd:1"  # a group is what one access reads; images are compressed already
SECONDS = 0.2  # between two looks at the progress


class Converted(NamedTuple):
    """Content of a folder after a conversion."""

    records: int
    shards: int
    broken: dict[str, int]  # by reason
    noted: dict[str, int] = {}  # records that were read in part, by what was left out of them


class Part(NamedTuple):
    """A shard to be written."""

    path: Path
    first: int  # record of the source
    last: int  # the first of the next


def convert(
    source: Conversations,
    folder: Path,
    about: dict[str, Any],
    records: int = 4096,
    processes: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Converted:
    """Writes the missing shards of a conversion.

    Args:
        about: settings that identify this conversion, as JSON; the folder of another one is refused.
        records: R, number of records in a shard.
        processes: number of worker processes. 0: this process does the work.
        progress: receives the number of source records done.

    Raises:
        ValueError: the folder has other files, or is being written; or no record can be used.
    """
    parts = _parts(folder, len(source), records)
    about = about | {"source_records": len(source), "shard_records": records}
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        held = _begin(folder, about)
        missing = [part for part in parts if not part.path.is_file()]
        if held and missing:
            raise ValueError(f"{folder} was complete, and lacks {missing[0].path.name} now: name a new folder")
        if not held:
            _write_all(missing, source, processes, progress)
            held = _finish(folder, parts)
    return held


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock that ends with the process. ValueError where another has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"{folder}: another conversion is writing there") from error
    finally:
        os.close(handle)


def _write_all(missing: Sequence[Part], source: Conversations, processes: int, progress: Callable[[int], None]) -> None:
    before = len(source) - sum(part.last - part.first for part in missing)
    progress(before)
    context = Workers()
    done, stop = context.Value("q", before), context.Event()
    if not processes:
        for part in missing:
            _write(part, source, done, stop)
            progress(done.value)
        return
    with ProcessPoolExecutor(processes, context, initializer=_start, initargs=(source, done, stop)) as pool:
        try:
            for _ in _ended({pool.submit(_write_here, part) for part in missing}):
                progress(done.value)
        except KeyboardInterrupt:
            context.kill()
            raise
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was killed, perhaps for lack of memory; the same command resumes"
            ) from error
        finally:
            stop.set()  # a shard takes minutes, and is not kept by halves
            pool.shutdown(cancel_futures=True)


def _ended(waiting: set[Future]) -> Iterator[None]:
    while waiting:
        done, waiting = wait(waiting, SECONDS, FIRST_EXCEPTION)
        for future in done:
            future.result()
        yield


def _parts(folder: Path, size: int, records: int) -> list[Part]:
    count = -(-size // records)
    name = lambda number: folder / f"conversations-{number:05d}-of-{count:05d}.array_record"
    return [Part(name(n), n * records, min((n + 1) * records, size)) for n in range(count)]


def _begin(folder: Path, about: dict[str, Any]) -> Converted | None:
    """Opens the folder for this conversion. What it came to, where it is complete."""
    if not (file := folder / ABOUT).is_file():
        if any(path for path in folder.iterdir() if not path.name.endswith(PARTIAL)):
            raise ValueError(f"{folder} is not empty, and not a conversion: name a new folder")
        write_atomically(file, json.dumps(about, indent=2) + "\n")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): name a new folder") from error
    held = found.pop("done", None)
    if found != json.loads(json.dumps(about)):
        changed = {key: (found.get(key), about.get(key)) for key in found | about if found.get(key) != about.get(key)}
        raise ValueError(f"{folder} holds another conversion; (there, now) differ in {changed}. Name a new folder")
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink()
    return held and Converted(**held)


def _finish(folder: Path, parts: Sequence[Part]) -> Converted:
    """Joins what the shards noted of their records, and notes that all are there."""
    notes = [_note(part.path) for part in parts]
    shards = [json.loads(note.read_text(encoding="utf-8")) for note in notes]
    broken = [bad for shard in shards for bad in shard["broken"]]
    counts = collections.Counter(reason for reason, _ in broken)
    noted = sum((collections.Counter(shard["noted"]) for shard in shards), collections.Counter())
    used = parts[-1].last - len(broken)
    if broken:
        write_atomically(folder / BROKEN, "".join(f"{message}\n" for _, message in broken))
    if not used:
        raise ValueError(f"of {len(broken)} records none can be used: {dict(counts)}; see {folder / BROKEN}")
    held = Converted(used, len(parts), dict(counts.most_common()), dict(noted.most_common()))
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    write_atomically(folder / ABOUT, json.dumps(about | {"done": held._asdict()}, indent=2) + "\n")
    for note in notes:
        note.unlink()
    return held


def _note(shard: Path) -> Path:
    """The file that names a shard's broken records and counts others, until all shards are there."""
    return shard.with_name(f".{shard.stem}.json")


def _write(part: Part, source: Conversations, done: Any, stop: Any) -> None:
    """Writes a shard, and before it the note of its records.

    Args:
        done: a number that processes share, of records. stop: an event at which they leave their shard.
    """
    partial, broken = part.path.with_name(f".{part.path.name}{PARTIAL}"), []
    noted: collections.Counter[str] = collections.Counter()
    try:
        with writing(part.path), contextlib.closing(ArrayRecordWriter(str(partial), OPTIONS)) as writer:
            for index in range(part.first, part.last):
                if stop.is_set():
                    return
                try:
                    record = embedded(source.labeled(index))
                    notes = record.pop("notes", ())
                    writer.write(_packed(record))
                    noted.update(notes)
                except BadRecord as error:
                    broken.append((error.reason, str(error)))
                with done.get_lock():
                    done.value += 1
        write_atomically(_note(part.path), json.dumps({"broken": broken, "noted": noted}))
        os.replace(partial, part.path)
    finally:
        partial.unlink(missing_ok=True)  # of a shard that was not finished


def _packed(record: dict[str, Any]) -> bytes:
    """The bytes of a record. Raises BadRecord: MessagePack has no integers over 64 bits, dates or lone surrogates."""
    try:
        return pack(record)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BadRecord("cannot be stored", record["id"], str(error)) from error


_shared: tuple[Any, ...]  # in writing processes: arguments of `_write` other than the part


def _start(*shared: Any) -> None:
    global _shared
    _shared = shared
    threading.Thread(target=end_with_parent, daemon=True).start()


def _write_here(part: Part) -> None:
    _write(part, *_shared)
