"""PPO: trains a model on its own answers, with rewards of a reward model that uses the same processor."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.reward import PpoPrompts
from mllm_jax.train.algorithms.base import Algorithm
from mllm_jax.train.algorithms.ppo_step import make_ppo_step
from mllm_jax.train.algorithms.rollout import FrozenModels
from mllm_jax.train.checkpoint.fingerprint import verify_frozen_weights
from mllm_jax.train.checkpoint.restore import first_params, processor_of, read_config, restore_params
from mllm_jax.train.input.processors import chat_processor
from mllm_jax.train.losses.algorithm_config import FIRST
from mllm_jax.train.losses.reward import RewardConfig
from mllm_jax.train.runs.config import Run
from mllm_jax.train.step.context import TrainContext

FILE = "judge.json"  # in the folder of a PPO run: fingerprints of its initial weights and of its reward model


class Ppo(Algorithm):
    """Trains a model on its own answers, see `PpoConfig`."""

    def check_sources(self) -> None:
        self.judge_run()

    def judge_run(self) -> Run:
        """Returns the run that trained the reward model. Raises ConfigError if `reward_model` is not such a run."""
        folder = self.config.reward_model
        setting = f"config.algorithm.reward_model={folder!r}"
        try:
            run = read_config(folder)
        except FileNotFoundError as error:
            raise ConfigError(f"{setting}: must be the folder of a run that trained a reward model: {error}") from error
        if not isinstance(run.algorithm, RewardConfig):
            raise ConfigError(f"{setting}: did not train a reward model. Train one with algorithm=RewardConfig().")
        return run

    def reading(self) -> PpoPrompts:
        """Returns the reading of records as prompts, followed by the reward model's own prompt for a verdict."""
        return PpoPrompts(self.judge_run().algorithm.prompt)

    def cost(self) -> None:
        return None  # unknown before the answers are generated

    def frozen(self, mesh: Mesh, workdir: Path, resumed: bool) -> tuple[FrozenModels]:
        """Returns the reward model and, if configured, a frozen reference.

        Raises:
          ConfigError: the reward model is missing, processes conversations differently than the policy, or is not the
            one that a resumed run began with; or the answers exceed the model's positions.
        """
        if jax.process_count() > 1:
            raise ConfigError("config.algorithm: PPO runs as one process. Start a single process with all devices.")
        run, judge_run, ppo = self.run, self.judge_run(), self.config
        own, other = (chat_processor(processor_of(x), x.model, x.data) for x in (run, judge_run))
        if faults := differences(run, judge_run, own, other):
            faults = "; ".join(faults)
            raise ConfigError(
                f"config.algorithm.reward_model={ppo.reward_model!r}: processes inputs differently than the policy: "
                f"{faults}. Train it with the same processor."
            )
        length, positions = run.data.tokens + ppo.response_length, run.model.decoder.positions
        if 0 < positions < length:
            raise ConfigError(
                f"config.data.tokens + config.algorithm.response_length is {length}: the model has only {positions} "
                "positions. Lower either."
            )
        first_weights = first_params(run, mesh) if ppo.reference == FIRST else None
        model, reward = restore_params(ppo.reward_model, mesh=mesh)
        verify_frozen_weights(
            Path(workdir) / FILE,
            resumed,
            ("reference", run.first_weights, first_weights),
            ("reward model's", f"config.algorithm.reward_model={ppo.reward_model!r}", reward),
        )
        return (FrozenModels(reward, jnp.asarray(own.stop_ids, jnp.int32), first_weights, model),)

    def check_plannable(self) -> None:
        raise ConfigError(
            "config.algorithm: PPO steps cannot be planned. Plan with algorithm=SupervisedConfig(), and add generation."
        )

    def step(self, context: TrainContext) -> Callable:
        return make_ppo_step(context, self.config, self.run.train.loss_chunk)


def differences(run: Run, judged: Run, own: Processor, other: Processor) -> list[str]:
    """Returns the differences between how the policy (`own`) and the reward model (`other`) process conversations."""
    pairs = {
        "the tokenizers": (own.tokenizer.vocabulary, other.tokenizer.vocabulary),
        "the chat templates": (own.template, other.template),
        "how images are read": (own.spec, other.spec),
        "the patches of images": (run.model.layout, judged.model.layout),
    }
    return [f"{name} differ" for name, (policy, reward) in pairs.items() if policy != reward]
