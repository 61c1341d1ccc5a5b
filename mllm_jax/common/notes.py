"""Small JSON files that a run keeps in its folder."""

import json
from pathlib import Path
from typing import Any

from mllm_jax.common.config import ConfigError

BEGIN_ANEW = "Put a copy of it back, or begin anew in another --workdir"


def read_note(path: Path, fix: str, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """The content of a small JSON file of a run, an object with these fields of these types.

    Raises:
      ConfigError: it is not; the message ends with the `fix`.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({in_short(error)}). {fix}") from error
    wrong = [
        name for name, kind in fields.items() if not isinstance(found, dict) or not isinstance(found.get(name), kind)
    ]
    if wrong or not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged ({', '.join(wrong) or 'no object'}). {fix}")
    return found


def in_short(error: Exception) -> str:
    """Returns the kind of an error and the beginning of its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
