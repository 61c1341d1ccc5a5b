"""Lists the commands of the package.

python -m mllm_jax
"""

import importlib.util
import sys

from mllm_jax.common.cli import Parser, fail, run_command
from mllm_jax.common.errors import suggestion

COMMANDS = {
    "mllm_jax.train": "trains a model, or resumes a run",
    "mllm_jax.train.algorithms.reference": "stores the log-probabilities that preference training compares with",
    "mllm_jax.evaluate": "asks a model held-out questions, and counts the right answers",
    "mllm_jax.generate": "answers questions about images and videos, and chats",
    "mllm_jax.export": "writes what a run trained for transformers or PEFT, and merges adapters",
    "mllm_jax.data convert": "turns any data into ArrayRecord shards with the media inside",
    "mllm_jax.data inspect": "shows what the batches of a run hold",
    "mllm_jax.data.synthetic.tfds_builder": "makes the embedded set of scenes a dataset of TFDS",
    "mllm_jax.families": "lists published models, and the tokens that an image costs them",
    "mllm_jax.plan": "finds the mesh for a run, and what it takes, without the accelerators",
    "mllm_jax.plan certify": "proves that meshes change nothing in a training step",
}
LAUNCHERS = {  # outside the package, in a checkout
    "launch.demo": "trains, stops, resumes, evaluates, generates, exports and reports, in a quarter of an hour",
    "launch.local": "trains in several processes on this machine",
    "launch.tpu_pod": "trains on a TPU pod, and watches the run",
    "launch.slurm": "trains on the nodes of a Slurm cluster",
    "launch.gke": "trains on Google Kubernetes Engine, on TPUs or GPUs",
    "launch.xpk": "trains on TPUs through XPK",
}


def main() -> None:
    """The command. Ends with exit code 2 at any other word."""
    commands = COMMANDS | (LAUNCHERS if importlib.util.find_spec("launch") else {})
    width = max(map(len, commands))
    lines = [f"    python -m {name:{width}}  {what}" for name, what in commands.items()]
    parser = Parser("python -m mllm_jax", "\n".join(["Commands, each with --help:", "", *lines]))
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        named = sys.argv[1]
        fail(f"there is no command {named!r}; {suggestion(f'mllm_jax.{named}', commands)}; each is run by its name", 2)
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    run_command(main)
