"""What a run of PPO needs beside its step: how records are read, and the judge, which must read as the model does."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm_jax.common.config import ConfigError
from mllm_jax.common.files import write_whole
from mllm_jax.common.workdir import BEGIN_ANEW, read_note
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.reward import Prompts
from mllm_jax.train.algorithms.rollout import Judge
from mllm_jax.train.checkpoint.fingerprint import fingerprint
from mllm_jax.train.checkpoint.restore import first_params, processor_of, read_config, restore_params
from mllm_jax.train.input.processors import make_processor
from mllm_jax.train.losses.preference import FIRST
from mllm_jax.train.runs.config import Run

FILE = "judge.json"  # in the folder of a run of PPO: fingerprints of the weights that it began with, and of its judge


def prompts_of(run: Run) -> Prompts:
    """How the records of a run of PPO are read: the verdict is asked for as its reward model was trained to give it."""
    return Prompts(judge_run(run).train.reward.prompt)


def judge_run(run: Run) -> Run:
    """The run that trained the reward model. Raises ConfigError where it did not."""
    folder = run.train.ppo.reward
    what = f"config.train.ppo.reward={folder!r}"
    try:
        found = read_config(folder)
    except FileNotFoundError as error:
        raise ConfigError(f"{what} must be the folder of a run that trained a reward model: {error}") from error
    if not found.train.reward.learn:
        raise ConfigError(f"{what} did not train a reward model; train one with config.train.reward.learn=True")
    return found


def make_judge(run: Run, mesh: Mesh, workdir: Path, resumed: bool) -> Judge:
    """What a step takes beside state and batch; checkpoints leave it out.

    Raises:
      ConfigError: there is no reward model, it reads otherwise than the model, or a resumed run had another judge.
    """
    if jax.process_count() > 1:
        raise ConfigError("config.train.ppo: PPO runs as one process, on any number of its devices")
    judged, ppo = judge_run(run), run.train.ppo
    own, other = (make_processor(processor_of(one), one.model, one.data) for one in (run, judged))
    if differ := differences(run, judged, own, other):
        raise ConfigError(f"config.train.ppo.reward={ppo.reward!r} reads otherwise than the model: {'; '.join(differ)}")
    room, positions = run.data.tokens + ppo.new_tokens, run.model.decoder.positions
    if 0 < positions < room:
        raise ConfigError(
            f"config.data.tokens and config.train.ppo.new_tokens are {room} tokens, and the model has learned "
            f"{positions} positions: lower the one or the other"
        )
    first = first_params(run, mesh) if ppo.reference == FIRST else None
    model, reward = restore_params(ppo.reward, mesh=mesh)
    found = {"first": None if first is None else int(fingerprint(first)), "reward": int(fingerprint(reward))}
    file = Path(workdir) / FILE
    if not resumed:
        write_whole(file, json.dumps(found) + "\n")
    elif read_note(file, BEGIN_ANEW, reward=int) != found:
        raise ConfigError(
            f"{workdir} had other weights to begin with, or another reward model, than config.init={run.init!r}, "
            f"config.train.seed={run.train.seed} and config.train.ppo.reward={ppo.reward!r} give now: give it those "
            "again, or use another --workdir"
        )
    return Judge(reward, jnp.asarray(own.stop_ids, jnp.int32), first, model)


def differences(run: Run, judged: Run, own: Processor, other: Processor) -> list[str]:
    """In what a reward model and a model read the same conversation otherwise, as texts."""
    pairs = {
        "the tokenizers": (own.tokenizer.vocabulary, other.tokenizer.vocabulary),
        "the chat templates": (own.template, other.template),
        "how pictures are read": (own.spec, other.spec),
        "the patches of pictures": (run.model.layout, judged.model.layout),
    }
    return [f"{name} differ" for name, (ours, theirs) in pairs.items() if ours != theirs]
