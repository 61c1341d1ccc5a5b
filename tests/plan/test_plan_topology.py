"""Devices that are not there: how many there are, where, and what is known of them."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from mllm_jax.plan.hardware.chips import CHIPS
from mllm_jax.plan.hardware.topology import GPUS, KNOWN, TPUS, get_topology
from mllm_jax.sharding.mesh import make_mesh


def test_devices_without_a_compiler_are_where_they_are():
    """There are as many devices as jax reports: only on TPU7x are the two cores of a chip two devices."""
    for name, count, kind in (
        ("v4:2x2x1", 4, "TPU v4"),
        ("v5p:2x2x4", 16, "TPU v5p"),
        ("tpu7x:2x2x1", 8, "TPU7x"),
        ("v5e:1x1", 1, "TPU v5 lite"),
        ("v6e:1x1", 1, "TPU v6 lite"),
        ("v6e:2x4*2", 16, "TPU v6 lite"),
    ):
        topology = get_topology(name, compiler=False)
        places = {(device.slice_index, *device.coords, device.core_on_chip) for device in topology.devices}
        assert len(topology.devices) == len(places) == count and topology.device_kind == kind
        _, sizes = name.partition("*")[0].split(":")
        extent = 1 + np.array([device.coords for device in topology.devices]).max(axis=0)
        assert extent.tolist() == ([int(size) for size in sizes.split("x")] + [1])[:3]
        assert make_mesh({"fsdp": -1}, topology.devices).shape["fsdp"] == count
    hosts = get_topology("b200:16", compiler=False).devices
    assert [device.process_index for device in hosts] == 8 * [0] + 8 * [1]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install -e '.[plan]')")
def test_devices_of_the_compiler_are_in_the_same_places():
    """A mesh has them in the same order, and libtpu has nothing to complain about."""
    code = """
import os
from mllm_jax.plan.hardware.topology import get_topology
from mllm_jax.sharding.mesh import make_mesh
place = lambda device: (getattr(device, "slice_index", 0), *device.coords, device.core_on_chip)
for name, shape in (("v4:2x2x2", {"fsdp": 4, "tensor": 2}), ("v6e:1x1", {"fsdp": 1}), ("v6e:4x4*2", {"fsdp": -1}),
                    ("v5e:4x8", {"fsdp": 8, "tensor": 4}), ("tpu7x:2x2x4", {"fsdp": 8, "tensor": 4})):
    one, other = (make_mesh(shape, get_topology(name, compiler=yes).devices) for yes in (True, False))
    assert list(map(place, one.devices.flat)) == list(map(place, other.devices.flat)), name
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_device_that_can_be_named_has_figures():
    assert {*TPUS, *GPUS} == set(CHIPS) and "cpu" not in KNOWN
    for name, chip in CHIPS.items():
        assert chip.peak and chip.sources and name in KNOWN
        assert bool(chip.link) == (name in TPUS) == (not chip.switch)
        assert name in TPUS or GPUS[name].name.startswith(chip.kind)
        assert name in TPUS or 0.6 * GPUS[name].memory < chip.memory < 0.8 * GPUS[name].memory
        assert name in TPUS or GPUS[name].bandwidth == pytest.approx(chip.memory_bandwidth, rel=0.05)
