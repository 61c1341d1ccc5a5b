"""Mistakes on the command line end in one line that names them, before anything starts."""

import json
import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

SCENES = ["--config", "configs/scenes.py"]
RUN = ["--workdir", "run"]
TRAIN = {
    "another flag": ([*SCENES, *RUN, "--steps=3"], "there is no flag --steps; settings of a run are --config.path.to="),
    "a mistyped flag": ([*SCENES, "--workdri=run"], "there is no flag --workdri; write --workdir; run with"),
    "no flags": ([], "--config and --workdir must be given; run with --help"),
    "no folder": (SCENES, "--workdir must be given; run with --help"),
    "surplus words": ([*SCENES, *RUN, "now"], "'now' belongs to no flag"),
    "another file": (["--config=configs/scenez.py", *RUN], "there is no config file configs/scenez.py; did you mean "),
    "another place": (["--config", "scenes.py:blind", *RUN], "there is no config file scenes.py; did you mean "),
    "another argument": (["--config", "configs/scenes.py:blnd", *RUN], "configs/scenes.py: unknown argument "),
    "another size": (["--config", "configs/qwen3_vl_sft.py:3b", *RUN], "Qwen3-VL has no size '3b'. Choose one of 2b, "),
    "no function": (["--config", "without.py", *RUN, "--config.a=1"], "without.py: has no function get_config"),
    "no Python": (["--config", "broken.py", *RUN], "broken.py, line 2: invalid syntax"),
    "no config": (["--config", "odd.py", *RUN], "odd.py: get_config returns a dict. Return run_config(Run(...))."),
    "another name": ([*SCENES, *RUN, "--config.optim.stepz=1"], "config.optim has no 'stepz'; did you mean 'steps'?"),
    "another type": (
        [*SCENES, *RUN, "--config.optim.steps=many"],
        "flag --config.optim.steps=many: needs an integer, not 'many'",
    ),
    "a file for a folder": (
        [*SCENES, "--workdir", "odd.py"],
        "--workdir=odd.py: is a file or inside one. Name",
    ),
    "in a file": ([*SCENES, "--workdir=odd.py/run"], "--workdir=odd.py/run: is a file or inside one. Name a folder."),
    "no rows": ([*SCENES, *RUN, "--config.data.batch=0"], "config.data.batch=0: must be at least 1."),
    "less than none": ([*SCENES, *RUN, "--config.data.batch=-8"], "config.data.batch=-8: must be at least 1."),
    "no parts": (
        [*SCENES, *RUN, "--config.train.grad_accum_steps=0"],
        "config.train.grad_accum_steps=0: must be at least 1.",
    ),
}
EVALUATE = {
    "nothing to evaluate": (SCENES, "--workdir, --checkpoint: exactly one is needed"),
    "another family": (
        ["--checkpoint", "other", *SCENES],
        "other/config.json: model_type='mamba': not supported. Did you mean 'llama'",
    ),
    "no folder for answers": (
        ["--checkpoint", "other", *SCENES, "--output=none/a.jsonl"],
        "--output=none/a.jsonl: its folder does not exist",
    ),
    "dashes in a flag": (["--checkpoint=other", *SCENES, "--max-new-tokens=0"], "flag --max_new_tokens=0: "),
    "a run that never saved": (["--workdir", "young"], "young has no checkpoint yet: its run ended"),
}
MISTAKES = [("train", *mistake) for mistake in TRAIN.values()] + [
    ("evaluate", *mistake) for mistake in EVALUATE.values()
]
# Flags live as long as a process: each command has its own.
SCRIPT = """
import json, os, runpy, sys
import mllm_jax.train.runs.command, mllm_jax.train.loop
for module, *arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        sys.argv = [module, *arguments]
        runpy.run_module("mllm_jax." + module, run_name="__main__", alter_sys=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ended with", status, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """stderr and exit code of each of MISTAKES, and the help."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "without.py").write_text("def config():\n    pass\n")
    (folder / "broken.py").write_text("def get_config():\n    return 1 +\n")
    (folder / "odd.py").write_text("def get_config():\n    return {'steps': 1}\n")
    (folder / "young" / "checkpoints").mkdir(parents=True)
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "mamba"}')
    commands = [[module, *arguments] for module, arguments, _ in MISTAKES] + [["train", "--help"]]
    script = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True)
    assert not (folder / "run").exists()
    errors = re.findall(r"(.*?)ended with (\d+)\n", done.stderr, re.DOTALL)
    assert len(errors) == len(commands), done.stderr
    return errors, done.stdout


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[*TRAIN, *EVALUATE])
def test_a_mistake_is_one_line(said, number):
    error, code = said[0][number]
    assert error.startswith("error: " + MISTAKES[number][2])
    assert (error.count("\n"), code) == (1, "1")


def test_help_is_no_failure(said):
    error, code = said[0][-1]
    assert (error, code) == ("", "0")
    assert "--workdir" in said[1] and "--config.path.to=value" in said[1]
