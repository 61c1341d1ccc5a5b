"""The context of a run: model, optimizer and mesh, from which its step, state and checkpoints are made."""

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
    """Model, optimizer and mesh of a run. Derived values are computed once, on first access.

    grad_accum_steps: A, number of parts in which a batch of A * B rows is processed. The result is that of one part.
    balance: load balancing of a model with experts.
    async_gathers: see `mllm_jax.train.step.compiler`.
    seed: seed of adapter dropout and of the algorithm's sampling; with the step number it gives the same values on any
      mesh.
    optimizer: replaces the optimizer of `optim`. None: no replacement.
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
        """The optimizer, see `make_optimizer`, which raises ValueError."""
        return self.optimizer or make_optimizer(self.optim, abstract_params(self.model))[0]

    @cached_property
    def state(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return abstract_state(self.model, self.tx)

    @cached_property
    def state_shardings(self) -> TrainState:
        """NamedSharding of every leaf of the state. Raises ValueError if a size does not divide over the mesh."""
        return state_shardings(self.model, self.tx, self.mesh, self.model.runtime.rules)


def init_state(context: TrainContext, key) -> TrainState:
    """Returns random parameters and new moments, created sharded. A key gives the same values on any mesh."""
    init = lambda key: new_state(context.tx, init_params(context.model, key))
    return jax.jit(init, out_shardings=context.state_shardings)(key)


def state_from_params(context: TrainContext, params) -> TrainState:
    """Returns a state of given parameters with new moments. Donates `params` if they are already sharded like it."""
    state_shardings = context.state_shardings
    params = jax.device_put(params, state_shardings.params)
    return jax.jit(lambda params: new_state(context.tx, params), donate_argnums=0, out_shardings=state_shardings)(
        params
    )
