"""The commands in docs/: each is understood by its program, with the config that it names; the small ones run."""

import importlib.util
import os
import re
import shlex

import pytest
from absl import flags
from ml_collections import config_flags
from test_readme import FEW_STEPS, ROOT, blocks_of, commands_of, run

from mllm_jax.config import to_config_dict
from mllm_jax.train.run import read_run
from mllm_jax.train.stages import names_in_order, one_run

PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
COMMANDS = [
    (page, command)
    for page, text in PAGES.items()
    for command in commands_of(text)
    if command.startswith("python -m mllm_jax.")
]


def program(command):
    """The source of the module, or of the package, that a command runs."""
    module = ROOT.joinpath(*command.split()[2].split("."))
    return "".join(path.read_text() for path in [*module.glob("*.py"), module.with_suffix(".py")] if path.is_file())


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda text: text[:60])
def test_a_command_is_understood(page, command, monkeypatch):
    """Its flags exist, its config can be read with what it replaces, and has the stage that it names."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[3:]
    known = {"config", *re.findall(r'(?:DEFINE_\w+|add(?:_argument)?)\(\s*"(?:--)?([\w-]+)"', program(command))}
    names = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    assert {name for name in names if not name.startswith("config.")} <= known
    if "--config" not in words:
        return
    values = flags.FlagValues()
    replaced = [word for word in words if word.startswith("--config.")]
    argv = ["", f"--config={words[words.index('--config') + 1]}", *replaced]
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    values(argv)
    stage = next((word.partition("=")[2] for word in words if word.startswith("--stage=")), None)
    if "model" not in values.config:
        return  # what `plan certify` compares, see tests/test_certify.py
    if stage is not None or not values.config.stages:
        read_run(one_run(values.config, stage))
    else:
        assert names_in_order(values.config) and read_run(values.config).stages


def small(command):
    """Whether a command trains something that needs no files, or reads what such a command left."""
    return ":tiny" in command or ("mllm_jax.evaluate" in command and "/tmp/" in command)


SMALL = [command for page, command in COMMANDS if page == "training.md" and small(command)]


def in_turn(commands, folder):
    """What they print, in one folder, as somebody runs them who reads the page from its top."""
    os.symlink(ROOT / "configs", folder / "configs")
    return [run(command.replace("/tmp/", f"{folder}/"), folder).stdout for command in commands]


def test_a_small_recipe_runs(tmp_path):
    (output,) = in_turn(SMALL[:1], tmp_path)
    assert "stage align, 1 of 2, from random weights" in output
    assert "stage instruct, 2 of 2, from the weights of" in output and "report.html" in output


@pytest.mark.slow
def test_small_commands_run_in_turn(tmp_path):
    outputs = in_turn(SMALL, tmp_path)
    assert len(outputs) == 4
    assert "instruct goes on at step 8 of 12" in outputs[1]
    assert all(output.startswith("all") for output in outputs[2:])


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for page, command in COMMANDS if page == "training.md"])
def test_training_runs(command, tmp_path):
    """The others that need no files: on the embedded scenes, with few steps."""
    if small(command) or "runs/" in command:
        return
    if "mllm_jax.plan" in command:
        if importlib.util.find_spec("libtpu"):
            run(f"{command} --compile=0", ROOT)
        return
    command = command.replace("/tmp/", f"{tmp_path}/")
    run(" ".join([command, *FEW_STEPS, "--config.model.decoder.layers=1"]), ROOT)


def test_the_config_of_the_page_is_one(monkeypatch):
    """The Python block of training.md is a config file."""
    monkeypatch.syspath_prepend(ROOT)
    (text,) = [text for language, text in blocks_of(PAGES["training.md"]) if language == "python"]
    scope = {}
    exec(text, scope)
    run_of = read_run(scope["get_config"]())
    assert run_of.stages["align"].optim.freeze == ("encoder", "decoder") and run_of.stages["instruct"].data.batch == 16
    assert run_of.stages["instruct"].optim == run_of.optim
    assert to_config_dict(run_of.optim).learning_rate == 2e-3
