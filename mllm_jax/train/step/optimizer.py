"""The optimizer of a run: patterns of trained weights and their learning rates, a schedule, an optax transformation."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from mllm_jax.common.settings import (
    Config,
    Fraction,
    NonNegative,
    NonNegativeInt,
    OneOf,
    Pattern,
    Positive,
    Range,
)
from mllm_jax.common.trees import check_patterns, first_found, flatten, map_with_paths, partition

SCHEDULES = {
    "constant": lambda t: jnp.ones_like(t),
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + jnp.cos(jnp.pi * t)),
    "step": lambda t: 10.0 ** (-0.5 * ((t >= 0.5) + (t >= 0.75).astype(jnp.float32))),
}


Decay = Annotated[float, Range(least=0, below=1)]  # of a running mean


@dataclass(frozen=True)
class OptimConfig(Config):
    """
    name: "adamw", "muon" (matrices of layers; AdamW for the rest) or "adafactor".
    schedule: "cosine", "linear", "constant", or "step" (divided by the square root of 10 after one half and again after
      three quarters, DeepSeek-VL2, arXiv 2412.10302), after a linear rise over `warmup` of the `steps` updates.
    steps: updates of the weights; of PPO, batches. 0: as many as `data.epochs` make, see `mllm_jax.train.length`.
    final_lr_ratio: share of `learning_rate` that is left at the end of the schedule.
    weight_decay: decoupled, times the learning rate; on matrices and adapters, not on norms, biases and embeddings.
    max_grad_norm: largest global norm of the gradients; 0 = any.
    lr_multipliers: (pattern, factor) pairs; the first pattern that is found in a weight's path scales its learning
      rate.
    freeze: patterns of weights that are not trained: they have no optimizer state and cost no backward pass.

    Patterns are regular expressions searched for in paths such as "decoder/layers/mlp/gate/w".
    """

    name: Annotated[str, OneOf(lambda: RULES)] = "adamw"
    learning_rate: NonNegative = 1e-4
    schedule: Annotated[str, OneOf(tuple(SCHEDULES))] = "cosine"
    warmup: NonNegativeInt = 0
    steps: NonNegativeInt = 1000
    final_lr_ratio: Fraction = 0.0
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: Annotated[float, Range(least=0, hint="Set 0 for no clipping.")] = 1.0
    lr_multipliers: tuple[tuple[Pattern, NonNegative], ...] = ()
    freeze: tuple[Pattern, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.steps and self.warmup > self.steps:
            tenth = self.steps // 10
            raise ValueError(f"warmup={self.warmup} is longer than the run, steps={self.steps}. Set warmup={tenth}")


def make_schedule(config: OptimConfig) -> Callable:
    """Update number i32[] (0-based) -> learning rate f32[]. The first update has learning_rate / warmup, never 0."""

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum((count + 1) / max(config.warmup, 1), 1)
        t = jnp.clip((count - config.warmup) / max(config.steps - config.warmup, 1), 0, 1)
        fall = config.final_lr_ratio + (1 - config.final_lr_ratio) * SCHEDULES[config.schedule](t)
        return config.learning_rate * rise * jnp.where(count < config.warmup, 1, fall)

    return schedule


def make_optimizer(config: OptimConfig, params) -> tuple[optax.GradientTransformation, Callable]:
    """The update rule and its schedule.

    Clipping is not part of it: the train step clips, where it reports the norm.

    Args:
      config: see OptimConfig.
      params: all parameters, arrays or shapes; patterns are checked against them.
    Returns:
      (transformation, schedule). `init` takes all parameters or the trainable ones and keeps state for these alone;
      `update` takes gradients of, and the, trainable ones (see `split`).
    Raises:
      ValueError: a pattern matches no weight, or nothing is left to train.
    """
    paths = list(flatten(params))
    check_patterns(config.freeze, paths, "optim.freeze")
    check_patterns([pattern for pattern, _ in config.lr_multipliers], paths, "optim.lr_multipliers")
    if not split(params, config.freeze)[0]:
        raise ValueError(f"optim.freeze={config.freeze} leaves nothing to train")
    schedule = make_schedule(config)
    chain = [RULES[config.name](config)]
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=_decays))
    if config.lr_multipliers:
        scaled = lambda path, x: x * first_found(config.lr_multipliers, path, 1.0)
        chain.append(optax.stateless(lambda updates, _: map_with_paths(scaled, updates)))
    chain.append(optax.scale_by_learning_rate(schedule))
    inner = optax.chain(*chain)
    init = lambda params: inner.init(split(params, config.freeze)[0])
    return optax.GradientTransformation(init, inner.update), schedule


BIAS = r"/mlp/bias$"  # of routers: only the choice of experts depends on them
NOT_BY_GRADIENT = rf"{BIAS}|/lora_(scale|keep)$"  # also constants of adapters


def split(params, freeze: tuple[str, ...]) -> tuple[dict, dict]:
    """A nested dict -> (what is trained, what is not), both nested dicts without the leaves of the other.

    What is not are the leaves that `freeze` finds, the biases of routers, and the constants of adapters.
    """
    patterns = (*freeze, NOT_BY_GRADIENT)
    frozen, trained = partition(params, lambda path: any(re.search(pattern, path) for pattern in patterns))
    return trained, frozen


def _decays(params) -> dict:
    return map_with_paths(lambda path, _: path.endswith(("/w", "/lora_down", "/lora_up")), params)


# Input and output axes of a matrix; along other axes (layers, q-k-v) matrices are stacked.
MATRICES = (
    (r"attention/(q|k|v|qkv)/w$", MuonDimensionNumbers(-3, (-2, -1))),
    (r"attention/out/w$", MuonDimensionNumbers((-3, -2), -1)),
    (r"(mlp|shared)/(gate|up|down)/w$", MuonDimensionNumbers(-2, -1)),
    (r"mlp/experts_(gate_up|down)/w$", MuonDimensionNumbers(-2, -1)),
)


def _matrices(params) -> dict:
    dimensions = lambda path, _: next((axes for pattern, axes in MATRICES if re.search(pattern, path)), None)
    return map_with_paths(dimensions, params)


def _adamw(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Updates with the root mean square that AdamW's have, so that its learning rates serve (arXiv 2502.16982)."""
    muon = optax.contrib.muon(
        learning_rate=1.0,
        eps=config.eps,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
    )
    return optax.chain(muon, optax.scale(-1.0))  # the sign and the learning rate belong to the end of the chain


def _adafactor(config: OptimConfig) -> optax.GradientTransformation:
    """Factored second moments, no momentum (arXiv 1804.04235)."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


RULES = {"adamw": _adamw, "muon": _muon, "adafactor": _adafactor}
