"""Runs the code cells of a notebook in order, without Jupyter. Run by test_colab.py in a process of its own:

    python run_notebook.py FILE.ipynb '{"STEPS": 4}'

replaces what the cell tagged `parameters` sets, and prints as JSON what was displayed and some of what the cells left
behind. As in Jupyter, an event loop is running meanwhile. A line with a magic is an error when it is reached.

    python run_notebook.py FILE.ipynb '{"REPOSITORY": "FOLDER"}' install

runs the cells up to that with the id `install`, with its magics: pip gets no network and installs nothing but what the
line names, as far as it is not there.
"""

import asyncio
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import types

PARAMETERS = "parameters"


def stand_in(display) -> None:
    """Stand-in for the parts of IPython that the notebooks use."""
    module = types.ModuleType("IPython.display")
    module.HTML, module.display = str, display
    sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": module}


def plain(source: str) -> str:
    """The cell with an error in place of every magic."""
    return re.sub(r"^( *)([!%].*)$", lambda line: f"{line[1]}raise RuntimeError({line[2]!r})", source, flags=re.M)


WITHOUT_NETWORK = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]


def magic(line: str, scope: dict) -> None:
    """Runs a line as IPython does: ! in a shell, %pip with this Python's pip, {NAME} with the value of a variable."""
    words = re.sub(r"\{(\w+)\}", lambda found: str(scope[found[1]]), line)
    if words.startswith("!"):
        subprocess.run(words[1:], shell=True, check=True)
    else:
        assert words.startswith("%pip install "), line
        pip = shlex.split(words.removeprefix("%pip install "), comments=True)
        subprocess.run([sys.executable, "-m", "pip", "install", *WITHOUT_NETWORK, *pip], check=True)


def with_magics(source: str) -> str:
    """The cell with calls of `magic` in place of magics."""
    return re.sub(r"^( *)([!%].*)$", lambda line: f"{line[1]}magic({line[2]!r}, globals())", source, flags=re.M)


def install(path: str, replaced: dict) -> None:
    scope = {"__name__": "__main__", "magic": magic}
    with open(path, encoding="utf-8") as file:
        cells = [cell for cell in json.load(file)["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec(compile(with_magics("".join(cell["source"])), f"<cell {cell['id']}>", "exec"), scope)
        if PARAMETERS in cell["metadata"].get("tags", ()):
            scope |= replaced
        if cell["id"] == "install":
            return


async def run(path: str, replaced: dict) -> None:
    shown: list[str] = []
    scope = {"__name__": "__main__"}
    stand_in(lambda *values: shown.extend(map(str, values)))
    with open(path, encoding="utf-8") as file:
        cells = [cell for cell in json.load(file)["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec(compile(plain("".join(cell["source"])), f"<cell {cell['id']}>", "exec"), scope)
        if PARAMETERS in cell["metadata"].get("tags", ()):
            if unknown := replaced.keys() - scope.keys():
                raise SystemExit(f"the cell {cell['id']} sets no {', '.join(sorted(unknown))}")
            scope |= replaced
    values = {name: value for name, value in scope.items() if isinstance(value, bool | int | float | str)}
    print(json.dumps({"shown": shown, "left": values}))


if __name__ == "__main__":
    if sys.argv[3:] == ["install"]:
        install(sys.argv[1], json.loads(sys.argv[2]))
        print(json.dumps({name: importlib.util.find_spec(name).origin for name in ("mllm_jax", "configs.scenes")}))
    else:
        asyncio.run(run(sys.argv[1], json.loads(sys.argv[2])))
