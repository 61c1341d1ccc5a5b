"""Asks a model held-out questions, and prints the share of right answers of every kind. Of a dual encoder it prints how
often the nearest text of an image is its own, and the nearest image of a text.

    python -m mllm_jax.evaluate --workdir DIR                                    a training run, on its held-out data
    python -m mllm_jax.evaluate --checkpoint FOLDER --config configs/scenes.py   published or exported weights

The questions are those of `config.data`, which `--config FILE --config.data.path=...` replaces. Answers are decoded
greedily and compared as texts, but for case, blanks and a final full stop.
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

CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the questions; by default that of the run.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run: its newest checkpoint is evaluated.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder or hub name of weights in Hugging Face's format.")
STAGE = flags.DEFINE_string("stage", None, "Stage of a run with stages; by default the last complete one.")
SPLIT = flags.DEFINE_enum("split", "heldout", ["heldout", "train"], "Split of the config's conversations.")
COUNT = flags.DEFINE_integer("count", 1000, "Number of conversations, spread evenly over the split.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Conversations answered at once.", lower_bound=1)
LONGEST = flags.DEFINE_integer("max_new_tokens", 32, "Largest number of tokens of an answer.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "File for all answers, as JSON Lines.")


def main() -> None:
    if (WORKDIR.value is None) == (CHECKPOINT.value is None):
        raise ConfigError("name what to evaluate: either --workdir or --checkpoint")
    if WORKDIR.value is None and CONFIG.value is None:
        raise ConfigError("--checkpoint needs a --config that names the questions")
    if OUTPUT.value and not Path(OUTPUT.value).absolute().parent.is_dir():
        raise ConfigError(f"--output={OUTPUT.value} is in a folder that does not exist")
    folder = run_folder(WORKDIR.value, STAGE.value) if WORKDIR.value else None
    run = read_run(one_run(CONFIG.value, STAGE.value)) if CONFIG.value else read_config(folder)
    source = run.data.source(SPLIT.value)
    if source is None:
        raise ConfigError("config.data names no held-out conversations: set data.heldout or data.heldout_where")
    vlm = load_workdir(folder) if folder else load_pretrained(CHECKPOINT.value)
    if isinstance(vlm.config, DualConfig):
        found = retrieval(vlm, run, source, COUNT.value)
        for kind, share in found["recall_at_1"].items():
            print(f"{kind:12} {share:7.1%} recall at 1 of {found['pairs']:,} pairs")
        return
    records = Spread(source, COUNT.value)
    answers = ask(vlm, records, BATCH_SIZE.value, LONGEST.value)
    answers = list(track(answers, "answering", total=len(records), console=Console(stderr=True)))
    for kind, share in scores(answers).items():
        asked = sum(kind in ("all", answer.kind or "other") for answer in answers)
        print(f"{kind:12} {share:7.1%} of {asked}")
    if OUTPUT.value:  # last, so that a full disk does not prevent printing
        write_atomically(OUTPUT.value, "".join(map(_line, answers)))


def _line(answer: Answer) -> str:
    fields = {name: value for name, value in answer._asdict().items() if name != "image"}
    return json.dumps(fields | {"right": exact_match(answer.answer, answer.truth)}) + "\n"


if __name__ == "__main__":
    command.run(main, (ValueError,))  # of weights and conversations that cannot be read
