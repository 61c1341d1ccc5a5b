"""Processes images and strings into the inputs of a dual encoder."""

import dataclasses
import pathlib
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_jax.common.settings import Config, Finite, Fraction, NonNegativeInt, Positive, PositiveInt
from mllm_jax.data.pipeline.dual_batches import one_each, pairs_in_rows
from mllm_jax.data.pipeline.packing import Budget, TooLarge
from mllm_jax.data.pipeline.spec import read_processor
from mllm_jax.data.records.content import parts_of
from mllm_jax.data.text.json_files import write_json
from mllm_jax.data.text.tokenizer import Tokenizer
from mllm_jax.data.vision.images import load_image, notes, patchify
from mllm_jax.data.vision.resize import Keep, Rule, rule_from_hf
from mllm_jax.types import DualBatch, Example, ImagePatches

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class DualProcessor(Config):
    """Needs no jax and no torch, and can be sent to another process.

    rule: how an image gets its size.
    mean, std: of pixels in 0..1, per channel.
    patch: side in pixels.
    num_prefix_tokens: empty patches before an image's own.
    length: tokens of a text; a shorter one is padded.
    reads_padding: whether padding is a part of a text.
    missing_rows: largest share of its rows that a truncated JPEG may lack.
    """

    tokenizer: Tokenizer
    rule: Rule
    mean: tuple[Finite, ...]
    std: tuple[Positive, ...]
    patch: PositiveInt
    num_prefix_tokens: NonNegativeInt
    length: PositiveInt
    reads_padding: bool
    missing_rows: Fraction = 0.0

    def image_patches(self, source: Any) -> ImagePatches:
        """A path, bytes, an array or a PIL image, as `images.open_image` takes them, normalized."""
        pixels = self.rule.read(load_image(source))
        return self._patches((pixels.astype(np.float32) / 255 - np.float32(self.mean)) / np.float32(self.std))

    def _patches(self, pixels: np.ndarray) -> ImagePatches:
        """Patches of pixels [h w c]; a remainder of its sides is not read."""
        grid = (pixels.shape[0] // self.patch, pixels.shape[1] // self.patch)
        patches = patchify(pixels[None], self.patch, 1, 1)
        return ImagePatches(
            np.concatenate([np.zeros((self.num_prefix_tokens, patches.shape[1]), patches.dtype), patches]), grid
        )

    @property
    def values(self) -> int:
        """Number of values in a patch."""
        return len(self.mean) * self.patch**2

    def example(self, record: dict[str, Any], budget: Budget) -> Example:
        """A training pair: the one image of a record, u8, and the text of its last message, truncated to `length`.

        Args:
          record: see data/records/records.py.
          budget: budget of a row; an image whose rule has no fixed size gets at most its patches.
        Raises:
          ValueError: not one image, or no text. TooLarge: an image of fixed size has more patches.
        """
        parts = [parts_of(message["content"]) for message in record["messages"]]
        shown = [part for message in parts for part in message if part["type"] != "text"]
        text = " ".join(part["text"] for part in parts[-1] if part["type"] == "text").strip()
        if [part["type"] for part in shown] != ["image"] or not text:
            raise ValueError(f"a pair needs one image and a text, not {len(shown)} images or videos and {text[:80]!r}")
        rule = self.rule.within((budget.patches_per_row - self.num_prefix_tokens) * self.patch**2)
        image = load_image(shown[0]["image"], self.missing_rows)
        image_patches = self._patches(rule.read(image))
        if len(image_patches.patches) > budget.patches_per_row:
            raise TooLarge(f"an image has {len(image_patches.patches)} patches, a patch row {budget.patches_per_row}")
        tokens, read = self._text(self.tokenizer.encode_framed(self._plain(text), self.length))
        nowhere = np.full(self.length, -1, np.int32)
        position = np.zeros((self.length, 3), np.int32)
        return Example(tokens, read, position, nowhere, (image_patches,), notes=tuple(notes(image)))

    def collate(self, rows: Sequence[Sequence[Example]], budget: Budget) -> DualBatch:
        """Rows of pairs as a batch."""
        return pairs_in_rows(rows, budget, self.length, self.values)

    def images(self, sources: Sequence[Any]) -> DualBatch:
        """An image per row; the rows of a model have one length, so that one program serves all images."""
        images = [self.image_patches(source) for source in sources]
        places = self.rule.patches + self.num_prefix_tokens if isinstance(self.rule, Keep) else 0
        return one_each(images, places)

    def texts(self, texts: Sequence[str]) -> DualBatch:
        """A text per row. Raises ValueError, naming it, for one that is longer than the model reads."""
        rows = []
        for text in texts:
            ids = self.tokenizer.encode_framed(self._plain(text))
            if len(ids) > self.length:
                raise ValueError(f"a text has {len(ids)} tokens, the model reads {self.length}; shorten {text[:80]!r}")
            rows.append(self._text(ids))
        tokens, segment = (np.array(part, np.int32).reshape(-1, self.length) for part in zip(*rows))
        return DualBatch(tokens=tokens, segment=segment)

    def _text(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens i32[length] with padding, and 1 where the model reads them."""
        tokens = np.full(self.length, self._padding, np.int32)
        read = np.full(self.length, int(self.reads_padding), np.int32)
        tokens[: len(ids)], read[: len(ids)] = ids, 1
        return tokens, read

    @property
    def _padding(self) -> int:
        special = self.tokenizer.special_tokens()
        return self.tokenizer.id(special.get("pad_token") or special["eos_token"])

    def _plain(self, text: str) -> str:
        """Normalizes a text as in training: lower case and, for the tokenizer of SigLIP 1, no punctuation."""
        text = text.lower()
        if self.tokenizer.config.get("tokenizer_class", "").startswith("SiglipTokenizer"):
            text = re.sub(r"\s+", " ", text.translate(_PUNCTUATION)).strip()
        return text

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, config: Any) -> "DualProcessor":
        """Reads the tokenizer and the preprocessor config of a published model; `config` is its DualConfig.

        Raises FileNotFoundError if one of them is missing.
        """
        folder = pathlib.Path(folder)
        _, image = read_processor(folder, "image_processor")
        if not image:
            raise FileNotFoundError(f"{folder}: holds no preprocessor_config.json")
        return cls(
            Tokenizer.from_folder(folder),
            rule_from_hf(image),
            image.get("image_mean", config.encoder.pixel_mean),
            image.get("image_std", config.encoder.pixel_std),
            config.encoder.patch_size,
            config.encoder.num_prefix_tokens,
            config.text.positions,
            config.text_pool.token == "last",
        )

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the files that `from_folder` and transformers read."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        image = self.rule.to_hf() | {"image_mean": list(self.mean), "image_std": list(self.std)}
        write_json(folder / "preprocessor_config.json", image)
