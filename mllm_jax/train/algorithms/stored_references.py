"""Files of what a reference model thinks of pairs of answers, which `mllm_jax.train.algorithms.reference` computes."""

import json
from collections.abc import Iterable
from pathlib import Path

from mllm_jax.common.config import ConfigError
from mllm_jax.common.files import atomic_file
from mllm_jax.data.pipeline.preference import Reference


def read_references(path: str) -> dict[str, Reference]:
    """Reads the file of `write_references`, by record id. Raises ConfigError if it is not such a file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return {item["id"]: Reference(item["content_hash"], tuple(item["log_probs"])) for item in found}
    except OSError as error:
        raise ConfigError(
            f"config.algorithm.reference={path!r} is neither 'base', 'first' or 'none' nor a file that can be "
            f"read ({error.strerror}); python -m mllm_jax.train.algorithms.reference writes one"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a file of python -m mllm_jax.train.algorithms.reference") from error


def write_references(path: Path, found: Iterable[tuple[str, Reference]]) -> int:
    """Writes a line of JSON for every pair of answers, atomically; returns their number.

    Raises:
      ConfigError: two records with different answers have the same id.
    """
    with atomic_file(path) as file:
        marks: dict[str, int] = {}
        for name, reference in found:
            if marks.setdefault(name, reference.content_hash) != reference.content_hash:
                raise ConfigError(f"two records are called {name!r}: give each its own id")
            line = {"id": name, "content_hash": reference.content_hash, "log_probs": reference.log_probs}
            file.write(json.dumps(line) + "\n")
    return len(marks)
