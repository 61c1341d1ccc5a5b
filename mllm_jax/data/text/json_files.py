"""Reads and writes JSON files of published models."""

import json
import pathlib
from typing import Any


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object that a JSON file contains, or {} if there is no file. Raises ValueError, naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must contain an object in braces, not {type(content).__name__}.")
    return content


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads an object without its null fields: in files of tokenizers and processors, null means absent."""
    return _without_nulls(read_object(path))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a JSON file that people can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
