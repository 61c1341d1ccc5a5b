"""Evaluates a model on held-out questions, and prints the share of right answers per kind of question.

For a dual encoder, it prints recall at 1: how often the nearest text of an image is its own, and vice versa.

    python -m mllm_jax.evaluate --workdir DIR                                    a training run, on its held-out data
    python -m mllm_jax.evaluate --checkpoint FOLDER --config configs/scenes.py   published or exported weights

The questions come from `config.data`; `--config FILE --config.data.path=...` replaces them. Answers are decoded
greedily and compared as texts, ignoring case, spaces and a final full stop.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.progress import track

from mllm_jax.common.config import ConfigError
from mllm_jax.common.files import write_atomically
from mllm_jax.common.workdir import run_folder
from mllm_jax.evaluate.ask import ask
from mllm_jax.evaluate.metrics import exact_match, scores
from mllm_jax.evaluate.report import Answer
from mllm_jax.evaluate.retrieval import retrieval
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.pretrained.api import load_pretrained
from mllm_jax.train.checkpoint.restore import load_workdir, read_config
from mllm_jax.train.evaluators.base import Spread
from mllm_jax.train.runs import command
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.runs.stages import one_run

CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the questions. Default: the run's.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run, whose newest checkpoint is evaluated.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder or hub name of weights in Hugging Face's format.")
STAGE = flags.DEFINE_string("stage", None, "Stage of a run with stages. Default: the last complete one.")
SPLIT = flags.DEFINE_enum("split", "heldout", ["heldout", "train"], "Split of the config's conversations.")
COUNT = flags.DEFINE_integer("count", 1000, "Number of conversations, spread evenly over the split.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Number of conversations per batch.", lower_bound=1)
LONGEST = flags.DEFINE_integer("max_new_tokens", 32, "Maximum number of tokens of an answer.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "File for all answers, as JSON Lines.")


def main() -> None:
    if (WORKDIR.value is None) == (CHECKPOINT.value is None):
        raise ConfigError(
            "--workdir, --checkpoint: exactly one is needed. Name the model to evaluate with one of them."
        )
    if WORKDIR.value is None and CONFIG.value is None:
        raise ConfigError("--checkpoint: the questions are missing. Add --config FILE.")
    if OUTPUT.value and not Path(OUTPUT.value).absolute().parent.is_dir():
        raise ConfigError(f"--output={OUTPUT.value}: its folder does not exist. Create it.")
    folder = run_folder(WORKDIR.value, STAGE.value) if WORKDIR.value else None
    run = read_run(one_run(CONFIG.value, STAGE.value)) if CONFIG.value else read_config(folder)
    source = run.data.source(SPLIT.value)
    if source is None:
        raise ConfigError("config.data: has no held-out conversations. Set data.heldout or data.heldout_where.")
    vlm = load_workdir(folder) if folder else load_pretrained(CHECKPOINT.value)
    if isinstance(vlm.config, DualConfig):
        results = retrieval(vlm, run, source, COUNT.value)
        for kind, share in results["recall_at_1"].items():
            print(f"{kind:12} {share:7.1%} recall at 1 of {results['pairs']:,} pairs")
        return
    records = Spread(source, COUNT.value)
    answers = ask(vlm, records, BATCH_SIZE.value, LONGEST.value)
    answers = list(track(answers, "answering", total=len(records), console=Console(stderr=True)))
    for kind, share in scores(answers).items():
        num_questions = sum(kind in ("all", answer.kind or "other") for answer in answers)
        print(f"{kind:12} {share:7.1%} of {num_questions}")
    if OUTPUT.value:  # last, so that scores are printed even if the disk is full
        write_atomically(OUTPUT.value, "".join(map(_line, answers)))


def _line(answer: Answer) -> str:
    fields = {name: value for name, value in answer._asdict().items() if name != "image"}
    return json.dumps(fields | {"right": exact_match(answer.answer, answer.truth)}) + "\n"


if __name__ == "__main__":
    command.run(main, (ValueError,))  # raised for unreadable weights and conversations
