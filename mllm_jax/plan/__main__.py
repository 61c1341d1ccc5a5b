"""Plans a run on accelerators that need not be there, or checks one that are.

    python -m mllm_jax.plan --config configs/qwen3_vl_8b.py --topology v6e:8x8
    python -m mllm_jax.plan certify --help

Each command says more under --help.
"""

import importlib
import sys

COMMANDS = ("certify",)


def main() -> None:
    named = sys.argv[1] if sys.argv[1:2] and sys.argv[1] in COMMANDS else ""
    if named:
        del sys.argv[1]
    importlib.import_module(f"mllm_jax.plan.{named or 'command'}").main()


if __name__ == "__main__":
    main()
