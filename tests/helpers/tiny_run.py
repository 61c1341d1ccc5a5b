"""The run of `configs/scenes.py`, made so small that a step takes milliseconds."""

import importlib.util
import pathlib

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def load_module(name: str):
    """`configs/NAME.py`."""
    spec = importlib.util.spec_from_file_location(f"configs_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_config(name: str, argument: str = ""):
    """The config that `configs/NAME.py` returns."""
    module = load_module(name)
    return module.get_config(argument) if argument else module.get_config()


def get_config(argument: str = ""):
    config = load_config("scenes", argument)
    config.model.encoder.update(width=32, layers=1, heads=2, mlp=32)
    config.model.decoder.update(width=32, layers=2, mlp=32)
    config.model.decoder.attention.update(heads=2, kv_heads=2, head_dim=16, rope_sections=(4, 2, 2))
    config.data.update(tokens=64, patch_rows=1, patches_per_row=112, batch=8)
    config.data.kinds = {"color": 1.0}
    config.optim.update(steps=24, warmup=4, learning_rate=3e-3)
    config.train.update(log_every=4, save_every=4, evaluate_every=8, num_eval_examples=32, max_to_keep=2)
    return config
