"""Growth of the cost of a training step with tokens, patch rows, experts and depth, one of them at a time.

    python benchmarks/scaling.py

Prints seconds of a step, and of its compilation. A step should grow linearly with tokens (rows of them), with patch
rows and with depth, and not with the number of experts that a token does not choose; compilation with none of them.
"""

import functools
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402

import mllm_jax  # noqa: E402
from mllm_jax.common.cli import Parser  # noqa: E402
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig  # noqa: E402
from mllm_jax.model.decoder import DecoderConfig  # noqa: E402
from mllm_jax.model.encoders.vit import VitConfig  # noqa: E402
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds, abstract_params  # noqa: E402
from mllm_jax.nn.attention.layer import AttentionConfig  # noqa: E402
from mllm_jax.nn.moe.layer import MoeConfig  # noqa: E402
from mllm_jax.nn.runtime import Runtime  # noqa: E402
from mllm_jax.train.algorithms.supervised import CrossEntropy  # noqa: E402
from mllm_jax.train.step.context import TrainContext, state_from_params  # noqa: E402
from mllm_jax.train.step.optimizer import OptimConfig  # noqa: E402
from mllm_jax.train.step.train_step import make_train_step  # noqa: E402

BASE = {"rows": 4, "patch_rows": 1, "experts": 8, "layers": 4}
SERIES = {"rows": (2, 4, 8), "patch_rows": (1, 2, 4), "experts": (8, 16, 32), "layers": (4, 8, 16)}
TOKENS, SIDE, WIDTH = 256, 16, 128


def model(layers: int, experts: int) -> ModelConfig:
    return ModelConfig(
        VitConfig(
            width=WIDTH, layers=layers, heads=4, mlp=4 * WIDTH, patch_size=8, position_grid=16, deepstack_layers=(1,)
        ),
        PatchMergerConfig(),
        DecoderConfig(
            vocab=2048,
            width=WIDTH,
            layers=layers,
            attention=AttentionConfig(4, 2, 32, rope_sections=(6, 5, 5)),
            mlp=4 * WIDTH,
            moe=MoeConfig(experts, top_k=2, mlp=2 * WIDTH),
        ),
        VisionTokenIds(2040, 2041, 2042, 2043),
        Runtime(remat="full"),
    )


def batch_of(config: ModelConfig, rows: int, patch_rows: int):
    """Rows of TOKENS tokens with `patch_rows` images of SIDE x SIDE patches."""
    rng, visual = np.random.default_rng(0), SIDE * SIDE // 4
    image = lambda: mllm_jax.Image(
        rng.integers(0, 256, (SIDE * SIDE, config.encoder.patch_values), np.uint8), (SIDE, SIDE)
    )

    def conversation(images: int):
        places = np.arange(TOKENS // 4, dtype=np.int32)
        index = np.where(places < visual * images, places, -1)
        position = np.repeat(places[:, None], 3, axis=1)
        ids = rng.integers(0, 2000, len(places)).astype(np.int32)
        weight = (index < 0).astype(np.float32)
        return mllm_jax.Example(ids, weight, position, index, tuple(image() for _ in range(images)))

    assert visual <= TOKENS // 4
    budget = mllm_jax.Budget(TOKENS, patch_rows, SIDE * SIDE)
    examples = [[conversation(int(i < patch_rows)) for i in range(4)] for _ in range(rows)]
    return mllm_jax.collate(examples, budget, merge=2, values=config.encoder.patch_values)


@functools.cache  # the base belongs to every series
def measure(rounds: int, rows: int, patch_rows: int, experts: int, layers: int) -> tuple[float, float]:
    """(median seconds of a step, seconds of its tracing and compilation)."""
    config, optim, rng = model(layers, experts), OptimConfig(), np.random.default_rng(0)
    mesh, shapes = mllm_jax.make_mesh(devices=jax.devices()[:1]), abstract_params(config)
    context = TrainContext(config, optim, mesh)
    params = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), shapes)
    state, batch = state_from_params(context, params), jax.device_put(batch_of(config, rows, patch_rows))
    start = time.perf_counter()
    step = make_train_step(context, CrossEntropy(config)).lower(state, batch).compile()
    compiled, seconds = time.perf_counter() - start, []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), compiled


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each (default 5)")
    rounds = parser.parse_args().rounds
    print(f"{'':24}{'s/step':>9}{'ratio':>8}{'compile s':>11}")
    for name, values in SERIES.items():
        first = None
        for value in values:
            seconds, compiled = measure(rounds, **BASE | {name: value})
            first = first or seconds
            print(f"{name.replace('_', ' '):14}{value:10}{seconds:9.3f}{seconds / first:8.2f}{compiled:11.1f}")


if __name__ == "__main__":
    main()
