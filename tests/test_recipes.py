"""The recipes in configs/recipes: each is read at its sizes, its patterns find weights, a small one takes steps."""

import re

import numpy as np
import pytest
from staged_run import on_one_device
from tiny_run import CONFIGS, load_module

from mllm_jax.config import ConfigError, dump, load
from mllm_jax.model import abstract_params
from mllm_jax.train.chain import train_run
from mllm_jax.train.metrics import read_metrics
from mllm_jax.train.optim import make_optimizer, split
from mllm_jax.train.run import read_run
from mllm_jax.train.stages import ended, names_in_order, stage_config

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
            assert run.data.patches % run.model.connector.patches_per_token == 0
            if size != "tiny":
                grid = run.model.encoder.position_grid
                assert grid**2 + run.model.lead <= run.data.patches and run.optim.steps > 500
    with pytest.raises(ConfigError, match=f"configs/recipes/{name}.py has no size '1m'"):
        module.get_config("1m")


def test_every_recipe_is_listed():
    assert set(RECIPES) == set(STAGES)
    guide = (CONFIGS.parent / "docs" / "training.md").read_text()
    assert set(re.findall(r"configs/recipes/(\w+)\.py", guide)) >= set(RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_steps(name, tmp_path, monkeypatch):
    """By default tests/test_docs.py takes those of one, with adapters."""
    on_one_device(monkeypatch)
    train_run(recipe(name).get_config("tiny"), tmp_path)
    assert list(ended(tmp_path)) == STAGES[name]
    for stage in STAGES[name]:
        losses = [line["loss"] for line in read_metrics(tmp_path / stage) if "loss" in line]
        assert len(losses) == 8 and np.isfinite(losses).all()
