"""Accelerators as clouds name them, from the names of `python -m mllm_jax.plan --topology`: "v6e:8x8", "h200:64".

Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and runtimes (types, hosts, software), and
docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels of nodes), .../how-to/gpus for those of GPUs.
"""

import argparse
import math
from typing import NamedTuple

from mllm_jax.common.errors import suggestion


class Generation(NamedTuple):
    """A generation of TPUs.

    prefix: prefix of the accelerator's type. cores: cores of a chip, which the type counts.
    dimensions: dimensions of the torus. software: version of a TPU VM. Empty: only Kubernetes has them.
    label: label of Kubernetes' nodes. devices: number of jax devices per chip.
    """

    prefix: str
    cores: int
    dimensions: int
    software: str
    label: str
    devices: int = 1


TPUS = {
    "v4": Generation("v4", 2, 3, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": Generation("v5litepod", 1, 2, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Generation("v5p", 2, 3, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Generation("v6e", 1, 2, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "tpu7x": Generation("tpu7x", 2, 3, "", "tpu7x", devices=2),
}
GPUS = {  # labels of Kubernetes' nodes with eight of them
    "a100": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h100-mega": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
GPUS_PER_HOST = 8
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # slices of v5e and v6e
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # further topologies, in addition to those of 4x4x4 cubes


class Tpu(NamedTuple):
    """Slices of TPUs: `name` of the generation, the `topology` of each as in "8x8", and how many `slices` there are."""

    name: str
    topology: str
    slices: int = 1

    @property
    def generation(self) -> Generation:
        return TPUS[self.name]

    @property
    def chips(self) -> int:
        """Number of chips of a slice."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def hosts(self) -> int:
        """Number of hosts of a slice: one for small flat slices, up to 2x4, and otherwise one per four chips."""
        return 1 if self.generation.dimensions == 2 and self.chips <= 8 else max(1, self.chips // 4)

    @property
    def type(self) -> str:
        """Accelerator type, such as "v6e-64" or "v5p-128", which counts cores."""
        return f"{self.generation.prefix}-{self.chips * self.generation.cores}"


class Gpu(NamedTuple):
    """`hosts` of eight GPUs, or one with fewer: `each` of them."""

    name: str
    hosts: int
    each: int

    @property
    def label(self) -> str:
        return GPUS[self.name]


def tpu(text: str) -> Tpu:
    """ "v6e:8x8", or "v6e:8x8*2" for two slices; for argparse."""
    name, _, size = text.partition(":")
    topology, written, slices = size.partition("*")
    if name not in TPUS:
        raise argparse.ArgumentTypeError(f"there is no TPU {name!r}; {suggestion(name, TPUS)}; write v6e:8x8")
    if written and not (slices.isdecimal() and int(slices)):
        raise argparse.ArgumentTypeError(f"{text!r}: {slices!r} is not a number of slices; write {name}:{topology}*2")
    sides = topology.split("x")
    if TPUS[name].dimensions == 2:
        known, good = f"slices of {name} are {', '.join(FLAT)}", topology in FLAT
    else:
        known = f"slices of {name} are {', '.join(SMALL)} and those whose three sides are multiples of 4"
        good = len(sides) == 3 and all(side.isdecimal() and int(side) and int(side) % 4 == 0 for side in sides)
        good = good or topology in SMALL
    if not good:
        raise argparse.ArgumentTypeError(f"there is no slice {text!r}; {known}; write {name}:TOPOLOGY")
    return Tpu(name, topology, int(slices or 1))


def gpu(text: str) -> Gpu:
    """ "h200:64", the number of all GPUs; for argparse."""
    name, _, size = text.partition(":")
    if name not in GPUS:
        raise argparse.ArgumentTypeError(f"there is no GPU {name!r}; {suggestion(name, GPUS)}; write h200:64")
    count = int(size) if size.isdecimal() else 0
    if not count or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        raise argparse.ArgumentTypeError(
            f"{text!r}: hosts have {GPUS_PER_HOST} GPUs; write {name}:N with fewer or with a multiple of them"
        )
    return Gpu(name, max(1, count // GPUS_PER_HOST), min(count, GPUS_PER_HOST))
