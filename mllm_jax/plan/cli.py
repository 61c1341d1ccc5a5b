"""Plans the training of a config on accelerators that this machine need not have.

    python -m mllm_jax.plan --config configs/qwen3_vl_8b.py --topology v6e:8x8                  rank all meshes
    python -m mllm_jax.plan --config configs/qwen3_vl_8b.py --topology v6e:8x8 --mesh fsdp=64   plan one mesh in detail
    python -m mllm_jax.plan certify --help                                                      check results of a mesh

Compiles the training step for a topology: TPUs as v5p:4x8x8 (chips along each axis; v6e:16x16*2 is two slices), GPUs as
h200:64. Without --mesh, all meshes and remat policies are estimated and the best are compiled, with reduced effort for
TPUs; the mesh of --mesh is compiled as for training. --config.path.to=value replaces a value of the config: sharding
rules by --config.preset=fsdp, fsdp_tensor, expert, long_context or replicated, and by --config.rules.vocab=None. All
results are planned, not measured.

Exit codes: 0 if the run fits, 1 if it does not fit, 2 if it cannot be planned.
"""

import sys
from collections import Counter
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mllm_jax.common.config import ConfigError
from mllm_jax.common.format import duration, gib, percent, size_text
from mllm_jax.plan import page
from mllm_jax.plan.hardware.topology import get_topology
from mllm_jax.plan.roofline import seconds
from mllm_jax.plan.search import Candidate, Found, Search, mesh_text, read_mesh, summary
from mllm_jax.plan.validate import check_run
from mllm_jax.train.runs import command
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.runs.stages import one_run

CONFIG = config_flags.DEFINE_config_file("config", None, "Config to train: a Python file with get_config(argument).")
TOPOLOGY = flags.DEFINE_string("topology", None, "Devices, as in v5p:4x8x8, v6e:16x16*2 or h200:64.")
MESH = flags.DEFINE_string("mesh", None, "Sizes of mesh axes, as in fsdp=16,expert=16; one may be -1. None: search.")
STAGE = flags.DEFINE_string("stage", None, "Stage to plan, for a config with stages.")
TOP = flags.DEFINE_integer("top", 10, "Number of candidates to list.", lower_bound=1)
COMPILE = flags.DEFINE_integer("compile", 1, "Number of candidates to compile. 0: estimate only.", lower_bound=0)
HTML = flags.DEFINE_string("html", None, "File for an HTML page with figures.")
WIDE = 160  # characters per line if the output is not a terminal
WITHIN = 90.0  # seconds after which no further candidate is compiled
flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    """Runs the command. Ends the process with exit code 1 if no candidate fits, 2 if the input is wrong."""
    command.run(plan, exit_code=2)


def plan() -> None:
    """Plans the run of the flags, prints tables and a summary, and ends the process."""
    if HTML.value and not Path(HTML.value).parent.is_dir():
        raise ConfigError(f"--html={HTML.value}: there is no folder {Path(HTML.value).parent}. Create it first.")
    run, console = read_run(one_run(CONFIG.value, STAGE.value)), Console(highlight=False)
    check_run(run)
    topology = get_topology(TOPOLOGY.value, compiler=COMPILE.value > 0)
    if not console.is_terminal:
        console.width = WIDE
    search = Search(run, topology)
    with _progress() as progress:
        found = _searched(search, progress) if MESH.value is None else _given(search, MESH.value, progress)
    best = found.candidates[0]
    lead = summary(best, run.data.batch * run.data.tokens)
    for table in [_ranking(found)] if MESH.value is None else _parts(best, search):
        console.print(table)
    if found.impossible:
        (reason, _), *_ = found.impossible.most_common(1)
        console.print(
            f"{found.impossible.total()} meshes are impossible. Most frequent reason: {reason}",
            style="dim",
            soft_wrap=True,
        )
    for warning in best.planned.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    console.print(lead, style="bold", soft_wrap=True)
    if HTML.value:
        chosen = page.Chosen(best, search.portion(best.choice).laid, search.network(best.choice.mesh))
        title = f"{Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem} on {topology.name}"
        console.print(f"wrote {page.write_page(HTML.value, title, lead, chosen, found, search.chip)}", soft_wrap=True)
    sys.exit(int(not best.fits))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _searched(search: Search, progress: Progress) -> Found:
    task = progress.add_task("estimating", total=1.0)
    found = search.rank(lambda share: progress.update(task, completed=share))
    progress.update(task, completed=1.0)
    if not COMPILE.value:
        return found
    task = progress.add_task("compiling", total=None)
    return search.compile_best(
        found, COMPILE.value, WITHIN, lambda mesh: progress.update(task, description=f"compiling {mesh}")
    )


def _given(search: Search, text: str, progress: Progress) -> Found:
    """Returns the single candidate of --mesh, with the remat policy and the rules of the config."""
    runtime = search.run.model.runtime
    try:
        mesh = tuple((axis, size) for axis, size in read_mesh(text, search.topology).items() if size > 1)
        (candidate,) = search.estimate(mesh, [runtime.remat], ["as it is"])
    except ValueError as error:
        raise ConfigError(f"--mesh={text}: {error}") from error
    if COMPILE.value:
        progress.add_task(f"compiling {mesh_text(mesh)}", total=None)
        candidate = search.compile(candidate)
    return Found([candidate], Counter())


def _ranking(found: Found) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    shown = found.candidates[: TOP.value]
    vision = any(candidate.choice.vision != "as it is" for candidate in shown)
    left = ("mesh", "remat", *(["encoder"] if vision else []), "fits", "bound by")
    for name in (*left[:-1], "step", "MFU", "bound by", "peak", "moved", ""):
        table.add_column(name, justify="left" if name in left or not name else "right", no_wrap=True)
    for candidate in shown:
        choice, time = candidate.choice, candidate.time
        table.add_row(
            mesh_text(choice.mesh),
            choice.remat,
            *([choice.vision] if vision else []),
            "yes" if candidate.fits else "no",
            duration(time.seconds),
            percent(time.mfu),
            time.bound,
            gib(candidate.planned.peak),
            f"{sum(move.bytes for move in candidate.planned.collectives) / 1e9:.1f} GB",
            "compiled" if candidate.compiled else "estimated",
        )
    return table


def _parts(best: Candidate, search: Search) -> list[Table]:
    """Returns the tables of one mesh: times, FLOPs, memory and collectives."""
    time, planned, network = best.time, best.planned, search.network(best.choice.mesh)
    waited = f"including {duration(time.waited)} for activations" if time.waited else ""
    tables = [
        _table("time of each resource alone", [
            ("compute", duration(time.compute), f"{planned.recomputed / 1e12:.1f} of "
             f"{sum(planned.flops.values()) / 1e12:.1f} TFLOP recomputed"),
            ("memory", duration(time.memory), ""),
            ("communication", duration(time.communication), waited),
            *([("compiler", duration(planned.compile_seconds), f"with {gib(planned.host_bytes)} of this machine")]
              if best.compiled else []),
        ]),
        _table("FLOPs per device", [(part, f"{value / 1e12:.1f} TFLOP", "") for part, value in planned.flops.items()]),
        _table("memory per device", [
            ("arguments", gib(planned.arguments), ""),
            ("temporary", gib(planned.peak - planned.arguments), ""),
            *((f"  {name}", size_text(size), "") for name, size in planned.largest[:6]),
        ]),
    ]  # fmt: skip
    moves = sorted(planned.collectives, key=lambda move: -seconds(move, network))
    rows = [
        (
            f"{move.kind} over {' x '.join(move.axes)}",
            duration(seconds(move, network)),
            f"{move.bytes / 1e9:.2f} GB, {move.runs:,.0f} runs",
        )
        for move in moves[:8]
    ]
    return tables + ([_table("collectives", rows)] if rows else [])


def _table(title: str, rows: list[tuple[str, str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    table.add_column(title, no_wrap=True, min_width=44)
    table.add_column("", justify="right", no_wrap=True, min_width=12)
    table.add_column("")
    for row in rows:
        table.add_row(*row)
    return table
