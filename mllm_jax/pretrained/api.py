"""Published models in and out: a folder in Hugging Face's format <-> config, parameters and processor."""

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
    """A model with all that its use needs: `vlm.model.apply({"params": vlm.params}, batch)`."""

    config: ModelConfig | DualConfig
    model: nn.Module
    params: Any  # nested dict of arrays
    processor: Processor | DualProcessor | None = None  # None: the folder lacks a part of it, such as a chat template


def load_pretrained(
    source: str | os.PathLike,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    runtime: Runtime | None = None,
    tower: str | os.PathLike | None = None,
) -> Pretrained:
    """Reads a model in Hugging Face's format; weights are streamed, so that host memory never holds all of them.

    Args:
      source: a folder with config.json and *.safetensors, or the name of a model on the Hugging Face hub.
      dtype: dtype of parameters and computation, "float32" or "bfloat16".
      mesh: mesh on which the rules of `runtime` shard the parameters. None: all on one device.
      runtime: execution of the model; `dtype` overrides its dtype.
      tower: source of the vision tower's weights, if `source` lacks them, as the authors' files of LLaVA 1.0 and 1.5
        do.
        Default: the one that config.json names. `save_pretrained` writes all in one folder.
    Raises:
      FileNotFoundError: no such folder or model, or no config.json in it.
      ValueError: the config is of another family or cannot be read, or the weights do not fit it.
    """
    folder = local_folder(source)
    runtime = dataclasses.replace(runtime or Runtime(), dtype=dtype)
    config = dataclasses.replace(published_config(folder), runtime=runtime)
    layout = shardings(abstract_boxed(config), mesh, runtime.rules) if mesh else None
    params = load_params(folder, config, layout, dtype, tower)
    return Pretrained(config, config.build(), params, _processor(folder, config))


def published_config(source: str | os.PathLike) -> ModelConfig | DualConfig:
    """The model that the config.json of a folder, or of the hub's model, describes; errors as of `load_pretrained`.

    A head that config.json ties to the embedding is not tied if the weights hold one with other values, as in
    transformers 5; this is logged.
    """
    folder = local_folder(source)
    stated = _read_config(folder)
    if stated.get("quantization_config"):
        raise ValueError(f"{folder} holds quantized weights, which cannot be read; load a copy in bf16, fp16 or fp32")
    kind = kind_of(stated)
    if kind not in FAMILIES:
        raise ValueError(f"{folder / CONFIG}: {unsupported('model_type', kind, FAMILIES)}")
    family = FAMILIES[kind]
    try:
        config = family.from_hf(stated)
    except KeyError as missing:
        raise ValueError(f"{folder / CONFIG} lacks the key {missing}") from None
    except ValueError as fault:
        raise ValueError(f"{folder / CONFIG}: {fault}") from None
    return _with_own_head(folder, config)


def _with_own_head(folder: Path, config: ModelConfig | DualConfig) -> ModelConfig | DualConfig:
    """The config of a folder, untied where the folder's weights hold a head that differs from the embedding."""
    decoder, family = getattr(config, "decoder", None), FAMILIES[config.family]
    if decoder is None or not decoder.tie_embeddings:
        return config
    try:
        found = named(open_checkpoint(folder), family.rename)
    except BrokenCheckpoint:
        return config  # loading the weights reports it
    if not (differing := untied(found, family.weights(config), TIES)):
        return config
    if jax.process_index() == 0:
        log.warning("%s ties %s to %s, which differs: the head is kept as its own", folder / CONFIG, *differing[0])
    return dataclasses.replace(config, decoder=dataclasses.replace(decoder, tie_embeddings=False))


def load_params(
    source: str | os.PathLike,
    config: ModelConfig | DualConfig,
    layout: Any = None,
    dtype: str = "float32",
    tower: str | os.PathLike | None = None,
    dtypes: Mapping[str, str] = {},  # noqa: B006 (nobody changes it)
    part: str = "",
) -> dict[str, Any]:
    """The weights of `source` as parameters of a config; arguments and errors are those of `load_pretrained`.

    layout: nested dict of jax.sharding.Sharding; None = all on the default device.
    dtypes: of single parameters, by path, that shall have another than `dtype`.
    part: the one part of the model that is read, such as "encoder", and returned as {part: ...}; "" = all.
    """
    folder, family = local_folder(source), FAMILIES[config.family]
    if tower is None and part in ("", "encoder"):
        tower = family.tower_source(_read_config(folder), open_checkpoint(folder))
    try:
        folders = [folder] if tower is None else [folder, local_folder(tower)]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} lacks the weights of its vision tower. Name their folder: load_pretrained(..., tower=FOLDER). "
            f"{error}"
        ) from error
    rows = [row._replace(dtype=dtypes.get(row.ours, row.dtype)) for row in family.weights(config)]
    shapes, ignore = abstract_params(config), (*BUFFERS, *family.ignore)
    if part:
        rows, shapes, ignore = [row for row in rows if row.ours.startswith(f"{part}/")], {part: shapes[part]}, (".*",)
    return load_tensors(folders, rows, shapes, layout, dtype, ignore=ignore, rename=family.rename, ties=TIES)


def save_pretrained(vlm: Pretrained, folder: str | os.PathLike) -> None:
    """Writes weights, config and the processor's files, generation config too, for transformers and `load_pretrained`.

    Everything is complete on disk before anything gets its final name. A model that the folder held before is replaced,
    its other files stay. Where a save is ended, the folder holds the old model, the new one, or is refused until the
    next save, which finishes it.
    In a run of several processes all must call. ValueError where it has adapters, which are no part of such a folder.
    """
    if split_adapters(vlm.params)[1]:
        raise ValueError("the model has adapters: save them with save_adapters, or save what merge_adapters returns")
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder to save to")
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
    """Hugging Face's arrays -> Batch with B, T of `input_ids`, so that logits are in its order.

    For a vision tower a batch row has one image and no tokens; for a dual encoder one image per row, one text per row,
    or either alone.

    Args:
      config: its family defines the arrays and their meaning.
      inputs: numpy arrays (or anything that `numpy.asarray` takes) under the names of this family's Hugging Face
        processor:
        `input_ids` i[B T], optional `attention_mask` and `labels`, and those of images.
    Raises:
      ValueError: an unknown name, `input_ids` outside the vocabulary or beyond the learned positions, or placeholders
        that do not match the images.
    """
    family = FAMILIES[config.family]
    if isinstance(config, DualConfig):
        arrays = as_arrays(inputs, family.input_names)
        text, reads_padding = config.text, config.text_pool.token == "last"
        return with_texts(family.images(config, arrays), arrays, text.vocab, text.positions, reads_padding)
    sees = config.encoder is not None
    arrays = as_arrays(inputs, family.input_names if sees else ())
    if config.decoder is None:
        return alone(config, family.visuals(config, arrays))
    return assemble(config, arrays, family.visuals(config, arrays) if sees else {})


def _read_config(folder: Path) -> dict[str, Any]:
    if is_run(folder):
        raise ValueError(
            f"{folder} is the folder of a training run, not a model in Hugging Face's format. Read it with "
            f"mllm_jax.load_workdir, or write the model with python -m mllm_jax.export --checkpoint {folder} FOLDER"
        )
    if not (folder / CONFIG).is_file():
        if why := interrupted(folder):
            raise FileNotFoundError(f"{folder} is not complete: {why}.")
        raise FileNotFoundError(f"{folder} has no {CONFIG}: it is not a model in Hugging Face's format")
    return read_object(folder / CONFIG)


def load_processor(folder: Path, config: ModelConfig | DualConfig) -> Processor | DualProcessor:
    """The processor in a folder, of the kind that the model is. FileNotFoundError where a part of it is missing."""
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
    plain = dataclasses.replace(vlm.config, lora=LoraConfig())  # of a base model, its adapters were taken away
    content = FAMILIES[plain.family].to_hf(plain) | {"dtype": dtype}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
