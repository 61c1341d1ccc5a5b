"""Training algorithms: the type of `config.algorithm` chooses one."""

from mllm_jax.train.algorithms.base import Algorithm
from mllm_jax.train.algorithms.contrastive import Contrastive
from mllm_jax.train.algorithms.ppo import Ppo
from mllm_jax.train.algorithms.preference import Preference
from mllm_jax.train.algorithms.reward import Reward
from mllm_jax.train.algorithms.supervised import Supervised
from mllm_jax.train.losses.algorithm_config import AlgorithmConfig
from mllm_jax.train.losses.contrastive import ContrastiveConfig
from mllm_jax.train.losses.cross_entropy import SupervisedConfig
from mllm_jax.train.losses.ppo import PpoConfig
from mllm_jax.train.losses.preference import PreferenceConfig
from mllm_jax.train.losses.reward import RewardConfig
from mllm_jax.train.runs.config import Run

ALGORITHMS: dict[type[AlgorithmConfig], type[Algorithm]] = {
    SupervisedConfig: Supervised,
    PreferenceConfig: Preference,
    RewardConfig: Reward,
    PpoConfig: Ppo,
    ContrastiveConfig: Contrastive,
}


def algorithm_of(run: Run) -> Algorithm:
    """Returns the algorithm that `run.algorithm` configures."""
    return ALGORITHMS[type(run.algorithm)](run)
