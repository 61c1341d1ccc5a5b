"""A model put together: CLIP's tower from one folder, Llama from another, the connector from the seed."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import transformers
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags
from reference import perturb
from sft_files import conversations, tokenizer
from tiny_llava import CLIP, TEXT, llava_config

import mllm_jax
from mllm_jax.common.config import ConfigError
from mllm_jax.common.workdir import ended
from mllm_jax.families import FAMILIES
from mllm_jax.model.vlm import init_params
from mllm_jax.nn.lora import LoraConfig
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.checkpoint.restore import first_params, processor_of
from mllm_jax.train.run_stages import train_run
from mllm_jax.train.runs.config import Run, Stage, TrainConfig, read_run, run_config
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.runs.stages import stage_config
from mllm_jax.train.step.optimizer import OptimConfig

HERE, THERE = 304, 301  # tokens of the model, and of Llama's folder, on which no mesh divides
MESH = make_mesh({"fsdp": 4, "tensor": 2})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    vision = {name: value for name, value in CLIP.items() if name != "model_type"}
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    models = {
        "clip": transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | {"vocab_size": THERE})),
    }
    for name, model in models.items():
        perturb(model)
        for module in (model.model.embed_tokens, model.lm_head) if name == "llama" else ():
            module.weight.data += 0.5  # its mean
        model.save_pretrained(root / name)
    ids = tokenizer(root / "llama", {"<|image_pad|>": "<image>"})
    return root, models["llama"], ids["<image>"]


def a_run(folders, **changes) -> Run:
    root, _, image = folders
    text = dict(model_type="llama", **TEXT | {"vocab_size": HERE})
    model = FAMILIES["llava"].from_hf(llava_config(text_config=text, image_token_index=image).to_dict())
    parts = {"encoder": str(root / "clip"), "decoder": str(root / "llama")}
    run = Run(
        model, FilesData(batch=8, tokens=96, patch_rows=1, patches_per_row=17), parts=parts, train=TrainConfig(seed=3)
    )
    return replace(run, **changes)


def test_weights_of_two_folders_meet(folders, capsys):
    """Combines two folders on a mesh, with adapters, where matrices are read in bf16."""
    root, theirs, _ = folders
    run = a_run(folders, lora=LoraConfig(2, base_dtype="bfloat16", modules_to_save=("decoder/(embed|head)",)))
    decoder = replace(run.model.decoder, norm_eps=1e-5)
    run = read_run(run_config(replace(run, model=replace(run.model, decoder=decoder))))
    found, base = first_params(run, MESH), replace(run.model, lora=LoraConfig())
    said = "llama was published with norm_eps=1e-06, which is 1e-05 in config.model.decoder\n"
    assert capsys.readouterr().out == f"config.parts.decoder={root}/{said}"
    clip, llama = (mllm_jax.load_pretrained(root / name).params for name in ("clip", "llama"))
    drawn = jax.jit(lambda key: init_params(base, key)["connector"])(jax.random.key(3))
    read = flatten_dict({"encoder": clip["encoder"], "decoder": llama["decoder"], "connector": drawn}, sep="/")
    found = flatten_dict(found, sep="/")
    assert found["decoder/layers/mlp/up/w"].dtype == "bfloat16" and "decoder/layers/mlp/up/lora_up" in found
    assert read.keys() == {path for path in found if "/lora_" not in path}
    theirs.resize_token_embeddings(HERE)  # draws new rows around the mean
    grown = {"decoder/embed": theirs.model.embed_tokens, "decoder/head/w": theirs.lm_head}
    for path, x in read.items():
        np.testing.assert_array_equal(
            found[path][:THERE] if path in grown else found[path], x.astype(found[path].dtype)
        )
    for path, module in grown.items():
        expected = module.weight.detach().numpy()[THERE:]
        np.testing.assert_allclose(found[path][THERE:], expected, atol=1e-3)
        assert expected.min() > 0.4 and found[path].dtype == "float32"
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(found)} == {8}
    assert not found["decoder/embed"].sharding.is_fully_replicated


def test_parts_are_named_on_the_command_line_and_the_decoders_folder_has_the_processor(folders):
    root, _, _ = folders
    config, values = run_config(a_run(folders, parts={})), flags.FlagValues()
    argv = ["", f"--config.parts.encoder={root}/clip", f"--config.parts.decoder={root}/llama"]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    run = read_run(values.config)
    assert run.taken == {"encoder": f"{root}/clip", "decoder": f"{root}/llama"}
    assert processor_of(run) == f"{root}/llama" and processor_of(replace(run, processor="other")) == "other"


def test_parts_that_do_not_fit_are_told(folders):
    root, _, _ = folders
    run = a_run(folders)
    wider = replace(run.model, decoder=replace(run.model.decoder, mlp=64, vocab=300))
    cases = (
        (replace(run, model=wider), r"config.parts.decoder=.*llama does not fit config.model.decoder:\n"
         r"  decoder/embed is \[301, 64\] in the folder, \[300, 64\] here\n"
         r"(.*\n)*  decoder/layers/mlp/gate/w is \[2, 64, 96\] in the folder, \[2, 64, 64\] here"),
        (replace(run, parts={"decoder": f"{root}/clip"}), "decoder=.*clip: this model has no decoder. Choose a"),
        (replace(run, parts={"encodr": "x"}), "config.parts: there is no 'encodr'; did you mean 'encoder'"),
        (replace(run, init="x"), "config.parts=.*: config.init='x' is set too. Leave one of them empty"),
        (replace(run, parts={"encoder": str(root)}), "has no config.json"),
    )  # fmt: skip
    for changed, message in cases:
        with pytest.raises((ConfigError, FileNotFoundError), match=message):
            first_params(read_run(run_config(changed)), MESH)


@pytest.mark.slow
def test_the_stages_of_llava_begin_with_two_folders(folders, tmp_path):
    """Align, then instruct with adapters, whose base comes again from all three."""
    optim = OptimConfig(steps=4, warmup=1)
    stages = {
        "align": Stage(optim=replace(optim, freeze=("encoder", "decoder"))),
        "instruct": Stage(lora=LoraConfig(2)),
    }
    data = FilesData(
        path=str(conversations(tmp_path)), root=str(tmp_path), batch=8, tokens=96, patch_rows=1, patches_per_row=17
    )
    config = run_config(a_run(folders, optim=optim, data=data, stages=stages))
    assert train_run(config, tmp_path / "run") and ended(tmp_path / "run") == {"align": 4, "instruct": 4}
    assert "parts" in config and not any(stage_config(config, "instruct", tmp_path / "run").parts.values())
    vlm = mllm_jax.load_workdir(tmp_path / "run")
    clip = mllm_jax.load_pretrained(folders[0] / "clip").params["encoder"]
    jax.tree.map(np.testing.assert_array_equal, vlm.params["encoder"], clip)
    mllm_jax.save_pretrained(mllm_jax.merge_adapters(vlm), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "llava"
