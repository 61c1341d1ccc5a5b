"""generation_config.json of published models: end tokens and defaults of sampling."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm_jax.data.text.json_files import read_json, write_json

FILE = "generation_config.json"
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers' defaults
# Fields that change which tokens are drawn, and the values with which they do not.
_UNSUPPORTED = {"repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class GenerationDefaults:
    """The content of a generation_config.json. A field that is null counts as absent."""

    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "GenerationDefaults":
        """Reads the file of a folder; empty if there is none. Raises ValueError, which names the field."""
        path = pathlib.Path(folder) / FILE
        defaults = cls(read_json(path))
        try:
            _ = defaults.eos_token_id, defaults.sampling
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return defaults

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        found = self.content.get("eos_token_id", [])
        found = found if isinstance(found, list) else [found]
        if not all(type(token) is int and token >= 0 for token in found):
            raise ValueError(f"eos_token_id={found}: not the id of a token. Name one, or a list.")
        return tuple(found)

    @property
    def sampling(self) -> dict[str, Any]:
        """`temperature`, `top_k` and `top_p` for `generate`; empty, which is greedy, unless `do_sample` is true."""
        if not self.content.get("do_sample"):
            return {}
        found = {name: self.content.get(name, usual) for name, usual in _SAMPLING.items()}
        for name, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: must be a number of at least 0. Correct or remove it.")
        return found

    @property
    def unsupported(self) -> dict[str, Any]:
        """Fields that `generate` cannot honor, and that change which tokens transformers draws."""
        return {
            name: self.content[name] for name, usual in _UNSUPPORTED.items() if self.content.get(name, usual) != usual
        }

    def save(self, folder: str | pathlib.Path, stop: Sequence[int], pad: int) -> None:
        """Writes the file with the tokens that end an answer; `pad` follows them, unless the file names another."""
        ends = {"eos_token_id": list(stop)}
        write_json(pathlib.Path(folder) / FILE, {"pad_token_id": pad} | dict(self.content) | ends)


NO_DEFAULTS = GenerationDefaults()
