"""The share of things in a model's captions that are not in the image (CHAIR_i, arXiv 1809.02156).

python benchmarks/false_objects.py --workdir /tmp/prefer [--count 400] [--examples 4]

Every stage of a run of `configs/prefer.py` that has ended captions the same held-out images, greedily. Shares have
their standard errors.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from mllm_jax.common.cli import Parser
from mllm_jax.common.workdir import ended
from mllm_jax.data.synthetic.captions import Share, count_named, false_share, recall
from mllm_jax.evaluate.ask import ask
from mllm_jax.evaluate.report import Answer
from mllm_jax.train.checkpoint.restore import load_workdir, read_config
from mllm_jax.train.evaluators.base import Spread


def captions(folder: Path, count: int) -> list[Answer]:
    """Captions by the model in a run's or a stage's folder of `count` held-out images, and the truth."""
    images = Spread(read_config(folder).data.source("heldout"), count)
    return list(ask(load_workdir(folder), images, batch_size=50, max_new_tokens=24))


def shown(share: Share) -> str:
    return f"{share.value:.1%} ± {share.error:.1%}"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a run of configs/prefer.py")
    parser.add_argument("--count", type=int, default=400, help="number of held-out images (default 400)")
    parser.add_argument("--examples", type=int, default=4, help="captions that are printed (default 4)")
    arguments = parser.parse_args()
    said = {stage: captions(arguments.workdir / stage, arguments.count) for stage in ended(arguments.workdir)}
    if not said:
        parser.error(f"no stage of a run has ended in {arguments.workdir}")
    shares = Table(
        *("stage", "things named", "of these false", "named of what is there"), title=f"{arguments.count} captions"
    )
    for stage, answers in said.items():
        named = [count_named(answer.answer, answer.truth) for answer in answers]
        shares.add_row(stage, str(sum(one.things for one in named)), shown(false_share(named)), shown(recall(named)))
    examples = Table("what is there", *said)
    for answers in list(zip(*said.values()))[: arguments.examples]:
        examples.add_row(answers[0].truth, *(answer.answer for answer in answers))
    for table in (shares, examples):
        Console().print(table)


if __name__ == "__main__":
    main()
