"""Creates the processors of runs and checks that they fit the models."""

import dataclasses
from typing import Any

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.dual_processor import DualProcessor
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import SEEING
from mllm_jax.data.synthetic.scenes import SCENES, SCENES_TEMPLATE, scenes_pair_tokenizer, scenes_tokenizer
from mllm_jax.data.text.chat_template import ChatTemplate
from mllm_jax.data.text.tokenizer import Tokenizer
from mllm_jax.families import FAMILIES, spec_for
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.train.runs.data import DataConfig
from mllm_jax.weights.hf import local_folder

# fields of the data config that set processor options
SETTINGS = ("min_pixels", "max_pixels", "missing_rows", "fps", "max_frames", "sampling", "user_content_tokens")


def pair_processor(source: str, model: DualConfig, data: DataConfig) -> DualProcessor:
    """Returns a dual encoder's processor, from a folder, the hub or `scenes`. Raises ConfigError if it does not fit."""
    encoder = model.encoder
    if source == SCENES:
        processor = DualProcessor(
            Tokenizer(scenes_pair_tokenizer(), {"eos_token": SEEING.end_of_turn, "pad_token": "<|endoftext|>"}),
            FAMILIES[model.family].rule(model),
            encoder.pixel_mean,
            encoder.pixel_std,
            encoder.patch_size,
            encoder.num_prefix_tokens,
            model.text.positions,
            model.text_pool.token == "last",
        )
    elif not source:
        raise ConfigError(
            "config.processor is empty. Set it to a folder with a tokenizer and a preprocessor_config.json."
        )
    else:
        try:
            processor = DualProcessor.from_folder(local_folder(source), model)
        except FileNotFoundError as error:
            raise ConfigError(f"config.processor: {error}") from error
    if (processor.mean, processor.std) != (encoder.pixel_mean, encoder.pixel_std):
        raise ConfigError(
            f"config.processor: pixel mean {processor.mean} and deviation {processor.std} differ from those of "
            f"config.model.encoder. Set its pixel_mean={processor.mean} and pixel_std={processor.std}."
        )
    if data.tokens % processor.length:
        raise ConfigError(
            f"config.data.tokens={data.tokens}: must be a multiple of the {processor.length} tokens of a text, so "
            "that a row holds complete texts."
        )
    if not data.patch_rows or data.patches_per_row <= encoder.num_prefix_tokens:
        raise ConfigError(
            f"config.data: patch_rows={data.patch_rows} of patches_per_row={data.patches_per_row} have no room for an "
            "image. Increase them."
        )
    _check_vocab(len(processor.tokenizer), model.text.vocab, "config.model.text")
    return dataclasses.replace(processor, missing_rows=data.missing_rows)


def chat_processor(source: str, model: ModelConfig, data: DataConfig) -> Processor:
    """Returns a chat model's processor, from a folder, the hub or `scenes`. Raises ConfigError if it does not fit."""
    limits = {name: getattr(data, name) for name in SETTINGS}
    limits = {name: value for name, value in limits.items() if value is not None}
    spec = spec_for(model)
    if source == SCENES:
        tokenizer = Tokenizer(scenes_tokenizer(), {"eos_token": SEEING.end_of_turn})
        return _checked(_with_limits(Processor(tokenizer, ChatTemplate(SCENES_TEMPLATE), spec), limits), model)
    if not source:
        raise ConfigError("config.processor is empty. Set it to a folder with a tokenizer and a chat template.")
    try:
        published = Processor.from_folder(local_folder(source), spec)
    except FileNotFoundError as error:
        raise ConfigError(f"config.processor: {error}") from error
    return _checked(_with_limits(published, limits), model)


def _with_limits(processor: Processor, limits: dict[str, Any]) -> Processor:
    """Returns the processor with the spec fields that `config.data` sets."""
    try:
        return processor.with_spec(**limits)
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error


def _id(token: int | None) -> int:
    return -1 if token is None else token


def _checked(processor: Processor, model: ModelConfig) -> Processor:
    num_tokens, pairs = len(processor.tokenizer), {}
    if model.encoder is not None:
        model_spec, spec = spec_for(model), processor.spec
        pairs = {
            "patch_size": (spec.patch, model_spec.patch),
            "temporal_patch_size": (spec.temporal_patch, model_spec.temporal_patch),
            "merge": (spec.merge, model_spec.merge),
            "queries": (spec.queries, model_spec.queries),
            "the number of values in a patch": (spec.layout["values"], model.patch_values),
            "the id of image tokens": (_id(processor.image_id), model.tokens.image),
            "the id of video tokens": (_id(processor.video_id), model.tokens.video),
        }
    if mismatches := [
        f"{name} is {value}, the model's {expected}" for name, (value, expected) in pairs.items() if value != expected
    ]:
        raise ConfigError(
            f"config.processor: does not fit config.model: {'; '.join(mismatches)}. Set the model's processor."
        )
    _check_vocab(num_tokens, model.decoder.vocab, "config.model.decoder")
    return processor


def _check_vocab(num_tokens: int, vocab: int, path: str) -> None:
    if num_tokens > vocab:
        raise ConfigError(
            f"{path}.vocab={vocab}: must be at least {num_tokens}, the number of tokens of the processor."
        )
