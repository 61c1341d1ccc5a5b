"""Builds the embedded set as a dataset of TFDS, in ArrayRecord and without TensorFlow.

    python -m mllm_jax.data.synthetic.tfds_builder --size small

Then `tfds:scenes` is a path like any other, for `python -m mllm_jax.train` as for other programs.
"""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mllm_jax.common.cli import Parser, run_command
from mllm_jax.data.records.content import texts_of
from mllm_jax.data.synthetic.scenes import Scenes as Drawn
from mllm_jax.data.tools.inline_media import embedded


@dataclasses.dataclass(kw_only=True)
class ScenesConfig(tfds.core.BuilderConfig):
    """train, heldout: how many conversations each split has."""

    train: int
    heldout: int


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Questions about drawn images and videos, see `mllm_jax.data.synthetic.scenes`."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # of downloads: TFDS would look for a file of them with a package that it does not declare
    BUILDER_CONFIGS = [
        ScenesConfig(name="small", description="To try things.", train=2_000, heldout=400),
        ScenesConfig(name="large", description="More than a small model needs.", train=200_000, heldout=2_000),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        images = tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3), encoding_format="png"))
        features = {
            "id": text,
            "kind": text,
            "images": images,
            "frames": images,  # of a video
            "fps": tfds.features.Scalar(np.float32),
            "messages": tfds.features.Sequence({"role": text, "content": text}),
        }
        return tfds.core.DatasetInfo(
            builder=self, description=self.__doc__, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        config = self.builder_config
        return {split: _examples(split, getattr(config, split)) for split in ("train", "heldout")}

    def _generate_examples(self) -> None:
        """All is said by `_split_generators`."""


def _examples(split: str, size: int) -> Iterator[tuple[int, dict[str, Any]]]:
    drawn = Drawn(split, size=size)
    for number in range(size):
        record = embedded(drawn[number])
        shown = [part for m in record["messages"] if not isinstance(m["content"], str) for part in m["content"]]
        video = next((part for part in shown if part["type"] == "video"), {"video": [], "fps": 0})
        texts = ["".join(texts_of(message["content"])) for message in record["messages"]]
        yield (
            number,
            {
                "id": record["id"],
                "kind": record["kind"],
                "images": [io.BytesIO(part["image"]) for part in shown if part["type"] == "image"],
                "frames": [io.BytesIO(frame) for frame in video["video"]],
                "fps": video["fps"],
                "messages": [{"role": m["role"], "content": text} for m, text in zip(record["messages"], texts)],
            },
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. `tfds build` does the same where TensorFlow is installed."""
    parser = Parser("python -m mllm_jax.data.synthetic.tfds_builder", __doc__.partition("\n")[0])
    sizes = {config.name: config for config in Scenes.BUILDER_CONFIGS}
    parser.add_argument("--size", choices=sizes, default="small", help="number of conversations (default small)")
    parser.add_argument("--data_dir", metavar="FOLDER", help="folder of TFDS datasets (default that of TFDS)")
    args = parser.parse_args(arguments)
    builder = Scenes(config=args.size, data_dir=args.data_dir, file_format="array_record")
    builder.download_and_prepare()
    print(builder.data_path)


if __name__ == "__main__":
    run_command(main)
