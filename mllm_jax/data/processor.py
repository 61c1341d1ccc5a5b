"""From a conversation with pictures and clips to an `Example`: the numbers that a model reads."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mllm_jax.data import images, video
from mllm_jax.data.pack import Budget, TooLarge, place
from mllm_jax.data.positions import on_a_grid, rotary_positions
from mllm_jax.data.template import ChatTemplate, Messages, Tokenizer, read_json, write_json
from mllm_jax.types import Example, Picture


@dataclasses.dataclass(frozen=True)
class ProcessorSpec:
    """What a model expects of its input. The defaults are those published with Qwen3-VL.

    A model of text alone has None for the tokens of vision; `end_of_turn` None is the tokenizer's end of text.
    """

    patch: int = 16  # side in pixels
    temporal_patch: int = 2  # frames
    merge: int = 2  # a visual token is merge x merge patches
    min_pixels: int = 65536  # of a picture
    max_pixels: int = 16777216
    clip_min_pixels: int = 4096  # of all frames of a clip together
    clip_max_pixels: int = 25165824
    fps: float = 2.0  # at which clips are sampled
    min_frames: int = 4
    max_frames: int = 768
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # the model reads (u8 / 255 - mean) / std
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_token: str | None = "<|image_pad|>"
    video_token: str | None = "<|video_pad|>"
    vision_start: str | None = "<|vision_start|>"
    vision_end: str | None = "<|vision_end|>"
    end_of_turn: str | None = "<|im_end|>"
    processor_class: str = "Qwen3VLProcessor"  # names in Hugging Face's files
    image_processor_type: str = "Qwen2VLImageProcessor"
    video_processor_type: str = "Qwen3VLVideoProcessor"

    @property
    def factor(self) -> int:
        """Side of a visual token in pixels."""
        return self.patch * self.merge


SEEING = ProcessorSpec()
TEXT = ProcessorSpec(image_token=None, video_token=None, vision_start=None, vision_end=None, end_of_turn=None)


def spec_for(config: Any) -> ProcessorSpec:
    """What a model expects, as far as its ModelConfig says."""
    encoder = config.encoder
    return TEXT if encoder is None else ProcessorSpec(encoder.patch_size, encoder.temporal_patch_size, config.merge)


@dataclasses.dataclass(frozen=True)
class _Still:
    source: Any  # opened again when it is read: neither open files nor pixels wait in between
    height: int
    width: int

    pictures = 1

    @property
    def name(self) -> str:
        return images.source_name(self.source)

    def placeholder(self, processor: "Processor") -> list[int]:
        return [processor.image_id]

    def size(self, spec: ProcessorSpec, budget: float, row: float) -> tuple[int, int]:
        budget = max(budget, min(spec.min_pixels, row))
        low, high = min(spec.min_pixels, budget), min(spec.max_pixels, budget)
        size = images.smart_resize(self.height, self.width, spec.factor, low, high)
        return _within(budget, size, self.height, self.width, spec.factor)

    def frames(self, spec: ProcessorSpec, size: tuple[int, int]) -> Iterator[np.ndarray]:
        yield images.resized(images.load_image(self.source), size)[None]


@dataclasses.dataclass(frozen=True)
class _Film:
    clip: video.Clip
    indices: list[int]
    temporal_patch: int

    @property
    def name(self) -> str:
        return self.clip.name

    @property
    def pictures(self) -> int:
        return math.ceil(len(self.indices) / self.temporal_patch)

    def placeholder(self, processor: "Processor") -> list[int]:
        times = video.patch_times(self.indices, self.clip.fps, self.temporal_patch)
        block = [processor.vision_start_id, processor.video_id, processor.vision_end_id]
        return [token for time in times for token in processor.tokenizer.encode(f"<{time:.1f} seconds>") + block]

    def size(self, spec: ProcessorSpec, budget: float, row: float) -> tuple[int, int]:
        clip, count = self.clip, len(self.indices)
        budget = max(budget, min(max(spec.factor**2, spec.clip_min_pixels / count), row))
        low, high = min(spec.clip_min_pixels, budget * count), min(spec.clip_max_pixels, budget * count)
        size = video.clip_size(count, clip.height, clip.width, spec.factor, self.temporal_patch, low, high)
        return _within(budget, size, clip.height, clip.width, spec.factor)

    def frames(self, spec: ProcessorSpec, size: tuple[int, int]) -> Iterator[np.ndarray]:
        return video.read_clip(self.clip, self.indices, size, self.temporal_patch)


def _within(budget: float, size: tuple[int, int], height: int, width: int, factor: int) -> tuple[int, int]:
    """`size`, unless rounding up to a minimum took it over the budget."""
    return size if math.prod(size) <= budget else images.shrunk_size(height, width, factor, budget)


class Processor:
    """`processor(messages) -> Example`. Needs no jax and no torch, and can be sent to another process."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, spec: ProcessorSpec):
        self.tokenizer = tokenizer
        self.template = template
        self.spec = spec
        tokens = (spec.image_token, spec.video_token, spec.vision_start, spec.vision_end)
        ids = (None if token is None else tokenizer.id(token) for token in tokens)
        self.image_id, self.video_id, self.vision_start_id, self.vision_end_id = ids
        self._placeholders = [token for token in (self.image_id, self.video_id) if token is not None]
        end_of_turn = spec.end_of_turn or tokenizer.special_tokens().get("eos_token")
        if end_of_turn is None:
            raise ValueError("tokenizer_config.json names no eos_token, so that nothing says where an answer ends")
        self.end_of_turn_id = tokenizer.id(end_of_turn)

    def __call__(
        self, messages: Messages, generate: bool = False, budget: Budget | None = None, kind: str = ""
    ) -> Example:
        """Reads one conversation in Hugging Face's layout: [{"role", "content": text or a list of items}].

        Items are {"type": "text", "text": ...}, {"type": "image", "image": ...} (see `images.open_image`) and
        {"type": "video", "video": ..., "fps": optional} (see `video.open_clip`). `fps` is the rate at which a file is
        to be sampled, or the rate at which the frames of an array or a list were taken; without it they are all used.
        `generate`: a prompt that ends where the answer begins, without loss.
        `budget`: pictures are made smaller, all by one limit of pixels, until the conversation fits; they are never
        cut. Raises TooLarge if it cannot fit, and ValueError for anything unreadable, naming it.
        """
        visuals = [self._open(item) for item in _items(messages) if item["type"] != "text"]
        tokens, weight = self._tokens(messages, visuals, generate)
        tokens, weight = np.array(tokens, np.int32), np.array(weight, np.float32)
        visual = np.isin(tokens, self._placeholders)

        sizes = self._sizes(visuals, int((~visual).sum()), budget)
        factor = self.spec.factor
        grids = [
            (height // factor, width // factor)
            for (height, width), item in zip(sizes, visuals, strict=True)
            for _ in range(item.pictures)
        ]
        counts = np.ones(len(tokens), np.int64)
        counts[visual] = [height * width for height, width in grids]
        weight[visual] = 0
        tokens, weight, visual = (np.repeat(values, counts) for values in (tokens, weight, visual))
        return Example(
            tokens=tokens,
            weight=weight,
            position=rotary_positions(visual, [on_a_grid(*grid) for grid in grids]),
            vision_index=np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32),
            pictures=tuple(self._pictures(visuals, sizes)),
            kind=kind,
        )

    def decode(self, tokens) -> str:
        """The text of tokens, without the special ones."""
        return self.tokenizer.decode(tokens)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the end of a turn, and the tokenizer's end of text and padding."""
        special = self.tokenizer.special_tokens()
        named = {self.spec.end_of_turn, special.get("eos_token"), special.get("pad_token")} - {None}
        return tuple(sorted(map(self.tokenizer.id, named)))

    def _open(self, item: dict) -> _Still | _Film:
        spec, source, fps = self.spec, item[item["type"]], item.get("fps", self.spec.fps)
        if item["type"] == "image":
            return _Still(source, *images.upright_size(images.open_image(source)))
        clip = video.open_clip(source, fps)
        target = fps if isinstance(source, (str, os.PathLike)) else spec.fps
        count = video.frame_count(clip.frames, clip.fps, target, spec.min_frames, spec.max_frames)
        return _Film(clip, video.sample_frames(clip.frames, count), spec.temporal_patch)

    def _tokens(self, messages: Messages, visuals: list, generate: bool) -> tuple[list[int], list[float]]:
        """Tokens and weights with one placeholder for every picture and every temporal patch of a clip."""
        written, weights = self.template.tokenize(self.tokenizer, messages, self.end_of_turn_id, generate)
        expected = [self.image_id if isinstance(visual, _Still) else self.video_id for visual in visuals]
        placeholders = [token for token in written if token in self._placeholders]
        if placeholders != expected:
            raise ValueError(
                f"the chat template wrote {len(placeholders)} placeholders for {len(visuals)} pictures and clips; "
                "it may not show pictures in messages of this role"
            )
        queue = iter(visuals)
        tokens, weight = [], []
        for token, value in zip(written, weights, strict=True):
            expanded = next(queue).placeholder(self) if token in self._placeholders else [token]
            tokens += expanded
            weight += [value] * len(expanded)
        return tokens, weight

    def _sizes(self, visuals: list, text_tokens: int, budget: Budget | None) -> list[tuple[int, int]]:
        """(height, width) of every picture and clip: their own, or the largest under one limit that fit the budget."""
        spec = self.spec
        if budget is None:
            return [self._size(visual, math.inf, math.inf) for visual in visuals]

        def sizes_at(limit: float) -> list[tuple[int, int]]:
            return [self._size(visual, limit, budget.patches * spec.patch**2) for visual in visuals]

        def fits(sizes: list[tuple[int, int]]) -> bool:
            tokens, patches = self._needed(visuals, sizes, text_tokens)
            return tokens <= budget.tokens and place(patches, budget) is not None

        sizes = sizes_at(math.inf)
        if fits(sizes):
            return sizes
        low, high = spec.factor**2, max(map(math.prod, sizes), default=0)
        best = sizes_at(low)
        if not fits(best):
            tokens, patches = self._needed(visuals, best, text_tokens)
            raise TooLarge(
                f"a conversation needs {tokens} tokens, and patch rows for {len(patches)} pictures of {sum(patches)} "
                f"patches (the largest {max(patches, default=0)}) at the smallest sizes, {best}; there is room for "
                f"{budget.tokens} tokens and {budget.rows} rows of {budget.patches} patches"
            )
        while high - low > spec.factor**2:
            middle = (low + high) // 2
            sizes = sizes_at(middle)
            low, high, best = (middle, high, sizes) if fits(sizes) else (low, middle, best)
        return best

    def _size(self, visual: _Still | _Film, limit: float, row: float) -> tuple[int, int]:
        try:
            return visual.size(self.spec, limit, row)
        except ValueError as error:
            raise ValueError(f"{visual.name}: {error}") from error

    def _needed(self, visuals: list, sizes: list[tuple[int, int]], text_tokens: int) -> tuple[int, list[int]]:
        """Tokens of the conversation, and patches of every picture."""
        patches = [
            height * width // self.spec.patch**2
            for (height, width), visual in zip(sizes, visuals, strict=True)
            for _ in range(visual.pictures)
        ]
        return text_tokens + sum(patches) // self.spec.merge**2, patches

    def _pictures(self, visuals: list, sizes: list[tuple[int, int]]) -> Iterator[Picture]:
        spec = self.spec
        for visual, (height, width) in zip(visuals, sizes, strict=True):
            for time, frames in enumerate(visual.frames(spec, (height, width))):
                patches = images.patchify(frames, spec.patch, spec.temporal_patch, spec.merge)
                yield Picture(patches, (height // spec.patch, width // spec.patch), time)

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, spec: ProcessorSpec = SEEING) -> "Processor":
        """Reads a published model's tokenizer, chat template and preprocessor configs; `spec` is what they leave open.

        Raises FileNotFoundError if the tokenizer or the template is missing.
        """
        folder = pathlib.Path(folder)
        both = read_json(folder / "processor_config.json")  # one file since transformers 5, two before
        image = read_json(folder / "preprocessor_config.json") or both.get("image_processor", {})
        clip = read_json(folder / "video_preprocessor_config.json") or both.get("video_processor", {})
        size, clip_size = image.get("size", {}), clip.get("size", {})
        found = {
            "patch": image.get("patch_size"),
            "temporal_patch": image.get("temporal_patch_size"),
            "merge": image.get("merge_size"),
            "min_pixels": image.get("min_pixels", size.get("shortest_edge")),
            "max_pixels": image.get("max_pixels", size.get("longest_edge")),
            "clip_min_pixels": clip_size.get("shortest_edge"),
            "clip_max_pixels": clip_size.get("longest_edge"),
            "fps": clip.get("fps"),
            "min_frames": clip.get("min_frames"),
            "max_frames": clip.get("max_frames"),
            "mean": tuple(image.get("image_mean", ())) or None,
            "std": tuple(image.get("image_std", ())) or None,
        }
        spec = dataclasses.replace(spec, **{name: value for name, value in found.items() if value is not None})
        return cls(Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder), spec)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the files that `from_folder` and transformers read."""
        spec, folder = self.spec, pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        self.template.save(folder)
        if spec.image_token is None:
            return
        common = {
            "patch_size": spec.patch,
            "temporal_patch_size": spec.temporal_patch,
            "merge_size": spec.merge,
            "image_mean": list(spec.mean),
            "image_std": list(spec.std),
            "processor_class": spec.processor_class,
        }
        image = {
            "size": {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
            "image_processor_type": spec.image_processor_type,
        }
        clip = {
            "size": {"shortest_edge": spec.clip_min_pixels, "longest_edge": spec.clip_max_pixels},
            "fps": spec.fps,
            "min_frames": spec.min_frames,
            "max_frames": spec.max_frames,
            "video_processor_type": spec.video_processor_type,
        }
        write_json(folder / "preprocessor_config.json", common | image)
        write_json(folder / "video_preprocessor_config.json", common | clip)


def _items(messages: Messages) -> Iterator[dict[str, Any]]:
    """All content items in order, checked: a type that is known, and the value that the type needs."""
    if not messages:
        raise ValueError("a conversation needs at least one message")
    for message in messages:
        if "role" not in message or "content" not in message:
            raise ValueError(f"a message needs a role and a content, got the keys {sorted(message)}")
        content = message["content"]
        for item in content if isinstance(content, (list, tuple)) else []:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind not in ("text", "image", "video") or item.get(kind) is None:
                raise ValueError(f"a content item needs a type (text, image or video) and its value, got {item!r:.80}")
            yield item
