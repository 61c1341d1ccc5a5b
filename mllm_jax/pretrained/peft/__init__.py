"""Reads and writes adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT stores A [rank in] and B [out rank] of every linear layer of transformers' model under the layer's module name
(sites.py). If one of our weights comprises several of these layers (queries, keys and values of a tower), adapters from
PEFT have an A per layer, and adapters that we create share one. The same file contains the modules that are trained in
full (`modules_to_save`).
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from mllm_jax.common.trees import flatten, join, unflatten
from mllm_jax.families import FAMILIES
from mllm_jax.model.vlm import ModelConfig, abstract_boxed
from mllm_jax.nn.lora import DOWN, SCALE, UP, LoraConfig, add_products, axes_of, split_adapters
from mllm_jax.pretrained.api import Pretrained
from mllm_jax.pretrained.peft.files import (
    CONFIG,
    FACTOR,
    HEAD_WEIGHT,
    PREFIX,
    WEIGHTS,
    make_config,
    module_names,
    read_config,
    scales_of,
)
from mllm_jax.pretrained.peft.sites import Layer, sites_of
from mllm_jax.sharding.weights import Partitioned, shardings
from mllm_jax.weights import table
from mllm_jax.weights.matching import WeightsMismatch
from mllm_jax.weights.replacing import interrupted, new_files, replace_files
from mllm_jax.weights.safetensors import Tensor, read_header, write_file
from mllm_jax.weights.streaming import gather


def load_adapters(vlm: Pretrained, folder: str | os.PathLike) -> Pretrained:
    """Returns the model with the adapters of a folder, written by PEFT or `save_adapters`, in place of its own.

    Adapters stay separate from the weights until `merge_adapters` adds them. If layers of one weight differ in rank,
    the smaller ranks are padded with zeros. Modules that were saved in full replace those of the model, and
    `config.lora.modules_to_save` names them.

    Raises:
      FileNotFoundError: the folder has no adapter.
      ValueError: the adapter is not plain LoRA, or does not fit the model; the message lists all faults.
    """
    folder, (base, _), boxes = Path(folder), split_adapters(vlm.params), flatten(_base_boxes(vlm.config))
    if not (folder / CONFIG).is_file() and (reason := interrupted(folder)):
        raise FileNotFoundError(f"{folder} is not complete: {reason}.")
    peft_config, sites, family = read_config(folder), sites_of(vlm.config, boxes), FAMILIES[vlm.config.family]
    names = module_names(sites.values(), peft_config.get("target_parameters") or ())
    pairs, full_tensors, faults = {}, {}, []
    for name, tensor in read_header(folder / WEIGHTS).items():
        if not (match := FACTOR.fullmatch(name)):
            full_tensors[name] = tensor
        elif (module := family.module_name(match[1])) in names:
            pairs.setdefault(names[module], {})[match[2]] = tensor.map().astype(np.float32)
        else:
            faults.append(f"unexpected: {name} {list(tensor.shape)}")
    faults += [f"{key}: one of A and B is missing" for key, pair in pairs.items() if len(pair) < 2]
    faults += [
        f"{key}: {side} has fewer than two axes" for key, pair in pairs.items() for side in pair if pair[side].ndim < 2
    ]
    pairs = {key: pair for key, pair in pairs.items() if len(pair) == 2 and min(x.ndim for x in pair.values()) > 1}
    scales = scales_of(peft_config, {key: sites[key].rank(pair["A"]) for key, pair in pairs.items()})
    parts: dict[str, dict[Layer, tuple]] = {}
    for key, pair in pairs.items():
        try:
            for layer, (down, up) in zip(sites[key].layers, sites[key].split(pair["A"], pair["B"])):
                parts.setdefault(layer.beside, {})[layer] = (down, up, scales[key])
        except ValueError as error:
            faults.append(f"{key}: {error}")
    replacements = _read_full_modules(vlm.config, boxes, full_tensors, faults)
    leaves: dict[str, Partitioned] = {}
    for layers in parts.values():
        try:
            leaves |= _stack(layers)
        except ValueError as error:  # numpy's, of shapes
            faults.append(f"{', '.join(layer.beside for layer in layers)}: {error}")
    if faults or not leaves:
        text = "\n  ".join(sorted(faults)) or "it is empty"
        raise WeightsMismatch(f"{folder}: the adapter does not fit the model:\n  {text}")
    adapters = _device_put(unflatten(leaves), base, vlm.config.runtime.rules)
    lora = replace(vlm.config.lora, modules_to_save=tuple(f"^{re.escape(path)}$" for path in replacements))
    return replace(
        vlm, params=join(_replace_elements(base, replacements), adapters), config=replace(vlm.config, lora=lora)
    )


def save_adapters(vlm: Pretrained, folder: str | os.PathLike, base: str | None = None) -> None:
    """Writes the adapters of a model, and `config.lora.modules_to_save`, for PEFT and `load_adapters`.

    All processes of a run must call this function.

    Args:
      vlm: model with adapters.
      folder: folder to write to, created if absent. An adapter in it is replaced atomically: after an interrupted save
        the folder is refused until the next save.
      base: folder or hub name of the base model, which PEFT's config stores. None: not stored.
    Raises:
      ValueError: the model has no adapters, an adapted weight is no linear layer of transformers' model, or a module in
        `modules_to_save` has no weight or bias there.
    """
    base_params, adapters = split_adapters(vlm.params)
    boxes = flatten(_base_boxes(vlm.config))
    flat = {path: gather(leaf, (), _identity) for path, leaf in flatten(adapters).items()}
    sites = sites_of(vlm.config, boxes)
    peft_paths = {layer.beside + DOWN for site in sites.values() for layer in site.layers}
    if unsupported := [path for path in flat if path.endswith(DOWN) and path not in peft_paths] or not flat:
        raise ValueError(
            f"{unsupported}: PEFT has no adapters of these weights. Save save_pretrained(merge_adapters(vlm), FOLDER)."
            if flat
            else "the model has no adapters. Save it with save_pretrained."
        )
    tensors, ranks_alphas = {}, {}
    for key, site in sites.items():
        factors = {layer: _factors(flat, layer) for layer in site.layers}
        # Without factors, only other layers of our weight have an adapter, or a rank above 0.
        if factors := {layer: factor for layer, factor in factors.items() if factor}:
            *pair, scale = site.joined(factors)
            ranks_alphas[key] = (site.rank(pair[0]), scale * site.rank(pair[0]))
            tensors |= {(key, side): np.ascontiguousarray(x, np.float32) for side, x in zip("AB", pair)}
    if not ranks_alphas:
        raise ValueError("no adapters to save: the scale or the down projection of each is zero. Train them first.")
    names = {key: name for name, key in module_names(sites.values(), ranks_alphas).items()}
    tensors = {f"{PREFIX}{names[key]}.lora_{side}.weight": x for (key, side), x in tensors.items()}
    modules, full_tensors = _full_modules(vlm.config, boxes, flatten(base_params))
    tensors |= {PREFIX + name: x for name, x in full_tensors.items()}
    if jax.process_index() == 0:
        tied = HEAD_WEIGHT in full_tensors and vlm.config.decoder.tie_embeddings
        folder, text = Path(folder), json.dumps(make_config(ranks_alphas, sites, modules, base, tied), indent=2) + "\n"
        layout = {name: (x.dtype, x.shape) for name, x in tensors.items()}
        with new_files(folder) as stage:
            write_file(stage / WEIGHTS, layout, iter(tensors.values()))
            (stage / CONFIG).write_text(text, encoding="utf-8")
            replace_files(folder, CONFIG)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_adapters")


def merge_adapters(vlm: Pretrained) -> Pretrained:
    """Returns the base model with the adapters added to its weights, w + scale * A B, for `save_pretrained`."""
    merge = jax.jit(lambda params: split_adapters(add_products(params, _base_boxes(vlm.config)))[0])
    return replace(vlm, params=merge(vlm.params), config=replace(vlm.config, lora=LoraConfig()))


def unmerge_adapters(merged: Pretrained, adapted: Pretrained) -> Pretrained:
    """Returns `merged` with the adapters of `adapted` separated again: inverts `merge_adapters` up to rounding."""
    split = jax.jit(lambda params: add_products(params, _base_boxes(merged.config), -1))
    return replace(adapted, params=split(join(merged.params, split_adapters(adapted.params)[1])))


def _base_boxes(config: Any) -> Any:
    return abstract_boxed(replace(config, lora=LoraConfig()))


def _factors(flat: Mapping[str, np.ndarray], layer: Layer) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Returns A, B and scale of one layer without the padding of its rank, or None if it has no adapter."""
    if layer.beside + DOWN not in flat:
        return None
    down, up, scale = (flat[layer.beside + leaf][layer.stack] for leaf in (DOWN, UP, SCALE))
    if down.ndim - 1 > len(axes_of(layer.box)[1]):  # every part has its own A
        down, up, scale = down[layer.part], up[layer.part], scale[layer.part]
    else:
        up = up[:, *layer.part]
    used = np.flatnonzero(np.any(down.reshape(-1, down.shape[-1]), axis=0)) if scale else ()
    return (down[..., : used[-1] + 1], up[: used[-1] + 1], float(scale)) if len(used) else None


def _entries(config: Any, boxes: Mapping[str, Partitioned]) -> dict[str, table.Entry]:
    """Returns the family's weight table by the names of tensors in a loaded transformers model."""
    family, shapes = FAMILIES[config.family], unflatten({path: box.value for path, box in boxes.items()})
    return {family.module_name(name): entry for name, entry in table.expand(family.weights(config), shapes).items()}


def _tied_embedding(config: Any, entries: Mapping[str, table.Entry]) -> str:
    """Returns the name of the embedding that is also the head. "": the model has none."""
    if not isinstance(config, ModelConfig) or config.decoder is None or not config.decoder.tie_embeddings:
        return ""
    return next((name for name, entry in entries.items() if entry.parts[0].path == "decoder/embed"), "")


def _full_modules(
    config: Any, boxes: Mapping[str, Partitioned], base: Mapping[str, jax.Array]
) -> tuple[set[str], dict[str, np.ndarray]]:
    """Returns the modules with a weight in `config.lora.modules_to_save`, and their tensors by transformers' names."""
    trained = {path for path in boxes if any(re.search(pattern, path) for pattern in config.lora.modules_to_save)}
    entries = _entries(config, boxes)
    names = [name for name, entry in entries.items() if any(part.path in trained for part in entry.parts)]
    has_experts = lambda name: any("expert" in boxes[part.path].names for part in entries[name].parts)
    if unsupported := [name for name in names if not name.endswith((".weight", ".bias")) or has_experts(name)]:
        raise ValueError(
            f"{unsupported[0]}: was trained in full, but PEFT saves only whole modules. Save the model with "
            "save_pretrained(merge_adapters(vlm), FOLDER)."
        )
    modules, tensors = {name.rpartition(".")[0] for name in names}, {}
    for name, entry in entries.items():
        if name.rpartition(".")[0] in modules:
            parts = [table.to_theirs(gather(base[part.path], (), _identity)[part.index], part) for part in entry.parts]
            tensors[name] = np.ascontiguousarray(table.join(parts, entry))
    if (name := _tied_embedding(config, entries)) in tensors:  # PEFT reads both and ties them
        tensors[HEAD_WEIGHT] = tensors[name].copy()
    return modules, tensors


def _read_full_modules(
    config: Any, boxes: Mapping[str, Partitioned], tensors: Mapping[str, Tensor], faults: list[str]
) -> dict[str, dict[tuple[int, ...], np.ndarray]]:
    """Returns the modules that a file stores in full, as elements of our weights by path and index.

    Tensors that do not fit the model are added to `faults`.
    """
    entries, elements = _entries(config, boxes) if tensors else {}, {}
    if embedding := _tied_embedding(config, entries):
        both = tensors.get(PREFIX + embedding), tensors.get(PREFIX + HEAD_WEIGHT)
        tensors = {name: tensor for name, tensor in tensors.items() if name != PREFIX + HEAD_WEIGHT}
        if any(both) and not (all(both) and np.array_equal(*(tensor.map() for tensor in both))):
            faults.append(
                f"modules_to_save: {embedding} and {HEAD_WEIGHT} are tied in this model, but differ in the adapter. "
                "Train it with ensure_weight_tying=True, or load a model that PEFT has merged it into"
            )
    for name, tensor in tensors.items():
        entry = entries.get(FAMILIES[config.family].module_name(name.removeprefix(PREFIX)))
        if entry is None or tensor.shape != entry.shape:
            needed = f", where the model has {list(entry.shape)}" if entry else ""
            faults.append(f"unexpected: {name} {list(tensor.shape)}{needed}")
            continue
        for part in entry.parts:
            elements.setdefault(part.path, {})[part.index] = table.to_ours(tensor.map(), part)
    return elements


def _replace_elements(base: Mapping, replacements: Mapping[str, Mapping[tuple[int, ...], np.ndarray]]) -> dict:
    """Returns the parameters with other values at the given paths and indices."""
    flat = flatten(base)
    for path, elements in replacements.items():
        if path not in flat:
            raise ValueError(f"{path}: is quantized, but the adapter replaces it. Load the model without quantization.")
        for index, x in elements.items():
            flat[path] = jnp.asarray(flat[path]).at[index].set(jnp.asarray(x, flat[path].dtype))
    return unflatten(flat)


def _identity(leaf: jax.Array) -> jax.Array:
    return leaf


def _stack(parts: Mapping[Layer, tuple]) -> dict[str, Partitioned]:
    """Returns the adapter leaves of one weight.

    Layers without an adapter stay zero, smaller ranks are padded with zeros. Example: layers with A [in 4] at index
    (0,) and A [in 2] at index (2,) of a stack of 3 layers become one leaf [3 in 4] with zeros at [1] and [2, :, 2:].

    Args:
      parts: (A, B, scale) of each layer, A and B as returned by `Layer.to_ours`.
    """
    layer, (down, up, _) = next(iter(parts.items()))
    outputs, rank = axes_of(layer.box)[2], max(down.shape[-1] for down, _, _ in parts.values())
    stacked, part_axes = axes_of(layer.box)[0], outputs[: len(layer.part)]
    lead = stacked + part_axes
    shape = lambda axes: tuple(layer.box.value.shape[axis] for axis in axes)
    names = lambda axes: tuple(layer.box.names[axis] for axis in axes)
    all_down = np.zeros((*shape(lead), *down.shape[:-1], rank), np.float32)
    all_up = np.zeros((*shape(lead), rank, *up.shape[1:]), np.float32)
    scales = np.zeros(shape(lead), np.float32)
    for layer, (down, up, scale) in parts.items():
        all_down[layer.entry.index][..., : down.shape[-1]] = down
        all_up[layer.entry.index][: len(up)] = up
        scales[layer.entry.index] = scale
    return {
        layer.beside + DOWN: Partitioned(all_down, (*names(lead), *names(axes_of(layer.box)[1]), None)),
        layer.beside + UP: Partitioned(all_up, (*names(lead), None, *names(outputs[len(part_axes) :]))),
        layer.beside + SCALE: Partitioned(scales, names(lead)),
    }


def _device_put(boxed: Any, base: Any, rules: Any) -> Any:
    """Returns the arrays of a tree of Partitioned, sharded like the base model."""
    sharding = getattr(jax.tree.leaves(base)[0], "sharding", None)
    values = meta.unbox(boxed)
    return jax.device_put(
        values, shardings(boxed, sharding.mesh, rules) if isinstance(sharding, NamedSharding) else sharding
    )
