"""Weights: the table of names, the reader and writer of safetensors, loading into shardings, saving, memory."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from same_bits import assert_same_bits, bits
from small_table import ROWS, SHAPES, abstract, random_params

from mllm_jax.common.trees import flatten, unflatten
from mllm_jax.weights.hf import load_tensors, save_tensors
from mllm_jax.weights.matching import WeightsMismatch
from mllm_jax.weights.safetensors import BrokenCheckpoint, open_checkpoint
from mllm_jax.weights.table import Row, expand, to_ours, to_theirs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def saved(tmp_path):
    params = random_params()
    save_tensors(params, ROWS, tmp_path)
    return tmp_path, params


# --- the table


def test_expand_names_every_tensor_with_its_shape():
    entries = expand(ROWS, abstract())
    assert len(entries) == 5 + 4 * 5 + 2 * 3
    assert entries["visual.patch.weight"].shape == (16, 3, 2, 2, 2)
    assert entries["visual.pos_embed.weight"].shape == (15, 16)
    entry = entries["model.layers.4.qkv.weight"]
    assert (entry.path, entry.index, entry.shape) == ("layers/qkv/w", (4,), (24, 16))
    assert entries["model.experts.1.2.up.weight"].index == (1, 2)
    assert entries["temperature"].shape == entries["model.layers.0.gate"].shape == ()


def test_rearranging_is_what_the_pattern_says_and_back():
    entry = expand(ROWS, abstract())["model.layers.0.qkv.weight"]
    theirs = np.arange(24 * 16).reshape(24, 16)
    ours = to_ours(theirs, entry)
    np.testing.assert_array_equal(ours[:, 1, 2], theirs[8 + 4 : 8 + 6].T)
    np.testing.assert_array_equal(to_theirs(ours, entry), theirs)


def test_rows_of_absent_leaves_are_not_used():
    shapes = {path: shape for path, shape in SHAPES.items() if path != "head/w"}
    assert "lm_head.weight" not in expand(ROWS, abstract(shapes))


@pytest.mark.parametrize(
    ("rows", "shape", "message"),
    [
        ([], (2, 3), "leaf: no row"),
        ([("leaf", "a"), ("leaf", "b")], (2, 3), "more than one row"),
        ([("leaf", "x.{n}.{m}.{k}")], (2, 3), "3 stacked axes"),
        ([("leaf", "x", "(a b c) -> a (b c)")], (2, 6), "sizes"),
        ([("leaf", "x", "(a b) -> a b", {"b": 4})], (2, 3), "cannot be 3"),
        ([("leaf", "x", "a b c -> a b")], (2, 3), "'c'"),
        ([("leaf", "x.{n}", "b a -> a b")], (2, 3), "the pattern gives 2 axes, the leaf has 1"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(rows, shape, message):
    with pytest.raises(ValueError, match="does not fit the tree") as error:
        expand(rows, abstract({"leaf": shape}))
    assert message in str(error.value)


def test_two_leaves_with_one_name_are_refused():
    with pytest.raises(ValueError, match="both a and b"):
        expand([("a", "x"), ("b", "x")], abstract({"a": (2,), "b": (2,)}))


JOINT = [
    Row("q/w", "{n}.qkv.weight", "(k g h) d -> d (k g) h", {"g": 3}, part=("g", 0, 5)),
    Row("k/w", "{n}.qkv.weight", "(k g h) d -> d k (g h)", {"g": 1}, part=("g", 3, 5)),
    Row("v/w", "{n}.qkv.weight", "(k g h) d -> d k (g h)", {"g": 1}, part=("g", 4, 5)),
]
JOINT_SHAPES = {"q/w": (2, 7, 6, 4), "k/w": (2, 7, 2, 4), "v/w": (2, 7, 2, 4)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_leaves_that_share_a_tensor(tmp_path, dtype):
    """Two groups of 20 rows hold 12 rows of queries, 4 of a key and 4 of a value each."""
    params = random_params(dtype, JOINT_SHAPES)
    save_tensors(params, JOINT, tmp_path)
    (tensor,) = (x for name, x in safetensors.torch.load_file(tmp_path / "model.safetensors").items() if name[0] == "1")
    assert tensor.shape == (40, 7)
    ours = torch.from_numpy(np.asarray(params["q"]["w"][1], np.float32)).permute(1, 2, 0).reshape(2, 12, 7)
    assert torch.equal(tensor.reshape(2, 20, 7)[:, :12].float(), ours)
    value = torch.from_numpy(np.asarray(params["v"]["w"][1], np.float32)).permute(1, 2, 0)
    assert torch.equal(tensor.reshape(2, 20, 7)[:, 16:].float(), value)
    assert_same_bits(load_tensors(tmp_path, JOINT, abstract(JOINT_SHAPES), dtype=dtype), params)


@pytest.mark.parametrize(
    "rows, message",
    [
        (JOINT[:2], "q/w and k/w are not the parts of one tensor"),
        ([*JOINT[:2], JOINT[2]._replace(part=("g", 3, 5))], "are not the parts of one tensor"),
        ([*JOINT[:2], JOINT[2]._replace(part=None)], "both q/w and k/w and v/w"),
        ([*JOINT[:2], JOINT[2]._replace(part=("x", 4, 5))], "part names 'x'"),
    ],
)
def test_parts_that_are_not_a_whole_are_refused(rows, message):
    shapes = {row.ours: JOINT_SHAPES[row.ours] for row in rows}
    with pytest.raises(ValueError, match="does not fit the tree") as error:
        expand(rows, abstract(shapes))
    assert message in str(error.value)


# --- round trips


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_equal_and_as_torch_reads_it(tmp_path, dtype):
    params = random_params(dtype)
    save_tensors(params, ROWS, tmp_path)
    loaded = load_tensors(tmp_path, ROWS, abstract(), dtype=dtype)
    assert_same_bits(loaded, params)
    theirs = safetensors.torch.load_file(tmp_path / "model.safetensors")
    entries = expand(ROWS, abstract())
    assert theirs.keys() == entries.keys()
    for name, entry in entries.items():
        assert theirs[name].dtype == DTYPES[dtype] and theirs[name].shape == entry.shape
        ours = to_ours(theirs[name].float().numpy(), entry)
        np.testing.assert_array_equal(ours, np.asarray(flatten(loaded)[entry.path][entry.index], np.float32))
    save_tensors(loaded, ROWS, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_every_bit_pattern_is_cast_as_numpy_casts_it(tmp_path, stored, asked):
    every = np.arange(1 << 16, dtype=np.uint16)
    values = every.view(np.dtype(stored)) if stored != "float32" else (every.astype(np.uint32) << 16).view(np.float32)
    values = values[np.isfinite(values.astype(np.float32))]
    tensor = torch.tensor(values.astype(np.float32)).to(DTYPES[stored])
    safetensors.torch.save_file({"x": tensor}, tmp_path / "a.safetensors")
    loaded = load_tensors(tmp_path, [("x", "x")], abstract({"x": values.shape}), dtype=asked)
    np.testing.assert_array_equal(bits(loaded["x"]), bits(values.astype(np.dtype(asked))))


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_doubles_are_cast_as_torch_casts_them(tmp_path, asked):
    values = {"x": torch.randn(6, 5, dtype=torch.float64), "scale": torch.tensor(1 / 3, dtype=torch.float64)}
    values["x"][0, :3] = torch.tensor([1 + 2**-8 + 2**-40, 1e-300, 3e38], dtype=torch.float64)
    safetensors.torch.save_file(values, tmp_path / "model.safetensors")
    loaded = load_tensors(tmp_path, [("x", "x"), ("scale", "scale")], abstract({"x": (6, 5), "scale": ()}), dtype=asked)
    for name, value in values.items():
        assert torch.equal(torch.from_numpy(np.array(loaded[name], np.float32)), value.to(DTYPES[asked]).float())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "int64", "bool", "complex64"])
def test_other_dtypes_are_refused_as_weights_and_ignored_as_buffers(tmp_path, dtype):
    kind = getattr(torch, dtype)
    tensors = {"model.embed.weight": torch.zeros(7, 16), "model.position_ids": torch.arange(3).to(kind)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    shapes = abstract({"embed": (7, 16)})
    load_tensors(tmp_path, ROWS, shapes, ignore=[r".*\.position_ids"])
    tensors["model.embed.weight"] = tensors["model.embed.weight"].to(kind)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsMismatch, match="dtype: model.embed.weight is .*, only F32, F16, BF16, F64 can be read"):
        load_tensors(tmp_path, ROWS, shapes, ignore=[r".*\.position_ids"])


def test_saving_can_cast(tmp_path):
    params = random_params()
    save_tensors(params, ROWS, tmp_path, dtype="bfloat16")
    loaded = load_tensors(tmp_path, ROWS, abstract(), dtype="bfloat16")
    assert_same_bits(loaded, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params))


SPECS = {
    "patch/w": (None, "fsdp"),
    "position": (),
    "layers/qkv/w": (None, "fsdp", None, "tensor"),
    "layers/out/w": (None, "tensor", None, "fsdp"),
    "layers/norm/scale": (),
    "experts/up/w": ("tensor", None, None, "fsdp"),
    "embed": (None, ("fsdp", "tensor")),
    "head/w": ("fsdp", "tensor"),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("under_mesh", [False, True])
def test_round_trip_over_eight_devices(saved, kind, under_mesh):
    folder, params = saved
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    shardings = unflatten({path: NamedSharding(mesh, PartitionSpec(*SPECS.get(path, ()))) for path in SHAPES})
    with jax.set_mesh(mesh if under_mesh else Mesh(np.array(jax.devices()[:1]), ("one",))):
        loaded = load_tensors(folder, ROWS, abstract(), shardings)
        for path, leaf in flatten(loaded).items():
            assert leaf.sharding == flatten(shardings)[path]
        save_tensors(loaded, ROWS, folder / "again")
    assert_same_bits(loaded, params)
    assert (folder / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_stacked_axis_may_be_sharded_too(tmp_path):
    shapes = {"experts/up/w": (2, 4, 16, 8)}
    params = random_params(shapes=shapes)
    save_tensors(params, ROWS, tmp_path)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("stage", "expert"))
    sharding = NamedSharding(mesh, PartitionSpec("stage", "expert"))
    loaded = load_tensors(tmp_path, ROWS, abstract(shapes), unflatten({"experts/up/w": sharding}))
    assert_same_bits(loaded, params)
    save_tensors(loaded, ROWS, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("nbytes", [1, 300])
def test_large_tensors_come_in_parts(saved, monkeypatch, nbytes):
    monkeypatch.setattr("mllm_jax.weights.streaming._PART", nbytes)
    folder, params = saved
    assert_same_bits(load_tensors(folder, ROWS, abstract()), params)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    shardings = unflatten({path: NamedSharding(mesh, PartitionSpec(*SPECS.get(path, ()))) for path in SHAPES})
    assert_same_bits(load_tensors(folder, ROWS, abstract(), shardings), params)


def test_empty_trees_and_empty_stacks(tmp_path):
    params = random_params(shapes={"layers/norm/scale": (0, 16), "embed": (7, 16)})
    save_tensors(params, ROWS, tmp_path / "a")
    loaded = load_tensors(tmp_path / "a", ROWS, abstract({"layers/norm/scale": (0, 16), "embed": (7, 16)}))
    assert_same_bits(loaded, params)
    save_tensors({}, ROWS, tmp_path / "b")
    assert load_tensors(tmp_path / "b", ROWS, {}) == {}


# --- files


@pytest.mark.parametrize("limit", [1, 1000, 6000])
def test_shards_with_and_without_their_index(tmp_path, limit):
    params = random_params()
    save_tensors(params, ROWS, tmp_path, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files and not list(tmp_path.glob("*.partial"))
    on_disk = [safetensors.numpy.load_file(tmp_path / file) for file in files]
    assert sum(array.nbytes for part in on_disk for array in part.values()) == index["metadata"]["total_size"]
    assert all(sum(array.nbytes for array in part.values()) <= limit or len(part) == 1 for part in on_disk)
    for file, part in zip(files, on_disk):
        assert part.keys() == {name for name, place in index["weight_map"].items() if place == file}
    assert_same_bits(load_tensors(tmp_path, ROWS, abstract()), params)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same_bits(load_tensors(tmp_path, ROWS, abstract()), params)


def test_saving_again_replaces_and_a_failure_keeps_what_was_there(tmp_path, monkeypatch):
    save_tensors(random_params(), ROWS, tmp_path, max_shard_bytes=1000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(random_params(), ROWS, tmp_path, max_shard_bytes=2000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    save_tensors(random_params(), ROWS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_only_floats_are_written(tmp_path):
    with pytest.raises(ValueError, match="only fp32, bf16 and fp16 can be written.*x int32"):
        save_tensors({"x": np.zeros(3, np.int32)}, [("x", "x")], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_one_name_in_two_files_is_refused(tmp_path):
    for file in ("a", "b"):
        safetensors.numpy.save_file({"x": np.zeros(2, np.float32)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(BrokenCheckpoint, match="b.safetensors: x is in a.safetensors, too"):
        open_checkpoint(tmp_path)


def test_pickle_is_refused(tmp_path):
    torch.save({"x": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BrokenCheckpoint, match="pytorch_model.bin may be pickle files, which run code"):
        load_tensors(tmp_path, ROWS, abstract())
    with pytest.raises(BrokenCheckpoint, match=r"has no \*.safetensors$"):
        (tmp_path / "empty").mkdir()
        open_checkpoint(tmp_path / "empty")


# --- what does not fit


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    save_tensors(random_params(), ROWS, tmp_path)
    arrays = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    del arrays["model.layers.3.norm.weight"], arrays["temperature"]
    arrays["model.layers.2.qkv.weight"] = arrays["model.layers.2.qkv.weight"][:-1].copy()
    arrays["model.embed.weight"] = np.zeros((7, 16), np.int8)
    arrays["surprise"] = np.zeros((2, 3), np.float32)
    arrays["old.lm_head.weight"] = arrays["lm_head.weight"]
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(WeightsMismatch) as error:
        load_tensors(tmp_path, ROWS, abstract(), rename=[("^old[.]", "")])
    lines = [line.strip() for line in str(error.value).split("\n")[1:]]
    assert lines == [
        "dtype: model.embed.weight is I8, only F32, F16, BF16, F64 can be read. Load a copy without quantization.",
        "missing: model.layers.3.norm.weight [16] for layers/norm/scale[3]",
        "missing: temperature [] for temperature",
        "shape: model.layers.2.qkv.weight is [23, 16], layers/qkv/w[2] needs [24, 16]",
        "twice: old.lm_head.weight (as lm_head.weight)",
        "unexpected: surprise [2, 3]",
    ]


def test_old_names_and_redundant_tensors(tmp_path):
    shapes = {"embed": (7, 16), "layers/norm/scale": (2, 16)}
    params = random_params(shapes=shapes)
    old = {"language_model.model.embed.weight": params["embed"], "lm_head.weight": params["embed"]}
    old |= {f"language_model.model.layers.{n}.norm.weight": params["layers"]["norm"]["scale"][n] for n in range(2)}
    old |= {f"layers.{n}.rotary.inv_freq": np.zeros(2, np.float64) for n in range(2)}
    safetensors.numpy.save_file(old, tmp_path / "model.safetensors")
    rename = [(r"^language_model\.model\.", "model.")]
    loaded = load_tensors(tmp_path, ROWS, abstract(shapes), ignore=["lm_head.weight", r".*\.inv_freq"], rename=rename)
    assert_same_bits(loaded, params)
    with pytest.raises(WeightsMismatch, match="unexpected: lm_head.weight"):
        load_tensors(tmp_path, ROWS, abstract(shapes), ignore=[r".*\.inv_freq"], rename=rename)


# --- several processes

PROCESS = """
    import sys
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from mllm_jax.weights.hf import load_tensors, save_tensors

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    rows = [("w", "layers.{n}.w", "(n h) d -> d n h"), ("scale", "scale"), ("temperature", "temperature")]
    shapes = {"w": (3, 8, 4, 2), "scale": (5,), "temperature": ()}
    abstract = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()}
    specs = {"w": PartitionSpec(None, "fsdp", "tensor"), "scale": PartitionSpec(), "temperature": PartitionSpec()}
    shardings = {path: NamedSharding(mesh, spec) for path, spec in specs.items()}
    params = load_tensors(sys.argv[3], rows, abstract, shardings)
    assert not params["w"].is_fully_addressable
    save_tensors(params, rows, sys.argv[4], max_shard_bytes=600)
"""


def test_two_processes_load_and_save_as_one(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"layers.{n}.w": rng.normal(size=(8, 8)).astype(np.float32) for n in range(3)}
    tensors |= {"scale": np.arange(5, dtype=np.float32), "temperature": np.array(3, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command, folders = [sys.executable, "-c", textwrap.dedent(PROCESS)], [tmp_path, tmp_path / "again"]
    processes = [
        subprocess.Popen([*command, address, str(rank), *folders], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    again = open_checkpoint(tmp_path / "again")
    assert len({tensor.file for tensor in again.values()}) == 2 and again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name].map(), tensor)


# --- memory

MEMORY = """
    import re, sys, threading
    import jax
    from mllm_jax.weights.hf import load_tensors, save_tensors
    from mllm_jax.common.trees import unflatten

    def held():  # without pages of files, which the kernel drops and reads again as others need memory
        status = open("/proc/self/status").read()
        return sum(int(re.search(rf"{field}:\\s+(\\d+)", status)[1]) * 1024 for field in ("RssAnon", "VmSwap"))
    rows = [("embed", "embed"), ("layers/w", "layers.{n}.w", "(n h) d -> d n h")]
    def load(folder, layers, width):
        shapes = {"layers/w": (layers, width, width // 64, 64), "embed": (layers * width, width)}  # largest one last
        return load_tensors(folder, rows, unflatten({k: jax.ShapeDtypeStruct(v, "float32") for k, v in shapes.items()}))
    def measure(function, *args):
        peak, done = [before := held()], threading.Event()
        def watch():
            while not done.wait(0.001):
                peak.append(held())
        (thread := threading.Thread(target=watch)).start()
        result = jax.block_until_ready(function(*args))
        done.set()
        thread.join()
        return result, max(peak) - before

    small, large, layers, width = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    save_tensors(load(small, 2, 128), rows, small + "/again")
    params, loading = measure(load, large, layers, width)
    _, saving = measure(save_tensors, params, rows, large + "/again")
    final = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(loading - final, saving, final, params["layers"]["w"][-1, 1, 0, 2])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory of a process from Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_grows_with_the_arrays_and_in_saving_with_the_largest_tensor(tmp_path, dtype):
    """Memory that the larger of two models (134 and 403 MB in fp32, half of it one tensor) needs above its arrays.

    Loading holds parts of a constant size; saving holds one full tensor in fp32. Memory of jax and the machine
    cancels out. glibc is told to return freed blocks, which would not.
    """
    width, sizes, above = 2048, (2, 4, 12), {}
    for layers in sizes:  # the first one warms up
        size = 128 if layers == 2 else width
        tensors = {f"layers.{n}.w": torch.zeros(size, size, dtype=DTYPES[dtype]) for n in range(layers)}
        tensors["embed"] = torch.zeros(layers * size, size, dtype=DTYPES[dtype])
        tensors[f"layers.{layers - 1}.w"][2, 1] = 0.5
        (tmp_path / f"{layers}").mkdir()
        safetensors.torch.save_file(tensors, tmp_path / f"{layers}" / "model.safetensors")
    for layers in sizes[1:]:
        command = [sys.executable, "-c", textwrap.dedent(MEMORY), tmp_path / "2", tmp_path / f"{layers}", layers, width]
        environment = os.environ | {"XLA_FLAGS": "", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
        *above[layers], final, value = map(float, done.stdout.split())
        assert value == 0.5 and final == 4 * 2 * layers * width**2
    loading, saving = np.subtract(above[12], above[4])
    arrays = 4 * 2 * (12 - 4) * width**2
    assert loading < 0.2 * arrays  # a copy of one leaf: 0.5, of the bytes of a bf16 file 0.25, beside what is measured
    assert saving < (0.5 + 0.2) * arrays  # two copies of the tensor: 1.0
