"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, through the family's weight table.

PEFT keeps A as [rank in] and B as [out rank] of every linear layer of transformers' model, under the layer's name in
its memory. Where several of their layers are one of our weights (queries, keys and values of a tower), each has an A of
its own if it was read so, and otherwise all have the same.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import EinopsError, rearrange
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from mllm_jax.api import Pretrained
from mllm_jax.families import FAMILIES
from mllm_jax.model import abstract_boxed
from mllm_jax.nn.lora import DOWN, HEAD, SCALE, UP, LoraConfig, add_products, axes_of, flatten, join, split_adapters
from mllm_jax.sharding import Named, shardings
from mllm_jax.weights.hf import WeightsMismatch
from mllm_jax.weights.safetensors import read_header, write_file
from mllm_jax.weights.stacked import gather
from mllm_jax.weights.table import Entry, expand, unflatten

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TENSOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
# What PEFT does beside plain LoRA, and the value that says it does not.
PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False}
PLAIN |= dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters"))


class Layer(NamedTuple):
    """A linear layer of transformers' model, as a part of one of our weights."""

    beside: str  # path of our weight, without the name `w`
    box: Named  # its shape and axes
    entry: Entry  # of the layer's weight in the family's table

    @property
    def stack(self) -> tuple[int, ...]:
        """Its place on the axes that our weight is stacked on."""
        return self.entry.index[: len(axes_of(self.box)[0])]

    @property
    def part(self) -> tuple[int, ...]:
        """Its place on the first axes of our weight's outputs, where these are layers of their own."""
        return self.entry.index[len(self.stack) :]

    def to_ours(self, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A [rank in], B [out rank] -> [*inputs rank], [rank *outputs]."""
        patterns = self._patterns()
        try:
            down, up = (rearrange(x, pattern, **sizes) for x, (pattern, sizes) in zip((down, up), patterns))
        except EinopsError:
            down = np.zeros(0)
        if down.shape[-1:] != up.shape[:1]:
            raise ValueError(f"A and B do not fit each other and a weight {list(self.entry.shape)}")
        return down, up

    def to_theirs(self, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `to_ours`."""
        turned = lambda pattern: " -> ".join(reversed(pattern.split(" -> ")))
        return tuple(
            rearrange(x, turned(pattern), **sizes) for x, (pattern, sizes) in zip((down, up), self._patterns())
        )

    def _patterns(self) -> list[tuple[str, dict[str, int]]]:
        """einops patterns, theirs -> ours, of A and B, from that of the weight, with the sizes of their axes."""
        ndim, depth = self.box.value.ndim, len(self.entry.index)
        theirs, _, ours = (self.entry.pattern or "a b -> a b").partition(" -> ")
        theirs, ours = (re.findall(r"\([^()]*\)|\S+", side) for side in (theirs, ours))
        inputs = [ours[axis - depth] for axis in axes_of(self.box)[1]]
        outputs = [ours[axis - depth] for axis in range(depth, ndim) if axis not in axes_of(self.box)[1]]
        letters = lambda groups: set(re.findall(r"\w+", " ".join(groups)))
        into, out = ([group for group in theirs if letters([group]) == letters(axes)] for axes in (inputs, outputs))
        if self.entry.part or not into or not out or len(theirs) != 2:
            raise ValueError(
                f"{self.beside}w is no linear layer of its own in transformers' model: PEFT cannot adapt it"
            )
        sizes = lambda groups: {name: size for name, size in self.entry.sizes if name in letters(groups)}
        return [
            (f"rank {into[0]} -> {' '.join(inputs)} rank", sizes(inputs)),
            (f"{out[0]} rank -> rank {' '.join(outputs)}", sizes(outputs)),
        ]


def layers_of(config: Any) -> dict[str, Layer]:
    """The linear layers of transformers' model, by their names in its memory, of all weights that can have adapters."""
    family, boxes = FAMILIES[config.family], flatten(_base_boxes(config))
    entries = expand(family.weights(config), unflatten({path: box.value for path, box in boxes.items()}))
    return {
        _in_memory(family, name.removesuffix(".weight")): Layer(entry.path.removesuffix("w"), boxes[entry.path], entry)
        for name, entry in entries.items()
        if name.endswith(".weight") and boxes[entry.path].matrix is not None and entry.path != HEAD
    }


def load_adapters(vlm: Pretrained, folder: str | os.PathLike) -> Pretrained:
    """The model with the adapters that PEFT, or `save_adapters`, wrote into a folder, in place of any that it has.

    They stay beside the weights; `merge_adapters` adds them. Layers that are one of our weights may differ in rank:
    what one lacks is zero.

    Raises:
      FileNotFoundError: the folder has no adapter.
      ValueError: it is none of plain LoRA, or does not fit the model; all that does not is listed.
    """
    folder, base = Path(folder), split_adapters(vlm.params)[0]
    stated, layers, family = _read_config(folder), layers_of(vlm.config), FAMILIES[vlm.config.family]
    pairs, faults = {}, []
    for name, tensor in read_header(folder / WEIGHTS).items():
        module, side = match.groups() if (match := TENSOR.fullmatch(name)) else ("", "")
        module = _in_memory(family, module)
        if module not in layers:
            faults.append(f"unexpected: {name} {list(tensor.shape)}")
        else:
            pairs.setdefault(module, {})[side] = tensor.map().astype(np.float32)
    leaves: dict[str, Named] = {}
    for beside in dict.fromkeys(layers[module].beside for module in pairs):
        own = {module: pair for module, pair in pairs.items() if layers[module].beside == beside}
        try:
            if single := [module for module, pair in own.items() if len(pair) < 2]:
                raise ValueError(f"one of A and B is missing of {', '.join(single)}")
            read = {module: layers[module].to_ours(pair["A"], pair["B"]) for module, pair in own.items()}
            leaves |= _stacked({layers[m]: (*pair, _scale(stated, m, pair[0].shape[-1])) for m, pair in read.items()})
        except ValueError as fault:  # also numpy's and einops', of shapes
            faults.append(f"{', '.join(own)}: {fault}")
    if faults or not leaves:
        text = "\n  ".join(sorted(faults)) or "it is empty"
        raise WeightsMismatch(f"the adapter in {folder} does not fit the model:\n  {text}")
    return replace(vlm, params=join(base, _placed(unflatten(leaves), base, vlm.config.runtime.rules)))


def save_adapters(vlm: Pretrained, folder: str | os.PathLike, base: str | None = None) -> None:
    """Writes the adapters of a model for PEFT and `load_adapters`; in a run of several processes all must call.

    Args:
      folder: made where absent; an adapter that it held is replaced.
      base: folder or hub name of the base model, for readers that are given none.
    Raises:
      ValueError: the model has no adapters, one beside what is no linear layer of transformers' model, or weights that
        were trained whole beside them, which would be lost.
    """
    if vlm.config.lora.train:
        raise ValueError(
            f"lora.train={vlm.config.lora.train} was trained whole, and adapters alone would lose it; "
            "write the model with save_pretrained(merge_adapters(vlm), folder)"
        )
    flat = {path: gather(leaf, (), _same) for path, leaf in flatten(split_adapters(vlm.params)[1]).items()}
    layers = layers_of(vlm.config)
    named = {layer.beside + DOWN for layer in layers.values()}
    if unnamed := [path for path in flat if path.endswith(DOWN) and path not in named] or not flat:
        raise ValueError(f"no adapters to save: {unnamed}" if flat else "the model has no adapters")
    tensors, numbers = {}, {}
    for module, layer in layers.items():
        if layer.beside + DOWN not in flat:
            continue
        down, up, scale = (flat[layer.beside + leaf][layer.stack] for leaf in (DOWN, UP, SCALE))
        if down.ndim - 1 > len(axes_of(layer.box)[1]):  # every part has its own
            down, up, scale = down[layer.part], up[layer.part], scale[layer.part]
        else:
            up = up[:, *layer.part]
        used = np.flatnonzero(np.any(down.reshape(-1, down.shape[-1]), axis=0)) if scale else ()
        if len(used):  # else only other layers of our weight have an adapter; they may also have a higher rank
            rank = int(used[-1]) + 1
            numbers[module] = (rank, float(scale) * rank)
            for side, x in zip("AB", layer.to_theirs(down[..., :rank], up[:rank])):
                tensors[f"{PREFIX}{module}.lora_{side}.weight"] = np.ascontiguousarray(x, np.float32)
    if jax.process_index() == 0:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{WEIGHTS}.unfinished"
        write_file(unfinished, {name: (x.dtype, x.shape) for name, x in tensors.items()}, iter(tensors.values()))
        unfinished.replace(folder / WEIGHTS)
        text = json.dumps(_config(numbers, list(layers), base), indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_adapters")


def merge_adapters(vlm: Pretrained) -> Pretrained:
    """The base model with the products of its adapters in its weights, as `save_pretrained` can write it."""
    merge = jax.jit(lambda params: split_adapters(add_products(params, _base_boxes(vlm.config)))[0])
    return replace(vlm, params=merge(vlm.params), config=replace(vlm.config, lora=LoraConfig()))


def unmerge_adapters(merged: Pretrained, adapted: Pretrained) -> Pretrained:
    """The inverse of `merge_adapters`, but for rounding: the adapters of `adapted` lie beside the weights again."""
    split = jax.jit(lambda params: add_products(params, _base_boxes(merged.config), -1))
    return replace(adapted, params=split(join(merged.params, split_adapters(adapted.params)[1])))


def _base_boxes(config: Any) -> Any:
    return abstract_boxed(replace(config, lora=LoraConfig()))


def _in_memory(family: Any, name: str) -> str:
    """The name that a layer has in transformers' memory, of one that it has in files, or had in former versions."""
    for old, new in (*family.RENAME, *getattr(family, "MODULES", ())):
        name = re.sub(old, new, name)
    return name


def _same(leaf: jax.Array) -> jax.Array:
    return leaf


def _stacked(parts: Mapping[Layer, tuple]) -> dict[str, Named]:
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
        layer.beside + DOWN: Named(whole, (*names(lead), *names(axes_of(layer.box)[1]), None)),
        layer.beside + UP: Named(whole_up, (*names(lead), None, *names(outputs[len(own) :]))),
        layer.beside + SCALE: Named(scales, names(lead)),
    }


def _placed(boxed: Any, base: Any, rules: Any) -> Any:
    """The values of a boxed tree, laid out as the base model is."""
    where = getattr(jax.tree.leaves(base)[0], "sharding", None)
    is_box = lambda leaf: isinstance(leaf, Named)
    values = jax.tree.map(lambda box: box.value, boxed, is_leaf=is_box)
    return jax.device_put(values, shardings(boxed, where.mesh, rules) if isinstance(where, NamedSharding) else where)


def _read_config(folder: Path) -> dict[str, Any]:
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {missing[0]}: it holds no adapter in PEFT's format")
    stated = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if stated.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type {stated.get('peft_type')!r} cannot be read, only 'LORA'")
    for name, plain in PLAIN.items():
        if (value := stated.get(name, plain)) != plain and value:
            raise ValueError(f"{folder / CONFIG}: {name} {value!r} cannot be read, only {plain!r}")
    return stated


def _scale(stated: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank of a layer, or by rsLoRA (arXiv 2312.03732) alpha / sqrt(rank); patterns as PEFT reads them."""
    patterns = (stated.get("alpha_pattern") or {}).items()
    found = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, stated["lora_alpha"]) / (rank**0.5 if stated.get("use_rslora") else rank)


def _config(numbers: Mapping[str, tuple[int, float]], modules: list[str], base: str | None) -> dict[str, Any]:
    """What PEFT needs to know of layers with these (rank, alpha), in a model that has these and others."""
    rank, alpha = max(set(numbers.values()), key=list(numbers.values()).count)
    ends = sorted({module.rpartition(".")[2] for module in numbers})
    meant = {module for module in modules if module.rpartition(".")[2] in ends}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ends if meant == set(numbers) else sorted(numbers),
        "rank_pattern": {_exactly(module): own for module, (own, _) in numbers.items() if own != rank},
        "alpha_pattern": {_exactly(module): own for module, (_, own) in numbers.items() if own != alpha},
    }


def _exactly(module: str) -> str:
    return "^" + re.escape(module)
