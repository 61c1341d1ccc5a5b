"""Trains a captioner that invents things, then a reward model, and then improves the captioner with PPO.

    python -m mllm_jax.train --config configs/ppo.py --workdir /tmp/ppo
    python -m mllm_jax.train --config configs/ppo.py --workdir /tmp/ppo --stage=ppo --config.stages.ppo.optim.steps=48
    python benchmarks/false_objects.py --workdir /tmp/ppo

Takes no argument. Stage `learn` is that of `configs/prefer.py`; the other two start from its weights. Stage `reward`
trains a reward model to prefer the truthful one of two captions; a prompt after each caption lists the things in the
image. Stage `ppo` samples captions, scores them with the reward model and updates the captioner. See
docs/preference.md.
"""

from dataclasses import replace

from mllm_jax.common.config import beside
from mllm_jax.train.losses.ppo import PpoConfig
from mllm_jax.train.losses.reward import RewardConfig
from mllm_jax.train.runs.config import Stage, read_run, run_config
from mllm_jax.train.step.optimizer import OptimConfig

FACTS = RewardConfig(prompt="{facts}")  # the facts only: the embedded tokenizer spells words that scenes do not use


def get_config():
    run = read_run(beside(__file__, "prefer.py").get_config())
    pairs = replace(run.data, batch=8, tokens=256)
    prompts = replace(run.data, batch=64, tokens=64, patches_per_row=160)
    judge = OptimConfig(name="muon", learning_rate=1e-3, steps=300, warmup=30, final_lr_ratio=0.03, b2=0.98)
    improve = OptimConfig(learning_rate=5e-5, schedule="constant", steps=24, warmup=2, b2=0.98)
    # With a lower kl_coef or more steps, rewards rise as far, but the model unlearns what the reward model overlooks.
    ppo = PpoConfig(
        reward_model="reward", response_length=24, kl_coef=0.5, cliprange_value=1.0, missing_eos_penalty=-4.0
    )
    stages = {
        "learn": run.stages["learn"],
        "reward": Stage(after="learn", algorithm=FACTS, data=pairs, optim=judge),
        "ppo": Stage(after="learn", algorithm=ppo, data=prompts, optim=improve),
    }
    return run_config(replace(run, stages=stages))
