"""Processes a conversation with images and videos into an `Example`, the input of a model."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mllm_jax.data.media import resolve
from mllm_jax.data.pipeline.packing import Budget, TooLarge, check_instructions, collate, place
from mllm_jax.data.pipeline.preference import together
from mllm_jax.data.pipeline.spans import (
    NativeImage,
    Plan,
    TiledImage,
    TimestampedFrames,
    TimestampedSpan,
    VideoFrames,
    VideoSpan,
)
from mllm_jax.data.pipeline.spec import SEEING, ProcessorSpec, read_spec, write_spec
from mllm_jax.data.records import grounding
from mllm_jax.data.records.content import parts_of
from mllm_jax.data.records.records import DOCUMENT
from mllm_jax.data.text.chat_format import ChatFormat
from mllm_jax.data.text.chat_template import ChatTemplate, Messages
from mllm_jax.data.text.generation_config import NO_DEFAULTS, GenerationDefaults
from mllm_jax.data.text.tokenizer import Tokenizer
from mllm_jax.data.video import videos
from mllm_jax.data.vision import images
from mllm_jax.data.vision.positions import rotary_positions
from mllm_jax.data.vision.token_blend import spread
from mllm_jax.types import Batch, Example, ImagePatches

COMPOSED = 4  # characters that a normalizer may join to one, and more than it does
INSTRUCTIONS = "qformer_tokenizer"  # folder of the tokenizer of instructions, by its name in transformers
USER_CONTENT = "user_content_tokens"  # in tokenizer_config.json, whose other readers pass over it


class Processor:
    """`processor(messages) -> Example`. Needs no jax and no torch, and can be sent to another process."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        spec: ProcessorSpec,
        generation: GenerationDefaults = NO_DEFAULTS,
        instruction_tokenizer: Tokenizer | None = None,
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.spec = spec
        self.generation = generation
        self.instruction_tokenizer = instruction_tokenizer
        tokens = (spec.image_token, spec.vision_start, spec.vision_end)
        ids = (None if token is None else tokenizer.id(token) for token in tokens)
        self.image_id, self.vision_start_id, self.vision_end_id = ids
        # if frames are images, only the template uses the video token, and a tokenizer may lack it
        no_id = spec.video_token is None or spec.frame_token is not None
        self.video_id = None if no_id else tokenizer.id(spec.video_token)
        self._placeholders = [token for token in (self.image_id, self.video_id) if token is not None]
        eos = tokenizer.special_tokens().get("eos_token")
        ends = [tokenizer.id(token) for token in (spec.end_of_turn, eos) if token is not None]
        own = (*tokens, spec.video_token, spec.frame_token)
        self.chat = ChatFormat(tokenizer, template, own, {*ends, *generation.eos_token_id})
        ends = [tokenizer.id(token) for token in (spec.end_of_turn, self.chat.end, eos) if token is not None]
        if not ends:
            raise ValueError("tokenizer_config.json names no eos_token, so that the end of an answer is unknown")
        self.end_of_turn_id = ends[0]

    def __call__(
        self,
        messages: Messages,
        generate: bool = False,
        budget: Budget | None = None,
        kind: str = "",
        others: Sequence[Messages] = (),
        tools: list[dict[str, Any]] | None = None,
    ) -> Example:
        """Processes one conversation into an `Example`.

        Args:
          messages: Hugging Face's layout, [{"role", "content": text, an item or a list of items}]. Items are {"type":
            "text", "text": ...}, {"type": "image", "image": ...} (see `images.open_image`) and {"type": "video",
            "video": ...} (see `videos.open_video`). A video may have "fps": the rate at which a file is sampled, or at
            which the frames of an array or a list were taken (default: all of them); "nframes": the number of frames,
            regardless of the rate; "sampling": "even" or "motion". Messages may have "tool_calls" and
            "reasoning_content", which are targets like the answer, and "weight", a factor of the loss of a turn. A
            single message of the role "document" uses no chat template: every token of its texts is a target.
          generate: return a prompt that ends where the answer begins, without loss.
          budget: shrink all images to one limit of pixels until the conversation fits. They are never cropped.
          kind: kind of the question, for reports.
          others: more conversations about the same images. The Example contains the images once, and only the last
            answer of each conversation is a target.
          tools: descriptions of functions that the model may call, as JSON schemas.
        Raises:
          TooLarge: the conversation does not fit the budget.
          ValueError: a part of the conversation cannot be read; the message names it.
        """
        conversations = [_listed(conversation) for conversation in (messages, *others)]
        messages, *others = [grounding.written(conversation, self.spec.grounding) for conversation in conversations]
        if budget is not None:
            self._check_length([messages, *others], budget)
        items = [item for item in _items(messages) if item["type"] != "text"]
        stills = sum(item["type"] == "image" for item in items)
        opened = [self._open(item, stills) for item in items]
        tokenized = [self._tokens(conversation, opened, generate, tools) for conversation in [messages, *others]]
        visuals = tokenized[0][2]
        text_tokens = sum(token not in self._placeholders for tokens, *_ in tokenized for token in tokens)
        plans = self._plans(visuals, text_tokens, len(tokenized), budget)
        conversations = [self._with_visual_tokens(tokens, weight, plans) for tokens, weight, _ in tokenized]
        example = together(conversations) if others else conversations[0]
        images = tuple(self._images(visuals, plans, self._instructions(messages, opened)))
        if budget is not None:
            check_instructions(images, budget)
        notes = tuple(note for visual in visuals for note in visual.notes)
        return example._replace(images=images, kind=kind, notes=notes)

    def _check_length(self, conversations: Sequence[Messages], budget: Budget) -> None:
        """Raises TooLarge for texts that exceed the budget in any tokenization: tokenizers take a minute for 60 MB."""
        characters = sum(len(text.strip()) for conversation in conversations for text in _texts(conversation))
        least = characters // (COMPOSED * self.tokenizer.longest)
        if least > budget.tokens:
            raise TooLarge(
                f"a conversation of {characters:,} characters needs at least {least:,} tokens; there is room for "
                f"{budget.tokens}"
            )

    def _with_visual_tokens(self, tokens: list[int], weight: list[float], plans: Sequence[Plan]) -> Example:
        """Returns a conversation whose placeholders are repeated for all visual tokens, without its images.

        For example, text tokens a b and an image of three visual tokens: a IMAGE b becomes a IMAGE IMAGE IMAGE b, with
        the vision index -1 0 1 2 -1.
        """
        tokens, weight = np.array(tokens, np.int32), np.array(weight, np.float32)
        visual = np.isin(tokens, self._placeholders)
        runs = [run for plan in plans for run in plan.runs]
        counts = np.ones(len(tokens), np.int64)
        counts[visual] = [len(run.order) for run in runs]
        weight[visual] = 0
        tokens, weight, visual = (np.repeat(values, counts) for values in (tokens, weight, visual))
        index, mix = spread(visual, [(run.order, run.mix) for run in runs], self._firsts(plans))
        return Example(
            tokens=tokens,
            weight=weight,
            position=rotary_positions(visual, [(run.position, run.advance) for run in runs]),
            vision_index=index,
            images=(),
            prefix=int(np.argmax(np.append(weight, 1) > 0)) if self.spec.prefix else 0,
            mix=mix,
        )

    def example(self, record: dict[str, Any], budget: Budget) -> Example:
        """Returns the Example of a record, see data/records/records.py."""
        return self(record["messages"], budget=budget, tools=record.get("tools"))

    def collate(self, rows: Sequence[Sequence[Example]], budget: Budget, references: bool = False) -> Batch:
        """Returns rows of conversations as a batch, see `mllm_jax.data.pipeline.packing.collate`."""
        return collate(rows, budget, **self.spec.layout, references=references)

    def decode(self, tokens, content_tokens: bool = True) -> str:
        """Returns the text of tokens, without the special control tokens (see `ChatFormat`).

        content_tokens: keep special content tokens, such as `<|box_start|>`. False: remove all special tokens, as
          transformers does with skip_special_tokens.
        """
        if not content_tokens:
            return self.tokenizer.decode(tokens)
        return self.tokenizer.decode([token for token in tokens if token not in self._control_ids], special=True)

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.id(token) for token in self.chat.control if self.tokenizer.added[token])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer.

        These are the end of a turn, those of generation_config.json, and the tokenizer's end of text and padding.
        """
        special = self.tokenizer.special_tokens()
        named = {self.spec.end_of_turn, self.chat.end, special.get("eos_token"), special.get("pad_token")} - {None}
        return tuple(sorted({*map(self.tokenizer.id, named), *self.generation.eos_token_id}))

    def _open(self, item: dict, stills: int) -> NativeImage | VideoFrames:
        """Opens an image or a video without reading pixels. `stills`: number of images in the conversation."""
        spec, source, fps = self.spec, resolve(item[item["type"]]), item.get("fps", self.spec.fps)
        if item["type"] == "image":
            size = images.upright_size(images.open_image(source))
            return (
                NativeImage(source, *size) if spec.rule is None else TiledImage(source, *size, spec.rule.among(stills))
            )
        if spec.video_token not in self.tokenizer:
            lacks = f"; its tokenizer has no token {spec.video_token!r}" if spec.video_token else ""
            raise ValueError(f"this model reads no videos{lacks}, but the conversation has one: {source!r:.80}")
        video = videos.open_video(source, fps)
        target = fps if isinstance(source, (str, os.PathLike, bytes)) else spec.fps
        spec = spec.asked(item)
        apart, whole = (TimestampedFrames, TimestampedSpan) if spec.video_rule else (VideoFrames, VideoSpan)
        kind = whole if spec.label is None else apart
        return kind.sampled(video, target, spec)

    def _tokens(
        self, messages: Messages, visuals: list, generate: bool, tools: list[dict[str, Any]] | None
    ) -> tuple[list[int], list[float], list]:
        """Returns tokens and weights with one placeholder per run of visual tokens, and the visuals in their order."""
        if messages[0]["role"] == DOCUMENT:
            return *self._document(messages[0]["content"], visuals, generate), visuals
        ordered = []

        def fill(placeholders: list[str]) -> list[str]:
            """Returns the texts of images and videos, which are needed before tokenization."""
            ordered.extend(self._ordered(placeholders, visuals))
            return [self._markup(visual) for visual in ordered]

        shows = {self.spec.image_token, self.spec.video_token} - {None}
        written, weights = self.tokenize(messages, generate, tools, placeholders=shows, fill=fill)
        return written, weights, ordered

    def tokenize(
        self, messages: Messages, generate: bool = False, tools: list[dict[str, Any]] | None = None, **options
    ) -> tuple[list[int], list[float]]:
        """Returns the tokens and weights of a conversation before its images are read, see `ChatFormat.tokenize`."""
        written, weights = self.chat.tokenize(
            messages, generate, tools or None, user_content_tokens=self.spec.user_content_tokens, **options
        )
        first = self.tokenizer.frame[0] if self.spec.framed else []
        if first != written[: len(first)]:  # else the template wrote them
            written, weights = [*first, *written], [0.0] * len(first) + weights
        return written, weights

    def _ordered(self, placeholders: list[str], visuals: list) -> list[NativeImage | VideoFrames]:
        """Returns the visuals in the order of their placeholders: a template may write all images before the videos."""
        waiting = {self.spec.image_token: [], self.spec.video_token: []}
        for visual in visuals:
            waiting[self.spec.video_token if visual.is_video else self.spec.image_token].append(visual)
        wrong = any(placeholders.count(token) != len(shown) for token, shown in waiting.items())
        if wrong or len(placeholders) != len(visuals):
            raise ValueError(
                f"the chat template wrote {len(placeholders)} placeholders for {len(visuals)} images and videos; "
                "it may not show images in messages of this role"
            )
        return [waiting[token].pop(0) for token in placeholders]

    def _document(
        self, content: str | list[dict[str, Any]], visuals: list, generate: bool
    ) -> tuple[list[int], list[float]]:
        """Returns tokens and weights of a text with images, with the tokens that begin and end a text."""
        tokens, end = list(self.tokenizer.frame[0]), self.tokenizer.special_tokens().get("eos_token")
        weights, queue = [0.0] * len(tokens), iter(visuals)
        brackets = self.spec.vision_start is not None and not self.spec.brackets  # otherwise `_markup` adds them
        start, stop = (self.spec.vision_start, self.spec.vision_end) if brackets else ("", "")
        for item in parts_of(content):
            text = item["type"] == "text"
            markup = "" if text else start + self._markup(next(queue)) + stop
            encoded = self.tokenizer.encode(item["text"]) if text else self.tokenizer.encode_markup(markup)
            tokens += encoded
            weights += [float(text and not generate)] * len(encoded)
        if not generate:
            tokens.append(self.end_of_turn_id if end is None else self.tokenizer.id(end))
            weights.append(1.0)
        return tokens, weights

    def _markup(self, visual: NativeImage | VideoFrames) -> str:
        """Returns the text of an image or a video: a placeholder for every run, and the tokens around it."""
        spec, token = self.spec, self.spec.video_token if visual.is_video else self.spec.image_token
        if not visual.is_video or spec.label is None:
            return f"{spec.vision_start}{token}{spec.vision_end}" if spec.brackets else token
        times = videos.patch_times(visual.indices, visual.video.fps, spec.temporal_patch)
        block = f"{spec.vision_start}{spec.frame_token or token}{spec.vision_end}"
        labels = (spec.label.format(number=number, seconds=time) for number, time in enumerate(times, 1))
        return spec.between.join(label + block for label in labels)

    def _plans(self, visuals: list, text_tokens: int, times: int, budget: Budget | None) -> list[Plan]:
        """Returns the plans of all images and videos, at their own size or under the largest limit that fits.

        The limit is a number of pixels, common to all of them.

        Args:
          text_tokens: number of tokens without visual ones, over all conversations.
          times: number of conversations, each of which contains all visual tokens.
        """
        spec = self.spec
        if budget is None:
            return [self._plan(visual, math.inf, math.inf) for visual in visuals]

        def plans_at(limit: float) -> list[Plan]:
            return [self._plan(visual, limit, budget.patches_per_row * spec.patch**2) for visual in visuals]

        def fits(plans: list[Plan]) -> bool:
            tokens, patches = self._needed(plans, text_tokens, times)
            return tokens <= budget.tokens and place(patches, budget) is not None

        plans = plans_at(math.inf)
        if fits(plans):
            return plans
        low, high = spec.factor**2, max((math.prod(size) for plan in plans for size in plan.sizes), default=0)
        high = max([high, *(sum(map(math.prod, plan.sizes)) for plan in plans)]) if spec.rule else high
        best = plans_at(low)
        if not fits(best):
            tokens, patches = self._needed(best, text_tokens, times)
            sizes = [size for plan in best for size in plan.sizes]
            raise TooLarge(
                f"a conversation needs {tokens} tokens, and patch rows for {len(patches)} images of {sum(patches)} "
                f"patches (the largest {max(patches, default=0)}) at the smallest sizes, {sizes}; there is room for "
                f"{budget.tokens} tokens and {budget.patch_rows} rows of {budget.patches_per_row} patches"
                + (f" and {budget.images_per_row} images" if budget.images_per_row else "")
            )
        while high - low > spec.factor**2:
            middle = (low + high) // 2
            plans = plans_at(middle)
            low, high, best = (middle, high, plans) if fits(plans) else (low, middle, best)
        return best

    def _plan(self, visual: NativeImage | VideoFrames, limit: float, row: float) -> Plan:
        try:
            return visual.plan(self.spec, limit, row)
        except ValueError as error:
            raise ValueError(f"{visual.name}: {error}") from error

    def _needed(self, plans: Sequence[Plan], text_tokens: int, times: int) -> tuple[int, list[int]]:
        """Returns the number of tokens of the conversations, and of patches of every image."""
        spec = self.spec
        sizes = [size for plan in plans for size in plan.sizes]
        patches = [spec.num_prefix_tokens + spec.squares(size) * spec.merge**2 for size in sizes]
        return text_tokens + times * sum(len(run.order) for plan in plans for run in plan.runs), patches

    def _firsts(self, plans: Sequence[Plan]) -> list[int]:
        """Returns, for every run, the index of the first visual token of its image or video among all visual tokens."""
        counts = [sum(map(self.spec.tokens, plan.sizes)) for plan in plans]
        firsts = np.cumsum([0, *counts])
        return [int(first) for plan, first in zip(plans, firsts) for _ in plan.runs]

    def _instructions(self, messages: Messages, opened: Sequence) -> dict[int, np.ndarray]:
        """Returns the tokens of the text beside each image or video in its message, by the `id` of what was opened.

        ValueError where there are more than the connector has positions.
        """
        if not self.spec.instruction_positions:
            return {}
        instructions, visuals = {}, iter(opened)
        for message in messages:
            items = parts_of(message["content"])
            text = "".join(item["text"] for item in items if item["type"] == "text")
            for _ in [item for item in items if item["type"] != "text"]:
                tokens = np.array(self.instruction_tokenizer.encode_framed(text), np.int32)
                if len(tokens) > self.spec.instruction_positions:
                    raise ValueError(
                        f"the text beside an image has {len(tokens)} tokens for the connector, which has "
                        f"{self.spec.instruction_positions} positions; shorten it: {text!r:.60}"
                    )
                instructions[id(next(visuals))] = tokens
        return instructions

    def _images(
        self, visuals: list, plans: Sequence[Plan], instructions: dict[int, np.ndarray]
    ) -> Iterator[ImagePatches]:
        spec = self.spec
        for visual, plan in zip(visuals, plans, strict=True):
            instruction = instructions.get(id(visual))
            for index, (frames, (height, width)) in enumerate(zip(visual.frames(spec, plan), plan.sizes, strict=True)):
                patches = images.patchify(frames, spec.patch, spec.temporal_patch, spec.merge)
                patches = np.concatenate([np.zeros((spec.num_prefix_tokens, patches.shape[1]), patches.dtype), patches])
                grid = (height // spec.patch, width // spec.patch)
                time = index if visual.is_video else 0
                yield ImagePatches(patches, grid, time, spec.shown > 0, instruction)

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, spec: ProcessorSpec = SEEING) -> "Processor":
        """Reads a published model's tokenizer, chat template and preprocessor configs.

        `spec` has the settings that these files do not contain. Raises FileNotFoundError if the tokenizer or the
        template is missing.
        """
        folder = pathlib.Path(folder)
        template = ChatTemplate.from_folder(folder, spec.template)
        outside = {} if spec.image_id is None else {spec.image_token: spec.image_id}
        generation = GenerationDefaults.from_folder(folder)
        tokenizer, spec = Tokenizer.from_folder(folder, outside), read_spec(folder, spec)
        user_content_tokens = tokenizer.config.get(USER_CONTENT, spec.user_content_tokens)
        spec = dataclasses.replace(spec, user_content_tokens=user_content_tokens)
        instructions = Tokenizer.from_folder(folder / INSTRUCTIONS) if spec.instruction_positions else None
        return cls(tokenizer, template, spec, generation, instructions)

    def with_spec(self, **changes: Any) -> "Processor":
        """Returns the processor with other values of its spec."""
        spec = dataclasses.replace(self.spec, **changes)
        return Processor(self.tokenizer, self.template, spec, self.generation, self.instruction_tokenizer)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the files that `from_folder` and transformers read."""
        spec, folder = self.spec, pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder, {USER_CONTENT: spec.user_content_tokens})
        self.template.save(folder)
        pad = self.tokenizer.special_tokens().get("pad_token")
        self.generation.save(folder, self.stop_ids, self.stop_ids[0] if pad is None else self.tokenizer.id(pad))
        if self.instruction_tokenizer is not None:
            self.instruction_tokenizer.save(folder / INSTRUCTIONS)
        if spec.image_token is not None:
            write_spec(spec, folder)


def _listed(messages: Messages) -> Messages:
    """Returns messages whose contents are texts or lists: a single item becomes a list of one."""
    single = lambda message: isinstance(message, dict) and isinstance(message.get("content"), dict)
    return [message | {"content": [message["content"]]} if single(message) else message for message in messages]


def _texts(messages: Messages) -> Iterator[str]:
    """Yields the texts of all contents."""
    for message in messages:
        if isinstance(content := message.get("content"), str):
            yield content
    yield from (item["text"] for item in _items(messages) if item["type"] == "text")


def _items(messages: Messages) -> Iterator[dict[str, Any]]:
    """All content items in order, checked: a type that is known, and the value that the type needs."""
    if not messages:
        raise ValueError("a conversation needs at least one message")
    for message in messages:
        if "role" not in message or not message.keys() & {"content", "tool_calls"}:
            raise ValueError(f"a message needs a role and a content, got the keys {sorted(message)}")
        content = message.get("content")
        for item in content if isinstance(content, (list, tuple)) else []:
            kind = item.get("type") if isinstance(item, dict) else None
            text = kind != "text" or isinstance(item.get("text"), str)
            if kind not in ("text", "image", "video") or item.get(kind) is None or not text:
                raise ValueError(f"a content item needs a type (text, image or video) and its value, got {item!r:.80}")
            yield item
