"""Asks a model about images and videos, and writes its answer as it is generated.

    python -m mllm_jax.generate --checkpoint FOLDER --image a.png --prompt "What is in the image?"
    python -m mllm_jax.generate --checkpoint FOLDER                              a chat, on a terminal
    python -m mllm_jax.generate --checkpoint FOLDER --prompts questions.jsonl    a line of JSON for each answer

A chat keeps its earlier turns; /help lists its commands. A file of prompts has one prompt per line, or records with or
without answers, of any format and layout that training reads; paths of images are relative to it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import mllm_jax
from mllm_jax.common.cli import Parser, run_command
from mllm_jax.common.errors import describe_error
from mllm_jax.common.settings import PositiveInt, Seed, argument
from mllm_jax.common.status import announced, say
from mllm_jax.common.workdir import is_run
from mllm_jax.data.media import resolve
from mllm_jax.data.text.generation_config import FILE, GenerationDefaults
from mllm_jax.generate.chat import Chat, first_line, stream_answer, system_message, talk, write_answer
from mllm_jax.generate.prompts import answers, as_line
from mllm_jax.generate.requests import answering_processor
from mllm_jax.generate.sampling import Temperature, TopK, TopP
from mllm_jax.pretrained.api import Pretrained, load_pretrained
from mllm_jax.pretrained.peft import load_adapters


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 1 where something is wrong that the user can mend, told in one line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    given = [args.prompt is not None, args.prompts is not None, args.chat]
    if sum(given) > 1 or not (any(given) or sys.stdin.isatty()):
        parser.error("give one of --prompt, --prompts and --chat")
    media = [{"type": kind, kind: path} for kind in ("image", "video") for path in getattr(args, kind)]
    if media and args.prompts is not None:
        parser.error("--prompts names its images and videos itself; leave out --image and --video")
    try:
        _check_files(args)
        with announced(f"reading {args.checkpoint}"):
            vlm = _load(args.checkpoint, args.dtype)
            vlm = load_adapters(vlm, args.adapters) if args.adapters else vlm
        settings = _sampling(args, answering_processor(vlm).generation) | {"max_new_tokens": args.max_new_tokens}
        settings["key"] = jax.random.key(args.seed)
        if args.prompts is not None:
            return _answer_file(vlm, args, settings)
        if args.prompt is None:
            chat = Chat(vlm, args.system, settings)
            for item in media:
                chat.attach(item["type"], item[item["type"]])
            talk(chat)
            return 0
        question = {"role": "user", "content": [*media, {"type": "text", "text": args.prompt}]}
        stream_answer(vlm, [*system_message(args.system), question], write_answer, **settings)
    except (OSError, ValueError) as error:
        say(f"error: {describe_error(error)}")
        return 1
    except jax.errors.JaxRuntimeError as error:  # such as too little memory
        say(f"error: {first_line(error)}")
        return 1
    print()
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Raises OSError or ValueError for a file that is not there, before minutes go into reading the weights."""
    named = [("prompts", path) for path in [args.prompts] if path is not None]
    named += [(kind, path) for kind in ("image", "video") for path in getattr(args, kind)]
    for flag, path in named:
        found = path if flag == "prompts" else resolve(path)
        if isinstance(found, str) and not Path(found).exists():
            raise FileNotFoundError(f"--{flag}={path}: there is no such file")


def _answer_file(vlm: Pretrained, args: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Prints an answer a line. Returns 1 where a prompt has none."""
    failed = 0
    for answer in answers(vlm, args.prompts, system_message(args.system), args.batch_size, settings):
        print(as_line(answer), flush=True)
        failed += "error" in answer
    if failed:
        say(f"error: {failed} prompts could not be read; their lines have the reasons")
    return int(failed > 0)


def _sampling(args: argparse.Namespace, defaults: GenerationDefaults) -> dict[str, float]:
    """Sampling settings: those of the command, else with --sample those of the model's file, else greedy."""
    asked = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    if args.sample and defaults.unsupported:
        say(f"note: {FILE} asks for {defaults.unsupported}, which is not done")
    usual = defaults.sampling if args.sample else {}
    return usual | {name: value for name, value in asked.items() if value is not None}


def _load(checkpoint: str, dtype: str) -> Pretrained:
    """A training run's folder, or a model in Hugging Face's format."""
    # Training is slow to import and unused for published models, so `mllm_jax` imports it on demand.
    return mllm_jax.load_workdir(checkpoint) if is_run(checkpoint) else load_pretrained(checkpoint, dtype)


def _parser() -> Parser:
    parser = Parser("python -m mllm_jax.generate", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FOLDER", help="a training run, or a model in Hugging Face's format")
    add("--adapters", metavar="FOLDER", help="an adapter (LoRA) of the model, in PEFT's format")
    add("--prompt", metavar="TEXT", help="question; without it, on a terminal, a chat starts")
    add("--prompts", metavar="FILE", help="file of prompts, one per line or as records")
    add("--chat", action="store_true", help="answer several turns, also if stdin is not a terminal")
    add("--system", metavar="TEXT", help="system message")
    add("--image", action="append", default=[], metavar="FILE", help="an image; may be given several times")
    add("--video", action="append", default=[], metavar="FILE", help="a video; may be given several times")
    add(
        "--batch_size",
        type=argument(PositiveInt),
        default=8,
        metavar="N",
        help="number of --prompts answered at once (default 8)",
    )
    add(
        "--max-new-tokens",
        "--max_new_tokens",
        type=argument(PositiveInt),
        default=256,
        metavar="N",
        help="largest number of tokens of an answer (default 256)",
    )
    add(
        "--sample",
        action="store_true",
        help="sample with the settings of generation_config.json, which the next three override",
    )
    add(
        "--temperature",
        type=argument(Temperature),
        metavar="X",
        help="0: greedy (default); 1: sample from the model's probabilities",
    )
    add("--top-k", type=argument(TopK), metavar="N", help="sample from the N most likely tokens (default 0: all)")
    add(
        "--top-p",
        type=argument(TopP),
        metavar="X",
        help="sample from the most likely tokens with total probability X (default 1)",
    )
    add("--seed", type=argument(Seed), default=0, metavar="N", help="seed of sampling (default 0)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of an exported model (default float32)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
