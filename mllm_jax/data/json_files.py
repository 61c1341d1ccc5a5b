"""JSON files of published models."""

import json
import pathlib


def read_json(path: pathlib.Path) -> dict:
    """The content of a JSON file, or {} if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from error


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a JSON file that people can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
