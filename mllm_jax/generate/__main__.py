"""Asks a model about images and videos, and prints the answer as it is generated.

    python -m mllm_jax.generate --checkpoint FOLDER --image a.png --prompt "What is in the image?"
    python -m mllm_jax.generate --checkpoint FOLDER                              a chat, on a terminal
    python -m mllm_jax.generate --checkpoint FOLDER --prompts questions.jsonl    a line of JSON for each answer

A chat continues one conversation; /help lists its commands. A file of prompts has one prompt per line, or records of
any format and layout that training reads, with or without answers. Paths of images are relative to the file.
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
    """Runs the command. Returns its exit status: 1 after an error that the user can fix, which one line reports."""
    parser = _parser()
    args = parser.parse_args(arguments)
    modes = [args.prompt is not None, args.prompts is not None, args.chat]
    if sum(modes) > 1 or not (any(modes) or sys.stdin.isatty()):
        parser.error("give one of --prompt, --prompts and --chat")
    media = [{"type": kind, kind: path} for kind in ("image", "video") for path in getattr(args, kind)]
    if media and args.prompts is not None:
        parser.error("--prompts: its records name their images and videos. Remove --image and --video.")
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
    except jax.errors.JaxRuntimeError as error:  # such as out of memory
        say(f"error: {first_line(error)}")
        return 1
    print()
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Raises OSError or ValueError if a file does not exist, before the weights are read, which may take minutes."""
    files = [("prompts", path) for path in [args.prompts] if path is not None]
    files += [(kind, path) for kind in ("image", "video") for path in getattr(args, kind)]
    for flag, path in files:
        file = path if flag == "prompts" else resolve(path)
        if isinstance(file, str) and not Path(file).exists():
            raise FileNotFoundError(f"--{flag}={path}: the file does not exist. Correct the path.")


def _answer_file(vlm: Pretrained, args: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Prints one line of JSON per answer. Returns 1 if a prompt could not be answered, otherwise 0."""
    failed = 0
    for answer in answers(vlm, args.prompts, system_message(args.system), args.batch_size, settings):
        print(as_line(answer), flush=True)
        failed += "error" in answer
    if failed:
        say(f"error: {failed} prompts could not be read; their lines state the reasons")
    return int(failed > 0)


def _sampling(args: argparse.Namespace, defaults: GenerationDefaults) -> dict[str, float]:
    """Returns the sampling settings: the flags, with --sample over those of generation_config.json. Empty: greedy."""
    flags = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    if args.sample and defaults.unsupported:
        say(f"note: {FILE} sets {defaults.unsupported}, which is not supported and has no effect")
    sampling = defaults.sampling if args.sample else {}
    return sampling | {name: value for name, value in flags.items() if value is not None}


def _load(checkpoint: str, dtype: str) -> Pretrained:
    """Reads a training run's folder, or a model in Hugging Face's format."""
    # `mllm_jax` imports the training code only on demand: it is slow to import, and published models do not need it.
    return mllm_jax.load_workdir(checkpoint) if is_run(checkpoint) else load_pretrained(checkpoint, dtype)


def _parser() -> Parser:
    parser = Parser("python -m mllm_jax.generate", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="FOLDER",
        help="folder of a training run, or of a model in Hugging Face's format",
    )
    add("--adapters", metavar="FOLDER", help="folder of LoRA adapters of the model in PEFT's format")
    add("--prompt", metavar="TEXT", help="question; without one, a chat starts on a terminal")
    add("--prompts", metavar="FILE", help="file of prompts, one per line or as records")
    add("--chat", action="store_true", help="answer several turns, also if stdin is not a terminal")
    add("--system", metavar="TEXT", help="system message")
    add("--image", action="append", default=[], metavar="FILE", help="image; may be repeated")
    add("--video", action="append", default=[], metavar="FILE", help="video; may be repeated")
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
        help="maximum number of tokens of an answer (default 256)",
    )
    add(
        "--sample",
        action="store_true",
        help="sample with the settings of generation_config.json; the next three flags override them",
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
        help="sample from the smallest set of most likely tokens with total probability X (default 1: all)",
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
