"""Base class of `config.algorithm`, whose type selects the training algorithm."""

from dataclasses import dataclass
from typing import Any, ClassVar

from mllm_jax.common.config import ConfigError
from mllm_jax.common.settings import Config
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.nn.lora import LoraConfig

BASE, FIRST, NONE = REFERENCES = ("base", "first", "none")


@dataclass(frozen=True)
class AlgorithmConfig(Config):
    """Settings of an algorithm, defined beside its loss; its code is in `mllm_jax.train.algorithms`."""

    model: ClassVar[type] = ModelConfig  # config type of the trained model
    value_head: ClassVar[bool] = False  # whether the model needs a value head
    runs: ClassVar[tuple[str, ...]] = ()  # fields that name the folder of another run or a stage

    @property
    def updates_per_step(self) -> int:
        """Number of weight updates per step."""
        return 1

    @property
    def files(self) -> dict[str, str]:
        """Paths of the files that the algorithm reads, by field name."""
        return {}

    def check(self, run: Any, path: str) -> None:
        """Raises ConfigError if the settings do not fit the others.

        Args:
          run: a Run, or a stage with all settings filled in.
          path: path of `run` in the config, "config" or "config.stages.NAME".
        """


def check_reference(reference: str, lora: LoraConfig, path: str) -> None:
    """Raises ConfigError if the reference is the model without its adapters and the model has none."""
    if reference == BASE and (not lora.rank or lora.modules_to_save):
        raise ConfigError(
            f"{path}.algorithm.reference={BASE!r}: the model without its adapters, which needs {path}.lora.rank and "
            f"no {path}.lora.modules_to_save. Set {FIRST!r} to use a copy of the first weights."
        )
