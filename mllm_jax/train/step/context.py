"""The context from which a run's step, state and checkpoints are made."""

from dataclasses import dataclass
from functools import cached_property

import jax
import optax
from jax.sharding import Mesh

from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.model.vlm import ModelConfig, abstract_params, init_params
from mllm_jax.train.losses.load_balance import BalanceConfig
from mllm_jax.train.step.optimizer import OptimConfig, make_optimizer
from mllm_jax.train.step.state import TrainState, abstract_state, new_state, state_shardings


@dataclass(frozen=True, eq=False)
class TrainContext:
    """A model, its optimizer and its mesh; derived values are computed once, at the first read.

    grad_accum_steps: A, number of parts in which a batch of A * B rows is processed, with the result of the whole
      batch.
    balance: load balancing of a model with experts.
    async_gathers: see `mllm_jax.train.step.compiler`.
    seed: seed of adapter dropout, which with the number of the step gives the same values on any mesh, and of random
      draws of an algorithm.
    optimizer: used instead of that of `optim`.
    """

    model: ModelConfig | DualConfig
    optim: OptimConfig
    mesh: Mesh
    grad_accum_steps: int = 1
    balance: BalanceConfig = BalanceConfig()
    async_gathers: bool = False
    seed: int = 0
    optimizer: optax.GradientTransformation | None = None

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        """The update rule; see `make_optimizer`, which raises ValueError."""
        return self.optimizer or make_optimizer(self.optim, abstract_params(self.model))[0]

    @cached_property
    def state(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return abstract_state(self.model, self.tx)

    @cached_property
    def state_shardings(self) -> TrainState:
        """NamedSharding of every leaf of the state. Raises ValueError where a size does not divide over the mesh."""
        return state_shardings(self.model, self.tx, self.mesh, self.model.runtime.rules)


def init_state(context: TrainContext, key) -> TrainState:
    """Random parameters and fresh moments, made where they will live. A key gives the same values on any mesh."""
    make = lambda key: new_state(context.tx, init_params(context.model, key))
    return jax.jit(make, out_shardings=context.state_shardings)(key)


def state_from_params(context: TrainContext, params) -> TrainState:
    """State of given (such as pretrained) parameters with new moments. Donates `params` if they are sharded alike."""
    layout = context.state_shardings
    params = jax.device_put(params, layout.params)
    return jax.jit(lambda params: new_state(context.tx, params), donate_argnums=0, out_shardings=layout)(params)
