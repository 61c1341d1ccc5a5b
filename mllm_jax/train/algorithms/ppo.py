"""PPO: learning from answers of the model's own, which a reward model judges that reads as the model does."""

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

FILE = "judge.json"  # in the folder of a run of PPO: fingerprints of the weights that it began with, and of its judge


class Ppo(Algorithm):
    """Learns from answers of the model's own, see `PpoConfig`."""

    def check_sources(self) -> None:
        self.judge_run()

    def judge_run(self) -> Run:
        """The run that trained the reward model. Raises ConfigError where it did not."""
        folder = self.config.reward_model
        what = f"config.algorithm.reward_model={folder!r}"
        try:
            found = read_config(folder)
        except FileNotFoundError as error:
            raise ConfigError(f"{what} must be the folder of a run that trained a reward model: {error}") from error
        if not isinstance(found.algorithm, RewardConfig):
            raise ConfigError(f"{what} did not train a reward model; train one with algorithm=RewardConfig()")
        return found

    def reading(self) -> PpoPrompts:
        """Reads records as prompts, with the turn that asks for a verdict as the reward model was trained on it."""
        return PpoPrompts(self.judge_run().algorithm.prompt)

    def cost(self) -> None:
        return None  # unknown before the answers are generated

    def frozen(self, mesh: Mesh, workdir: Path, resumed: bool) -> tuple[FrozenModels]:
        """The reward model and, if configured, a frozen reference.

        Raises:
          ConfigError: there is no reward model, it reads conversations otherwise than the model, or a resumed run had
            another reward model.
        """
        if jax.process_count() > 1:
            raise ConfigError("config.algorithm: PPO runs as one process, on any number of its devices")
        run, judged, ppo = self.run, self.judge_run(), self.config
        own, other = (chat_processor(processor_of(one), one.model, one.data) for one in (run, judged))
        if differ := differences(run, judged, own, other):
            listed = "; ".join(differ)
            raise ConfigError(
                f"config.algorithm.reward_model={ppo.reward_model!r} reads otherwise than the model: {listed}"
            )
        room, positions = run.data.tokens + ppo.response_length, run.model.decoder.positions
        if 0 < positions < room:
            raise ConfigError(
                f"config.data.tokens and config.algorithm.response_length are {room} tokens, and the model has learned "
                f"{positions} positions: lower the one or the other"
            )
        first = first_params(run, mesh) if ppo.reference == FIRST else None
        model, reward = restore_params(ppo.reward_model, mesh=mesh)
        verify_frozen_weights(
            Path(workdir) / FILE,
            resumed,
            ("reference", run.first_weights, first),
            ("reward model's", f"config.algorithm.reward_model={ppo.reward_model!r}", reward),
        )
        return (FrozenModels(reward, jnp.asarray(own.stop_ids, jnp.int32), first, model),)

    def check_plannable(self) -> None:
        raise ConfigError(
            "steps of PPO are not planned; plan one with algorithm=SupervisedConfig(), and add generation"
        )

    def step(self, context: TrainContext) -> Callable:
        return make_ppo_step(context, self.config, self.run.train.loss_chunk)


def differences(run: Run, judged: Run, own: Processor, other: Processor) -> list[str]:
    """Differences between how a reward model and a model read the same conversation, as texts."""
    pairs = {
        "the tokenizers": (own.tokenizer.vocabulary, other.tokenizer.vocabulary),
        "the chat templates": (own.template, other.template),
        "how images are read": (own.spec, other.spec),
        "the patches of images": (run.model.layout, judged.model.layout),
    }
    return [f"{name} differ" for name, (ours, theirs) in pairs.items() if ours != theirs]
