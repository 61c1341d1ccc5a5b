"""Every notebook is stored without outputs, and runs from top to bottom: with few steps, on a tiny model."""

import builtins
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from functools import partial

import pytest
from compiler import QUICKLY
from paths import HELPERS, ROOT

from mllm_jax.train.monitor.metrics import Display

NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
QUICKSTART, LORA, CONNECTORS, SHARDING = (
    ROOT / "colab" / f"{name}.ipynb" for name in ("quickstart", "lora", "connectors", "sharding")
)
LONGEST = 15  # lines of a cell
TINY = {
    "data.batch": 1,
    "model.encoder.layers": 1,
    "model.decoder.layers": 1,
    "train.num_eval_examples": 4,
}
KINDS = ["What color? ", "What shape? ", "Where? ", "How many? ", "Any ", "Which way? "]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def run(path, folder, **replaced):
    """The finished process that ran a notebook, in a folder of its own, on one device as people have it."""
    command = [sys.executable, str(HELPERS / "run_notebook.py"), str(path), json.dumps(replaced)]
    environment = os.environ | {"XLA_FLAGS": QUICKLY, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_index_names_every_notebook():
    readme = (ROOT / "README.md").read_text()
    assert NOTEBOOKS == sorted([QUICKSTART, LORA, CONNECTORS, SHARDING])
    assert all(f"| `colab/{path.name}` |" in readme for path in NOTEBOOKS)


@each_notebook
def test_format(path):
    """The schema of nbformat 4.5, of which Colab and Jupyter read any notebook; nothing but what people wrote."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", id) for id in ids)
    for cell in notebook["cells"]:
        fields = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), f"{cell['id']} was stored after a run"
            fields |= {"outputs", "execution_count"}
        else:
            assert cell["cell_type"] == "markdown"
        assert set(cell) == fields
        *lines, last = cell["source"]
        assert all(line.count("\n") == 1 and line.endswith("\n") for line in lines) and "\n" not in last and last
    assert path.stat().st_size < 20_000


@each_notebook
def test_cells_are_short(path):
    assert {cell["id"]: len(cell["source"]) for cell in cells(path) if len(cell["source"]) > LONGEST} == {}


def test_all_are_installed_alike():
    """But for the planner, which wants a compiler besides."""
    ways = ["".join(cell["source"]) for path in NOTEBOOKS for cell in cells(path) if cell["id"] == "install"]
    assert len(ways) == len(NOTEBOOKS)
    assert {way.replace('--editable "mllm-jax[plan]"', '--editable "mllm-jax"') for way in ways} == {ways[0]}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The Python of an environment with pip, setuptools and jax, as a notebook's machine has them, without mllm_jax."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    [site] = folder.glob("lib/python*/site-packages")
    for name in ("pip", "setuptools", "jax"):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"needs {name}")
        parts = {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}
        for part in parts:
            (site / part).symlink_to(distribution.locate_file(part))
    return python


@pytest.mark.skipif(os.name != "posix", reason="its virtual environments lie otherwise")
@each_notebook
def test_on_a_fresh_machine_the_installation_works(path, fresh, repository, tmp_path):
    """From a clone of the repository, with its own commands. The package is found at once and by other processes."""
    site = next(fresh.parents[1].glob("lib/python*/site-packages"))
    before = set(site.iterdir())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [fresh, HELPERS / "run_notebook.py", path, json.dumps({"REPOSITORY": str(repository)}), "install"]
    run = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    found, clone = json.loads(done.stdout.splitlines()[-1]), tmp_path / "mllm-jax"
    assert found["mllm_jax"] == str(clone / "mllm_jax" / "__init__.py")
    assert found["configs.scenes"] == str(clone / "configs" / "scenes.py")
    other = run([fresh, "-c", "import importlib.util; print(importlib.util.find_spec('mllm_jax').origin)"])
    assert other.stdout.strip() == found["mllm_jax"], other.stderr
    for new in set(site.iterdir()) - before:  # the next one begins without it again
        shutil.rmtree(new) if new.is_dir() else new.unlink()


def test_a_notebook_without_an_address_says_so(fresh, tmp_path):
    command = [fresh, HELPERS / "run_notebook.py", QUICKSTART, "{}", "install"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode and "set REPOSITORY above to the address of the git repository" in done.stderr


class ZMQInteractiveShell:
    """The class by which rich recognizes a notebook."""


def test_a_training_cell_shows_one_live_line(monkeypatch, capsys):
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    names = ("mean_loss", "learning_rate", "grad_norm", "tokens_per_second", "patches_per_second", "data_wait")
    display = Display(steps=300, step=0)
    for step in range(1, 301):
        display.step(step)
        display.interval({"step": step, "seconds_per_step": 1.0} | dict.fromkeys(names, 0.5))
    display.close()
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and shown.endswith("\n")
    lines = shown.split("\r")[1:]
    assert len(lines) == 300 and lines[-1].startswith("step 300/300  loss 0.5000")
    assert all(len(after) >= len(before.rstrip()) for before, after in zip(lines, lines[1:]))  # nothing of it is left


@each_notebook
def test_only_the_installation_needs_jupyter(path):
    magic = [cell["id"] for cell in cells(path) if re.search(r"^ *[!%]", "".join(cell["source"]), re.MULTILINE)]
    assert magic == ["install"]


def test_quickstart_runs(tmp_path):
    """Nothing is installed, since mllm_jax can be imported. The last cell asks the model that the notebook exported."""
    folder = tmp_path / "run"
    published = str(folder / "export")
    found = left(run(QUICKSTART, tmp_path, STEPS=4, SETTINGS=TINY, FOLDER=str(folder), PUBLISHED=published))
    assert found["left"]["reached"] == 4 and found["left"]["same"] is True
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4]
    looked, curve, asked, *seen, described = found["shown"]
    assert looked.count('<img src="data:image/png;base64,') == len(KINDS)
    assert all(asked in looked for asked in KINDS)
    points = re.search(r'points="(.*?)"', curve)[1].split()
    assert len(points) == 4 and "nan" not in curve
    assert asked.count("<img") == 16 and asked.count("(right)") + asked.count("(the truth is ") == 16
    assert len(seen) == 3 and all(panels.count("<img") == 2 for panels in [*seen, described])
    shares = [int(share) for panels in [*seen, described] for share in re.findall(r"(\d+)% on the image", panels)]
    assert len(shares) == 4 and all(0 < share < 100 for share in shares)
    assert (folder / "export" / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # nothing else was written


@pytest.mark.slow
def test_lora_runs(tmp_path):
    folder = tmp_path / "run"
    settings = TINY | {"train.evaluate_every": 0}
    found = left(run(LORA, tmp_path, BASE_STEPS=2, STEPS=4, SETTINGS=settings, FOLDER=str(folder)))
    assert found["left"]["reached"] == 4 and found["left"]["same"] is True
    drawn, curve, asked, files = found["shown"]
    assert drawn.count("<img") == 6 and asked.count("<img") == asked.count("→") == 12
    assert [len(points.split()) for points in re.findall(r'points="(.*?)"', curve)] == [4, 4]
    assert "adapter_model.safetensors" in files
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.slow
def test_connectors_runs(tmp_path):
    folder = tmp_path / "run"
    settings = TINY | {"train.log_every": 1}
    found = left(run(CONNECTORS, tmp_path, STEPS=4, SETTINGS=settings, FOLDER=str(folder)))
    parts, losses, matches, last, asked = found["shown"]
    assert [len(points.split()) for points in re.findall(r'points="(.*?)"', losses)] == [3, 3, 3]  # of means
    for name in ("mlp", "average_pool", "pixel_shuffle"):
        assert all(name in shown for shown in (parts, losses, matches, last, asked))
        assert (folder / name / "checkpoints").is_dir()
    assert asked.count("<img") == 8


def test_sharding_runs(tmp_path):
    """On two of the meshes; tests/sharding/test_sharding.py and `plan certify` compare many."""
    meshes = {"one device": ["fsdp", {}], "both": ["fsdp_tensor", {"fsdp": 4, "tensor": 2}]}
    about = dict(MESHES=meshes, SETTINGS={name: 1 for name in TINY if name.endswith("layers")})
    compiler = importlib.util.find_spec("libtpu")
    done = run(SHARDING, tmp_path, **about, PLANNED="scenes", TOPOLOGY="v5e:2x4" if compiler else "")
    numbers, *planned = left(done)["shown"]
    (loss, gradient, whole), (other, another, part) = (
        map(float, re.findall(r"<td[^>]*>([\d.]+)</td>", row)[:3]) for row in numbers.split("<tr>")[2:]
    )
    assert other == pytest.approx(loss, rel=1e-5) and another == pytest.approx(gradient, rel=1e-4)
    assert part < whole / 4
    assert len(planned) == (1 if compiler else 0)
    assert all(f"CPU {device}" in done.stdout for device in range(8))


def left(done):
    """Output and files of a notebook."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_downloaded_unasked():
    for path in (LORA, CONNECTORS, SHARDING):
        [parameters] = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", ())]
        assert 'SIZE = "tiny"' in parameters["source"][0]
    [parameters] = [cell for cell in cells(QUICKSTART) if "parameters" in cell["metadata"].get("tags", ())]
    scope = {}
    exec("".join(parameters["source"]), scope)
    assert scope["PUBLISHED"] == "" and scope["STEPS"] >= 1000
    *_, last = cells(QUICKSTART)
    assert last["id"] == "published" and last["source"][0] == "if PUBLISHED:\n"
    assert all(line.startswith(" ") or line == "\n" for line in last["source"][1:])


def notebook_of(tmp_path, *sources):
    """A notebook of code cells, the first of which sets the parameters."""
    made = [
        {"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "source": [text]} for i, text in enumerate(sources)
    ]
    made[0]["metadata"] = {"tags": ["parameters"]}
    path = tmp_path / "made.ipynb"
    path.write_text(json.dumps({"cells": made}))
    return path


def test_a_cell_that_fails_is_told(tmp_path):
    path = notebook_of(tmp_path, "STEPS = 5", "assert STEPS == 2", "1 / 0", "open('after', 'w')")
    done = run(path, tmp_path, STEPS=2)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "<cell cell-2>" in done.stderr
    assert not (tmp_path / "after").exists()


def test_magics_and_unknown_parameters_are_told(tmp_path):
    path = notebook_of(tmp_path, "STEPS = 5", "if STEPS == 5:\n    %pip install nothing")
    assert "RuntimeError: %pip install nothing" in run(path, tmp_path).stderr
    assert run(path, tmp_path, STEPS=2).returncode == 0
    assert "sets no STEP" in run(path, tmp_path, STEP=2).stderr
