"""Reads and writes the files of reference log-probabilities that `mllm_jax.train.algorithms.reference` computes."""

import json
from collections.abc import Iterable
from pathlib import Path

from mllm_jax.common.config import ConfigError
from mllm_jax.common.files import atomic_file
from mllm_jax.data.pipeline.preference import Reference


def read_references(path: str) -> dict[str, Reference]:
    """Reads a file of `write_references`, by record id. Raises ConfigError if it is not such a file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines]
        return {item["id"]: Reference(item["content_hash"], tuple(item["log_probs"])) for item in items}
    except OSError as error:
        raise ConfigError(
            f"config.algorithm.reference={path!r}: neither 'base', 'first' or 'none', nor a readable file "
            f"({error.strerror}). Write one with python -m mllm_jax.train.algorithms.reference."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"config.algorithm.reference={path!r}: not a file of reference log-probabilities. Write it again with "
            "python -m mllm_jax.train.algorithms.reference."
        ) from error


def write_references(path: Path, found: Iterable[tuple[str, Reference]]) -> int:
    """Writes a JSON line per pair of answers, atomically. Returns the number of record ids.

    Raises:
      ConfigError: two records with different content have the same id.
    """
    with atomic_file(path) as file:
        hashes: dict[str, int] = {}
        for name, reference in found:
            if hashes.setdefault(name, reference.content_hash) != reference.content_hash:
                raise ConfigError(f"id={name!r}: two different records have this id. Give each its own.")
            line = {"id": name, "content_hash": reference.content_hash, "log_probs": reference.log_probs}
            file.write(json.dumps(line) + "\n")
    return len(hashes)
