"""Every command: its help lists its options with their defaults, and a wrong word is one line with the right one."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from paths import ROOT

from mllm_jax import __main__ as package
from mllm_jax.common.cli import Parser
from mllm_jax.data.__main__ import main as data
from mllm_jax.plan import __main__ as plan

SUBCOMMANDS = {"mllm_jax.plan": ["", "certify"], "mllm_jax.data": ["", "convert", "inspect"]}
SOURCES = {  # of options, where they are not in the module that is run
    "mllm_jax.plan": ["mllm_jax/plan/cli.py"],
    "mllm_jax.plan certify": ["mllm_jax/plan/verify/certify.py"],
    "mllm_jax.data": [],
}


def modules():
    """Whatever runs with `python -m`, in the package and among the launchers."""
    for path in sorted([*ROOT.glob("mllm_jax/**/*.py"), *ROOT.glob("launch/*.py")]):
        if '\nif __name__ == "__main__":' in path.read_text():
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


COMMANDS = [f"{module} {word}".strip() for module in modules() for word in SUBCOMMANDS.get(module, [""])]
# Flags live as long as a process: each command has its own.
SCRIPT = """
import json, os, runpy, sys
import mllm_jax.evaluate.ask, mllm_jax.plan.verify.certificate, mllm_jax.plan.search, mllm_jax.train.loop
for command in json.loads(sys.argv[1]):
    module, *words = command.split()
    print("=== of", command, flush=True)
    child = os.fork()
    if not child:
        sys.argv = [module, *words, "--help"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("=== ended with", status, flush=True)
"""


@pytest.fixture(scope="module")
def helps():
    """{command: (its help, exit code)}."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    words = [sys.executable, "-c", SCRIPT, json.dumps(COMMANDS)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    found = re.findall(r"=== of (.*)\n((?:.*\n)*?)=== ended with (\d+)\n", done.stdout)
    return {command: (text, int(code)) for command, text, code in found}


def options(path):
    """{option: its default, or None} that a file defines, for argparse or as flags of absl."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
            continue
        called = ast.unparse(node.func).split(".")[-1]
        first = node.args[0].value
        if called in ("add", "add_argument") and str(first).startswith("--"):
            given = {word.arg: word.value for word in node.keywords}
            found[first] = given.get("default")
        elif called.startswith("DEFINE_"):
            found[f"--{first}"] = node.args[1]
    return {name: ast.unparse(value) if value is not None else None for name, value in found.items()}


def source(command):
    module = command.split()[0]
    path = ROOT / pathlib.Path(*module.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__main__.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_lists_its_options(helps, command):
    text, code = helps[command]
    assert code == 0 and text.startswith(f"usage: python -m {command}")
    if command.startswith("mllm_jax.data "):
        return  # both are in one file
    paths = [ROOT / path for path in SOURCES.get(command, [source(command).relative_to(ROOT)])]
    defined = {name: default for path in paths for name, default in options(path).items()}
    defined |= options(ROOT / "launch" / "command.py") if "= launcher(" in source(command).read_text() else {}
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)
    assert set(defined) | {"--help"} == set(listed)
    for name, default in defined.items():
        if default not in (None, "None", "False", "[]"):
            (told,) = re.findall(rf"^  {name}\b(?:.*\n)*?(?=  -|\n|\Z)", text, re.MULTILINE)
            assert "default" in told, name


def test_the_help_of_both_commands_of_data_lists_all_of_their_options(helps):
    defined = set(options(ROOT / "mllm_jax/data/__main__.py"))
    listed = {
        name for word in ("convert", "inspect") for name in re.findall(r"--[\w]+", helps[f"mllm_jax.data {word}"][0])
    }
    assert defined <= listed and {"--records", "--html"} <= listed


def refused(main, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["inspct"], "error: argument COMMAND: there is no 'inspct'; did you mean 'inspect'? "),
        (["convert", "a", "b", "--recods=3"], "error: there is no option --recods; did you mean '--records'? "),
        (["inspect", "--config", "a", "--htlm", "b"], "error: there is no option --htlm; did you mean '--html'? "),
        (["convert", "a", "b", "c"], "error: 'c' belongs to no option; run with --help"),
        (["convert", "a", "b", "--config.seed=1"], "error: there is no option --config.seed; "),
        ([], "error: the following arguments are required: COMMAND; run with --help"),
    ],
    ids=str,
)
def test_a_wrong_word_is_one_line_with_the_nearest(words, said, capsys):
    error = refused(data, words, capsys)
    assert error.startswith(said) and error.count("\n") == 1


def test_a_wrong_command_is_one_line_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "certifi"])
    error = refused(lambda words: plan.main(), [], capsys)
    assert (
        error == "error: there is no command 'certifi'; did you mean 'certify'? Known here: certify; run with --help\n"
    )


def test_the_list_of_commands_has_all_of_them(helps):
    text, code = helps["mllm_jax"]
    listed = re.findall(r"^    python -m (\S+(?: \w+)?)  +\w.*[^.]$", text, re.MULTILINE)
    assert code == 0 and sorted(listed) == sorted(set(COMMANDS) - {"mllm_jax", "mllm_jax.data"})


def test_a_word_after_the_package_is_told_its_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mllm_jax", "trian"])
    error = refused(lambda words: package.main(), [], capsys)
    assert error.startswith("error: there is no command 'trian'; did you mean 'mllm_jax.train'? Known here: ")


def test_overrides_are_words_of_a_config():
    parser = Parser("run")
    parser.add_argument("--steps", type=int)
    words = ["--config.a=1", "--steps", "3", "--config.b", "2", "--config.c=4"]
    options, overrides = parser.parse_with_overrides(words)
    assert options.steps == 3 and overrides == ["--config.a=1", "--config.b", "2", "--config.c=4"]
    with pytest.raises(SystemExit):
        parser.parse_with_overrides(["--config.a=1", "2"])


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise KeyboardInterrupt", 130, "\ninterrupted\n"),
        ("raise KeyboardInterrupt('half is done')", 130, "\nhalf is done\n"),
        ("return 3", 3, ""),
    ],
)
def test_a_command_ends_with_its_code_or_one_line_after_ctrl_c(body, code, said):
    script = f"from mllm_jax.common.cli import run_command\ndef main(): {body}\nrun_command(main)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)


def test_every_command_ends_that_way():
    """Those with absl's flags do by `mllm_jax.train.runs.command.run`."""
    ends = {
        path: path.read_text().rpartition('if __name__ == "__main__":')[2]
        for folder in ("mllm_jax", "launch")
        for path in (ROOT / folder).rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert len(ends) > 10 and not [
        path for path, end in ends.items() if "run_command(main)" not in end and "command.run(" not in end
    ]
