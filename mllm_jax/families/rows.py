"""Rows that many tables of weights share; see weights/table.py."""

from collections.abc import Callable, Iterable, Mapping

from mllm_jax.decoder import DecoderConfig
from mllm_jax.nn.stack import segments
from mllm_jax.weights.table import Row


def linear(ours: str, theirs: str, pattern: str, bias: str | None = None) -> list[Row]:
    """Rows of a linear layer: torch keeps [out, in]. `bias` is the pattern of its bias; None = it has none."""
    rows = [Row(f"{ours}/w", f"{theirs}.weight", pattern)]
    return rows if bias is None else [*rows, Row(f"{ours}/b", f"{theirs}.bias", bias)]


def layer_norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def gated_mlp(ours: str, theirs: str) -> list[Row]:
    return [
        *linear(f"{ours}/gate", f"{theirs}.gate_proj", "f d -> d f"),
        *linear(f"{ours}/up", f"{theirs}.up_proj", "f d -> d f"),
        *linear(f"{ours}/down", f"{theirs}.down_proj", "d f -> f d"),
    ]


def experts(ours: str, theirs: str) -> list[Row]:
    """Experts that lie on disk one by one."""
    halves: Mapping = {"half": ("gate", "up")}
    return [
        Row(f"{ours}/experts_gate_up/w", f"{theirs}.{{e}}.{{half}}_proj.weight", "f d -> d f", values=halves),
        Row(f"{ours}/experts_down/w", f"{theirs}.{{e}}.down_proj.weight", "d f -> f d"),
    ]


def layers(config: DecoderConfig, rows: Callable[[str], Iterable[Row]]) -> list[Row]:
    """Rows of all layers: `rows(kind)` are those of a layer, ours without the path of layers, theirs with `{n}`."""
    return [
        row._replace(ours=f"decoder/{name}/{row.ours}", values={**row.values, "n": numbers})
        for segment in segments(config.kinds)
        for name, numbers, kind in segment.slots()
        for row in rows(kind)
    ]
