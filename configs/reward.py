"""Trains a reward model from any published model, on pairs of a chosen and a rejected answer.

    python -m mllm_jax.train --config configs/reward.py:FOLDER --workdir DIR \
        --config.data.path=pairs.jsonl --config.data.root=IMAGES

The argument is the model, as in configs/sft.py. See docs/preference.md.
"""

from dataclasses import replace

from mllm_jax.common.config import beside
from mllm_jax.train.losses.reward import RewardConfig
from mllm_jax.train.runs.config import run_config


def get_config(arg: str = ""):
    run = beside(__file__, "sft.py").run(arg)
    return run_config(replace(run, algorithm=RewardConfig(), optim=replace(run.optim, learning_rate=2e-5)))
