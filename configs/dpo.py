"""Fine-tunes any published model on pairs of a chosen and a rejected answer, with DPO or a related loss.

    python -m mllm_jax.train --config configs/dpo.py:FOLDER --workdir DIR \
        --config.data.path=pairs.jsonl --config.data.root=IMAGES

The argument is the model, as in configs/sft.py. `--config.algorithm.NAME=VALUE` sets the loss and the reference, see
docs/preference.md.
"""

from dataclasses import replace

from mllm_jax.common.config import beside
from mllm_jax.train.losses.preference import PreferenceConfig
from mllm_jax.train.runs.config import run_config


def get_config(arg: str = ""):
    run = beside(__file__, "sft.py").run(arg)
    optim = replace(run.optim, learning_rate=5e-7)
    return run_config(replace(run, algorithm=PreferenceConfig(dpo=1.0), optim=optim))
