"""Runs the code cells of a notebook in order, without Jupyter. Run by test_colab.py in a process of its own:

    python run_notebook.py FILE.ipynb '{"STEPS": 4}'

replaces what the cell tagged `parameters` sets, and prints as JSON what was displayed and some of what the cells left
behind. As in Jupyter, an event loop is running meanwhile. A line with a magic is an error when it is reached.
"""

import asyncio
import json
import re
import sys
import types

PARAMETERS = "parameters"


def stand_in(display) -> None:
    """What the notebooks use of IPython."""
    module = types.ModuleType("IPython.display")
    module.HTML, module.display = str, display
    sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": module}


def plain(source: str) -> str:
    """The cell with an error in place of every magic."""
    return re.sub(r"^( *)([!%].*)$", lambda line: f"{line[1]}raise RuntimeError({line[2]!r})", source, flags=re.M)


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
    asyncio.run(run(sys.argv[1], json.loads(sys.argv[2])))
