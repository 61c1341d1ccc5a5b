"""A run with adapters: small checkpoints, from which it goes on bit for bit, on its own base only."""

import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags
from paths import ROOT
from PIL import Image

from mllm_jax import load_adapters, load_pretrained, load_workdir, merge_adapters, save_adapters, save_pretrained
from mllm_jax.common.config import ConfigError
from mllm_jax.generate import __main__ as generate
from mllm_jax.model.vlm import abstract_params
from mllm_jax.nn.lora import split_adapters
from mllm_jax.train.checkpoint.fingerprint import fingerprint
from mllm_jax.train.loop import train
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.step.optimizer import split

PAGE = (ROOT / "docs" / "lora.md").read_text()


def a_config():
    config = tiny_run.get_config()
    config.lora.update(rank=2, dropout=0.1)
    config.optim.update(steps=4, warmup=0)
    config.train.update(log_every=1, save_every=2, evaluate_every=0, num_eval_examples=8)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    train(a_config(), workdir)
    return workdir


def test_a_run_goes_on_bit_for_bit(trained, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "checkpoints" / "4")
    assert train(a_config(), again) == 4
    losses = lambda workdir: {row["step"]: row["loss"] for row in read_metrics(workdir) if "loss" in row}
    assert losses(again) == losses(trained) and len(losses(again)) == 4
    jax.tree.map(np.testing.assert_array_equal, load_workdir(again).params, load_workdir(trained).params)


def test_checkpoints_leave_the_base_out(trained):
    size = lambda folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    vlm = load_workdir(trained)
    flat = flatten_dict(vlm.params, sep="/")
    held = {path: x.size for path, x in flat.items() if path.endswith(("lora_down", "lora_up"))}
    assert size(trained / "checkpoints" / "4" / "params") < 2 * 4 * sum(held.values()) + 50_000
    assert sum(held.values()) * 3 < sum(x.size for x in flat.values())


def test_a_run_needs_the_base_that_it_began_with(trained):
    config = a_config()
    config.train.seed = 5
    with pytest.raises(ConfigError, match="began with other weights .* than config.train.seed=5 gives, and its"):
        train(config, trained)
    config = a_config()
    config.lora.alpha = 3.0
    with pytest.raises(ConfigError, match=r"config.lora.alpha was 16.0, is 3.0\. Use another --workdir"):
        train(config, trained)


def test_adapters_of_a_run_are_written(trained, tmp_path):
    vlm = load_workdir(trained)
    save_adapters(vlm, tmp_path)
    base, adapters = split_adapters(vlm.params)
    read = split_adapters(load_adapters(replace(vlm, params=base), tmp_path).params)[1]
    assert np.abs(read["decoder"]["layers"]["mlp"]["up"]["lora_up"]).max() > 0
    expected = {path: x for path, x in flatten_dict(adapters).items() if path[-1] != "lora_keep"}
    assert flatten_dict(read).keys() == expected.keys()
    for path, x in flatten_dict(read).items():
        np.testing.assert_array_equal(x, expected[path])
    more = replace(vlm.config, lora=replace(vlm.config.lora, modules_to_save=("^connector/main/mlp/",)))
    save_adapters(replace(vlm, config=more), tmp_path)
    other = jax.tree.map(lambda x: x + 1, base)
    whole = flatten_dict(split_adapters(load_adapters(replace(vlm, params=other), tmp_path).params)[0], sep="/")
    for path, x in flatten_dict(base, sep="/").items():
        np.testing.assert_array_equal(whole[path], x if path.startswith("connector/main/mlp/") else x + 1)


def test_the_page_runs(trained, tmp_path, monkeypatch):
    """Its Python, with this run in place of the published model's, and the settings of its commands."""
    monkeypatch.chdir(tmp_path)
    vlm = load_workdir(trained)
    base = replace(vlm, params=split_adapters(vlm.params)[0])
    save_pretrained(base, "base")
    scope, published = {"vlm": vlm}, "Qwen/Qwen3-VL-2B-Instruct"
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block.replace(published, "base").replace("runs/lora", str(trained)), scope)
    merged, expected = load_pretrained("merged").params, merge_adapters(vlm).params
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), merged, expected)

    commands = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ").splitlines()
    settings = [shlex.split(command) for command in commands if "--config" in command]
    assert len(settings) == 3
    for words in settings:
        named = [after.partition(":") for word, after in zip(words, words[1:]) if word == "--config"]
        name, _, argument = named[0] if named else ("configs/scenes.py", "", "")
        config, values = tiny_run.load_config(Path(name).stem, argument), flags.FlagValues()
        overrides = ["", "--config.lora.rank=4", *(word for word in words if word.startswith("--config."))]
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=overrides)
        values(overrides)
        run = read_run(values.config)
        assert run.lora.rank in (4, 16) and split(abstract_params(run.model), run.optim.freeze)[0]


@pytest.mark.slow
def test_generation_with_adapters(trained, tmp_path, monkeypatch, capsys):
    """The page's last command, answered as by the run itself."""
    monkeypatch.chdir(tmp_path)
    vlm = load_workdir(trained)
    save_adapters(vlm, "adapter")
    save_pretrained(replace(vlm, params=split_adapters(vlm.params)[0]), "demo/export")
    Image.new("RGB", (48, 64), "red").save("image.png")
    command = next(line for line in PAGE.splitlines() if line.startswith("python -m mllm_jax.generate"))
    words = [*shlex.split(command)[3:], "--max-new-tokens=8"]
    assert generate.main(words) == 0
    answer = capsys.readouterr().out
    assert (
        generate.main([str(trained) if word == "demo/export" else word for word in words if "adapter" not in word]) == 0
    )
    assert capsys.readouterr().out == answer


def test_fingerprints_see_values_places_and_names():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    trees = [{"a": {"b": x}}, {"a": {"c": x}}, {"a": {"b": x[::-1]}}, {"a": {"b": x.reshape(4, 3)}}]
    trees += [{"a": {"b": np.where(x == 5, np.nextafter(x, 9), x)}}, {"a": {"b": x, "c": x}}]
    assert len({int(fingerprint(tree)) for tree in trees}) == len(trees)
