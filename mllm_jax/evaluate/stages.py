"""Compares the stages of a run: in a table, and on a page where every branch of stages is one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.table import Table

from mllm_jax.common.cli import cell
from mllm_jax.common.config import load
from mllm_jax.common.format import percent, short
from mllm_jax.common.workdir import CONFIG, ended, read_note
from mllm_jax.evaluate.report import Kind, Run, write_report
from mllm_jax.model.vlm import abstract_params, count_params
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.runs.stages import branch, stage_config
from mllm_jax.train.step.optimizer import split

SHOWN = 4  # maximum number of branches on a page


def table(workdir: str | Path) -> Table:
    """Returns a table of the complete stages: steps, number of trained parameters and last evaluation."""
    config, evaluations = _config(workdir), {name: _last(Path(workdir) / name) for name in ended(workdir)}
    kinds = _kinds(evaluations.values())
    result = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("stage", "after"):
        result.add_column(name, no_wrap=True, min_width=max(map(len, ("stage", *config.stages))))
    for name in ("steps", "trained", "held-out loss", *kinds):
        result.add_column(cell(name), justify="right", no_wrap=True)
    for name, steps in ended(workdir).items():
        loss = evaluations[name].get("loss")
        scores = [percent(evaluations[name].get("exact_match", {}).get(kind)) for kind in kinds]
        cells = ["–" if loss is None else f"{loss:.4f}", *scores]
        result.add_row(name, config.stages[name].after or "–", f"{steps:,}", short(_num_trained(config, name)), *cells)
    return result


def write_page(workdir: str | Path) -> Path:
    """Writes report.html with a line for each of the last four branches, from their first stage. Returns its path."""
    runs = branches(workdir)[-SHOWN:]
    config = _config(workdir)
    kinds = _kinds(record["heldout"] for run in runs for record in run.records if "heldout" in record)
    return write_report(
        Path(workdir) / "report.html",
        runs,
        title=f"Stages of {Path(workdir).resolve().name}",
        lead="Each line is one branch of stages in order. Vertical marks show where stages of the first branch begin.",
        kinds=[Kind(kind) for kind in kinds],
        parts=count_params(read_run(config).model),
        facts={"Stages": ", ".join(ended(workdir)), "Steps in all": f"{sum(ended(workdir).values()):,}"},
        config=(Path(workdir) / CONFIG).read_text(encoding="utf-8"),
    )


def branches(workdir: str | Path) -> list[Run]:
    """Returns every branch of complete stages as one run, whose steps continue from stage to stage."""
    steps = ended(workdir)
    after = {name: stage.after for name, stage in _config(workdir).stages.items()}
    leaves = [name for name in steps if not any(after[other] == name for other in steps)]
    return [_branch(Path(workdir), [name for name in branch(leaf, after) if name in steps], steps) for leaf in leaves]


def _branch(workdir: Path, names: list[str], steps: Mapping[str, int]) -> Run:
    """Returns the stages `names` as one run."""
    records, marks, offset = [], [], 0
    for name in names:
        records += [
            record | {"step": offset + record["step"], "stage": name} for record in read_metrics(workdir / name)
        ]
        marks += [(offset, f"{name} begins")] if offset else []
        offset += steps[name]
    return Run(names[-1], records, _last(workdir / names[-1]).get("exact_match", {}), marks)


def _config(workdir: str | Path) -> ConfigDict:
    fix = "The training command of this run writes it again"
    return load(json.dumps(read_note(Path(workdir) / CONFIG, fix, stages=dict)))


def _last(folder: Path) -> dict[str, Any]:
    """Returns the last evaluation of a stage. Empty: there was none."""
    return next((record["heldout"] for record in reversed(read_metrics(folder)) if "heldout" in record), {})


def _kinds(evaluations) -> list[str]:
    """Returns the kinds of questions in order of their first occurrence; "all" is first."""
    return list(dict.fromkeys(kind for evaluation in evaluations for kind in evaluation.get("exact_match", {})))


def _num_trained(config: ConfigDict, name: str) -> int:
    """Returns the number of parameters that a stage trains."""
    run = read_run(stage_config(config, name))
    return sum(leaf.size for leaf in jax.tree.leaves(split(abstract_params(run.model), run.optim.freeze)[0]))
