"""Comparison of a run's stages: a table, and a page on which every branch of stages is one line."""

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

SHOWN = 4  # branches on a page


def table(workdir: str | Path) -> Table:
    """A row for every stage that came to its end: its length, what it trained, and its last evaluation."""
    config, found = _config(workdir), {name: _last(Path(workdir) / name) for name in ended(workdir)}
    kinds = _kinds(found.values())
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("stage", "after"):
        shown.add_column(name, no_wrap=True, min_width=max(map(len, ("stage", *config.stages))))
    for name in ("steps", "trained", "held-out loss", *kinds):
        shown.add_column(cell(name), justify="right", no_wrap=True)
    for name, steps in ended(workdir).items():
        loss = found[name].get("loss")
        scores = [percent(found[name].get("exact_match", {}).get(kind)) for kind in kinds]
        size = ["–" if loss is None else f"{loss:.4f}", *scores]
        shown.add_row(name, config.stages[name].after or "–", f"{steps:,}", short(_trained(config, name)), *size)
    return shown


def write_page(workdir: str | Path) -> Path:
    """Writes report.html, and returns its path: a line for each of the last four branches, from its first stage on."""
    runs = branches(workdir)[-SHOWN:]
    config = _config(workdir)
    kinds = _kinds(record["heldout"] for run in runs for record in run.records if "heldout" in record)
    return write_report(
        Path(workdir) / "report.html",
        runs,
        title=f"Stages of {Path(workdir).resolve().name}",
        lead="Each line is one branch of stages in order; a mark shows where a stage of the first begins.",
        kinds=[Kind(kind) for kind in kinds],
        parts=count_params(read_run(config).model),
        facts={"Stages": ", ".join(ended(workdir)), "Steps in all": f"{sum(ended(workdir).values()):,}"},
        config=(Path(workdir) / CONFIG).read_text(encoding="utf-8"),
    )


def branches(workdir: str | Path) -> list[Run]:
    """Every branch of stages that came to their end, as one run: steps count on from stage to stage."""
    steps = ended(workdir)
    after = {name: stage.after for name, stage in _config(workdir).stages.items()}
    leaves = [name for name in steps if not any(after[other] == name for other in steps)]
    return [_branch(Path(workdir), [name for name in branch(leaf, after) if name in steps], steps) for leaf in leaves]


def _branch(workdir: Path, names: list[str], steps: Mapping[str, int]) -> Run:
    records, marks, before = [], [], 0
    for name in names:
        records += [
            record | {"step": before + record["step"], "stage": name} for record in read_metrics(workdir / name)
        ]
        marks += [(before, f"{name} begins")] if before else []
        before += steps[name]
    return Run(names[-1], records, _last(workdir / names[-1]).get("exact_match", {}), marks)


def _config(workdir: str | Path) -> ConfigDict:
    fix = "The training command of this run writes it again"
    return load(json.dumps(read_note(Path(workdir) / CONFIG, fix, stages=dict)))


def _last(folder: Path) -> dict[str, Any]:
    """The last evaluation of a stage; empty where there was none."""
    return next((record["heldout"] for record in reversed(read_metrics(folder)) if "heldout" in record), {})


def _kinds(evaluations) -> list[str]:
    """The kinds of questions in the order in which they turn up; "all" first."""
    return list(dict.fromkeys(kind for found in evaluations for kind in found.get("exact_match", {})))


def _trained(config: ConfigDict, name: str) -> int:
    """Number of parameters that a stage trains."""
    run = read_run(stage_config(config, name))
    return sum(leaf.size for leaf in jax.tree.leaves(split(abstract_params(run.model), run.optim.freeze)[0]))
