"""Reads and writes published models: folders in Hugging Face's format <-> config, parameters and processor."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mllm_jax.common.workdir import is_run
from mllm_jax.data.pipeline.dual_batches import with_texts
from mllm_jax.data.pipeline.dual_processor import DualProcessor
from mllm_jax.data.pipeline.hf_inputs import alone, as_arrays, assemble
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.text.json_files import read_object
from mllm_jax.families import FAMILIES, kind_of, spec_for
from mllm_jax.families.shared.rows import BUFFERS, TIES
from mllm_jax.families.shared.suggestions import unsupported
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.model.vlm import ModelConfig, abstract_boxed, abstract_params
from mllm_jax.nn.lora import LoraConfig, split_adapters
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.weights import shardings
from mllm_jax.types import Batch, DualBatch
from mllm_jax.weights.hf import load_tensors, local_folder, save_tensors
from mllm_jax.weights.matching import named, untied
from mllm_jax.weights.replacing import interrupted, new_files, replace_files, unfinished
from mllm_jax.weights.safetensors import BrokenCheckpoint, open_checkpoint, weight_files

log = logging.getLogger(__name__)
CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model with its parameters and processor; `vlm.model.apply({"params": vlm.params}, batch)` runs it."""

    config: ModelConfig | DualConfig
    model: nn.Module
    params: Any  # nested dict of arrays
    processor: Processor | DualProcessor | None = (
        None  # None: the folder lacks one of its files, such as a chat template
    )


def load_pretrained(
    source: str | os.PathLike,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    runtime: Runtime | None = None,
    tower: str | os.PathLike | None = None,
) -> Pretrained:
    """Reads a model in Hugging Face's format. Weights are streamed, so that host memory never holds all of them.

    Args:
      source: folder with config.json and *.safetensors, or name of a model on the Hugging Face hub.
      dtype: dtype of parameters and computation, "float32" or "bfloat16".
      mesh: mesh on which the rules of `runtime` shard the parameters. None: all on one device.
      runtime: execution of the model; `dtype` overrides its dtype.
      tower: source of the vision tower's weights, if `source` lacks them (the authors' files of LLaVA 1.0 and 1.5).
        None: the source that config.json names. `save_pretrained` writes all weights to one folder.
    Raises:
      FileNotFoundError: the folder, the model or its config.json does not exist.
      ValueError: the config is invalid or of an unknown family, or the weights do not match it.
    """
    folder = local_folder(source)
    runtime = dataclasses.replace(runtime or Runtime(), dtype=dtype)
    config = dataclasses.replace(published_config(folder), runtime=runtime)
    layout = shardings(abstract_boxed(config), mesh, runtime.rules) if mesh else None
    params = load_params(folder, config, layout, dtype, tower)
    return Pretrained(config, config.build(), params, _processor(folder, config))


def published_config(source: str | os.PathLike) -> ModelConfig | DualConfig:
    """Returns the config that config.json of a folder or hub model describes. Raises the errors of `load_pretrained`.

    If config.json ties the head to the embedding but the weights contain a different head, the head is untied, as in
    transformers 5, and a warning is logged.
    """
    folder = local_folder(source)
    hf_config = _read_config(folder)
    if hf_config.get("quantization_config"):
        raise ValueError(f"{folder}: quantized weights are not supported. Load a copy in bf16, fp16 or fp32.")
    kind = kind_of(hf_config)
    if kind not in FAMILIES:
        raise ValueError(f"{folder / CONFIG}: {unsupported('model_type', kind, FAMILIES)}")
    family = FAMILIES[kind]
    try:
        config = family.from_hf(hf_config)
    except KeyError as missing:
        raise ValueError(f"{folder / CONFIG}: the key {missing} is missing. Add it.") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    return _untie_head(folder, config)


def _untie_head(folder: Path, config: ModelConfig | DualConfig) -> ModelConfig | DualConfig:
    """Returns the config, with the head untied if the folder's weights contain a head that is not the embedding."""
    decoder, family = getattr(config, "decoder", None), FAMILIES[config.family]
    if decoder is None or not decoder.tie_embeddings:
        return config
    try:
        tensors = named(open_checkpoint(folder), family.rename)
    except BrokenCheckpoint:
        return config  # reported when the weights are loaded
    if not (differing := untied(tensors, family.weights(config), TIES)):
        return config
    if jax.process_index() == 0:
        log.warning("%s ties %s to %s, but their values differ: the head is untied", folder / CONFIG, *differing[0])
    return dataclasses.replace(config, decoder=dataclasses.replace(decoder, tie_embeddings=False))


def load_params(
    source: str | os.PathLike,
    config: ModelConfig | DualConfig,
    layout: Any = None,
    dtype: str = "float32",
    tower: str | os.PathLike | None = None,
    dtypes: Mapping[str, str] = {},  # noqa: B006 (never mutated)
    part: str = "",
) -> dict[str, Any]:
    """Reads the weights of a folder or hub model as parameters of a config.

    Args:
      source, dtype, tower: as in `load_pretrained`.
      config: config of the model, such as the result of `published_config`.
      layout: nested dict of jax.sharding.Sharding. None: all on the default device.
      dtypes: dtypes of single parameters by path, if they differ from `dtype`.
      part: part of the model to read, such as "encoder", returned as {part: ...}. "": all.
    Raises:
      FileNotFoundError, ValueError: as `load_pretrained`.
    """
    folder, family = local_folder(source), FAMILIES[config.family]
    if tower is None and part in ("", "encoder"):
        tower = family.tower_source(_read_config(folder), open_checkpoint(folder))
    try:
        folders = [folder] if tower is None else [folder, local_folder(tower)]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder}: the weights of its vision tower are missing. Name their folder: load_pretrained(..., "
            f"tower=FOLDER). {error}"
        ) from error
    rows = [row._replace(dtype=dtypes.get(row.ours, row.dtype)) for row in family.weights(config)]
    shapes, ignore = abstract_params(config), (*BUFFERS, *family.ignore)
    if part:
        rows, shapes, ignore = [row for row in rows if row.ours.startswith(f"{part}/")], {part: shapes[part]}, (".*",)
    return load_tensors(folders, rows, shapes, layout, dtype, ignore=ignore, rename=family.rename, ties=TIES)


def save_pretrained(vlm: Pretrained, folder: str | os.PathLike) -> None:
    """Writes weights, config and the processor's files for transformers and `load_pretrained`.

    All files are complete on disk before they are renamed. They replace the model in the folder; other files stay.
    After an interrupted save, the folder contains the old model or the new one, or is refused until the next save.
    All processes of a run must call this function.

    Raises:
      FileExistsError: `folder` is a file.
      ValueError: the model has adapters, which Hugging Face's format cannot store.
    """
    if split_adapters(vlm.params)[1]:
        raise ValueError("the model has adapters. Save them with save_adapters, or save the result of merge_adapters.")
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Name a folder to save to.")
    stage, family = unfinished(folder), FAMILIES[vlm.config.family]
    first = jax.process_index() == 0
    with new_files(folder) if first else nullcontext():
        save_tensors(vlm.params, family.weights(vlm.config), stage)
        if first:
            _write_texts(vlm, stage)
            replace_files(folder, CONFIG, weight_files(folder))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_pretrained")


def from_hf_inputs(config: ModelConfig | DualConfig, inputs: Mapping[str, Any]) -> Batch | DualBatch:
    """Returns a batch from the arrays of a Hugging Face processor, with the B and T of `input_ids`.

    A batch row of a vision tower has one image and no tokens. A row of a dual encoder has an image, a text, or both.

    Args:
      config: config of the model, whose family defines the names and meaning of the arrays.
      inputs: arrays that `numpy.asarray` accepts, by the names of the family's processor: `input_ids` i[B T], optional
        `attention_mask` and `labels`, and arrays of images.
    Raises:
      ValueError: an unknown name, `input_ids` outside the vocabulary or beyond the learned positions, or placeholders
        that do not match the images.
    """
    family = FAMILIES[config.family]
    if isinstance(config, DualConfig):
        arrays = as_arrays(inputs, family.input_names)
        text, reads_padding = config.text, config.text_pool.token == "last"
        return with_texts(family.images(config, arrays), arrays, text.vocab, text.positions, reads_padding)
    has_vision = config.encoder is not None
    arrays = as_arrays(inputs, family.input_names if has_vision else ())
    if config.decoder is None:
        return alone(config, family.visuals(config, arrays))
    return assemble(config, arrays, family.visuals(config, arrays) if has_vision else {})


def _read_config(folder: Path) -> dict[str, Any]:
    if is_run(folder):
        raise ValueError(
            f"{folder} is the folder of a training run, not a model in Hugging Face's format. Read it with "
            f"mllm_jax.load_workdir, or export the model with python -m mllm_jax.export --checkpoint {folder} FOLDER"
        )
    if not (folder / CONFIG).is_file():
        if reason := interrupted(folder):
            raise FileNotFoundError(f"{folder} is not complete: {reason}.")
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}: it is not a model in Hugging Face's format. Name a folder of a published model."
        )
    return read_object(folder / CONFIG)


def load_processor(folder: Path, config: ModelConfig | DualConfig) -> Processor | DualProcessor:
    """Reads the processor of a model from its folder. Raises FileNotFoundError if one of its files is missing."""
    if isinstance(config, DualConfig):
        return DualProcessor.from_folder(folder, config)
    return Processor.from_folder(folder, spec_for(config))


def _processor(folder: Path, config: ModelConfig | DualConfig) -> Processor | DualProcessor | None:
    try:
        return load_processor(folder, config)
    except FileNotFoundError:
        return None


def _write_texts(vlm: Pretrained, folder: Path) -> None:
    dtype = jax.tree.leaves(vlm.params)[0].dtype.name
    if vlm.processor is not None:
        vlm.processor.save(folder)
    config = dataclasses.replace(vlm.config, lora=LoraConfig())  # the parameters have no adapters
    hf_config = FAMILIES[config.family].to_hf(config) | {"dtype": dtype}
    (folder / CONFIG).write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
