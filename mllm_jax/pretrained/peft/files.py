"""adapter_config.json, and the names in adapter_model.safetensors, as PEFT has them."""

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
# Values of `init_lora_weights` for which an adapter belongs to the base model's own weights. With others
# (pissa, olora, corda, loftq, lora_ga) A and B belong to a base that was changed when training began.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Extensions of plain LoRA in PEFT, and the value that turns each off. Empty values do, too.
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
SECONDS = 10  # that all patterns may take to match the names of all modules
_MATCH = r"""
import json, re, sys
patterns, keys = json.load(sys.stdin)
compiled = [re.compile(rf"(.*\.)?({pattern})$") for pattern in patterns]
first = {key: next((n for n, pattern in enumerate(compiled) if pattern.match(key)), None) for key in keys}
json.dump({key: n for key, n in first.items() if n is not None}, sys.stdout)
"""
CHECKED = {"lora_alpha": Finite, "alpha_pattern": Mapping[str, Finite]}
PARAMETERS = tuple(parameter for parameter, _ in EXPERTS.values())  # in the order of a module
HEAD_WEIGHT = "lm_head.weight"  # in transformers' memory, of every model that writes texts
OUTER = ".base_layer"  # of two parameters that are adapted, PEFT has the second around the first


def read_config(folder: Path) -> dict[str, Any]:
    """PEFT's config of an adapter, with the defaults of the fields that are applied.

    Raises:
      FileNotFoundError: there is no adapter.
      ValueError: it does what is not done here; the message names the field.
    """
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {missing[0]}: it holds no adapter in PEFT's format")
    path = folder / CONFIG
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(stated, dict):
        raise ValueError(f"{path}: needs an object with the fields of PEFT's LoraConfig.")
    if (kind := stated.get("peft_type")) != "LORA":
        raise ValueError(f"{path}: peft_type={kind!r}: only 'LORA' can be read.")
    for name, value in stated.items():
        if not value or name in APPLIED | NOT_NEEDED:
            continue
        if name in PLAIN and value != PLAIN[name]:
            raise ValueError(f"{path}: {name}={value!r}: only {PLAIN[name]!r} can be read.")
        if name not in PLAIN:
            raise ValueError(
                f"{path}: {name}={value!r}: a field that is not known here. Remove it if results do not depend on it."
            )
    start = stated.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in (*PLAIN_STARTS, None):
        raise ValueError(
            f"{path}: init_lora_weights={start!r}: these A and B belong to a base model that was changed when training "
            "began. Save the adapter with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            "which makes plain LoRA of it."
        )
    stated = {"lora_alpha": 8} | {name: value for name, value in stated.items() if value is not None}
    for name, hint in CHECKED.items():
        if name in stated:
            check(hint, stated[name], f"{path}: {name}")
    for pattern in stated.get("alpha_pattern", ()):  # a mapping by now
        check(Pattern, pattern, f"{path}: alpha_pattern")
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


def scales_of(stated: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """alpha / rank of each site, or by rsLoRA (arXiv 2312.03732) alpha / sqrt(rank).

    Args:
      ranks: {name in PEFT: rank} of the sites.
    Raises:
      ValueError: the patterns of `alpha_pattern` take too long to match, or are none inside the one that PEFT builds.
    """
    own = _first_matches(list(stated.get("alpha_pattern", ())), list(ranks))
    alphas = {key: stated["alpha_pattern"][own[key]] if key in own else stated["lora_alpha"] for key in ranks}
    return {key: alphas[key] / (rank**0.5 if stated.get("use_rslora") else rank) for key, rank in ranks.items()}


def _first_matches(patterns: list[str], keys: list[str]) -> dict[str, str]:
    """{key: the first pattern that matches it, as PEFT reads them}, without keys that no pattern matches.

    The patterns are untrusted and `re` has no time limit, so a separate process matches them.
    """
    if not patterns:
        return {}
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    try:
        done = subprocess.run(
            command, input=json.dumps([patterns, keys]), capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{CONFIG}: alpha_pattern: its patterns take over {SECONDS} s to match.") from error
    except subprocess.CalledProcessError as error:  # such as (?i), which is allowed only at the beginning
        why = error.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"{CONFIG}: alpha_pattern: PEFT cannot read its patterns: {why}") from error
    return {key: patterns[index] for key, index in json.loads(done.stdout).items()}


def make_config(
    numbers: Mapping[str, tuple[int, float]],
    sites: Mapping[str, Site],
    whole: Iterable[str],
    base: str | None,
    tied: bool = False,
) -> dict[str, Any]:
    """PEFT's config of sites with these (rank, alpha), out of all sites of a model.

    whole: modules that are saved in full. base: folder or hub name of the base model.
    tied: these are the embedding and the head, which stay one table.
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
    more = {"target_parameters": parameters, "modules_to_save": sorted(whole), "ensure_weight_tying": tied}
    return stated | {name: value for name, value in more.items() if value}


def _targets(keys: set[str], known: Iterable[str], parts: int) -> list[str]:
    """The last `parts` of keys, where these mean no other known key, else the keys."""
    end = lambda key: ".".join(key.split(".")[-parts:])
    ends = {end(key) for key in keys}
    return sorted(ends if {key for key in known if end(key) in ends} == keys else keys)


def _exactly(key: str) -> str:
    return "^" + re.escape(key)
