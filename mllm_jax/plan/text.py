"""Quantities as people read them."""

from mllm_jax.plan.hardware.chips import GIB


def gib(size: float) -> str:
    """Bytes as GiB: "0.42 GiB", "12.3 GiB"."""
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def size_text(size: float) -> str:
    """Bytes in the unit that suits them: 512 B, 3.1 MiB, 1.20 GiB."""
    for limit, unit in ((2**10, "B"), (2**20, "KiB"), (2**30, "MiB")):
        if size < limit:
            return f"{size / (limit >> 10):.3g} {unit}"
    return gib(size)


def duration(value: float) -> str:
    """Seconds: "1.24 s", "85 ms"."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def percent(share: float) -> str:
    """0.412 -> "41.2 %"."""
    return f"{100 * share:.1f} %"
