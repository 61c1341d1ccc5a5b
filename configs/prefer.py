"""Learns captions that often name what is not there, and then to prefer truthful ones, in minutes on two cores.

    python -m mllm_jax.train --config configs/prefer.py --workdir /tmp/prefer
    python -m mllm_jax.train --config configs/prefer.py --workdir /tmp/prefer --stage=mpo
    python benchmarks/false_objects.py --workdir /tmp/prefer

The model is that of `configs/scenes.py` with fewer layers. Three of four captions of the first stage end with a thing
that is not in the picture, so that the model says such things too. The others begin with its weights and see pairs: a
truthful caption, and one with a false thing more or in place of a true one. See `mllm_jax.data.captions` and
docs/preference.md.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

from mllm_jax.train.inputs import SCENES, CaptionsData
from mllm_jax.train.optim import OptimConfig
from mllm_jax.train.preference import PreferenceConfig
from mllm_jax.train.run import Run, Stage, TrainConfig, run_config

LOSSES = {
    "dpo": PreferenceConfig(dpo=1.0, beta=0.1),
    "dense": PreferenceConfig(dpo=1.0, beta=0.1, changed=3.0),  # where the captions differ tokens count three times
    "mpo": PreferenceConfig(dpo=0.8, bco=0.2, sft=1.0, beta=0.1),  # InternVL's weights
}


def get_config():
    spec = importlib.util.spec_from_file_location("scenes", Path(__file__).parent / "scenes.py")
    scenes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scenes)
    data = CaptionsData(batch=4, tokens=224, rows=1, patches=208, window=8.0, min_pixels=256)
    false = CaptionsData(batch=4, tokens=224, rows=2, patches=160, window=8.0, min_pixels=256, false=0.75)
    model = scenes.model()
    model = replace(model, encoder=replace(model.encoder, layers=1), decoder=replace(model.decoder, layers=2))
    learn = OptimConfig(name="muon", learning_rate=2e-3, steps=900, warmup=90, final=0.03, b2=0.98, weight_decay=0.02)
    prefer = OptimConfig(learning_rate=5e-5, steps=100, warmup=10, b2=0.98)
    often = dict(log_every=25, heldout=200, save_every=500)
    return run_config(
        Run(
            model=model,
            processor=SCENES,
            data=data,
            optim=prefer,
            train=TrainConfig(**often),
            stages={
                "learn": Stage(data=false, optim=learn),
                **{
                    name: Stage(after="learn", train=TrainConfig(**often, preference=loss))
                    for name, loss in LOSSES.items()
                },
            },
        )
    )
