"""Memory that a run needs is known before it is allocated, and a run that has not got it ends in one line."""

import jax
import numpy as np
import pytest
import tiny_run

from mllm_jax.common.config import ConfigError
from mllm_jax.common.format import with_prefix
from mllm_jax.model.vlm import abstract_params
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.loop import Training
from mllm_jax.train.monitor import memory
from mllm_jax.train.monitor.memory import Memory, check_memory, host_limit, memory_of, trained_share
from mllm_jax.train.runs.config import read_run, train_context
from mllm_jax.train.step.optimizer import split


def states(run, mesh):
    context = train_context(run, mesh)
    return context.state, context.state_shardings


@pytest.mark.parametrize("freeze", [(), ("encoder", "embed")], ids=["all", "frozen"])
@pytest.mark.parametrize("shards", [1, 4])
def test_what_is_counted_is_what_a_device_holds(freeze, shards):
    config = tiny_run.get_config()
    config.optim.freeze, config.mesh.fsdp = freeze, shards
    run = read_run(config)
    mesh = make_mesh(run.mesh, devices=jax.devices()[:shards])
    shapes, layout = states(run, mesh)
    found = memory_of(run, shapes, layout)
    state = jax.tree.map(lambda x, place: jax.device_put(np.zeros(x.shape, x.dtype), place), shapes, layout)
    held = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    assert (found.weights, found.optimizer) == (held(state.params), held(state.opt_state))
    assert found.gradients == held(split(state.params, freeze)[0]) > 0
    assert (found.gradients < found.weights) == bool(freeze)


def test_a_run_without_room_is_refused_before_it_allocates(tmp_path, monkeypatch):
    config = tiny_run.get_config()
    config.mesh.fsdp = 1
    config.model.decoder.update(width=8192, layers=400, mlp=32768)  # terabytes
    monkeypatch.setattr("mllm_jax.train.loop.make_mesh", lambda axes: make_mesh(axes, devices=jax.devices()[:1]))
    run = read_run(config)
    with pytest.raises(
        ConfigError, match=r"^config.model: a device needs weights .*TB.*this host has .*GB left\. Train"
    ):
        Training(config, run, tmp_path)


def test_only_what_cannot_run_is_refused(monkeypatch):
    mesh = make_mesh({"fsdp": 4}, devices=jax.devices()[:4])
    monkeypatch.setattr(memory, "host_limit", lambda: 1000)
    check_memory(Memory(weights=100, gradients=10_000, optimizer=150), mesh)  # four devices share the host
    with pytest.raises(ConfigError, match="Weights and optimizer are 1kB, and this host has 1kB left"):
        check_memory(Memory(weights=101, gradients=0, optimizer=150), mesh)
    monkeypatch.setattr(memory, "host_limit", lambda: None)
    check_memory(Memory(10**18, 0, 0), mesh)


def test_the_limit_of_a_host_is_that_of_its_container(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:      60 kB\nSwapFree:        4 kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert host_limit() == 64 * 1024
    files = {"memory.max": "50000\n", "memory.current": "20000\n", "memory.stat": "anon 5\nfile 3000\n"}
    for name, text in (files | {"memory.swap.max": "0\n"}).items():
        (tmp_path / name).write_text(text)
    assert host_limit() == 33_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host_limit() == 64 * 1024
    meminfo.unlink()
    assert host_limit() is None


def test_the_share_of_what_is_trained_is_told():
    config = tiny_run.get_config()
    assert trained_share(read_run(config)) == ""
    config.lora.rank = 2
    params = abstract_params(read_run(config).model)
    flat = {jax.tree_util.keystr(path): x.size for path, x in jax.tree_util.tree_leaves_with_path(params)}
    adapters = sum(size for path, size in flat.items() if path.endswith(("lora_down']", "lora_up']")))
    share = adapters / sum(flat.values())
    told = f"{with_prefix(adapters)} parameters are trained ({share:.2%})"
    assert trained_share(read_run(config)) == told
    config.lora.base_dtype = "nf4"  # of which an array holds two weights in a byte
    assert trained_share(read_run(config)) == told
