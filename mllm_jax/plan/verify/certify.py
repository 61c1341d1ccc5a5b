"""Certifies that meshes do not change results: compares the training step on many devices with the step on one.

    python -m mllm_jax.plan certify --config configs/certify.py
    python -m mllm_jax.plan certify --config configs/certify.py --config.meshes="('fsdp=8', 'data=2,tensor=4')"

Runs on virtual CPU devices, in fp32, on one packed batch of the data, with random weights. Differences are relative to
the largest value of each tensor. The config may also be that of a run. The exit code is 1 if a difference exceeds the
tolerance or a router chooses other experts.
"""

import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from mllm_jax.plan.verify.certificate import Comparison, compare, devices, read_certificate
from mllm_jax.train.runs import command

CONFIG = config_flags.DEFINE_config_file("config", None, "Config to certify: a Python file with get_config(argument).")
WIDE = 140  # characters per line if the output is not a terminal
flags.mark_flags_as_required(["config"])


def main() -> None:
    """Runs the command. Ends the process with exit code 1 if a mesh drifts, 2 if the input is wrong."""
    command.run(_certify, exit_code=2, command="certify")


def _certify() -> None:
    certificate = read_certificate(CONFIG.value, Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(devices(mesh) for mesh in certificate.meshes))
    console, drift = Console(highlight=False), False
    if not console.is_terminal:
        console.width = WIDE
    for name in certificate.models:
        table = Table(title=name, box=None, pad_edge=False, header_style="dim", title_justify="left")
        for column in ("mesh", "logits", "gradients", "balance", "decisions", "worst tensor", "", ""):
            table.add_column(column, no_wrap=column != "worst tensor", overflow="fold")
        with Console(stderr=True).status(f"{name}: one device, and {len(certificate.meshes)} meshes"):
            for comparison in compare(certificate, name):
                drift = comparison.drifts(certificate.tolerance) or drift
                table.add_row(*_cells(comparison, certificate.tolerance))
        console.print(table, "")
    within = f"within {certificate.tolerance:g} of one device, relative to each tensor's largest value"
    console.print(
        f"drift: not all results are {within}" if drift else f"no drift: all results are {within}", soft_wrap=True
    )
    sys.exit(int(drift))


def _cells(found: Comparison, tolerance: float) -> list[str]:
    gradients = max(value for name, value in found.differences.items() if name.startswith("gradient"))
    others = [value for name, value in found.differences.items() if name in ("balance", "z")]
    return [
        found.mesh,
        f"{found.differences['logits']:.1e}",
        f"{gradients:.1e}",
        f"{max(others):.1e}" if others else "-",
        "-" if found.decisions is None else "equal" if found.decisions == 0 else f"{found.decisions} differ",
        found.worst,
        f"{found.differences[found.worst]:.1e}",
        "[bold red]drift[/]" if found.drifts(tolerance) else "[green]ok[/]",
    ]
