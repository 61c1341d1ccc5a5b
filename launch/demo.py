"""Runs the full cycle on this machine: train, kill, resume, evaluate, generate, export and report.

    python -m launch.demo --workdir demo

Trains configs/scenes.py with and without images, in 10 to 15 minutes on two cores. Exits with 1 if a kind of question
stays below its bar, or if the exported model answers differently from the trained one.
"""

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import webbrowser
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mllm_jax.common.cli import OVERRIDE, Parser, run_command
from mllm_jax.common.format import percent, short
from mllm_jax.common.interrupts import INTERRUPTED
from mllm_jax.common.settings import PositiveInt, Range, argument
from mllm_jax.common.workdir import saved_steps
from mllm_jax.data.synthetic.scenes import chance
from mllm_jax.evaluate.report import Answer, Kind, Run, write_report

ROOT = Path(__file__).resolve().parents[1]
BARS = {"color": 0.9, "shape": 0.9, "count": 0.9, "movement": 0.9, "place": 0.85, "presence": 0.85}
MARKER = ".mllm_jax-demo"  # a folder with this file may be deleted by the next demo
TOGETHER = 50  # questions that are answered at once
LONGEST = 8  # tokens of an answer

LEAD = """A small Qwen3-VL was trained on this machine to answer questions about generated images and videos. It was
killed half-way, resumed, exported in Hugging Face's format and loaded again. Generated images are an embedded example:
scores tell nothing about photographs."""

console = Console(highlight=False)


class Failed(RuntimeError):
    """The demo cannot continue; users read the message."""


class Kill(NamedTuple):
    step: int  # the last step seen
    resumed: int  # step of the checkpoint from which the run resumes

    def __str__(self) -> str:
        return f"killed after step {self.step:,}, resumed from {self.resumed:,}"


class Trained(NamedTuple):
    """A finished training, its answers to held-out questions, and the share of right ones of every kind."""

    name: str
    folder: Path
    answers: list[Answer]
    scores: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m launch.demo", __doc__)
    parser.add_argument("--workdir", default="demo", help="folder of the results; an earlier demo there is deleted")
    parser.add_argument(
        "--steps",
        type=argument(Annotated[int, Range(least=10)]),
        help="steps of both trainings, instead of the config's",
    )
    parser.add_argument(
        "--questions", type=argument(PositiveInt), default=1000, help="held-out questions of the final evaluation"
    )
    parser.epilog = f"{OVERRIDE}PATH=VALUE is passed on to both trainings."
    options, overrides = parser.parse_with_overrides(arguments)
    try:
        return demo(fresh_folder(options.workdir), options.steps, options.questions, overrides)
    except Failed as error:
        console.print(str(error), style="bold red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("\nstopped; the next demo starts over")
        return INTERRUPTED


def demo(workdir: Path, steps: int | None, questions: int, overrides: Sequence[str]) -> int:
    began = time.perf_counter()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir / "compilations"))  # the second start is faster
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what was asked of it
    steps, settings = settings_of(steps)
    settings += overrides

    headline(1, "Training with images; it will be killed half-way")
    kill = train_until_killed(workdir / "with_images", settings, steps // 2)
    console.print(f"[bold yellow]{kill}[/] by the same command:")
    train(workdir / "with_images", settings)
    seconds = time.perf_counter() - began

    headline(2, "The same training without images, for comparison")
    train(workdir / "text_only", settings, blind=True)

    headline(3, f"Answering {questions:,} held-out questions")
    seeing, blind = (answered(workdir / name, questions) for name in ("with_images", "text_only"))

    headline(4, "Exporting in Hugging Face's format, and asking the exported model")
    same = export_and_compare(seeing, workdir / "export")

    headline(5, "Results")
    kinds = asked_kinds(seeing.answers)
    facts = {"Steps": f"{steps:,}", "Training time": f"{seconds // 60:.0f} min {seconds % 60:.0f} s"}
    facts["Exported model"] = "same answers" if same else "other answers"
    page = report(workdir / "report.html", seeing, blind, kinds, kill, facts)
    console.print(results(kinds, seeing, blind))
    console.print(f"{time.perf_counter() - began:.0f} s in all. The exported model: {workdir / 'export'}")
    console.print(f"The report: {page.as_uri()}", style="bold", soft_wrap=True)
    display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if display and sys.stdout.isatty():
        webbrowser.open(page.as_uri())
    missed = [kind.name for kind in kinds if not passes(kind, seeing)]
    if missed:
        console.print(f"[bold red]below the bar: {', '.join(missed)}")
    return int(bool(missed) or not same)


def headline(number: int, text: str) -> None:
    console.rule(f"[bold]{number}/5  {text}", align="left")


def fresh_folder(workdir: str | Path) -> Path:
    """An empty folder. What an earlier demo left there is deleted; a folder of anything else is refused."""
    folder = Path(workdir).resolve()
    if folder.exists():
        if not (folder.is_dir() and ((folder / MARKER).is_file() or not any(folder.iterdir()))):
            raise Failed(f"{folder} is not empty and not of a demo: name another --workdir, or remove it yourself")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("The next `python -m launch.demo` deletes this folder.\n")
    return folder


def settings_of(steps: int | None) -> tuple[int, list[str]]:
    """The length of both trainings and the settings that follow from it."""
    from configs.scenes import get_config

    optim = get_config().optim
    steps = steps or optim.steps
    settings = {
        "optim.steps": steps,
        "optim.warmup": min(optim.warmup, steps // 4),
        "train.save_every": max(1, steps // 20),
        "train.evaluate_every": max(1, steps // 8),
    }
    return steps, [f"--config.{name}={value}" for name, value in settings.items()]


@contextmanager
def training(workdir: Path, settings: Sequence[str], blind: bool = False) -> Iterator[subprocess.Popen]:
    """Context with the running training command; its process group is killed afterwards."""
    config = "configs/scenes.py:blind" if blind else "configs/scenes.py"
    command = ["-m", "mllm_jax.train", "--config", config, "--workdir", str(workdir), *settings]
    console.print(shlex.join(["python", *command]), style="dim", soft_wrap=True, markup=False)
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True)
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all have ended
        process.wait()


def train(workdir: Path, settings: Sequence[str], blind: bool = False) -> None:
    """Trains to the end; resumes the run in `workdir`."""
    with training(workdir, settings, blind) as process:
        if status := process.wait():
            raise Failed(f"training ended with status {status}, see the messages above")


def train_until_killed(workdir: Path, settings: Sequence[str], step: int) -> Kill:
    """Trains, and sends SIGKILL, which no program can catch, as soon as a checkpoint of `step` or later is complete."""
    with training(workdir, settings) as process:
        while (saved := max(saved_steps(workdir), default=0)) < step:
            if process.poll() is not None:
                raise Failed(f"training ended with status {process.poll()} before it could be killed")
            time.sleep(0.2)
    console.show_cursor(True)  # a killed progress bar leaves it hidden
    console.print()
    return Kill(max(last_step(workdir), saved), max(saved_steps(workdir), default=0))


def last_step(workdir: Path) -> int:
    from mllm_jax.train.monitor.metrics import read_metrics

    return max((record["step"] for record in read_metrics(workdir)), default=0)


def answered(folder: Path, questions: int) -> Trained:
    """Asks the model that was trained in `folder`."""
    import mllm_jax
    from mllm_jax.evaluate.metrics import scores

    name = folder.name.replace("_", " ")
    answers = ask(mllm_jax.load_workdir(folder), held_out(folder, questions), name)
    return Trained(name, folder, answers, scores(answers))


def held_out(folder: Path, count: int) -> list[dict]:
    """Held-out conversations, read as by the run in `folder`; not those that evaluated training."""
    from mllm_jax.train.checkpoint.restore import read_config

    source = read_config(folder).data.source("heldout")
    return [source[i] for i in range(1, count + 1)]


def ask(vlm, records: Sequence[dict], name: str) -> list[Answer]:
    """The greedy answers, and a bar while they come."""
    from mllm_jax.evaluate.ask import ask

    answers = ask(vlm, records, TOGETHER, LONGEST)
    return list(track(answers, f"{name:15}", total=len(records), console=console))


def asked_kinds(answers: Sequence[Answer]) -> list[Kind]:
    asked = Counter(answer.kind for answer in answers)
    return [Kind(name, asked[name], chance(name), bar) for name, bar in BARS.items() if asked[name]]


def passes(kind: Kind, trained: Trained) -> bool:
    return trained.scores[kind.name] >= kind.bar


def export_and_compare(trained: Trained, folder: Path) -> bool:
    """Returns whether the model answers some images alike after it was exported to `folder` and loaded from there."""
    import mllm_jax

    mllm_jax.save_pretrained(mllm_jax.load_workdir(trained.folder), folder)
    some = trained.answers[: 2 * TOGETHER]
    again = ask(
        mllm_jax.load_pretrained(folder, dtype="float32"), held_out(trained.folder, len(some)), "exported model"
    )
    for answer in again[:5]:
        console.print(f"  {answer.question}  {answer.answer}  (truth: {answer.truth})", markup=False)
    different = sum(one.answer != other.answer for one, other in zip(some, again))
    console.print(
        f"[bold red]{different} of {len(some)} answers differ" if different else f"all {len(some)} answers agree"
    )
    return not different


def results(kinds: Sequence[Kind], seeing: Trained, blind: Trained) -> Table:
    table = Table("kind", title="Exact match on held-out questions", title_justify="left")
    for column in ("questions", seeing.name, blind.name, "chance", "bar", ""):
        table.add_column(column, justify="right")
    for kind in kinds:
        shares = (seeing.scores[kind.name], blind.scores.get(kind.name), kind.chance, kind.bar)
        verdict = "[green]pass" if passes(kind, seeing) else "[bold red]MISSED"
        table.add_row(kind.name, str(kind.questions), *map(percent, shares), verdict)
    return table


def report(
    path: Path, seeing: Trained, blind: Trained, kinds: Sequence[Kind], kill: Kill, facts: dict[str, str]
) -> Path:
    """Writes the page; it shows `facts` with scores, size and speed."""
    from mllm_jax.evaluate.metrics import exact_match
    from mllm_jax.model.vlm import count_params
    from mllm_jax.train.checkpoint.restore import read_config
    from mllm_jax.train.monitor.metrics import read_metrics

    parts, records = count_params(read_config(seeing.folder).model), read_metrics(seeing.folder)
    last = [record for record in records if "tokens_per_second" in record][-1]
    mean = lambda trained: percent(sum(trained.scores[kind.name] for kind in kinds) / len(kinds))
    means = {"Exact match, mean of kinds": mean(seeing), f"The same, {blind.name}": mean(blind)}
    sizes = {"Parameters": short(sum(parts.values())), "Tokens per second": short(last["tokens_per_second"])}
    sizes["Fill of tokens, patches"] = f"{last['fill_tokens']:.0%}, {last['fill_patches']:.0%}"
    return write_report(
        path,
        [
            Run(seeing.name, records, seeing.scores, [(kill.step, str(kill))]),
            Run(blind.name, read_metrics(blind.folder), blind.scores),
        ],
        title="A vision-language model, trained from scratch",
        lead=LEAD,
        kinds=kinds,
        answers=gallery(seeing.answers),
        right=exact_match,
        parts=parts,
        facts=means | sizes | facts,
        config=(seeing.folder / "config.json").read_text(encoding="utf-8"),
    )


def gallery(answers: Sequence[Answer], each: int = 2, mistakes: int = 4) -> list[Answer]:
    """The first answers of each kind, then the first wrong ones among the others."""
    from mllm_jax.evaluate.metrics import exact_match

    first = [answer for kind in BARS for answer in [a for a in answers if a.kind == kind][:each]]
    shown = set(map(id, first))
    return first + [a for a in answers if not exact_match(a.answer, a.truth) and id(a) not in shown][:mistakes]


if __name__ == "__main__":
    run_command(main)
