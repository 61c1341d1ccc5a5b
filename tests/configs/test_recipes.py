"""The recipes in configs/recipes: each is read at its sizes, its patterns find weights, a small one takes steps."""

import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from staged_run import on_one_device
from tiny_run import CONFIGS, load_module

from mllm_jax.common.config import ConfigError, dump, load
from mllm_jax.common.workdir import ended
from mllm_jax.model.vlm import abstract_params
from mllm_jax.train.algorithms import algorithm_of
from mllm_jax.train.input.pipeline import loader_of
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.run_stages import train_run
from mllm_jax.train.runs.command import read_config
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.runs.data_files import MixtureData
from mllm_jax.train.runs.stages import names_in_order, stage_config
from mllm_jax.train.step.optimizer import make_optimizer, split

RECIPES = sorted(path.stem for path in (CONFIGS / "recipes").glob("*.py"))
STAGES = {
    "deepseek_vl2": ["align", "pretrain", "instruct"],
    "internvl_2_5": ["mlp", "full"],
    "internvl_3": ["joint", "finetune"],
    "llava_1_5": ["align", "instruct"],
    "llava_next": ["align", "instruct"],
    "mm1_5": ["instruct"],
    "paligemma": ["transfer"],
    "qwen2_vl": ["vision", "joint", "instruct"],
    "qwen3_vl": ["s0", "s1", "s2", "s3"],
}
TRAINED = {  # parts that learn, where not all do
    "align": {"connector"},
    "mlp": {"connector"},
    "s0": {"connector"},
    "vision": {"encoder", "connector"},
    "finetune": {"connector", "decoder"},
    ("llava_1_5", "instruct"): {"connector", "decoder"},
    ("qwen2_vl", "instruct"): {"connector", "decoder"},
    ("deepseek_vl2", "align"): {"encoder", "connector"},
}


def recipe(name):
    return load_module(f"recipes/{name}")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_at_every_size_and_its_patterns_find_weights(name):
    module = recipe(name)
    for size in (*module.SIZES[:1], module.SIZES[-1], "tiny"):
        config = module.get_config(size)
        assert names_in_order(config) == STAGES[name]
        assert read_run(load(dump(config))) == read_run(config)
        for stage in STAGES[name]:
            run = read_run(stage_config(config, stage))
            params = abstract_params(run.model)
            make_optimizer(run.optim, params)
            learning = {"encoder", "connector", "decoder"} & split(params, run.optim.freeze)[0].keys()
            every = {"encoder", "connector", "decoder"}
            assert learning == TRAINED.get((name, stage), TRAINED.get(stage, every))
            assert run.data.patches_per_row % run.model.connector.patches_per_token == 0
            if size != "tiny":
                grid = run.model.encoder.position_grid
                assert grid**2 + run.model.num_prefix_tokens <= run.data.patches_per_row and run.optim.steps > 500
    with pytest.raises(ConfigError, match=f"configs/recipes/{name}.py has no size '1m'"):
        module.get_config("1m")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Files of a user: conversations with images of several sizes, and texts."""
    folder = tmp_path_factory.mktemp("own")
    for number, size in enumerate([(640, 480), (1920, 1080), (2000, 100), (30, 40)]):
        Image.new("RGB", size, (60 * number, 80, 90)).save(folder / f"{number}.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Ein Bild – 图."}]
    records = [{"id": str(number), "image": f"{number % 4}.jpg", "conversations": turns} for number in range(64)]
    (folder / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "texts.jsonl").write_text('{"text": "A text of one\'s own. It has two sentences."}\n' * 8)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_small_recipe_reads_the_files_that_its_command_names(name, own):
    """As its docstring calls it, but for the size, the model's folder and the files."""
    module = recipe(name)
    words = shlex.split(re.search(r"(?<=mllm_jax.train ).*?(?=\n\n)", module.__doc__, re.DOTALL)[0])
    paths = [re.sub("=.*", f"={own / ('texts' if '.text.' in word else 'own')}.jsonl", word) for word in words[4:]]
    paths = [word for word in paths if ".path=" in word]
    assert words[:3:2] == ["--config", "--workdir"] and len(paths) >= 1
    config = read_config(["--config", str(CONFIGS / "recipes" / f"{name}.py:tiny"), *paths])
    for stage in STAGES[name]:
        run = read_run(stage_config(config, stage))
        data = replace(run.data, workers=0, prefetch=0, batch=2)
        loader = loader_of(data, algorithm_of(replace(run, data=data)).processor())
        batch, info = next(loader)
        assert info.conversations >= 2 and not info.dropped and not info.skipped and batch.weight.any()
        files = data.sources.values() if isinstance(data, MixtureData) else [data]
        assert all(file.path.startswith(str(own)) for file in files)


def test_a_small_recipe_has_embedded_questions_where_no_file_is_named(own):
    run = read_run(stage_config(recipe("llava_1_5").get_config("tiny"), "align"))
    train, heldout = run.data.source("train"), run.data.source("heldout")
    assert {train[0]["kind"], heldout[0]["kind"]} == {"color"} and train[0] != heldout[0]
    with pytest.raises(ConfigError, match="scenes:colour: there is no 'colour'; did you mean 'color'?"):
        replace(run.data, path="scenes:colour").source()
    with pytest.raises(ConfigError, match="scenes:color has no fields to select by"):
        replace(run.data, where={"split": "train"}).source()
    assert replace(run.data, path=str(own / "own.jsonl")).source("heldout") is None


def test_every_recipe_is_listed():
    assert set(RECIPES) == set(STAGES)
    guide = (CONFIGS.parent / "docs" / "training.md").read_text()
    assert set(re.findall(r"configs/recipes/(\w+)\.py", guide)) >= set(RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_steps(name, tmp_path, monkeypatch):
    """By default tests/docs/test_docs.py takes those of one, with adapters."""
    on_one_device(monkeypatch)
    train_run(recipe(name).get_config("tiny"), tmp_path)
    assert list(ended(tmp_path)) == STAGES[name]
    for stage in STAGES[name]:
        losses = [line["loss"] for line in read_metrics(tmp_path / stage) if "loss" in line]
        assert len(losses) == 8 and np.isfinite(losses).all()
