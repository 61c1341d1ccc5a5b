"""The optimizer of a run: trained and frozen weights, learning rate schedule and multipliers, optax transformation."""

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


Decay = Annotated[float, Range(least=0, below=1)]  # decay of a running mean


@dataclass(frozen=True)
class OptimConfig(Config):
    """Optimizer, learning rate schedule, and frozen weights.

    name: "adamw", "muon" (layer matrices; AdamW for all other weights) or "adafactor".
    learning_rate: peak of the schedule.
    schedule: decay after warmup: "cosine", "linear", "constant", or "step" (divided by sqrt(10) after half and after
      three quarters of the updates, DeepSeek-VL2, arXiv 2412.10302).
    warmup: number of updates with a linearly rising learning rate, part of `steps`.
    steps: number of updates; for PPO, of batches. 0: as many as `data.epochs` give, see `mllm_jax.train.length`.
    final_lr_ratio: final learning rate as a fraction of `learning_rate`.
    weight_decay: decoupled weight decay, scaled by the learning rate. Applied to matrices and adapters, not to norms,
      biases and embeddings.
    max_grad_norm: global norm to which gradients are clipped. 0: no clipping.
    lr_multipliers: (pattern, factor) pairs. The first pattern found in a weight's path scales its learning rate.
    freeze: patterns of frozen weights, which have no optimizer state and cost no backward pass.

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
            raise ValueError(f"warmup={self.warmup}: longer than the run, steps={self.steps}. Set warmup={tenth}.")


def make_schedule(config: OptimConfig) -> Callable:
    """Returns the schedule: update i32[], from 0 -> learning rate f32[]. Update 0 has learning_rate / warmup, not 0."""

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum((count + 1) / max(config.warmup, 1), 1)
        t = jnp.clip((count - config.warmup) / max(config.steps - config.warmup, 1), 0, 1)
        fall = config.final_lr_ratio + (1 - config.final_lr_ratio) * SCHEDULES[config.schedule](t)
        return config.learning_rate * rise * jnp.where(count < config.warmup, 1, fall)

    return schedule


def make_optimizer(config: OptimConfig, params) -> tuple[optax.GradientTransformation, Callable]:
    """Returns the optimizer and its learning rate schedule. The train step clips gradients, not the optimizer.

    Args:
      config: see OptimConfig.
      params: all parameters, arrays or shapes, against which patterns are checked.
    Returns:
      (transformation, schedule). `init` takes all parameters, or the trainable ones, and creates state for the
      trainable ones; `update` takes gradients and parameters of the trainable ones (see `split`).
    Raises:
      ValueError: a pattern matches no weight, or all weights are frozen.
    """
    paths = list(flatten(params))
    check_patterns(config.freeze, paths, "optim.freeze")
    check_patterns([pattern for pattern, _ in config.lr_multipliers], paths, "optim.lr_multipliers")
    if not split(params, config.freeze)[0]:
        raise ValueError(f"optim.freeze={config.freeze}: leaves nothing to train. Remove a pattern.")
    schedule = make_schedule(config)
    transforms = [RULES[config.name](config)]
    if config.weight_decay:
        transforms.append(optax.add_decayed_weights(config.weight_decay, mask=_decays))
    if config.lr_multipliers:
        scale_by_path = lambda path, x: x * first_found(config.lr_multipliers, path, 1.0)
        transforms.append(optax.stateless(lambda updates, _: map_with_paths(scale_by_path, updates)))
    transforms.append(optax.scale_by_learning_rate(schedule))
    optimizer = optax.chain(*transforms)
    init = lambda params: optimizer.init(split(params, config.freeze)[0])
    return optax.GradientTransformation(init, optimizer.update), schedule


BIAS = r"/mlp/bias$"  # router biases, which affect only the choice of experts
NOT_BY_GRADIENT = rf"{BIAS}|/lora_(scale|keep)$"  # router biases and constants of adapters


def split(params, freeze: tuple[str, ...]) -> tuple[dict, dict]:
    """Splits nested parameters into (trained, not trained), two nested dicts.

    Not trained are leaves whose paths match `freeze`, router biases, and constants of adapters.
    """
    patterns = (*freeze, NOT_BY_GRADIENT)
    frozen, trained = partition(params, lambda path: any(re.search(pattern, path) for pattern in patterns))
    return trained, frozen


def _decays(params) -> dict:
    return map_with_paths(lambda path, _: path.endswith(("/w", "/lora_down", "/lora_up")), params)


# Input and output axes of matrices. Other axes (layers, q-k-v) stack matrices.
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
    """Muon with AdamW's root mean square of updates, so that learning rates of AdamW fit (arXiv 2502.16982)."""
    muon = optax.contrib.muon(
        learning_rate=1.0,
        eps=config.eps,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
    )
    return optax.chain(muon, optax.scale(-1.0))  # `make_optimizer` applies the sign and the learning rate


def _adafactor(config: OptimConfig) -> optax.GradientTransformation:
    """Adafactor: factored second moments, no momentum (arXiv 1804.04235)."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


RULES = {"adamw": _adamw, "muon": _muon, "adafactor": _adafactor}
