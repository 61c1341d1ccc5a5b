"""Reads and writes generation_config.json of published models: end tokens and sampling defaults."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm_jax.data.text.json_files import read_json, write_json

FILE = "generation_config.json"
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # defaults of transformers
# Fields that change sampling, and the values that disable them.
_UNSUPPORTED = {"repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class GenerationDefaults:
    """Content of a generation_config.json. Null fields count as absent."""

    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "GenerationDefaults":
        """Reads the file of a folder; empty if it is missing. Raises ValueError, which names the field."""
        path = pathlib.Path(folder) / FILE
        defaults = cls(read_json(path))
        try:
            _ = defaults.eos_token_id, defaults.sampling
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return defaults

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        tokens = self.content.get("eos_token_id", [])
        tokens = tokens if isinstance(tokens, list) else [tokens]
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise ValueError(f"eos_token_id={tokens}: not a token id. Set it to an id or a list of ids.")
        return tuple(tokens)

    @property
    def sampling(self) -> dict[str, Any]:
        """`temperature`, `top_k` and `top_p` for `generate`; empty (greedy decoding) unless `do_sample` is true."""
        if not self.content.get("do_sample"):
            return {}
        settings = {name: self.content.get(name, default) for name, default in _SAMPLING.items()}
        for name, value in settings.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: not a number >= 0. Correct or remove it.")
        return settings

    @property
    def unsupported(self) -> dict[str, Any]:
        """Fields that change sampling in transformers and that `generate` does not support."""
        return {name: self.content[name] for name, off in _UNSUPPORTED.items() if self.content.get(name, off) != off}

    def save(self, folder: str | pathlib.Path, stop: Sequence[int], pad: int) -> None:
        """Writes the file; `stop` are the ids that end an answer, `pad` the padding id unless `content` has one."""
        ends = {"eos_token_id": list(stop)}
        write_json(pathlib.Path(folder) / FILE, {"pad_token_id": pad} | dict(self.content) | ends)


NO_DEFAULTS = GenerationDefaults()
