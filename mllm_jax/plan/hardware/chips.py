"""Lists memory and bandwidths of accelerators, as published by their vendors, for the roofline."""

from dataclasses import dataclass

from mllm_jax.common.format import GIB
from mllm_jax.common.settings import Config, NonNegative, NonNegativeInt, Positive, PositiveInt
from mllm_jax.train.monitor.flops import peak_flops

CLOUD = "https://docs.cloud.google.com/tpu/docs"


@dataclass(frozen=True)
class Chip(Config):
    """Properties of one jax device: a chip, or half a chip on TPU7x.

    kind: `device_kind` in jax, by which `mllm_jax.train.monitor.flops` finds the bf16 peak.
    memory: bytes that a program may use.
    memory_bandwidth: bytes/s.
    link: one-way bandwidth of a torus link to a neighbor, bytes/s. 0: no torus.
    wraps: number of chips of whose multiples a torus dimension wraps around to a ring.
    switch: one-way bandwidth of a device to the switch of its node (NVLink or PCI Express), bytes/s. 0: a torus.
    node: number of devices on a switch.
    network: one-way bandwidth of a device to other nodes or slices, bytes/s.
    sources: publications of these figures.
    """

    kind: str
    memory: Positive
    memory_bandwidth: Positive
    network: Positive
    sources: tuple[str, ...]
    link: NonNegative = 0.0
    wraps: PositiveInt = 4
    switch: NonNegative = 0.0
    node: NonNegativeInt = 0

    @property
    def peak(self) -> float:
        """bf16 FLOP/s."""
        if peak := peak_flops(self.kind):
            return peak
        raise ValueError(f"{self.kind!r} has no bf16 peak. Add it to PEAK_FLOPS in train/monitor/flops.py")


NVLINK = "https://www.nvidia.com/en-us/data-center/nvlink/"  # GB/s of a GPU, both directions: 600, 900, 1800
DGX = "https://docs.nvidia.com/dgx/dgx{0}-user-guide/"  # nodes of 8 GPUs and their network adapters
TAKEN = "https://docs.jax.dev/en/latest/gpu_memory_allocation.html"  # jax allocates 75 % of a GPU's memory
DATA = "https://www.nvidia.com/en-us/data-center/{0}/"  # data sheets: peaks, memory, PCI Express
# The memory of TPUs is the limit in XLA's error about too large programs (libtpu 0.0.52). The bandwidth of a link is
# the published bidirectional bandwidth of a chip, divided by its links (6 in 3-D, 4 in 2-D) and by two directions.
CHIPS = {
    "v4": Chip(
        kind="TPU v4",
        memory=30.75 * GIB,
        memory_bandwidth=1200e9,
        link=50e9,
        network=6.25e9,
        sources=(f"{CLOUD}/v4", "arXiv 2304.01433", "https://jax-ml.github.io/scaling-book/tpus"),
    ),
    "v5e": Chip(
        kind="TPU v5 lite",
        memory=15.75 * GIB,
        memory_bandwidth=819e9,
        link=400e9 / 4 / 2,
        wraps=16,
        network=6.4e12 / 8 / 256,
        sources=(f"{CLOUD}/v5e",),
    ),
    "v5p": Chip(
        kind="TPU v5p",
        memory=95.73 * GIB,
        memory_bandwidth=2765e9,
        link=1200e9 / 6 / 2,
        network=50e9 / 8,
        sources=(f"{CLOUD}/v5p",),
    ),
    "v6e": Chip(
        kind="TPU v6 lite",
        memory=31.24 * GIB,
        memory_bandwidth=1638e9,
        link=800e9 / 4 / 2,
        wraps=16,
        network=100e9 / 8,
        sources=(f"{CLOUD}/v6e", f"{CLOUD}/tpu7x"),
    ),
    "tpu7x": Chip(
        kind="TPU7x",
        memory=94.74 * GIB,
        memory_bandwidth=7380e9 / 2,
        link=1200e9 / 6 / 2 / 2,
        network=100e9 / 8 / 2,
        sources=(f"{CLOUD}/tpu7x",),
    ),
    "t4": Chip(
        kind="Tesla T4",
        memory=0.75 * 16e9,
        memory_bandwidth=320e9,
        switch=32e9 / 2,
        node=8,
        network=100e9 / 8 / 8,
        sources=(DATA.format("tesla-t4"), "https://aws.amazon.com/ec2/instance-types/g4/", TAKEN),  # g4dn.metal
    ),
    "l4": Chip(
        kind="NVIDIA L4",
        memory=0.75 * 24e9,
        memory_bandwidth=300e9,
        switch=64e9 / 2,
        node=8,
        network=100e9 / 8 / 8,
        sources=(DATA.format("l4"), "https://docs.cloud.google.com/compute/docs/gpus", TAKEN),  # g2-standard-96
    ),
    "a100-40gb": Chip(
        kind="NVIDIA A100",
        memory=0.75 * 40e9,
        memory_bandwidth=1555e9,
        switch=600e9 / 2,
        node=8,
        network=200e9 / 8,
        sources=(DATA.format("a100"), NVLINK, DGX.format("a100"), TAKEN),
    ),
    "a100": Chip(
        kind="NVIDIA A100",
        memory=0.75 * 80e9,
        memory_bandwidth=2039e9,
        switch=600e9 / 2,
        node=8,
        network=200e9 / 8,
        sources=(DATA.format("a100"), NVLINK, DGX.format("a100"), TAKEN),
    ),
    "h100-pcie": Chip(
        kind="NVIDIA H100 PCIe",
        memory=0.75 * 80e9,
        memory_bandwidth=2000e9,
        switch=128e9 / 2,  # PCI Express: NVLink bridges connect only pairs of GPUs
        node=8,
        network=400e9 / 2 / 8,  # one adapter per two GPUs
        sources=(
            DATA.format("h100"),
            "https://docs.nvidia.com/ai-enterprise/reference-architecture/latest/compute-node-hardware.html",
            TAKEN,
        ),
    ),
    "h100": Chip(
        kind="NVIDIA H100",
        memory=0.75 * 80e9,
        memory_bandwidth=3350e9,
        switch=900e9 / 2,
        node=8,
        network=400e9 / 8,
        sources=(DATA.format("h100"), NVLINK, DGX.format("h100"), TAKEN),
    ),
    "h200": Chip(
        kind="NVIDIA H200",
        memory=0.75 * 141e9,
        memory_bandwidth=4800e9,
        switch=900e9 / 2,
        node=8,
        network=400e9 / 8,
        sources=(DATA.format("h200"), NVLINK, DGX.format("h100"), TAKEN),
    ),
    "b200": Chip(
        kind="NVIDIA B200",
        memory=0.75 * 180e9,
        memory_bandwidth=8000e9,
        switch=1800e9 / 2,
        node=8,
        network=400e9 / 8,
        sources=(DATA.format("hgx"), NVLINK, DGX.format("b200"), TAKEN),
    ),
}
