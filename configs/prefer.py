"""Trains a captioner that often names absent things, then teaches it to prefer truthful captions.

    python -m mllm_jax.train --config configs/prefer.py --workdir /tmp/prefer
    python -m mllm_jax.train --config configs/prefer.py:1 --workdir /tmp/prefer-1      another seed
    python benchmarks/false_objects.py --workdir /tmp/prefer

The argument is a seed (default 0). The model is that of `configs/scenes.py` with fewer layers, on its smallest images;
all stages take minutes on two cores. In stage `learn`, three of four captions end with a thing that is not in the
image. The other stages, one for each of LOSSES, start from its weights and train on pairs: a truthful caption, and one
with a false thing added or in place of a true one. See `mllm_jax.data.synthetic.captions` and docs/preference.md.
"""

from dataclasses import replace

from mllm_jax.common.config import ConfigError, beside
from mllm_jax.data.synthetic.scenes import SCENES
from mllm_jax.train.losses.preference import PreferenceConfig
from mllm_jax.train.runs.config import Run, Stage, TrainConfig, run_config
from mllm_jax.train.runs.data import CaptionsData
from mllm_jax.train.step.optimizer import OptimConfig

LOSSES = {
    # Captions change once ratios change by a factor of three. With beta=0.1, DPO goes on until some are gibberish.
    "dpo": PreferenceConfig(dpo=1.0, beta=1.0),
    # Tokens in which the two captions differ count three times.
    "dense": PreferenceConfig(dpo=1.0, beta=0.5, diff_token_weight=3.0),
    "mpo": PreferenceConfig(dpo=0.8, bco=0.2, sft=1.0, beta=0.1),  # InternVL's weights
}


def get_config(arg: str = "0"):
    if not (arg or "0").isdigit():
        raise ConfigError(f"configs/prefer.py: the seed {arg!r} is not a number. Pass a whole number.")
    seed = int(arg or "0")
    pairs = CaptionsData(
        batch=4, tokens=224, patch_rows=1, patches_per_row=208, window=8.0, min_pixels=256, max_cells=3, seed=seed
    )
    false = replace(pairs, patch_rows=2, patches_per_row=160, false=0.75)
    model = beside(__file__, "scenes.py").model()
    model = replace(model, encoder=replace(model.encoder, layers=1), decoder=replace(model.decoder, layers=2))
    learn = OptimConfig(
        name="muon", learning_rate=4e-3, steps=600, warmup=60, final_lr_ratio=0.03, b2=0.98, weight_decay=0.02
    )
    prefer = OptimConfig(learning_rate=1e-4, steps=100, warmup=10, b2=0.98)
    train = TrainConfig(seed=seed, log_every=25, num_eval_examples=200, save_every=500)
    return run_config(
        Run(
            model=model,
            processor=SCENES,
            data=pairs,
            optim=prefer,
            train=train,
            stages={
                "learn": Stage(data=false, optim=learn),
                **{name: Stage(after="learn", algorithm=loss) for name, loss in LOSSES.items()},
            },
        )
    )
