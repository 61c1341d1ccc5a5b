"""Trains a model.

    python -m mllm_jax.train --config configs/scenes.py --workdir DIR
    python -m mllm_jax.train --config configs/scenes.py --workdir DIR --config.model.decoder.mlp=512

The config file says what is trained, on what and how. `--config FILE.py:argument` picks a variant where the file has
some, and every value in it can be replaced: `--config.path.to=value`. DIR receives checkpoints, metrics.jsonl,
TensorBoard events, the config and the processor. The same command goes on where a run stopped: SIGTERM and Ctrl-C make
it save and end; after a crash it takes the last checkpoint.
"""

import jax
from absl import flags
from ml_collections import config_flags

from mllm_jax.train import command
from mllm_jax.train.loop import Diverged, train

CONFIG = config_flags.DEFINE_config_file("config", None, "What to train: a Python file with get_config(argument).")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; one that holds checkpoints is continued.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one of several processes (TPU pod, Slurm, Kubernetes).")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    command.run(main, (Diverged,))
