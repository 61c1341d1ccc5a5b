"""Damaged and hostile files of weights: each is one error that names the file, and none leads elsewhere."""

import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from same_bits import assert_same_bits
from small_table import ROWS, abstract, random_params

from mllm_jax.weights.hf import load_tensors, save_tensors
from mllm_jax.weights.matching import WeightsMismatch
from mllm_jax.weights.safetensors import BrokenCheckpoint, open_checkpoint


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(tmp_path, keep):
    save_tensors(random_params(), ROWS, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BrokenCheckpoint, match="model.safetensors: "):
        load_tensors(tmp_path, ROWS, abstract())


@pytest.mark.parametrize("header", [b"[]", b"{}", b"{", b'{"x":{"dtype":"F32"}}', b"\xff\xfe",
                                    b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}'])  # fmt: skip
def test_damaged_header(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(BrokenCheckpoint, match="model.safetensors: "):
        open_checkpoint(tmp_path)


X = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
ODD = [None, True, -1, 1.5, "a", [], [True, 24], [-8, 24], [24, 0], [0, 24, 32], ["0", "24"], [0.0, 24.0], [[2]], {}]


@pytest.mark.parametrize("field", [*X, "whole"])
def test_a_header_of_other_values_is_one_error(tmp_path, field):
    """Also infinite, huge and nested ones: none of these can be what 32 bytes of two tensors are."""
    for value in [*ODD, [float("inf")], [2**63, 2], 10**30]:
        other = {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]}
        text = json.dumps({"x": value if field == "whole" else X | {field: value}, "y": other}).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
        if (field, value) == ("dtype", "a"):  # a dtype of a later version of the format
            with pytest.raises(WeightsMismatch, match="dtype: x is a, only F32"):
                load_tensors(tmp_path, [("x", "x")], abstract({"x": (2, 3)}), ignore="y")
            continue
        with pytest.raises(BrokenCheckpoint, match="model.safetensors: "):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("offsets", [[16, 40], [32, 56]], ids=["overlap", "hole"])
def test_tensors_lie_back_to_back(tmp_path, offsets):
    text = json.dumps({"x": X, "y": X | {"data_offsets": offsets}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(offsets[1]))
    with pytest.raises(BrokenCheckpoint, match="y does not begin where the tensor before it ends"):
        open_checkpoint(tmp_path)


def test_a_nested_header_and_a_pipe_are_errors(tmp_path):
    for text in (b"[" * 100_000, b'{"a":' * 100_000):
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(BrokenCheckpoint, match="model.safetensors: the safetensors header is damaged"):
            open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(BrokenCheckpoint, match="model.safetensors: not a regular file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), None])
def test_weights_that_are_not_finite_are_named(tmp_path, caplog, dtype, value):
    largest = torch.finfo(dtype).max if dtype != torch.float64 else 3e38
    layers = {f"model.layers.{n}.norm.weight": torch.full((16,), -largest, dtype=dtype) for n in range(5)}
    tensors = layers | {"temperature": torch.tensor(1.0, dtype=dtype)}
    if value is not None:
        layers["model.layers.3.norm.weight"][7] = value
        tensors["temperature"] = torch.tensor(value, dtype=dtype)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    load_tensors(tmp_path, ROWS, abstract({"layers/norm/scale": (5, 16), "temperature": ()}))
    told = [record.getMessage() for record in caplog.records]
    text = "contain inf or NaN, in 2 parameters: layers/norm/scale, temperature"
    assert told == ([] if value is None else [f"the weights in {tmp_path} {text}"])


def test_index_and_files_that_disagree_are_listed(tmp_path):
    save_tensors(random_params(), ROWS, tmp_path, max_shard_bytes=6000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    some = index["weight_map"]["temperature"]
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"ghost": some}}))
    with pytest.raises(BrokenCheckpoint, match="no tensor ghost, which the index lists"):
        open_checkpoint(tmp_path)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"ghost": "absent.safetensors"}}))
    with pytest.raises(BrokenCheckpoint, match="missing files: absent.safetensors"):
        open_checkpoint(tmp_path)
    for damage in ("[", "{}", '{"weight_map": {}}', '{"weight_map": {"x": 1}}', '{"weight_map": {"x": "../x"}}'):
        path.write_text(damage)
        with pytest.raises(BrokenCheckpoint, match="index.json is damaged"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("spelling", ["./{}", ".//{}", "parts/{}", "./parts/./{}"])
def test_an_index_may_spell_a_path_inside_the_folder(tmp_path, spelling):
    params = random_params()
    save_tensors(params, ROWS, tmp_path, max_shard_bytes=6000)
    path = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    (tmp_path / "parts").mkdir()
    for file in set(weight_map.values()) if "parts" in spelling else ():
        (tmp_path / file).rename(tmp_path / "parts" / file)
    path.write_text(json.dumps({"weight_map": {name: spelling.format(file) for name, file in weight_map.items()}}))
    assert_same_bits(load_tensors(tmp_path, ROWS, abstract()), params)


@pytest.mark.parametrize("place", ["../{}", "a/../../{}", "/{}", "..\\{}", "parts/..", "", ".", None])
def test_an_index_never_leads_out_of_the_folder(tmp_path, place):
    folder = tmp_path / "folder"
    for where in (folder, tmp_path):
        save_tensors({"embed": np.zeros((7, 16), np.float32)}, ROWS, where)
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    place = place and place.format(
        str(tmp_path / "model.safetensors").strip("/") if place[0] == "/" else "model.safetensors"
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.embed.weight": place}}))
    with pytest.raises(BrokenCheckpoint, match="index.json is damaged"):
        load_tensors(folder, ROWS, abstract({"embed": (7, 16)}))
