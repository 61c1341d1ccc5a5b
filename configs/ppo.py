"""Trains captions that often name absent objects, a reward model of captions, and better captions with PPO.

    python -m mllm_jax.train --config configs/ppo.py --workdir /tmp/ppo
    python -m mllm_jax.train --config configs/ppo.py --workdir /tmp/ppo --stage=ppo --config.stages.ppo.optim.steps=48
    python benchmarks/false_objects.py --workdir /tmp/ppo

The first stage is that of `configs/prefer.py`. The second starts from its weights and trains a reward model, which
prefers the truthful one of two captions and also reads the facts, the content of the image. The third starts from the
weights of the first: it captions images, and PPO trains it with the rewards of the second. See docs/preference.md.
"""

from dataclasses import replace

from mllm_jax.common.config import beside
from mllm_jax.train.losses.ppo import PpoConfig
from mllm_jax.train.losses.reward import RewardConfig
from mllm_jax.train.runs.config import Stage, read_run, run_config
from mllm_jax.train.step.optimizer import OptimConfig

FACTS = RewardConfig(prompt="{facts}")  # the embedded tokenizer spells every word that scenes do not need


def get_config():
    run = read_run(beside(__file__, "prefer.py").get_config())
    pairs = replace(run.data, batch=8, tokens=256)
    prompts = replace(run.data, batch=64, tokens=64, patches_per_row=160)
    judge = OptimConfig(name="muon", learning_rate=1e-3, steps=300, warmup=30, final_lr_ratio=0.03, b2=0.98)
    improve = OptimConfig(learning_rate=5e-5, schedule="constant", steps=24, warmup=2, b2=0.98)
    # With less of a penalty, or longer, rewards rise as far while the model unlearns what the reward model overlooks.
    ppo = PpoConfig(
        reward_model="reward", response_length=24, kl_coef=0.5, cliprange_value=1.0, missing_eos_penalty=-4.0
    )
    stages = {
        "learn": run.stages["learn"],
        "reward": Stage(after="learn", algorithm=FACTS, data=pairs, optim=judge),
        "ppo": Stage(after="learn", algorithm=ppo, data=prompts, optim=improve),
    }
    return run_config(replace(run, stages=stages))
