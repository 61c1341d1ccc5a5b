"""What a run's step, its state and its checkpoints are made from."""

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
    """A model, how it is optimized, and on which devices; what follows from these is computed once, when it is read.

    grad_accum_steps: A, number of parts that a batch of A * B rows is worked off in; the result is that of the whole
      batch.
    balance: of a model with experts.
    async_gathers: see `mllm_jax.train.step.compiler`.
    seed: of the dropout of adapters, which with the number of the step says what is left out, on any mesh; and of
      what an algorithm draws.
    optimizer: in place of that of `optim`.
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
    """Given parameters (pretrained, say) and fresh moments. `params` is donated where it already lies as it should."""
    layout = context.state_shardings
    params = jax.device_put(params, layout.params)
    return jax.jit(lambda params: new_state(context.tx, params), donate_argnums=0, out_shardings=layout)(params)
