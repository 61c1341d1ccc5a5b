"""Asks a model about pictures and clips, and writes its answer as it comes.

python -m mllm_jax.generate --checkpoint FOLDER --image a.png --prompt "What is in the picture?"
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from mllm_jax.adapters import load_adapters
from mllm_jax.api import Pretrained, is_run, load_pretrained
from mllm_jax.cli import Parser
from mllm_jax.config import told
from mllm_jax.data.generation import FILE, GenerationDefaults
from mllm_jax.generate.decode import generate_ids
from mllm_jax.generate.requests import read_prompts, stream_text
from mllm_jax.generate.sampling import Temperature, TopK, TopP
from mllm_jax.settings import PositiveInt, Seed, argument


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 1 where something is wrong that the user can mend, told in one line."""
    args = _parser().parse_args(arguments)
    try:
        vlm = _load(args.checkpoint, args.dtype)
        vlm = load_adapters(vlm, args.adapters) if args.adapters else vlm
        seen = [{"type": kind, kind: path} for kind in ("image", "video") for path in getattr(args, kind)]
        messages = [{"role": "user", "content": [*seen, {"type": "text", "text": args.prompt}]}]
        batch = read_prompts(vlm, [messages])
        stop = vlm.processor.stop_ids
        generate_ids(
            vlm,
            batch,
            args.max_new_tokens,
            **_sampling(args, vlm.processor.generation),
            stop=stop,
            key=jax.random.key(args.seed),
            on_token=stream_text(vlm.processor, stop, lambda text: print(text, end="", flush=True)),
        )
    except (OSError, ValueError) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 1
    print()
    return 0


def _sampling(args: argparse.Namespace, defaults: GenerationDefaults) -> dict[str, float]:
    """How tokens are drawn: as the command says, else as the model's file does with --sample, else greedily."""
    asked = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    if args.sample and defaults.unsupported:
        print(f"note: {FILE} asks for {defaults.unsupported}, which is not done", file=sys.stderr)
    usual = defaults.sampling if args.sample else {}
    return usual | {name: value for name, value in asked.items() if value is not None}


def _load(checkpoint: str, dtype: str) -> Pretrained:
    """A training run's folder, or a model in Hugging Face's format."""
    if not is_run(checkpoint):
        return load_pretrained(checkpoint, dtype)
    from mllm_jax.train.checkpoint import load_workdir  # slow to import, and a published model needs none of it

    return load_workdir(checkpoint)


def _parser() -> Parser:
    parser = Parser("python -m mllm_jax.generate", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FOLDER", help="a training run, or a model in Hugging Face's format")
    add("--adapters", metavar="FOLDER", help="an adapter (LoRA) of the model, in PEFT's format")
    add("--prompt", required=True, metavar="TEXT", help="what to ask")
    add("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    add("--video", action="append", default=[], metavar="FILE", help="a clip; may be given several times")
    add(
        "--max-new-tokens",
        "--max_new_tokens",
        type=argument(PositiveInt),
        default=256,
        metavar="N",
        help="longest answer (default 256)",
    )
    add(
        "--sample",
        action="store_true",
        help="draw as the model's generation_config.json says, unless the next three do",
    )
    add(
        "--temperature",
        type=argument(Temperature),
        metavar="X",
        help="0 = the likeliest answer (default); 1 = as likely",
    )
    add("--top-k", type=argument(TopK), metavar="N", help="draw among the N likeliest tokens (default 0 = all)")
    add("--top-p", type=argument(TopP), metavar="X", help="draw among the likeliest that reach X (default 1)")
    add("--seed", type=argument(Seed), default=0, metavar="N", help="of random draws (default 0)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of an exported model (default float32)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
