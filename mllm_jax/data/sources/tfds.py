"""Reads datasets of TFDS that are prepared as ArrayRecord, with random access and without TensorFlow.

Their features must be fields of a layout of `mllm_jax.data.records.records`. Images and frames stay encoded.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mllm_jax.data.records.parts import Find
from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources.shards import Shard

SPLIT = "train"  # default, unless `where` selects another one


class TfdsSplit(Shard):
    """One split of a dataset.

    Args:
        path: folder of a version of a prepared dataset, which contains features.json.
        split: split in TFDS's notation: "train", "train[:10%]" ...
    """

    def __init__(self, path: Path, split: str):
        super().__init__(path, path)
        self.split = split
        self._open()

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return f"{self._source.dataset_info.name}:{self.split}:{index}"

    def read(self, index: int) -> tuple[Any, Find]:
        try:
            return _plain(self._source.dataset_info.features, self._source[index]), self.find
        except RuntimeError as error:
            raise BadRecord("not readable", self.name(index), str(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "root": self.root, "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    def _open(self) -> None:
        builder = tfds.builder_from_directory(self.path)
        if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
            kind = builder.info.file_format
            raise ValueError(f"{self.path}: is {kind}. Prepare it with file_format='array_record' for random access.")
        try:
            self._source = builder.as_data_source(split=self.split, decoders=_decoders(builder.info.features))
        except (KeyError, ValueError) as error:
            splits = ", ".join(builder.info.splits)
            raise ValueError(f"{self.path}: has no split {self.split!r}. Use one of {splits}.") from error


def prepared(name: str) -> Path:
    """Returns the folder of a dataset such as "scenes" or "scenes:1.0.0". Raises FileNotFoundError if not prepared."""
    try:
        return Path(tfds.builder(name, try_gcs=False).data_path)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"tfds:{name}: not prepared ({first}). Prepare it with its builder."
        ) from None  # the original error lists all datasets of TFDS


class _Encoded(tfds.decode.SkipDecoding):
    """Keeps images as the bytes of their files, also in sequences."""

    def decode_example(self, serialized_example: Any) -> Any:
        return serialized_example

    def decode_batch_example_np(self, serialized_example: Any) -> Any:
        return serialized_example

    decode_ragged_example_np = decode_batch_example_np


def _decoders(features: tfds.features.FeaturesDict) -> dict[str, Any]:
    return {name: _Encoded() for name, feature in features.items() if _shows(feature)}


def _shows(feature: tfds.features.FeatureConnector) -> bool:
    return isinstance(getattr(feature, "feature", feature), tfds.features.Image)


def _plain(feature: tfds.features.FeatureConnector, value: Any) -> Any:
    """Converts a value to JSON types (texts, numbers, lists and mappings), and images to bytes."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _plain(part, value[name]) for name, part in feature.items()}
    if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.FeaturesDict):
        rows = zip(*value.values())
        return [_plain(feature.feature, dict(zip(value, row))) for row in rows]
    if isinstance(feature, tfds.features.Sequence):
        return [_plain(feature.feature, item) for item in value]
    if isinstance(feature, tfds.features.Image):
        return bytes(value)
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value))
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
