"""The tiny run in two stages: the connector and the decoder's embedding alone, then all weights on other questions."""

import pathlib
import sys
from dataclasses import replace

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny_run  # noqa: E402

from mllm_jax.sharding.mesh import make_mesh  # noqa: E402
from mllm_jax.train.runs.config import Run, Stage, read_run, run_config  # noqa: E402


def on_one_device(patch) -> None:
    """Runs stages on one device, which compiles and computes faster; tests of stages do not depend on the mesh."""
    patch.setattr("mllm_jax.train.loop.make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))


def staged(run: Run) -> Run:
    align = replace(run.optim, steps=8, freeze=("encoder", "decoder/layers"), learning_rate=5e-3)
    data = replace(run.data, kinds={"shape": 1.0}, tokens=72)
    return replace(
        run, stages={"align": Stage(optim=align), "instruct": Stage(data=data, optim=replace(run.optim, steps=16))}
    )


def get_config():
    config = tiny_run.get_config()
    config.train.evaluate_every = 0
    config.optim.name = "adamw"  # which compiles in less time than Muon
    return run_config(staged(read_run(config)))
