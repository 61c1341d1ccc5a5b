"""Trains a model with PPO on answers that it samples, scored by a reward model of configs/reward.py.

    python -m mllm_jax.train --config configs/rlhf.py:FOLDER --workdir DIR \
        --config.data.path=questions.jsonl --config.data.root=IMAGES --config.algorithm.reward_model=REWARD_DIR

The argument is the model, as in configs/sft.py. REWARD_DIR is the workdir of the reward-model run. See
docs/preference.md.
"""

from dataclasses import replace

from mllm_jax.common.config import beside
from mllm_jax.train.losses.ppo import PpoConfig
from mllm_jax.train.runs.config import run_config


def get_config(arg: str = ""):
    run = beside(__file__, "sft.py").run(arg)
    return run_config(replace(run, algorithm=PpoConfig(), optim=replace(run.optim, learning_rate=3e-5)))
