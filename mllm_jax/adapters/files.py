"""adapter_config.json, and the names in adapter_model.safetensors, as PEFT has them."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mllm_jax.adapters.sites import EXPERTS, Site

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
# What PEFT does beside plain LoRA, and the value that says it does not.
PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False, "trainable_token_indices": None}
PARAMETERS = tuple(parameter for parameter, _ in EXPERTS.values())  # in the order of a module
OUTER = ".base_layer"  # of two parameters that are adapted, PEFT has the second around the first


def read_config(folder: Path) -> dict[str, Any]:
    """What PEFT's config says. FileNotFoundError where there is none, ValueError where it is none of plain LoRA."""
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {missing[0]}: it holds no adapter in PEFT's format")
    stated = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if stated.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type {stated.get('peft_type')!r} cannot be read, only 'LORA'")
    for name, plain in PLAIN.items():
        if (value := stated.get(name, plain)) != plain and value:
            raise ValueError(f"{folder / CONFIG}: {name} {value!r} cannot be read, only {plain!r}")
    return stated


def module_names(sites: Iterable[Site], adapted: Iterable[str]) -> dict[str, str]:
    """The names that modules have in a file -> keys of sites.

    adapted: those parameters that are adapted, as full names or the ends of such.
    """
    names, modules, ends = {}, {}, tuple(adapted)
    for site in sites:
        if not site.parameter:
            names[site.name] = site.key
        elif any(site.key == end or site.key.endswith(f".{end}") for end in ends):
            modules.setdefault(site.name, []).append(site)
    for name, own in modules.items():
        own.sort(key=lambda site: PARAMETERS.index(site.parameter), reverse=True)
        names |= {name + OUTER * depth: site.key for depth, site in enumerate(own)}
    return names


def scale_of(stated: Mapping[str, Any], key: str, rank: int) -> float:
    """alpha / rank of a site, or by rsLoRA (arXiv 2312.03732) alpha / sqrt(rank); patterns as PEFT reads them."""
    patterns = (stated.get("alpha_pattern") or {}).items()
    found = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", key))
    return next(found, stated["lora_alpha"]) / (rank**0.5 if stated.get("use_rslora") else rank)


def make_config(
    numbers: Mapping[str, tuple[int, float]], sites: Mapping[str, Site], whole: Iterable[str], base: str | None
) -> dict[str, Any]:
    """What PEFT needs to know of sites with these (rank, alpha), of all those of a model.

    whole: modules that are saved as they are. base: folder or hub name of the base model.
    """
    rank, alpha = max(set(numbers.values()), key=list(numbers.values()).count)
    ours = {key for key in numbers if sites[key].parameter}
    parameters = _targets(ours, [key for key, site in sites.items() if site.parameter], 3)
    modules = _targets(numbers.keys() - ours, [key for key, site in sites.items() if not site.parameter], 1)
    stated = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "rank_pattern": {_exactly(key): own for key, (own, _) in numbers.items() if own != rank},
        "alpha_pattern": {_exactly(key): own for key, (_, own) in numbers.items() if own != alpha},
    }
    more = {"target_parameters": parameters, "modules_to_save": sorted(whole)}
    return stated | {name: value for name, value in more.items() if value}


def _targets(keys: set[str], known: Iterable[str], parts: int) -> list[str]:
    """The last `parts` of keys, where these mean no other known key, else the keys."""
    end = lambda key: ".".join(key.split(".")[-parts:])
    ends = {end(key) for key in keys}
    return sorted(ends if {key for key in known if end(key) in ends} == keys else keys)


def _exactly(key: str) -> str:
    return "^" + re.escape(key)
