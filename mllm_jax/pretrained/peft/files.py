"""PEFT's file format: fields of adapter_config.json and tensor names in adapter_model.safetensors."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mllm_jax.common.settings import Finite, Pattern, check
from mllm_jax.pretrained.peft.sites import EXPERTS, Site

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
# Values of `init_lora_weights` that leave the base model unchanged. Others (pissa, olora, corda, loftq, lora_ga) modify
# its weights when training begins, and A and B fit only the modified ones.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# PEFT's extensions of plain LoRA, and the value that disables each. Empty values disable them, too.
PLAIN = {
    "bias": "none",
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora"), False),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens", "layer_replication"), None),
    **dict.fromkeys(("use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"), None),
}
APPLIED = {"lora_alpha", "alpha_pattern", "use_rslora", "target_parameters", "init_lora_weights", "ensure_weight_tying"}
# The tensors of the file determine the modules and their ranks; the remaining fields affect only training.
NOT_NEEDED = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
}
SECONDS = 10  # time limit for matching all patterns with the names of all modules
_MATCH = r"""
import json, re, sys
patterns, keys = json.load(sys.stdin)
compiled = [re.compile(rf"(.*\.)?({pattern})$") for pattern in patterns]
first = {key: next((n for n, pattern in enumerate(compiled) if pattern.match(key)), None) for key in keys}
json.dump({key: n for key, n in first.items() if n is not None}, sys.stdout)
"""
CHECKED = {"lora_alpha": Finite, "alpha_pattern": Mapping[str, Finite]}
PARAMETERS = tuple(parameter for parameter, _ in EXPERTS.values())  # in the order in which a module defines them
HEAD_WEIGHT = "lm_head.weight"  # name of the head in every loaded language model of transformers
OUTER = ".base_layer"  # if two parameters of a module are adapted, PEFT's wrapper of the second contains the first's


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the PEFT config of an adapter, with defaults for the fields in APPLIED that it lacks.

    Raises:
      FileNotFoundError: the folder has no adapter.
      ValueError: the config is invalid or uses an unsupported feature; the message names the field.
    """
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} has no {missing[0]}: it is not an adapter in PEFT's format. Name the folder of one."
        )
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Save the adapter again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: needs an object with the fields of PEFT's LoraConfig.")
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{path}: peft_type={kind!r}: only 'LORA' is supported.")
    for name, value in config.items():
        if not value or name in APPLIED | NOT_NEEDED:
            continue
        if name in PLAIN and value != PLAIN[name]:
            raise ValueError(f"{path}: {name}={value!r}: only {PLAIN[name]!r} is supported.")
        if name not in PLAIN:
            raise ValueError(
                f"{path}: {name}={value!r}: the field is unknown. Remove it if results do not depend on it."
            )
    start = config.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in (*PLAIN_STARTS, None):
        raise ValueError(
            f"{path}: init_lora_weights={start!r}: A and B belong to a base model that was modified when training "
            "began. Convert them to plain LoRA with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    config = {"lora_alpha": 8} | {name: value for name, value in config.items() if value is not None}
    for name, hint in CHECKED.items():
        if name in config:
            check(hint, config[name], f"{path}: {name}")
    for pattern in config.get("alpha_pattern", ()):  # checked above to be a mapping
        check(Pattern, pattern, f"{path}: alpha_pattern")
    return config


def module_names(sites: Iterable[Site], adapted: Iterable[str]) -> dict[str, str]:
    """Returns {name of a module in the file: key of its site}.

    Args:
      sites: sites of the model.
      adapted: names of the adapted parameters, complete or their ends ("experts.down_proj").
    """
    names, modules, ends = {}, {}, tuple(adapted)
    for site in sites:
        if not site.parameter:
            names[site.name] = site.key
        elif any(site.key == end or site.key.endswith(f".{end}") for end in ends):
            modules.setdefault(site.name, []).append(site)
    for name, parameters in modules.items():
        parameters.sort(key=lambda site: PARAMETERS.index(site.parameter), reverse=True)
        names |= {name + OUTER * depth: site.key for depth, site in enumerate(parameters)}
    return names


def scales_of(stated: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Returns the scale of each site by key: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732).

    Args:
      stated: PEFT's config, from `read_config`.
      ranks: {key: rank} of the sites.
    Raises:
      ValueError: patterns of `alpha_pattern` take too long to match, or are invalid in the expression that PEFT builds.
    """
    matches = _first_matches(list(stated.get("alpha_pattern", ())), list(ranks))
    alphas = {key: stated["alpha_pattern"][matches[key]] if key in matches else stated["lora_alpha"] for key in ranks}
    return {key: alphas[key] / (rank**0.5 if stated.get("use_rslora") else rank) for key, rank in ranks.items()}


def _first_matches(patterns: list[str], keys: list[str]) -> dict[str, str]:
    """Returns {key: first pattern that matches it under PEFT's rules}, without keys that no pattern matches.

    A separate process with a time limit matches them, because the patterns are untrusted.
    """
    if not patterns:
        return {}
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    try:
        result = subprocess.run(
            command, input=json.dumps([patterns, keys]), capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"{CONFIG}: alpha_pattern: its patterns take over {SECONDS} s to match. Simplify them."
        ) from error
    except subprocess.CalledProcessError as error:  # such as (?i), which is allowed only at the start
        reason = error.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"{CONFIG}: alpha_pattern: PEFT cannot read its patterns: {reason}") from error
    return {key: patterns[index] for key, index in json.loads(result.stdout).items()}


def make_config(
    numbers: Mapping[str, tuple[int, float]],
    sites: Mapping[str, Site],
    whole: Iterable[str],
    base: str | None,
    tied: bool = False,
) -> dict[str, Any]:
    """Returns PEFT's config of adapters.

    Args:
      numbers: (rank, alpha) of each adapted site, by key.
      sites: all sites of the model, by key.
      whole: modules that are saved in full.
      base: folder or hub name of the base model. None: not stored.
      tied: whether `whole` contains the embedding, which is also the head.
    """
    rank, alpha = max(set(numbers.values()), key=list(numbers.values()).count)
    expert_keys = {key for key in numbers if sites[key].parameter}
    parameters = _targets(expert_keys, [key for key, site in sites.items() if site.parameter], 3)
    modules = _targets(numbers.keys() - expert_keys, [key for key, site in sites.items() if not site.parameter], 1)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "rank_pattern": {_pattern(key): site_rank for key, (site_rank, _) in numbers.items() if site_rank != rank},
        "alpha_pattern": {_pattern(key): site_alpha for key, (_, site_alpha) in numbers.items() if site_alpha != alpha},
    }
    optional = {"target_parameters": parameters, "modules_to_save": sorted(whole), "ensure_weight_tying": tied}
    return config | {name: value for name, value in optional.items() if value}


def _targets(keys: set[str], all_keys: Iterable[str], parts: int) -> list[str]:
    """Returns the last `parts` components of keys if no other key of `all_keys` ends in them, else the full keys."""
    end = lambda key: ".".join(key.split(".")[-parts:])
    ends = {end(key) for key in keys}
    return sorted(ends if {key for key in all_keys if end(key) in ends} == keys else keys)


def _pattern(key: str) -> str:
    """Returns the regular expression with which PEFT finds only this key."""
    return "^" + re.escape(key)
