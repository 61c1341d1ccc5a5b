"""The share of things in a model's captions that are not in the picture (CHAIR_i, arXiv 1809.02156).

python benchmarks/false_objects.py --workdir /tmp/prefer [--count 400]

Every stage of a run of `configs/prefer.py` that has ended captions the same held-out pictures, greedily.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mllm_jax.data.captions import Captions, Named, count_named
from mllm_jax.evaluate.ask import ask
from mllm_jax.train.checkpoint import load_workdir
from mllm_jax.train.heldout import Spread
from mllm_jax.train.stages import ended


def measure(folder: Path, count: int) -> Named:
    """What the model in a run's or a stage's folder names in its captions of `count` held-out pictures."""
    answers = ask(load_workdir(folder), Spread(Captions("heldout"), count), together=50, max_new_tokens=24)
    return count_named((answer.answer, answer.truth) for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a run of configs/prefer.py")
    parser.add_argument("--count", type=int, default=400, help="pictures (default 400)")
    arguments = parser.parse_args()
    table = Table("stage", "things named", "of these false", "things missed", title=f"{arguments.count} captions")
    for stage in ended(arguments.workdir):
        named = measure(arguments.workdir / stage, arguments.count)
        table.add_row(stage, str(named.things), f"{named.false_share:.1%}", str(named.missed))
    Console().print(table)


if __name__ == "__main__":
    main()
