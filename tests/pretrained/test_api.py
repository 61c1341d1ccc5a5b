"""Models in Hugging Face's format, in and out, and the names that users import."""

import dataclasses
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat
import torch
import transformers
from examples import random_params, tiny_config
from reference import batch_of, prompt, tiny_qwen3_vl, to_torch

import mllm_jax
from mllm_jax.common.trees import flatten, join
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.families import FAMILIES
from mllm_jax.model.vlm import VLM, init_adapters
from mllm_jax.nn.lora import LoraConfig
from mllm_jax.pretrained import api


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def published(request, tmp_path_factory):
    """transformers' model and its folder."""
    _, reference = tiny_qwen3_vl(tie=request.param)
    folder = tmp_path_factory.mktemp("published")
    reference.save_pretrained(folder)
    return reference, folder


def random_model(seed=0, processor=None):
    config = tiny_config()
    return mllm_jax.Pretrained(config, VLM(config), random_params(config, seed), processor)


def inputs():
    rows = [(3, ("image", 4, 6), 4), (1, ("video", 2, 4, 4), 2, ("image", 12, 4), 9)]
    return batch_of([prompt(np.random.default_rng(0), *row) for row in rows])


def logits(vlm, inputs):
    out = jax.jit(vlm.model.apply)({"params": vlm.params}, mllm_jax.from_hf_inputs(vlm.config, inputs))
    return np.asarray(out.logits)[inputs["attention_mask"] == 1]


def assert_equal_params(left, right):
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def test_published_weights_give_transformers_logits(published):
    reference, folder = published
    vlm = mllm_jax.load_pretrained(folder)
    assert vlm.processor is None and vlm.config.runtime.dtype == "float32"
    with torch.no_grad():
        expected = reference(**to_torch(inputs())).logits.numpy()[inputs()["attention_mask"] == 1]
    np.testing.assert_allclose(logits(vlm, inputs()), expected, atol=1e-4, rtol=1e-4)


def test_export_is_read_by_transformers(published, tmp_path):
    reference, folder = published
    vlm = mllm_jax.load_pretrained(folder)
    mllm_jax.save_pretrained(vlm, tmp_path / "export")
    exported = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "export", attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert type(exported) is type(reference)
    expected, got = reference.state_dict(), exported.state_dict()
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    with torch.no_grad():
        torch.testing.assert_close(
            exported(**to_torch(inputs())).logits, reference(**to_torch(inputs())).logits, rtol=0, atol=0
        )


def test_round_trip_is_bit_equal(published, tmp_path):
    first = mllm_jax.load_pretrained(published[1])
    mllm_jax.save_pretrained(first, tmp_path / "a")
    second = mllm_jax.load_pretrained(tmp_path / "a")
    assert second.config == first.config
    assert_equal_params(first.params, second.params)
    mllm_jax.save_pretrained(second, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_bfloat16_is_kept_and_computed(published, tmp_path):
    half = mllm_jax.load_pretrained(published[1], dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.bfloat16.dtype}
    assert half.config.runtime.dtype == "bfloat16"
    whole = mllm_jax.load_pretrained(published[1])
    np.testing.assert_allclose(logits(half, inputs()), logits(whole, inputs()), atol=0.5)
    mllm_jax.save_pretrained(half, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_equal_params(half.params, mllm_jax.load_pretrained(tmp_path / "half", dtype="bfloat16").params)


def test_a_mesh_spreads_the_weights(published):
    mesh = mllm_jax.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    spread, whole = mllm_jax.load_pretrained(published[1], mesh=mesh), mllm_jax.load_pretrained(published[1])
    assert len(spread.params["decoder"]["layers"]["mlp"]["up"]["w"].sharding.device_set) == 4
    assert_equal_params(whole.params, spread.params)
    batch = mllm_jax.from_hf_inputs(whole.config, inputs())
    np.testing.assert_array_equal(mllm_jax.generate_ids(spread, batch, 4), mllm_jax.generate_ids(whole, batch, 4))


def test_runtime_is_taken_but_for_its_dtype(published):
    runtime = mllm_jax.Runtime(dtype="bfloat16", scan=False, remat="dots")
    vlm = mllm_jax.load_pretrained(published[1], runtime=runtime)
    assert vlm.config.runtime == mllm_jax.Runtime(scan=False, remat="dots") == vlm.model.config.runtime


def test_the_processor_travels(tmp_path):
    processor = Processor.from_folder(tiny_chat.write_tokenizer(tmp_path / "tokenizer"))
    mllm_jax.save_pretrained(random_model(processor=processor), tmp_path / "model")
    again = mllm_jax.load_pretrained(tmp_path / "model").processor
    assert again.spec == processor.spec and again.stop_ids == processor.stop_ids
    messages = [{"role": "user", "content": "How many <|im_end|>?"}]
    np.testing.assert_array_equal(again(messages).tokens, processor(messages).tokens)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert generation.eos_token_id == list(processor.stop_ids)
    assert generation.pad_token_id in processor.stop_ids
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "model")) == len(processor.tokenizer)


def test_saving_replaces_the_model_and_nothing_else(tmp_path):
    folder = tmp_path / "model"
    mllm_jax.save_pretrained(random_model(0), folder)
    (folder / "README.md").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("of an earlier model")
    mllm_jax.save_pretrained(random_model(1), folder)
    assert_equal_params(mllm_jax.load_pretrained(folder).params, random_model(1).params)
    assert (folder / "README.md").read_text() == "mine"
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    mllm_jax.save_pretrained(random_model(0), folder)

    def full_disk(*args):
        raise OSError("no space left on device")

    for broken in ("save_tensors", "_write_texts"):
        with monkeypatch.context() as patch:
            patch.setattr(api, broken, full_disk)
            for target in (folder, tmp_path / "new" / "model"):
                with pytest.raises(OSError, match="no space"):
                    mllm_jax.save_pretrained(random_model(1), target)
    assert not (tmp_path / "new" / "model").exists()
    assert_equal_params(mllm_jax.load_pretrained(folder).params, random_model(0).params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        mllm_jax.save_pretrained(random_model(1), tmp_path / "file")


class Killed(BaseException):
    """An exception that no error handler catches, like a signal."""


def test_a_save_that_is_killed_while_it_moves_files(tmp_path, monkeypatch):
    """At whichever file: the folder is the old model, the new one, or refused, and the next save begins as it ended."""
    folder, moved = tmp_path / "model", []
    replace, remove = pathlib.Path.replace, pathlib.Path.unlink

    def counted(change):
        def act(path, *args, **options):
            if path.parent.name not in ("model", ".model.moving"):
                return change(path, *args, **options)
            if len(moved) >= limit:
                raise Killed
            moved.append(path.name)
            return change(path, *args, **options)

        return act

    new = random_model(1).params
    for limit in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        mllm_jax.save_pretrained(random_model(0), folder)
        (folder / "model_ema.safetensors").write_text("mine")
        moved.clear()
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "replace", counted(replace))
            patch.setattr(pathlib.Path, "unlink", counted(remove))
            try:
                mllm_jax.save_pretrained(random_model(1), folder)
                break
            except Killed:
                pass
        assert (folder / "model_ema.safetensors").read_text() == "mine"
        if (folder / "config.json").exists():
            found = mllm_jax.load_pretrained(folder).params
            assert_equal_params(found, random_model(0 if limit == 0 else 1).params)
        else:
            with pytest.raises(FileNotFoundError, match="is not complete: a save was interrupted.*Save again, or move"):
                mllm_jax.load_pretrained(folder)
        with monkeypatch.context() as patch:  # the next save fails, after what was left of this one is in place
            patch.setattr(api, "save_tensors", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                mllm_jax.save_pretrained(random_model(0), folder)
        assert_equal_params(mllm_jax.load_pretrained(folder).params, new)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert limit >= 3
    assert_equal_params(mllm_jax.load_pretrained(folder).params, new)


def test_adapters_never_mix_with_those_before(tmp_path, monkeypatch):
    """A save that is killed between its two files leaves what is refused, and the next one has both."""
    folder, replace = tmp_path / "adapters", pathlib.Path.replace
    base = random_model()

    def adapted(alpha):
        config = dataclasses.replace(base.config, lora=LoraConfig(rank=2, alpha=alpha))
        params = join(base.params, init_adapters(config, jax.random.key(int(alpha))))
        return dataclasses.replace(base, config=config, params=params)

    def killed(path, target):
        if path.name == "adapter_config.json":
            raise Killed
        return replace(path, target)

    first, second = adapted(4.0), adapted(32.0)
    mllm_jax.save_adapters(first, folder)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", killed)
        with pytest.raises(Killed):
            mllm_jax.save_adapters(second, folder)
    with pytest.raises(FileNotFoundError, match="is not complete: a save was interrupted"):
        mllm_jax.load_adapters(base, folder)
    mllm_jax.save_adapters(second, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 32
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


@pytest.mark.parametrize(
    "config, error, message",
    [
        (None, FileNotFoundError, "has no config.json"),
        ("{", ValueError, "not readable JSON"),
        ('{"model_type": "mllama"}', ValueError, "model_type='mllama': .*Did you mean 'llama'.*Supported: .*qwen3_vl"),
        ('{"model_type": "qwen3_vl"}', ValueError, "config.json: text_config: is missing"),
        (
            '{"model_type": "llava", "text_config": {}, "vision_config": {"model_type": "mlcd_vision_model"}}',
            ValueError,
            "vision_config.model_type='mlcd_vision_model': not supported. Did you mean 'clip_vision_model'",
        ),
        (
            '{"model_type": "llava_onevision", "vision_config": {"model_type": "siglip_vision_model"},'
            ' "text_config": {"model_type": "qwen2_moe"}}',
            ValueError,
            "config.json: decoder model_type='qwen2_moe': not .*Did you mean 'qwen3_moe'.*Supported: g",
        ),
    ],
)
def test_folders_that_are_no_model(tmp_path, config, error, message):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(error, match=message):
        mllm_jax.load_pretrained(tmp_path)


def test_folders_without_weights(published, tmp_path):
    (tmp_path / "config.json").write_bytes((published[1] / "config.json").read_bytes())
    with pytest.raises(ValueError, match="no .*safetensors"):
        mllm_jax.load_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        mllm_jax.load_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="dtype"):
        mllm_jax.load_pretrained(published[1], dtype="float8")


def test_public_names():
    for name in mllm_jax.__all__:
        assert getattr(mllm_jax, name) is not None and name in dir(mllm_jax)
    with pytest.raises(AttributeError, match="nonsense.*load_pretrained"):
        mllm_jax.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import mllm_jax; assert 'jax' not in sys.modules; assert 'generate' in dir(mllm_jax)",
        "import mllm_jax; mllm_jax.generate(None, []); import mllm_jax.generate; mllm_jax.generate(None, [])",
        "import mllm_jax.generate; mllm_jax.generate(None, []); from mllm_jax import generate; generate(None, [])",
        "import mllm_jax.generate.sampling, mllm_jax; mllm_jax.generate(None, []); mllm_jax.generate.sampling.greedy",
        "from mllm_jax import *; assert generate(None, []) == [] and callable(generate_ids)",
    ],
)
def test_generate_is_a_function_whatever_was_imported(code):
    subprocess.run([sys.executable, "-c", f"import sys; {code}"], check=True)


@pytest.mark.parametrize(
    ("kind", "size", "change", "message"),
    [
        ("llama", "3.2-1b", {"input_ids": [[5, 128256]]}, "input_ids hold 128256, which is not a token: .* has 128256"),
        ("llama", "3.2-1b", {"input_ids": [[5, -3]]}, "input_ids hold -3, which is not a token"),
        ("llama", "3.2-1b", {"input_ids": [[5, 2**32 + 5]]}, "input_ids hold 4294967301, which is not a token"),
        ("llama", "3.2-1b", {"input_ids": [[5.5, 6]]}, r"input_ids must be integers \[B T\], not float64 \[1, 2\]"),
        ("llama", "3.2-1b", {"input_ids": [5, 6]}, r"input_ids must be integers \[B T\], not int64 \[2\]"),
        ("llama", "3.2-1b", {"attention_mask": [[1]]}, r"attention_mask has shape \(1, 1\), input_ids \(1, 2\)"),
        ("llama", "3.2-1b", {"input_ids": None}, "input_ids are missing"),
        ("gpt2", "124m", {"input_ids": np.full((1, 1025), 5)}, "a text of 1025 tokens; .* learned 1024 positions"),
        ("clip", "b16", {"input_ids": np.full((1, 78), 5)}, "a text of 78 tokens; the model has learned 77 positions"),
        ("siglip", "base-16-224", {"input_ids": [[32000]]}, "input_ids hold 32000, which is not a token"),
        ("clip", "b16", {"input_ids": np.zeros((2, 0), int)}, r"must be \[texts T\], not \(2, 0\)"),
    ],
)
def test_tokens_that_a_model_has_not_are_refused(kind, size, change, message):
    """Looking them up gives NaN, or the embedding of another token."""
    given = {"input_ids": [[5, 6]]} | change
    with pytest.raises(ValueError, match=message):
        mllm_jax.from_hf_inputs(FAMILIES[kind].config(size), given)


def test_padding_may_hold_any_id():
    config = FAMILIES["gpt2"].config("124m")
    ids, mask = np.full((1, 1030), -1), np.zeros((1, 1030), int)
    ids[0, 10:], mask[0, 10:] = 50256, 1
    mask[0, 500:] = 0
    assert mllm_jax.from_hf_inputs(config, {"input_ids": ids, "attention_mask": mask}).tokens.shape == (1, 1030)
