"""Writes a model as a folder in Hugging Face's format, or its adapters as one in PEFT's.

    python -m mllm_jax.export --checkpoint RUN FOLDER                       the model that a run trained
    python -m mllm_jax.export --checkpoint RUN --adapters_only FOLDER       the adapters that a run trained, alone
    python -m mllm_jax.export --checkpoint MODEL --adapters ADAPTER FOLDER  a model with an adapter merged into it

Adapters are merged into the weights unless they are written alone. The work is done in the memory of the host, in
float32; accelerators are not used.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from mllm_jax.common.cli import Parser, run_command
from mllm_jax.common.errors import describe_error
from mllm_jax.common.settings import NonNegativeInt, argument
from mllm_jax.common.status import say
from mllm_jax.common.workdir import is_run
from mllm_jax.nn.lora import split_adapters
from mllm_jax.pretrained.api import CONFIG, Pretrained, load_pretrained, save_pretrained
from mllm_jax.pretrained.peft import files as peft
from mllm_jax.pretrained.peft import load_adapters, merge_adapters, save_adapters
from mllm_jax.train.checkpoint.restore import load_workdir, read_config
from mllm_jax.weights.hf import local_folder
from mllm_jax.weights.replacing import interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 1 where something is wrong that the user can mend, told in one line."""
    args = _parser().parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    try:
        _check(args)
        say(f"reading {args.checkpoint}")
        vlm = _load(args)
        say(f"writing {args.folder}")
        if args.adapters_only:
            save_adapters(vlm, args.folder, base=read_config(args.checkpoint).init or None)
        else:
            save_pretrained(_merged(vlm, args.dtype), args.folder)
    except (OSError, ValueError) as error:
        say(f"error: {describe_error(error)}")
        return 1
    except KeyboardInterrupt as interrupt:
        state = "unchanged, complete, or refused by readers until the next export"
        raise KeyboardInterrupt(f"interrupted; {args.folder} is {state}") from interrupt
    size = sum(file.stat().st_size for file in Path(args.folder).glob("*.safetensors"))
    reader = "PEFT and mllm_jax.load_adapters read" if args.adapters_only else "transformers and load_pretrained read"
    print(f"wrote {args.folder}, {size / 1e6:,.1f} MB of weights, which {reader}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses before anything is read what could not be written."""
    target = Path(args.folder)
    file, key = (peft.CONFIG, "peft_type") if args.adapters_only else (CONFIG, "model_type")
    if args.adapters_only and (args.adapters or not is_run(args.checkpoint)):
        raise ValueError("--adapters_only writes what a run trained: name the folder of a run, without --adapters")
    if args.step is not None and not is_run(args.checkpoint):
        raise ValueError(f"--step={args.step}: {args.checkpoint} is not the folder of a training run. Leave it out")
    if is_run(target):
        raise ValueError(f"{target} is the folder of a training run. Name another folder to write to")
    for source in filter(None, (args.checkpoint, args.adapters)):
        if target.exists() and Path(source).exists() and target.samefile(source):
            raise ValueError(f"{target} is read from. Name another folder to write to")
    if target.is_dir() and any(target.iterdir()) and not (_states(target / file, key) or interrupted(target)):
        raise FileExistsError(f"{target} is not empty and has no {file} with {key!r}. Name a new folder to write to")


def _states(file: Path, key: str) -> bool:
    """Returns whether a file is JSON with this key, as a model's or an adapter's is."""
    try:
        return key in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _load(args: argparse.Namespace) -> Pretrained:
    if is_run(args.checkpoint):
        vlm = load_workdir(args.checkpoint, args.step)
    else:
        folder = local_folder(args.checkpoint)
        vlm = load_pretrained(folder, "float32" if args.adapters else args.dtype)
    if args.adapters and split_adapters(vlm.params)[1]:
        raise ValueError(f"--adapters={args.adapters}: {args.checkpoint} already has adapters. Export it first")
    return load_adapters(vlm, args.adapters) if args.adapters else vlm


def _merged(vlm: Pretrained, dtype: str) -> Pretrained:
    """The model without adapters, in the type that is written."""
    if split_adapters(vlm.params)[1]:
        whole = lambda x: x.astype("float32") if x.dtype == "bfloat16" else x  # before: sums are rounded once
        vlm = merge_adapters(dataclasses.replace(vlm, params=jax.tree.map(whole, vlm.params)))
    leaves, tree = jax.tree.flatten(vlm.params)
    vlm = dataclasses.replace(vlm, params=None)
    for number, leaf in enumerate(leaves):  # one by one, each instead of its first form
        leaves[number] = leaf.astype(dtype)
    return dataclasses.replace(vlm, params=jax.tree.unflatten(tree, leaves))


def _parser() -> Parser:
    parser = Parser("python -m mllm_jax.export", __doc__)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="folder to write; a model or adapter in it is replaced")
    add("--checkpoint", required=True, metavar="FOLDER", help="a training run, or a model in Hugging Face's format")
    add("--adapters", metavar="FOLDER", help="an adapter (LoRA) of the model, in PEFT's format, to merge into it")
    add("--adapters_only", action="store_true", help="write the adapters of a run alone, in PEFT's format")
    add("--step", type=argument(NonNegativeInt), metavar="N", help="step of the checkpoint (default: the newest)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the written weights (default float32)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
