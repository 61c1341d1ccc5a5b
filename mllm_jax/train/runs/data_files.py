"""Data of a run in files: one set, or a mixture of several by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import describe_error, suggestion
from mllm_jax.common.settings import Config, NonNegative, NonNegativeInt, Positive
from mllm_jax.data.sources import open_source
from mllm_jax.data.sources.mixture import Mixture, tempered
from mllm_jax.data.sources.shards import Conversations
from mllm_jax.data.synthetic.scenes import KINDS, Scenes
from mllm_jax.train.runs.data import DataConfig, WithoutImages

EMBEDDED = "scenes:"  # begins the path of an embedded set


@dataclass(frozen=True, kw_only=True)
class Files(Config):
    """Conversations and documents in files: JSON, ArrayRecord, WebDataset, Parquet or TFDS.

    path: a file, a pattern, a folder or tfds:NAME, whose format is detected (see `mllm_jax.data.sources`). Or
      scenes:KIND, the embedded questions of a kind, with held-out ones (see `mllm_jax.data.synthetic.scenes`).
    root: folder of the images. Default: the folder of the files.
    where: fields that a record must have to be trained on, as in {"split": "train"}.
    heldout: another path to evaluate on. None: the same. heldout_where: the fields of held-out records.
    """

    path: str = ""
    root: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    heldout: str | None = None
    heldout_where: Mapping[str, Any] = field(default_factory=dict)

    def open(self, split: str, name: str) -> Conversations | Scenes | None:
        """The conversations of "train" or "heldout"; None where no held-out ones are named. `name` is the config's."""
        if not self.path:
            raise ConfigError(f"{name}.path must name the conversations: a file, a pattern, a folder or tfds:NAME")
        path, where = (self.path, self.where) if split == "train" else (self.heldout or self.path, self.heldout_where)
        if path.startswith(EMBEDDED):
            return _scenes(path, where, split, name)
        if split == "heldout" and not (self.heldout or self.heldout_where):
            return None
        try:
            return open_source(path, self.root, where)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name}: {describe_error(error)}") from error


def _scenes(path: str, where: Mapping[str, Any], split: str, name: str) -> Scenes:
    kind = path.removeprefix(EMBEDDED)
    if kind not in KINDS:
        raise ConfigError(f"{name}: {path}: there is no {kind!r}; {suggestion(kind, KINDS)}")
    if where:
        raise ConfigError(f"{name}: {path} has no fields to choose by {dict(where)}. Remove it")
    return Scenes(split, kinds={kind: 1.0})


@dataclass(frozen=True, kw_only=True)
class FilesData(Files, DataConfig):
    """One set."""

    def source(self, split: str = "train") -> Any:
        """The conversations of "train" or "heldout"; None where the config names no held-out ones."""
        records = self.open(split, "config.data")
        return WithoutImages(records) if self.text_only and records is not None else records


@dataclass(frozen=True, kw_only=True)
class Part(Files):
    """One set of a mixture. weight: how often it is drawn from, relative to the others; 0 = not at all."""

    weight: NonNegative = 1.0


@dataclass(frozen=True, kw_only=True)
class MixtureData(DataConfig):
    """Several sets, drawn from by weight, forever (see `mllm_jax.data.sources.mixture`). Weights count conversations.

    sources: the sets by name.
    temperature: exponent of size: weights are multiplied with size^(1 / temperature). 1: by size, 2: by its square
      root,
      larger: more even. None: the weights alone.
    curriculum: (step, {name: weight}) pairs: weights that change after that number of steps. Sets that are not named
      keep their weights. Batches that are being packed then still hold records drawn before.
    """

    sources: Mapping[str, Part] = field(default_factory=dict)
    temperature: Positive | None = None
    curriculum: tuple[tuple[NonNegativeInt, Mapping[str, NonNegative]], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.epochs is not None:
            raise ValueError("a mixture has no epochs; optim.steps ends the run")
        for step, changed in self.curriculum:
            if unknown := sorted(set(changed) - set(self.sources)):
                known = suggestion(unknown[0], self.sources)
                raise ValueError(f"curriculum of step {step}: there is no source {unknown[0]!r}; {known}")

    def source(self, split: str = "train") -> Any:
        """A `Mixture` of all sets to train on; of "heldout", all held-out sets as one, or None."""
        opened = [part.open(split, f"config.data.sources.{name}") for name, part in self.sources.items()]
        opened = [WithoutImages(source) if self.text_only else source for source in opened if source is not None]
        if split == "heldout":
            return Conversations(opened) if opened else None
        if not opened:
            raise ConfigError("config.data.sources must name at least one source")
        try:
            return Mixture(opened, self.weights([len(source) for source in opened]))
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error

    def weights(self, sizes: list[int]) -> dict[int, list[float]]:
        """The weights of sets of these sizes, by the batch from which on they hold."""
        now, found = {name: part.weight for name, part in self.sources.items()}, {}
        for step, changed in sorted([(0, {}), *self.curriculum], key=lambda phase: phase[0]):
            now |= changed
            found[step] = tempered(list(now.values()), sizes, self.temperature)
        return found
