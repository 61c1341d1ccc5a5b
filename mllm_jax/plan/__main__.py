"""Plans a run for accelerators that this machine need not have, or certifies meshes on virtual devices.

python -m mllm_jax.plan --config configs/qwen3_vl_8b.py --topology v6e:8x8
python -m mllm_jax.plan certify --config configs/certify.py
"""

import importlib
import sys

from mllm_jax.common.cli import fail, run_command
from mllm_jax.common.errors import suggestion

PLAN = "mllm_jax.plan.cli"
COMMANDS = {"certify": "mllm_jax.plan.verify.certify"}


def main() -> None:
    named = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else ""
    if named and named not in COMMANDS:
        fail(f"there is no command {named!r}; {suggestion(named, COMMANDS)}; run with --help", 2)
    importlib.import_module(COMMANDS.get(named, PLAN)).main()


if __name__ == "__main__":
    run_command(main)
