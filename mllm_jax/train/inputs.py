"""Where a run's conversations, or pairs of a picture and a text, come from, and how they reach the devices."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from mllm_jax.config import ConfigError
from mllm_jax.data.captions import Captions
from mllm_jax.data.dual_processor import DualProcessor
from mllm_jax.data.loader import Info, make_loader
from mllm_jax.data.pack import Budget
from mllm_jax.data.processor import Processor
from mllm_jax.data.readers import Reading
from mllm_jax.data.scenes import DEFAULT_KINDS, SCENES_TEMPLATE, Scenes, scenes_pair_tokenizer, scenes_tokenizer
from mllm_jax.data.spec import SEEING
from mllm_jax.data.template import ChatTemplate, Tokenizer
from mllm_jax.data.video import SAMPLINGS
from mllm_jax.dual import DualConfig
from mllm_jax.families import FAMILIES, spec_for
from mllm_jax.model import ModelConfig
from mllm_jax.sharding import Rules, partition_spec
from mllm_jax.train.dual_step import pair_shardings
from mllm_jax.train.step import batch_shardings
from mllm_jax.types import Batch, DualBatch
from mllm_jax.weights.hf import local_folder

SCENES = "scenes"  # the processor of the embedded set
STREAMS = 64  # at most, unless a config says more: each has its own conversations waiting to be packed


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The shape of a batch, and how conversations come into it.

    batch: rows of a batch, over all processes and accumulated parts.
    tokens, rows, patches: a row holds `tokens` tokens and `rows` x `patches` patches; no picture exceeds `patches`. Of
      pairs of a picture and a text, each text takes as many tokens as the model reads.
    min_pixels, max_pixels: of a picture, before the budget shrinks it; None leaves it to the processor.
    fps, max_frames, sampling: of a clip: frames a second, how many at most, and whether they are spread evenly ("even")
      or denser where they differ ("motion"); None leaves it to the processor. A clip in a message may ask for its own.
    epochs: None repeats forever (optim.steps ends the run).
    blind: leave all pictures and clips out, for a text-only baseline.
    streams: of conversations, each of which fills rows of its own, so that the order of the data is the same on any
      number of processes that divides it; None = the largest divisor of `batch` up to 64.
    window, workers, processes, prefetch, strict, max_bad: see `mllm_jax.data.loader.make_loader`.
    """

    batch: int = 8
    tokens: int = 4096
    rows: int = 4
    patches: int = 4096
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    sampling: str | None = None
    seed: int = 0
    epochs: int | None = None
    blind: bool = False
    streams: int | None = None
    window: float = 4.0
    workers: int = 2
    processes: int = 0
    prefetch: int = 2
    strict: bool = False
    max_bad: float = 0.05

    def __post_init__(self):
        for name, least in {"batch": 1, "tokens": 1, "rows": 0, "patches": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more")
        if self.sampling not in (None, *SAMPLINGS):
            raise ValueError(f"sampling={self.sampling!r} must be one of {', '.join(SAMPLINGS)}")
        if self.streams is not None and (self.streams < 1 or self.batch % self.streams):
            raise ValueError(f"streams={self.streams} must divide batch={self.batch}")

    @property
    def budget(self) -> Budget:
        return Budget(self.tokens, 0 if self.blind else self.rows, self.patches)


@dataclass(frozen=True, kw_only=True)
class ScenesData(DataConfig):
    """Pictures and clips that are drawn on the fly (see `mllm_jax.data.scenes`)."""

    kinds: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_KINDS))
    cell: int = 16
    min_cells: int = 3
    max_cells: int = 5

    def source(self, split: str = "train") -> Any:
        """The conversations of "train" or "heldout"."""
        sizes = {"cell": self.cell, "min_cells": self.min_cells, "max_cells": self.max_cells}
        return Scenes(split, self.seed, self.kinds, pictures=not self.blind, **sizes)


@dataclass(frozen=True, kw_only=True)
class CaptionsData(DataConfig):
    """Captions of such pictures, truthful and false (see `mllm_jax.data.captions`).

    false: share of the captions to train on that name an absent thing; held-out ones are true.
    """

    false: float = 0.0
    cell: int = 16
    min_cells: int = 3
    max_cells: int = 5

    def source(self, split: str = "train") -> Any:
        """The captions of "train" or "heldout"."""
        sizes = {"cell": self.cell, "min_cells": self.min_cells, "max_cells": self.max_cells}
        false = self.false if split == "train" else 0.0
        return Captions(split, self.seed, false, pictures=not self.blind, **sizes)


class WithoutPictures:
    """A source of the same questions and answers, without what they are about."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return without_pictures(self.source[index])


def without_pictures(record: dict[str, Any]) -> dict[str, Any]:
    """The record with only the texts of its messages."""

    def texts(content: Any) -> Any:
        return content if isinstance(content, str) else [part for part in content if part["type"] == "text"]

    return record | {"messages": [message | {"content": texts(message["content"])} for message in record["messages"]]}


def make_processor(source: str, model: ModelConfig | DualConfig, data: DataConfig) -> Processor | DualProcessor:
    """The processor in a folder, of the hub, or of `scenes`, of the model's kind; ConfigError unless it fits it."""
    return PROCESSORS[type(model)](source, model, data)


def _pair_processor(source: str, model: DualConfig, data: DataConfig) -> DualProcessor:
    encoder = model.encoder
    if source == SCENES:
        processor = DualProcessor(
            Tokenizer(scenes_pair_tokenizer(), {"eos_token": SEEING.end_of_turn, "pad_token": "<|endoftext|>"}),
            FAMILIES[model.family].rule(model),
            encoder.pixel_mean,
            encoder.pixel_std,
            encoder.patch_size,
            encoder.lead,
            model.text.positions,
            model.text_pool.token == "last",
        )
    elif not source:
        raise ConfigError("config.processor must name a folder with a tokenizer and a preprocessor_config.json")
    else:
        try:
            processor = DualProcessor.from_folder(local_folder(source), model)
        except FileNotFoundError as error:
            raise ConfigError(f"config.processor: {error}") from error
    if (processor.mean, processor.std) != (encoder.pixel_mean, encoder.pixel_std):
        raise ConfigError(
            f"config.processor has pixels of mean {processor.mean} and deviation {processor.std}, "
            f"config.model.encoder of {encoder.pixel_mean} and {encoder.pixel_std}"
        )
    if data.tokens % processor.length:
        raise ConfigError(
            f"config.data.tokens={data.tokens} must be a multiple of the {processor.length} tokens of a text: so many "
            "pairs of them lie in a row"
        )
    if not data.rows or data.patches <= encoder.lead:
        raise ConfigError(f"config.data: rows={data.rows} of patches={data.patches} have no room for a picture")
    _check_words(len(processor.tokenizer), model.text.vocab, "config.model.text")
    return processor


def _chat_processor(source: str, model: ModelConfig, data: DataConfig) -> Processor:
    limits = {name: getattr(data, name) for name in ("min_pixels", "max_pixels", "fps", "max_frames", "sampling")}
    limits = {name: value for name, value in limits.items() if value is not None}
    spec = spec_for(model)
    if source == SCENES:
        spec = dataclasses.replace(spec, **limits)
        tokenizer = Tokenizer(scenes_tokenizer(), {"eos_token": SEEING.end_of_turn})
        return _checked(Processor(tokenizer, ChatTemplate(SCENES_TEMPLATE), spec), model)
    if not source:
        raise ConfigError("config.processor must name a folder with a tokenizer and a chat template")
    try:
        published = Processor.from_folder(local_folder(source), spec)
    except FileNotFoundError as error:
        raise ConfigError(f"config.processor: {error}") from error
    spec = dataclasses.replace(published.spec, **limits)
    return _checked(Processor(published.tokenizer, published.template, spec), model)


def _id(token: int | None) -> int:
    return -1 if token is None else token


def _checked(processor: Processor, model: ModelConfig) -> Processor:
    words, pairs = len(processor.tokenizer), {}
    if model.encoder is not None:
        wanted, spec = spec_for(model), processor.spec
        pairs = {
            "patch_size": (spec.patch, wanted.patch),
            "temporal_patch_size": (spec.temporal_patch, wanted.temporal_patch),
            "merge": (spec.merge, wanted.merge),
            "the id of image tokens": (_id(processor.image_id), model.tokens.image),
            "the id of video tokens": (_id(processor.video_id), model.tokens.video),
        }
    if wrong := [f"{name} is {ours}, the model's {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]:
        raise ConfigError(f"config.processor does not fit config.model: {'; '.join(wrong)}")
    _check_words(words, model.decoder.vocab, "config.model.decoder")
    return processor


def _check_words(words: int, vocab: int, where: str) -> None:
    if words > vocab:
        raise ConfigError(f"{where}.vocab={vocab} is less than the processor's {words} tokens")


PROCESSORS = {ModelConfig: _chat_processor, DualConfig: _pair_processor}
LAYOUTS = {Batch: batch_shardings, DualBatch: pair_shardings}


def open_data(
    data: DataConfig,
    processor: Processor | DualProcessor,
    mesh: Mesh,
    rules: Rules,
    reading: Reading | None = None,
) -> Any:
    """The loader of this process's share of every batch: an iterator of (Batch, Info) with get_state and set_state.

    reading: see `make_loader`.
    """
    sharding = NamedSharding(mesh, partition_spec(("batch",), rules, mesh, (data.batch,), "config.data.batch"))
    index, count = row_share(sharding, data.batch)
    streams = streams_of(data)
    if streams % count:
        raise ConfigError(
            f"config.data: {streams} streams do not divide among {count} processes; set config.data.streams, a divisor "
            f"of batch={data.batch} and a multiple of {count}"
        )
    loader = loader_of(data, processor, reading, index, count)
    return loader if count == 1 or data.epochs is None else EndTogether(loader)


def streams_of(data: DataConfig) -> int:
    """The streams that fill the rows of a batch."""
    return data.streams or max(divisor for divisor in range(1, STREAMS + 1) if data.batch % divisor == 0)


def loader_of(
    data: DataConfig,
    processor: Processor | DualProcessor,
    reading: Reading | None = None,
    index: int = 0,
    count: int = 1,
) -> Any:
    """The loader of the share `index` of `count` of every batch; `reading` as in `make_loader`."""
    return make_loader(
        data.source(),
        processor,
        data.budget,
        data.batch,
        seed=data.seed,
        epochs=data.epochs,
        window=data.window,
        streams=streams_of(data),
        workers=data.workers,
        processes=data.processes,
        prefetch=data.prefetch,
        process_index=index,
        process_count=count,
        strict=data.strict,
        max_bad=data.max_bad,
        reading=reading,
    )


class EndTogether:
    """The loader of one of several processes: it ends with the batch at which the data of all of them have ended."""

    def __init__(self, loader: Any):
        self.loader = loader
        self.get_state, self.set_state, self.close = loader.get_state, loader.set_state, loader.close

    def __iter__(self) -> "EndTogether":
        return self

    def __next__(self) -> tuple[Batch, Info]:
        batch, info = next(self.loader)
        if not multihost_utils.process_allgather(np.array(info.conversations)).any():
            raise StopIteration
        return batch, info


def row_share(sharding: jax.sharding.Sharding, rows: int) -> tuple[int, int]:
    """(index, count): which share of the rows of a global batch this process feeds.

    Processes whose devices hold the same rows (a model spread over hosts) feed the same share.
    """
    first: dict[int, int] = {}
    for device, (rows_here, *_) in sharding.devices_indices_map((rows,)).items():
        start = rows_here.start or 0
        first[device.process_index] = min(start, first.get(device.process_index, start))
    shares = sorted(set(first.values()))
    return shares.index(first[jax.process_index()]), len(shares)


class Placer:
    """Puts this process's rows of every batch on the devices of the mesh, as parts of one global batch."""

    def __init__(self, rows: int, mesh: Mesh, rules: Rules):
        self.rows, self.mesh, self.rules = rows, mesh, rules
        self._layout = None  # that of the first batch: all have one shape

    def __call__(self, batch: Batch | DualBatch) -> Batch | DualBatch:
        shares = self.rows // batch.rows
        whole = lambda x: (shares * x.shape[0], *x.shape[1:])
        if self._layout is None:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(whole(x), x.dtype), batch)
            self._layout = LAYOUTS[type(batch)](shapes, self.mesh, self.rules)
        place = lambda x, sharding: jax.make_array_from_process_local_data(sharding, x, whole(x))
        return jax.tree.map(place, batch, self._layout)
