"""Data in files: one data set, or a mixture of several."""

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

EMBEDDED = "scenes:"  # prefix of the path of an embedded data set


@dataclass(frozen=True, kw_only=True)
class Files(Config):
    """Conversations and documents in files: JSON, ArrayRecord, WebDataset, Parquet or TFDS.

    path: file, pattern, folder or tfds:NAME, whose format is detected (see `mllm_jax.data.sources`). Or scenes:KIND,
      embedded questions of a kind, which have held-out ones (see `mllm_jax.data.synthetic.scenes`).
    root: folder of the images. None: the folder of the files.
    where: field values that select training records, such as {"split": "train"}.
    heldout: path of held-out records. None: `path`.
    heldout_where: field values that select held-out records.
    """

    path: str = ""
    root: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    heldout: str | None = None
    heldout_where: Mapping[str, Any] = field(default_factory=dict)

    def open(self, split: str, name: str) -> Conversations | Scenes | None:
        """Opens the conversations of "train" or "heldout" (None: none are set). name: path of this config in errors."""
        if not self.path:
            raise ConfigError(
                f"{name}.path is empty. Set it to the conversations: a file, a pattern, a folder or tfds:NAME."
            )
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
        raise ConfigError(f"{name}: {path} has no fields to select by {dict(where)}. Remove it.")
    return Scenes(split, kinds={kind: 1.0})


@dataclass(frozen=True, kw_only=True)
class FilesData(Files, DataConfig):
    """One data set in files."""

    def source(self, split: str = "train") -> Any:
        """Returns the conversations of "train" or "heldout". None: the config sets no held-out ones."""
        records = self.open(split, "config.data")
        return WithoutImages(records) if self.text_only and records is not None else records


@dataclass(frozen=True, kw_only=True)
class Part(Files):
    """One data set of a mixture. weight: relative frequency of its records. 0: never drawn."""

    weight: NonNegative = 1.0


@dataclass(frozen=True, kw_only=True)
class MixtureData(DataConfig):
    """Data sets from which records are drawn by weight, without end (see `mllm_jax.data.sources.mixture`).

    sources: data sets by name.
    temperature: multiplies weights by size^(1 / temperature). 1: by size. 2: by its square root. Larger: more even.
      None: sizes are ignored.
    curriculum: (step, {name: weight}) pairs: weights from that step on; other data sets keep theirs. Rows that are
      being packed at that step still contain records drawn before.
    """

    sources: Mapping[str, Part] = field(default_factory=dict)
    temperature: Positive | None = None
    curriculum: tuple[tuple[NonNegativeInt, Mapping[str, NonNegative]], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.epochs is not None:
            raise ValueError(f"epochs={self.epochs}: a mixture has no epochs. Set optim.steps instead.")
        for step, changed in self.curriculum:
            if unknown := sorted(set(changed) - set(self.sources)):
                names = suggestion(unknown[0], self.sources)
                raise ValueError(f"curriculum of step {step}: there is no source {unknown[0]!r}; {names}")

    def source(self, split: str = "train") -> Any:
        """Returns the `Mixture` of all training sets; for "heldout", all held-out sets concatenated, or None."""
        opened = [part.open(split, f"config.data.sources.{name}") for name, part in self.sources.items()]
        opened = [WithoutImages(source) if self.text_only else source for source in opened if source is not None]
        if split == "heldout":
            return Conversations(opened) if opened else None
        if not opened:
            raise ConfigError("config.data.sources is empty. Add at least one source.")
        try:
            return Mixture(opened, self.weights([len(source) for source in opened]))
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error

    def weights(self, sizes: list[int]) -> dict[int, list[float]]:
        """Returns the weights of data sets of these sizes, by the step from which they apply."""
        current, weights = {name: part.weight for name, part in self.sources.items()}, {}
        for step, changes in sorted([(0, {}), *self.curriculum], key=lambda phase: phase[0]):
            current |= changes
            weights[step] = tempered(list(current.values()), sizes, self.temperature)
        return weights
