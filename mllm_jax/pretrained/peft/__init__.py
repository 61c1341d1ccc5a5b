"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, through the family's weight table.

PEFT stores A as [rank in] and B as [out rank] of every linear layer of transformers' model, under the layer's module
name (sites.py). If several of their layers are one of our weights (queries, keys and values of a tower), each has its
own A if it was read so, and otherwise they share one. Modules that are trained in full are in the same file
(`modules_to_save`).
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
    """Returns the model with the adapters that PEFT, or `save_adapters`, wrote into a folder, in place of its own.

    Adapters stay separate from the weights; `merge_adapters` adds them. Layers that are one of our weights may differ
    in
    rank: smaller ones are padded with zeros. Modules that were saved in full replace the model's;
    `config.lora.modules_to_save` then names them.

    Raises:
      FileNotFoundError: the folder has no adapter.
      ValueError: it is not plain LoRA, or does not fit the model; the message lists all faults.
    """
    folder, (base, _), boxes = Path(folder), split_adapters(vlm.params), flatten(_base_boxes(vlm.config))
    if not (folder / CONFIG).is_file() and (why := interrupted(folder)):
        raise FileNotFoundError(f"{folder} is not complete: {why}.")
    stated, sites, family = read_config(folder), sites_of(vlm.config, boxes), FAMILIES[vlm.config.family]
    names = module_names(sites.values(), stated.get("target_parameters") or ())
    pairs, whole, faults = {}, {}, []
    for name, tensor in read_header(folder / WEIGHTS).items():
        if not (match := FACTOR.fullmatch(name)):
            whole[name] = tensor
        elif (module := family.module_name(match[1])) in names:
            pairs.setdefault(names[module], {})[match[2]] = tensor.map().astype(np.float32)
        else:
            faults.append(f"unexpected: {name} {list(tensor.shape)}")
    faults += [f"{key}: one of A and B is missing" for key, pair in pairs.items() if len(pair) < 2]
    faults += [f"{key}: {side} has no two axes" for key, pair in pairs.items() for side in pair if pair[side].ndim < 2]
    pairs = {key: pair for key, pair in pairs.items() if len(pair) == 2 and min(x.ndim for x in pair.values()) > 1}
    scales = scales_of(stated, {key: sites[key].rank(pair["A"]) for key, pair in pairs.items()})
    parts: dict[str, dict[Layer, tuple]] = {}
    for key, pair in pairs.items():
        try:
            for layer, (down, up) in zip(sites[key].layers, sites[key].split(pair["A"], pair["B"])):
                parts.setdefault(layer.beside, {})[layer] = (down, up, scales[key])
        except ValueError as fault:
            faults.append(f"{key}: {fault}")
    found = _read_whole(vlm.config, boxes, whole, faults)
    leaves: dict[str, Partitioned] = {}
    for own in parts.values():
        try:
            leaves |= _stacked(own)
        except ValueError as fault:  # numpy's, of shapes
            faults.append(f"{', '.join(layer.beside for layer in own)}: {fault}")
    if faults or not leaves:
        text = "\n  ".join(sorted(faults)) or "it is empty"
        raise WeightsMismatch(f"the adapter in {folder} does not fit the model:\n  {text}")
    adapters = _placed(unflatten(leaves), base, vlm.config.runtime.rules)
    lora = replace(vlm.config.lora, modules_to_save=tuple(f"^{re.escape(path)}$" for path in found))
    return replace(vlm, params=join(_replaced(base, found), adapters), config=replace(vlm.config, lora=lora))


def save_adapters(vlm: Pretrained, folder: str | os.PathLike, base: str | None = None) -> None:
    """Writes the adapters of a model for PEFT and `load_adapters`; in a run of several processes all must call it.

    Args:
      folder: created if absent; an adapter in it is replaced atomically: if this save is killed, the folder is refused
        until the next save.
      base: folder or hub name of the base model, for readers that are given none.
    Raises:
      ValueError: the model has no adapters, or one of a weight that is not a linear layer of transformers' model; or
        `config.lora.modules_to_save`, which is written too, names something other than a weight or bias of a module
        there.
    """
    base_params, adapters = split_adapters(vlm.params)
    boxes = flatten(_base_boxes(vlm.config))
    flat = {path: gather(leaf, (), _same) for path, leaf in flatten(adapters).items()}
    sites = sites_of(vlm.config, boxes)
    named = {layer.beside + DOWN for site in sites.values() for layer in site.layers}
    if unnamed := [path for path in flat if path.endswith(DOWN) and path not in named] or not flat:
        raise ValueError(f"no adapters to save: {unnamed}" if flat else "the model has no adapters")
    tensors, numbers = {}, {}
    for key, site in sites.items():
        factors = {layer: _factors(flat, layer) for layer in site.layers}
        # An absent one: only other layers of our weight have an adapter; they may also have a higher rank.
        if factors := {layer: own for layer, own in factors.items() if own}:
            *pair, scale = site.joined(factors)
            numbers[key] = (site.rank(pair[0]), scale * site.rank(pair[0]))
            tensors |= {(key, side): np.ascontiguousarray(x, np.float32) for side, x in zip("AB", pair)}
    if not numbers:
        raise ValueError("no adapters to save: the scale or the down projection of each is zero")
    names = {key: name for name, key in module_names(sites.values(), numbers).items()}
    tensors = {f"{PREFIX}{names[key]}.lora_{side}.weight": x for (key, side), x in tensors.items()}
    modules, whole = _whole(vlm.config, boxes, flatten(base_params))
    tensors |= {PREFIX + name: x for name, x in whole.items()}
    if jax.process_index() == 0:
        tied = HEAD_WEIGHT in whole and vlm.config.decoder.tie_embeddings
        folder, text = Path(folder), json.dumps(make_config(numbers, sites, modules, base, tied), indent=2) + "\n"
        layout = {name: (x.dtype, x.shape) for name, x in tensors.items()}
        with new_files(folder) as stage:
            write_file(stage / WEIGHTS, layout, iter(tensors.values()))
            (stage / CONFIG).write_text(text, encoding="utf-8")
            replace_files(folder, CONFIG)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_adapters")


def merge_adapters(vlm: Pretrained) -> Pretrained:
    """The base model with the products of its adapters in its weights, as `save_pretrained` can write it."""
    merge = jax.jit(lambda params: split_adapters(add_products(params, _base_boxes(vlm.config)))[0])
    return replace(vlm, params=merge(vlm.params), config=replace(vlm.config, lora=LoraConfig()))


def unmerge_adapters(merged: Pretrained, adapted: Pretrained) -> Pretrained:
    """The inverse of `merge_adapters` up to rounding: the adapters of `adapted` are separate from the weights again."""
    split = jax.jit(lambda params: add_products(params, _base_boxes(merged.config), -1))
    return replace(adapted, params=split(join(merged.params, split_adapters(adapted.params)[1])))


def _base_boxes(config: Any) -> Any:
    return abstract_boxed(replace(config, lora=LoraConfig()))


def _factors(flat: Mapping[str, np.ndarray], layer: Layer) -> tuple[np.ndarray, np.ndarray, float] | None:
    """A, B and scale of one layer, as far as its rank goes; None where it has no adapter."""
    if layer.beside + DOWN not in flat:
        return None
    down, up, scale = (flat[layer.beside + leaf][layer.stack] for leaf in (DOWN, UP, SCALE))
    if down.ndim - 1 > len(axes_of(layer.box)[1]):  # every part has its own
        down, up, scale = down[layer.part], up[layer.part], scale[layer.part]
    else:
        up = up[:, *layer.part]
    used = np.flatnonzero(np.any(down.reshape(-1, down.shape[-1]), axis=0)) if scale else ()
    return (down[..., : used[-1] + 1], up[: used[-1] + 1], float(scale)) if len(used) else None


def _entries(config: Any, boxes: Mapping[str, Partitioned]) -> dict[str, table.Entry]:
    """The family's table by the names in transformers' memory."""
    family, shapes = FAMILIES[config.family], unflatten({path: box.value for path, box in boxes.items()})
    return {family.module_name(name): entry for name, entry in table.expand(family.weights(config), shapes).items()}


def _tied_embedding(config: Any, entries: Mapping[str, table.Entry]) -> str:
    """Name of the embedding that is also the head. Empty: there is none."""
    if not isinstance(config, ModelConfig) or config.decoder is None or not config.decoder.tie_embeddings:
        return ""
    return next((name for name, entry in entries.items() if entry.parts[0].path == "decoder/embed"), "")


def _whole(
    config: Any, boxes: Mapping[str, Partitioned], base: Mapping[str, jax.Array]
) -> tuple[set[str], dict[str, np.ndarray]]:
    """The modules in which `config.lora.modules_to_save` finds a weight, and all their tensors, by names in memory."""
    trained = {path for path in boxes if any(re.search(pattern, path) for pattern in config.lora.modules_to_save)}
    entries = _entries(config, boxes)
    found = [name for name, entry in entries.items() if any(part.path in trained for part in entry.parts)]
    experts = lambda name: any("expert" in boxes[part.path].names for part in entries[name].parts)
    if bare := [name for name in found if not name.endswith((".weight", ".bias")) or experts(name)]:
        raise ValueError(
            f"{bare[0]} was trained in full, and PEFT saves only modules: write the model with "
            "save_pretrained(merge_adapters(vlm), folder)"
        )
    modules, tensors = {name.rpartition(".")[0] for name in found}, {}
    for name, entry in entries.items():
        if name.rpartition(".")[0] in modules:
            parts = [table.to_theirs(gather(base[part.path], (), _same)[part.index], part) for part in entry.parts]
            tensors[name] = np.ascontiguousarray(table.join(parts, entry))
    if (name := _tied_embedding(config, entries)) in tensors:  # PEFT reads both, and keeps them one
        tensors[HEAD_WEIGHT] = tensors[name].copy()
    return modules, tensors


def _read_whole(
    config: Any, boxes: Mapping[str, Partitioned], tensors: Mapping[str, Tensor], faults: list[str]
) -> dict[str, dict[tuple[int, ...], np.ndarray]]:
    """Modules that a file stores in full, as elements of our weights by path and index; misfits are faults."""
    entries, found = _entries(config, boxes) if tensors else {}, {}
    if embedding := _tied_embedding(config, entries):
        both = tensors.get(PREFIX + embedding), tensors.get(PREFIX + HEAD_WEIGHT)
        tensors = {name: tensor for name, tensor in tensors.items() if name != PREFIX + HEAD_WEIGHT}
        if any(both) and not (all(both) and np.array_equal(*(tensor.map() for tensor in both))):
            faults.append(
                f"modules_to_save: {embedding} and {HEAD_WEIGHT} are one table in this model, and differ in the "
                "adapter. Train it with ensure_weight_tying=True, or load a model that PEFT has merged it into"
            )
    for name, tensor in tensors.items():
        entry = entries.get(FAMILIES[config.family].module_name(name.removeprefix(PREFIX)))
        if entry is None or tensor.shape != entry.shape:
            needed = f", where the model has {list(entry.shape)}" if entry else ""
            faults.append(f"unexpected: {name} {list(tensor.shape)}{needed}")
            continue
        for part in entry.parts:
            found.setdefault(part.path, {})[part.index] = table.to_ours(tensor.map(), part)
    return found


def _replaced(base: Mapping, found: Mapping[str, Mapping[tuple[int, ...], np.ndarray]]) -> dict:
    """Parameters with other elements at some places."""
    flat = flatten(base)
    for path, elements in found.items():
        if path not in flat:
            raise ValueError(f"{path}, which the adapter replaces, is quantized: read the model in full precision")
        for index, x in elements.items():
            flat[path] = jnp.asarray(flat[path]).at[index].set(jnp.asarray(x, flat[path].dtype))
    return unflatten(flat)


def _same(leaf: jax.Array) -> jax.Array:
    return leaf


def _stacked(parts: Mapping[Layer, tuple]) -> dict[str, Partitioned]:
    """The leaves of one of our weights from A, B and scale of its layers, as `Layer.to_ours` gives the first two."""
    layer, (down, up, _) = next(iter(parts.items()))
    outputs, rank = axes_of(layer.box)[2], max(down.shape[-1] for down, _, _ in parts.values())
    stacked, own = axes_of(layer.box)[0], outputs[: len(layer.part)]
    lead = stacked + own
    shape = lambda axes: tuple(layer.box.value.shape[axis] for axis in axes)
    names = lambda axes: tuple(layer.box.names[axis] for axis in axes)
    whole = np.zeros((*shape(lead), *down.shape[:-1], rank), np.float32)
    whole_up = np.zeros((*shape(lead), rank, *up.shape[1:]), np.float32)
    scales = np.zeros(shape(lead), np.float32)
    for layer, (down, up, scale) in parts.items():
        whole[layer.entry.index][..., : down.shape[-1]] = down
        whole_up[layer.entry.index][: len(up)] = up
        scales[layer.entry.index] = scale
    return {
        layer.beside + DOWN: Partitioned(whole, (*names(lead), *names(axes_of(layer.box)[1]), None)),
        layer.beside + UP: Partitioned(whole_up, (*names(lead), None, *names(outputs[len(own) :]))),
        layer.beside + SCALE: Partitioned(scales, names(lead)),
    }


def _placed(boxed: Any, base: Any, rules: Any) -> Any:
    """The values of a boxed tree, laid out as the base model is."""
    where = getattr(jax.tree.leaves(base)[0], "sharding", None)
    values = meta.unbox(boxed)
    return jax.device_put(values, shardings(boxed, where.mesh, rules) if isinstance(where, NamedSharding) else where)
