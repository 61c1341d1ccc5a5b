"""From pictures and strings to what a dual encoder reads."""

import dataclasses
import pathlib
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_jax.data.images import load_image, patchify
from mllm_jax.data.pairs import one_each
from mllm_jax.data.resize import Keep, Rule, rule_from_hf
from mllm_jax.data.template import Tokenizer, read_json, write_json
from mllm_jax.types import DualBatch, Picture

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class DualProcessor:
    """Needs no jax and no torch, and can be sent to another process.

    rule: how a picture gets its size.
    mean, std: of pixels in 0..1, per channel.
    patch: side in pixels.
    lead: empty patches before a picture's own.
    length: tokens of a text; a shorter one is padded.
    reads_padding: whether padding is a part of a text.
    """

    tokenizer: Tokenizer
    rule: Rule
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int
    lead: int
    length: int
    reads_padding: bool

    def picture(self, source: Any) -> Picture:
        """A path, bytes, an array or a PIL image, as `images.open_image` takes them, normalised."""
        pixels = self.rule.read(load_image(source))
        grid = (pixels.shape[0] // self.patch, pixels.shape[1] // self.patch)
        normal = (pixels.astype(np.float32) / 255 - np.float32(self.mean)) / np.float32(self.std)
        patches = patchify(normal[None], self.patch, 1, 1)
        return Picture(np.concatenate([np.zeros((self.lead, patches.shape[1]), np.float32), patches]), grid)

    def pictures(self, sources: Sequence[Any]) -> DualBatch:
        """A picture per row; the rows of a model have one length, so that one program serves all pictures."""
        pictures = [self.picture(source) for source in sources]
        places = self.rule.patches + self.lead if isinstance(self.rule, Keep) else 0
        return one_each(pictures, places)

    def texts(self, texts: Sequence[str]) -> DualBatch:
        """A text per row. Raises ValueError, naming it, for one that is longer than the model reads."""
        tokens = np.full((len(texts), self.length), self._padding, np.int32)
        segment = np.full_like(tokens, int(self.reads_padding))
        for row, text in enumerate(texts):
            ids = self.tokenizer.encode_framed(self._plain(text))
            if len(ids) > self.length:
                raise ValueError(f"a text has {len(ids)} tokens, the model reads {self.length}; shorten {text[:80]!r}")
            tokens[row, : len(ids)], segment[row, : len(ids)] = ids, 1
        return DualBatch(tokens=tokens, segment=segment)

    @property
    def _padding(self) -> int:
        special = self.tokenizer.special_tokens()
        return self.tokenizer.id(special.get("pad_token") or special["eos_token"])

    def _plain(self, text: str) -> str:
        """As the models were trained: small letters and, under the first SigLIP's tokenizer, no punctuation."""
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
        image = read_json(folder / "preprocessor_config.json")
        image = image or read_json(folder / "processor_config.json").get("image_processor")  # since transformers 5
        if not image:
            raise FileNotFoundError(f"{folder}: holds no preprocessor_config.json")
        return cls(
            Tokenizer.from_folder(folder),
            rule_from_hf(image),
            tuple(image.get("image_mean", config.encoder.pixel_mean)),
            tuple(image.get("image_std", config.encoder.pixel_std)),
            config.encoder.patch_size,
            config.encoder.lead,
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
