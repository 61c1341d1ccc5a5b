"""The planner: estimates against closed forms, and against what arrays and traced programs take; search and page."""

import contextlib
import dataclasses
import html.parser
import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from examples import tiny_config
from flax.traverse_util import flatten_dict

from mllm_jax.common.config import ConfigError
from mllm_jax.common.format import GIB, duration
from mllm_jax.families import FAMILIES
from mllm_jax.model.vlm import abstract_params, count_params
from mllm_jax.nn.lora import LoraConfig
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.nn.runtime import Runtime
from mllm_jax.plan import search as search_module
from mllm_jax.plan.comms import traffic
from mllm_jax.plan.compile import Collective, TooLarge, abstract_step
from mllm_jax.plan.device_workload import DeviceWorkload, read_shapes
from mllm_jax.plan.estimate import estimate
from mllm_jax.plan.hardware.chips import CHIPS
from mllm_jax.plan.hlo.jaxpr import operations, products
from mllm_jax.plan.page import Chosen, write_page
from mllm_jax.plan.roofline import Network, roofline, seconds
from mllm_jax.plan.search import Search, mesh_text, meshes, read_mesh, summary
from mllm_jax.plan.validate import check_run
from mllm_jax.sharding.mesh import MESH_AXES, make_mesh
from mllm_jax.sharding.presets import LOGICAL_AXIS_RULES
from mllm_jax.train.runs.config import Run, TrainConfig, read_run, run_config
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.step.optimizer import OptimConfig, make_optimizer, split
from mllm_jax.train.step.state import abstract_state, state_shardings

MOE = MoeConfig(experts=8, top_k=2, mlp=64)


def a_run(model=None, remat="full", moe=None, **changes) -> Run:
    """A run of the tiny model: 8 rows of 64 tokens and 2 x 32 patches."""
    model = model or tiny_config()
    model = dataclasses.replace(model, runtime=Runtime(dtype="bfloat16", remat=remat, capacity_factor=1.25))
    if moe:
        model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, moe=moe))
    data = FilesData(**{"batch": 8, "tokens": 64, "patch_rows": 2, "patches_per_row": 32} | changes.pop("data", {}))
    optim, train = OptimConfig(**changes.pop("optim", {})), TrainConfig(**changes.pop("train", {}))
    return read_run(run_config(Run(model=model, data=data, optim=optim, train=train, **changes)))


def published(name: str, **data) -> Run:
    rules = LOGICAL_AXIS_RULES | {"encoder_embed": "fsdp"}
    return a_run(FAMILIES["qwen3_vl"].config(name), data={"tokens": 4096, "patches_per_row": 4096} | data, rules=rules)


KNOWN = {}


def shapes_of(run: Run):
    """Result of `read_shapes`, computed once per model, batch and optimizer."""
    key = str((run.model.encoder, run.model.decoder, run.data, run.optim, run.lora))
    if key not in KNOWN:
        KNOWN[key] = read_shapes(run)
    return KNOWN[key]


def plan(run: Run, remat: str = "", **mesh):
    return estimate(DeviceWorkload(shapes_of(run), run, mesh), remat or run.model.runtime.remat)


def torus(shape, axes, sizes, slices: int = 1):
    """A mesh of chips that are numbered along the torus, x last; slices outermost."""
    places = [(s, *place) for s in range(slices) for place in np.ndindex(*shape)]
    devices = np.array([SimpleNamespace(slice_index=s, coords=place) for s, *place in places], object)
    return SimpleNamespace(devices=devices.reshape(sizes), axis_names=tuple(axes))


# What a link carries, counted packet by packet.


def busiest_link(size: int, closed: bool) -> float:
    """Load of the busiest link in an all-to-all on a ring or line, with shortest routes and one unit per pair
    of devices."""
    load = Counter()
    for start in range(size):
        for end in range(size):
            ways = [(1, (end - start) % size), (-1, (start - end) % size)]
            ways = [way for way in ways if closed or 0 <= start + way[0] * way[1] < size]
            least = min(steps for _, steps in ways)
            shortest = [way for way in ways if way[1] == least]
            for step, steps in shortest:
                for i in range(steps):
                    load[(start + i * step) % size, step] += 1 / len(shortest)
    return max(load.values())


@pytest.mark.parametrize(("size", "closed"), [(4, True), (8, True), (16, True), (2, False), (4, False), (8, False)])
def test_an_all_to_all_takes_as_long_as_its_busiest_link(size, closed):
    chip = dataclasses.replace(CHIPS["v5p"], wraps=4 if closed else 1000)
    network = Network(torus((size, 1, 1), ("expert",), (size,)), chip)
    sent = 1e9  # bytes from one device to another
    took = seconds(Collective("all-to-all", ("expert",), 1, sent * size), network)
    assert took == pytest.approx(busiest_link(size, closed) * sent / chip.link)


def test_gathers_use_all_rings_of_their_axes():
    chip = CHIPS["v5p"]
    mesh = torus((4, 8, 8), ("fsdp", "expert", "tensor"), (4, 8, 8))
    network, size = Network(mesh, chip), 1e9
    took = lambda kind, *axes: seconds(Collective(kind, axes, 1, size), network)
    assert took("all-gather", "expert") == pytest.approx(size * 7 / 8 / (2 * chip.link))
    assert took("all-gather", "fsdp", "expert") == pytest.approx(size * 31 / 32 / (4 * chip.link))
    assert took("all-reduce", "tensor") == pytest.approx(2 * size * 7 / 8 / (2 * chip.link))
    assert took("reduce-scatter", "tensor") == pytest.approx(size * 7 / (2 * chip.link))  # of what comes out
    assert took("collective-permute", "tensor") == pytest.approx(size / chip.link)


def test_a_part_of_a_dimension_is_a_line_and_strides_share_links():
    chip = CHIPS["v5p"]
    halves = Network(torus((8, 1, 1), ("data", "tensor"), (2, 4)), chip)
    assert halves.group(("tensor",)).bandwidth == chip.link  # 4 neighbors of 8: no ring
    assert (
        halves.group(("data",)).bandwidth == 2 * chip.link / 4
    )  # chips 0 and 4, 1 and 5 ...: four pairs share the ring
    assert halves.group(("data", "tensor")).bandwidth == 2 * chip.link
    small = Network(torus((8, 1, 1), ("tensor",), (8,)), CHIPS["v6e"])  # only 16 chips in a row close the ring
    assert small.group(("tensor",)).bandwidth == CHIPS["v6e"].link


def test_what_crosses_slices_or_nodes_takes_the_network():
    chip = CHIPS["v6e"]
    mesh = torus((16, 16, 1), ("data", "fsdp"), (2, 256), slices=2)
    took = seconds(Collective("all-reduce", ("data",), 1, 1e9), Network(mesh, chip))
    assert took == pytest.approx(2 * 1e9 / 2 / chip.network)
    took = seconds(Collective("all-gather", ("data", "fsdp"), 1, 1e9), Network(mesh, chip))
    inside, outside = 1e9 * 255 / 256 / (4 * chip.link), 1e9 / 256 / 2 / chip.network
    assert took == pytest.approx(max(inside, outside))
    gpu = CHIPS["h200"]
    devices = np.array([SimpleNamespace(id=n) for n in range(64)], object)
    network = Network(SimpleNamespace(devices=devices.reshape(8, 8), axis_names=("fsdp", "tensor")), gpu)
    assert network.group(("tensor",)).far == 1 and network.group(("fsdp",)).near == 1
    took = seconds(Collective("all-gather", ("fsdp", "tensor"), 1, 1e9), network)
    assert took == pytest.approx(1e9 / 8 * 7 / 8 / gpu.network)  # eight adapters of a node share the work
    took = seconds(Collective("all-to-all", ("tensor",), 1, 1e9), network)
    assert took == pytest.approx(1e9 * 7 / 8 / gpu.switch)


def test_a_roofline_waits_for_activations_alone():
    run = published("8b", batch=64, patch_rows=0)
    mesh = {"fsdp": 8, "tensor": 8}
    portion = DeviceWorkload(shapes_of(run), run, mesh)
    network = Network(torus((8, 8, 1), ("fsdp", "tensor"), (8, 8)), CHIPS["v6e"])
    planned = estimate(portion, "full", "TPU v6 lite")
    found = roofline(planned, network, traffic(portion, "full"))
    waits = [move for move in planned.collectives if "tensor" in move.axes]
    assert found.waited == pytest.approx(sum(seconds(move, network) for move in waits)) and waits
    beside = max(found.compute, found.memory, found.communication - found.waited)
    assert found.seconds == pytest.approx(beside + found.waited)
    assert found.mfu == pytest.approx(planned.useful / 918e12 / found.seconds)
    assert found.bound == "communication"
    assert found.compute == pytest.approx(sum(planned.flops.values()) / 918e12)
    assert sum(found.axes.values()) == pytest.approx(found.communication)


# What a device holds.

MESHES = [
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"fsdp": 2, "expert": 4},
    {"data": 2, "expert": 2, "tensor": 2},
]


@pytest.mark.parametrize("mesh", MESHES, ids=mesh_text)
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weights_and_moments_lie_as_those_of_training(mesh, name):
    """Bytes on a device equal those of the state that training makes; factored moments are too small to count."""
    run = a_run(moe=MOE, optim={"name": name})
    params, devices = abstract_params(run.model), make_mesh(mesh)
    tx, _ = make_optimizer(run.optim, params)
    state, layout = abstract_state(run.model, tx), state_shardings(run.model, tx, devices, run.model.runtime.rules)
    portion = DeviceWorkload(shapes_of(run), run, mesh)
    shapes, real = (flatten_dict(tree, sep="/") for tree in (params, layout.params))
    for laid in portion.laid:
        path = laid.weight.path
        assert laid.sizes == real[path].shard_shape(shapes[path].shape), path
    held = lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    held = sum(jax.tree.leaves(jax.tree.map(held, state, layout)))
    batch = portion.patches * run.model.patch_values
    assert estimate(portion, "full").arguments - batch == pytest.approx(held, rel=1e-4 if name == "adamw" else 0.03)


@pytest.mark.parametrize(
    ("chip", "peak", "arguments", "decoder"), [("v6e", 11.8, 1.59, 486.7), ("h200", 13.2, 1.56, 470.0)]
)
def test_estimates_are_near_what_compilers_find(chip, peak, arguments, decoder):
    """The published 8B on 64 devices, as `python -m mllm_jax.plan --mesh fsdp=64` compiles configs/qwen3_vl_8b.py."""
    run = published("8b", batch=128)
    planned = estimate(DeviceWorkload(shapes_of(run), run, {"fsdp": 64}), "full", CHIPS[chip].kind)
    assert planned.peak / GIB == pytest.approx(peak, rel=0.15)
    assert planned.arguments / GIB == pytest.approx(arguments, rel=0.02)
    assert planned.flops["decoder"] / 1e12 == pytest.approx(decoder, rel=1e-3)


def test_saving_more_recomputes_less():
    run = a_run(moe=MOE)
    plans = {remat: plan(run, remat, fsdp=2, expert=4) for remat in ("full", "experts", "dots", "none")}
    assert plans["none"].recomputed == 0 < plans["dots"].recomputed < plans["full"].recomputed
    assert plans["full"].peak < plans["experts"].peak < plans["none"].peak and plans["full"].peak < plans["dots"].peak
    sent = {remat: bytes_of(plans[remat], "all-to-all", "expert") for remat in plans}
    assert sent["experts"] == sent["none"] == sent["full"] * 4 / 6


# What a device computes.


@pytest.mark.parametrize("mesh", [{}, *MESHES], ids=mesh_text)
def test_every_device_has_its_share_of_the_work(mesh):
    run = a_run(moe=MOE, remat="none")
    planned = plan(run, **mesh)
    # Devices along `tensor` all ask the router, which is not split: 3 layers, forward and two products backward.
    router = 3 * 3 * 2 * (8 * 64) * run.model.decoder.width * MOE.experts / planned.devices
    again = router * (mesh.get("tensor", 1) - 1)
    assert sum(planned.flops.values()) == pytest.approx(planned.useful + again, rel=1e-9)
    assert planned.useful * planned.devices == pytest.approx(plan(run).useful, rel=1e-9)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_work_is_that_of_the_traced_step(remat):
    """Estimated FLOPs equal the trace per part on a mesh, recomputation included.

    The trace counts all pairs of attention, of which half count here.
    """
    run = a_run(remat=remat, data={"tokens": 16, "patches_per_row": 8})
    traced = abstract_step(run, make_mesh({"fsdp": 4, "tensor": 2}))
    found = products(list(operations(traced[0].trace(*traced[1:]).jaxpr)))
    planned = plan(run, fsdp=4, tensor=2)
    pairs = shapes_of(run).attention["decoder"] * (3 if remat == "none" else 4)
    for part in ("encoder", "connector", "decoder"):
        real = sum(product.flops for product in found if product.part == part) - pairs * (part == "decoder")
        assert planned.flops[part] * 8 == pytest.approx(real, rel=0.02), part
    again = sum(product.recomputed for product in found if product.part in ("encoder", "decoder"))
    again -= pairs / 4 if remat != "none" else 0
    assert planned.recomputed * 8 == pytest.approx(again, rel=0.03)


def test_frozen_parts_cost_no_backward():
    run = a_run(optim={"freeze": ("^encoder/", "^connector/")})
    planned, free = plan(run, fsdp=8), plan(a_run(), fsdp=8)
    assert planned.flops["encoder"] == pytest.approx(shapes_of(run).flops["encoder"].forward / 8)
    assert planned.flops["decoder"] == pytest.approx(free.flops["decoder"])
    assert planned.arguments < free.arguments


@pytest.mark.parametrize("base", ("float32", "int8", "int4"))
def test_adapters_are_weighed_beside_a_base_in_few_bits(base):
    run = a_run(lora=LoraConfig(rank=4, base_dtype=base, quant_block_size=16))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    params = abstract_params(run.model)
    expected = size(params) + 2 * size(split(params, run.optim.freeze)[0]) + 8 * 2 * 32 * run.model.patch_values
    assert plan(run, fsdp=1).arguments == expected


# Communication.


def bytes_of(planned, kind: str, *axes: str) -> float:
    return sum(move.bytes for move in planned.collectives if (move.kind, move.axes) == (kind, axes))


def test_fsdp_gathers_every_matrix_twice_and_the_vocabulary_once():
    run = published("8b", batch=128, patch_rows=0)
    decoder = run.model.decoder
    vocabulary = decoder.vocab * decoder.width
    layers = count_params(run.model)["decoder"] - 2 * vocabulary - decoder.width
    layers -= decoder.layers * (2 * decoder.width + 2 * 128)  # norms
    planned, seeing = plan(run, fsdp=64), plan(published("8b", batch=128, patch_rows=2), fsdp=64)
    gathered = bytes_of(planned, "all-gather", "fsdp")
    assert gathered == pytest.approx(2 * (2 * layers + 2 * vocabulary))
    assert bytes_of(planned, "reduce-scatter", "fsdp") * 64 == pytest.approx(2 * layers + 4 * 2 * vocabulary)
    towers = sum(count_params(run.model)[part] for part in ("encoder", "connector"))  # nearly all of it in matrices
    assert bytes_of(seeing, "all-gather", "fsdp") - gathered == pytest.approx(2 * 2 * towers, rel=0.01)


def test_tensor_parallelism_adds_up_activations():
    run = published("8b", batch=256, patch_rows=0)
    planned = plan(run, fsdp=64, tensor=2)
    activations = 4 * 4096 * 4096 * 2  # bytes of the 4 rows of a device
    # Forward two sums, backward two, and attention's again.
    assert bytes_of(planned, "all-reduce", "tensor") == pytest.approx(36 * 5 * activations, rel=1e-5)
    saved = bytes_of(plan(run, "dots", fsdp=64, tensor=2), "all-reduce", "tensor")
    assert saved == pytest.approx(36 * 4 * activations, rel=1e-5)


def test_tokens_between_layers_apart_are_scattered_and_gathered():
    """Sequence parallelism moves as many bytes as full sums, and halves saved activations on two devices."""
    data = {"tokens": 4096, "patches_per_row": 4096, "batch": 256, "patch_rows": 0}
    run = a_run(FAMILIES["qwen3_vl"].config("8b"), data=data, preset="fsdp_tensor")
    planned, plain = plan(run, fsdp=64, tensor=2), plan(published("8b", batch=256, patch_rows=0), fsdp=64, tensor=2)
    activations = 4 * 4096 * 4096 * 2  # bytes of the 4 rows of a device
    assert bytes_of(planned, "all-reduce", "tensor") == 0
    assert bytes_of(planned, "reduce-scatter", "tensor") == pytest.approx(36 * 5 * activations / 2, rel=1e-5)
    # Into both blocks of a layer forward and again, and the gradients of what they gave.
    assert bytes_of(planned, "all-gather", "tensor") == pytest.approx(36 * 2 * 3 * activations, rel=1e-5)
    saved = [dict(x.largest)["saved activations"] for x in (planned, plain)]
    assert saved[0] == pytest.approx(saved[1] / 2)


def test_experts_exchange_six_times_a_layer():
    run = published("235b-a22b", batch=256, patch_rows=0)
    planned = plan(run, fsdp=16, expert=16)
    buffer = 1.25 * 4096 * 8 * 4096 * 2  # bytes of a device's tokens, each for eight experts, with room to spare
    assert bytes_of(planned, "all-to-all", "expert") == pytest.approx(94 * 6 * buffer, rel=1e-6)
    assert bytes_of(plan(run, "experts", fsdp=16, expert=16), "all-to-all", "expert") == pytest.approx(94 * 4 * buffer)
    ragged = estimate(DeviceWorkload(shapes_of(run), run, dict(fsdp=16, expert=16)), "full", "TPU v5p")
    assert bytes_of(ragged, "ragged-all-to-all", "expert") == pytest.approx(94 * 6 * buffer / 1.25)  # no room
    experts = 94 * 128 * 3 * 4096 * 1536 / 16 * 2
    assert bytes_of(planned, "all-gather", "fsdp") == pytest.approx(2 * experts)


def test_long_rows_exchange_heads_or_go_round():
    run = published("8b", batch=16, patch_rows=0)
    planned = plan(run, fsdp=16, context=4)
    tokens = 4096 / 4 * 128 * 2  # bytes of a head of a device's tokens
    assert bytes_of(planned, "all-to-all", "context") == pytest.approx(36 * 3 * tokens * 2 * (32 + 8))
    model = dataclasses.replace(run.model, runtime=dataclasses.replace(run.model.runtime, context="ring"))
    ring = plan(dataclasses.replace(run, model=model), fsdp=16, context=4)
    assert bytes_of(ring, "all-to-all", "context") == 0
    assert bytes_of(ring, "collective-permute", "context") > 36 * 3 * 3 * 2 * 8 * tokens


# The search.


def a_topology(name: str = "v6e:8x8"):
    sizes = tuple(map(int, name.partition(":")[2].split("x")))
    places = np.ndindex(*sizes, *(1,) * (3 - len(sizes)))
    return SimpleNamespace(name=name, devices=tuple(SimpleNamespace(slice_index=0, coords=place) for place in places))


@pytest.fixture(scope="module")
def fake():
    """Devices that are not there, laid out row by row; what is compiled takes what was estimated, times `grown`."""
    made = SimpleNamespace(grown=1.0, compiled=[])

    def lay_out(sizes, devices):
        filled = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
        array = np.array(devices, object).reshape(tuple(filled.values()))
        return SimpleNamespace(devices=array, axis_names=MESH_AXES, shape=filled)

    def compile_step(run, topology, mesh, quick):
        assert quick
        made.compiled.append((mesh_text(mesh), run.model.runtime.remat))
        planned = plan(run, **mesh)
        if planned.peak * made.grown > 1.2 * CHIPS["v6e"].memory:
            raise TooLarge("exceeds the memory of a device")
        return planned._replace(peak=int(planned.peak * made.grown), compile_seconds=1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "make_mesh", lay_out)
        patch.setattr(search_module, "plan_step", compile_step)
        patch.setattr(search_module, "read_shapes", shapes_of)
        yield made


@pytest.fixture(scope="module")
def search(fake):
    """Searches meshes of 64 chips for a model of 128 experts and a batch with too few rows for all chips."""
    return Search(published("30b-a3b", batch=32), a_topology())


@pytest.fixture(scope="module")
def found(search):
    return search.rank()


def test_meshes_are_all_factorizations():
    found = [tuple(sizes.values()) for sizes in meshes(12, ("fsdp", "expert", "tensor"))]
    by_hand = [(a, b, c) for a in range(1, 13) for b in range(1, 13) for c in range(1, 13) if a * b * c == 12]
    assert sorted(found) == by_hand
    assert sum(1 for _ in meshes(256)) == math.comb(8 + 4, 4)


def test_a_search_ranks_what_is_possible_and_says_what_is_not(found):
    for candidate in found.candidates:
        shape = dict.fromkeys(MESH_AXES, 1) | dict(candidate.choice.mesh)
        assert math.prod(shape.values()) == 64 and 4 % shape["tensor"] == 0
        assert 32 % (shape["data"] * shape["fsdp"] * shape["expert"]) == 0
        assert candidate.fits == (candidate.planned.peak <= CHIPS["v6e"].memory)
    fitting = [candidate for candidate in found.candidates if candidate.fits]
    assert found.candidates[: len(fitting)] == fitting and 0 < len(fitting) < len(found.candidates)
    for roomy in (True, False):
        times = [c.time.seconds for c in fitting if (c.planned.peak <= search_module.ROOM * c.memory) == roomy]
        assert all(later >= 0.99 * earlier for earlier, later in zip(times, times[1:])) and len(times) > 1
    possible = {candidate.choice.mesh for candidate in found.candidates}
    assert len(possible) + found.impossible.total() == math.comb(6 + 4, 4)
    assert any("'kv_heads' of size 4 is not divisible by tensor=8" in reason for reason in found.impossible)
    assert any("config.data.batch: its axis 'batch' of size 32" in reason for reason in found.impossible)
    assert {candidate.choice.remat for candidate in found.candidates} == {"none", "full", "experts", "dots"}


def test_the_best_are_compiled_until_enough_fit(fake, search, found):
    said = []
    fake.grown, fake.compiled = 1.0, []
    best = search.compile_best(found, 2, 1e9, said.append)
    first, second = best.candidates[:2]
    assert first.compiled and second.compiled and not best.candidates[2].compiled and len(said) == 2
    assert fake.compiled[0] == (mesh_text(found.candidates[0].choice.mesh), found.candidates[0].choice.remat)
    # The compiler needs more than was thought, and refuses what is far too large.
    fake.grown, fake.compiled = CHIPS["v6e"].memory / found.candidates[0].planned.peak * 1.5, []
    best = search.compile_best(found, 1, 1e9, said.append)
    assert len(fake.compiled) > 1
    refused = [candidate for candidate in best.candidates if candidate.compiled and not candidate.fits]
    assert refused and any("exceeds" in candidate.refused for candidate in refused)
    assert all(candidate.compiled == candidate.fits for candidate in best.candidates[:1])
    fake.grown, fake.compiled = 1.0, []
    search.compile_best(found, 5, 0.0, said.append)
    assert len(fake.compiled) == 1  # no time for a second one


def test_what_does_not_fit_is_in_the_order_of_its_size(fake, search, found):
    """The smallest is shown; estimates are trusted to within a factor, so it is compiled where it may fit."""
    memory = min(candidate.planned.peak for candidate in found.candidates)
    small = lambda candidate, share: candidate._replace(memory=share * memory)
    for share, grown, compiled, fits in ((0.5, 1.0, 0, False), (0.9, 0.8, 1, True), (0.9, 1.0, 1, False)):
        fake.grown, fake.compiled = grown, []
        candidates = sorted((small(one, share) for one in found.candidates), key=lambda candidate: candidate.rank)
        peaks = [candidate.planned.peak for candidate in candidates]
        assert peaks == sorted(peaks) and not candidates[0].fits
        best, *_ = search.compile_best(found._replace(candidates=candidates), 1, 0.0, lambda mesh: None).candidates
        assert len(fake.compiled) == compiled and best.fits == fits
        assert ("does not fit" in summary(best, 1)) != fits


def test_a_dense_model_has_no_expert_axis(fake):
    found = Search(published("8b", batch=128, patch_rows=0), a_topology("v6e:4x4")).rank()
    assert not any("expert" in dict(candidate.choice.mesh) for candidate in found.candidates)
    assert not any(candidate.choice.remat == "experts" for candidate in found.candidates)


def test_a_vision_tower_that_does_not_divide_gets_a_rule_of_its_own(fake):
    run = dataclasses.replace(published("30b-a3b", batch=256), rules=LOGICAL_AXIS_RULES)
    search = Search(run, a_topology("v5p:4x8x8"))
    mesh = (("fsdp", 16), ("expert", 16))
    with pytest.raises(ValueError, match="weight encoder/.*'embed' of size 1152 is not divisible"):
        search.estimate(mesh, ["full"], ["as it is"])
    (candidate,) = search.estimate(mesh, ["full"], ["as it is", "over fsdp"])
    assert candidate.choice.vision == "over fsdp"
    assert candidate.choice.run(run).rules["encoder_embed"] == "fsdp"


def test_no_mesh_is_an_error(fake):
    run = a_run(data={"batch": 1, "tokens": 61})
    with pytest.raises(ConfigError, match="no mesh of 64 devices is possible: .*"):
        Search(run, a_topology()).rank()
    with pytest.raises(ConfigError, match="cpu:8 has no published figures to plan with. Choose one of v4, "):
        Search(run, SimpleNamespace(name="cpu:8"))
    with pytest.raises(ConfigError, match="optim.freeze: 'decodr' matches no weight; the nearest names are decoder"):
        Search(a_run(optim={"freeze": ("decodr",)}), a_topology())


def test_meshes_are_read(monkeypatch):
    topology = SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(search_module, "make_mesh", make_mesh)
    assert read_mesh("fsdp=2,tensor=-1", topology) == dict(data=1, fsdp=2, expert=1, context=1, tensor=4)
    for text, reason in {
        "fsdp": "a mesh is written as in fsdp=16,expert=16",
        "fsdp=2,fsdp=4": "a mesh is written as",
        "fdsp=8": "unknown mesh axes",
        "fsdp=3": "does not cover 8 devices",
    }.items():
        with pytest.raises(ValueError, match=reason):
            read_mesh(text, topology)


def test_a_summary_says_whether_it_fits(found):
    text = summary(found.candidates[0], 32 * 4096)
    assert re.match(r"fits: \S.* with remat \w+ .*on 64 x TPU v6 lite \(estimated, not compiled\) needs", text)
    assert "planned step" in text and "MFU" in text and "bound by" in text and "measured" not in text
    worst = summary(found.candidates[-1], 1)
    assert worst.startswith("does not fit: ") and "lower data.batch" in worst
    assert summary(found.candidates[0]._replace(refused="no room"), 1).endswith(": no room")


# Errors that no mesh can fix.


def test_rows_longer_than_the_positions_of_a_model_are_refused():
    check_run(published("8b", batch=8, tokens=262144))
    with pytest.raises(ConfigError, match="config.data.tokens=262145 is longer than the 262144 positions"):
        check_run(published("8b", batch=8, tokens=262145))
    check_run(a_run())


def test_weights_of_another_model_are_refused(tmp_path):
    run = published("8b", batch=8)
    named = lambda folder: dataclasses.replace(run, init=str(folder))
    check_run(named("Qwen/Qwen3-VL-8B-Instruct"))
    for size, problem in {
        "8b": None,
        "2b": r"encoder.width is 1024 there and 1152 here.* more\. Choose the weights",
    }.items():
        folder = tmp_path / size
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(FAMILIES["qwen3_vl"].to_hf(FAMILIES["qwen3_vl"].config(size))))
        with pytest.raises(ConfigError, match=problem) if problem else contextlib.nullcontext():
            check_run(named(folder))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for folder, problem in {
        tmp_path / "absent": "absent: there is no such folder",
        tmp_path: "is of model_type 'bert', not of this model",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            check_run(named(folder))


# The page.


class Tags(html.parser.HTMLParser):
    """Checks that tags close in order, and collects them with their attributes."""

    VOID = {"meta", "br", "wbr"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_shows_every_candidate_and_every_matrix(fake, search, found, tmp_path):
    fake.grown = 1.0
    found = search.compile_best(found, 2, 1e9, lambda text: None)
    best = found.candidates[0]
    chosen = Chosen(best, search.portion(best.choice).laid, search.network(best.choice.mesh))
    path = write_page(tmp_path / "plan.html", "235B & more", "It <fits>.", chosen, found, search.chip)
    text = path.read_text()
    tags = Tags(text)
    assert list(tmp_path.iterdir()) == [path]
    assert "235B &amp; more" in text and "It &lt;fits&gt;." in text and "planned" in text
    assert not any(tag in ("script", "link", "img") for tag, _ in tags.seen)
    circles = [attrs for tag, attrs in tags.seen if tag == "circle"]
    assert sum("compiled" in attrs["class"] for attrs in circles) == 2
    shown = len(circles) + int(re.search(r"(\d+) candidates that are much slower", text)[1])
    assert shown == len(found.candidates)
    for attrs in circles:
        assert all(0 <= float(attrs[name].rstrip("%")) <= 100 for name in ("cx", "cy"))
    for name in ("mlp/experts_gate_up", "attention/q", "layers/attention/qkv", "embed", "head"):
        assert f">{name}" in text.replace("<wbr>", "") or f"/{name}" in text.replace("<wbr>", ""), name
    assert mesh_text(best.choice.mesh) in text and "ZeRO" not in text
    # A tick beside each axis tells the best, and no other tick is so near that their texts would meet.
    for axis, own, room in (("x", duration(best.time.seconds), 14), ("y", f"{best.planned.peak / GIB:.3g}", 6)):
        ticks = re.findall(
            rf'<text class="{axis}( best)?" {axis}="([\d.]+)%"|<text class="{axis}( best)?" x="-8" y="([\d.]+)%"', text
        )
        places = {bool(a or b): float(c or d) for a, c, b, d in ticks}
        assert re.search(rf'<text class="{axis} best"[^>]*>{re.escape(own)}</text>', text)
        others = [float(c or d) for a, c, b, d in ticks if not (a or b)]
        assert others and all(abs(place - places[True]) > room for place in others)
