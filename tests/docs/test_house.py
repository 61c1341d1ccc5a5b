"""The rules of the house that a machine can hold: imports run one way, files stay small, the package needs no torch."""

import ast
import collections
import graphlib
import pathlib
import statistics
import subprocess
import sys

import pytest
from paths import HELPERS, ROOT

PACKAGE = ROOT / "mllm_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Who may import whom, beside itself. A part that is not listed fails, so that a new one finds its room.
MAY_IMPORT = {
    "types": set(),
    "common": set(),
    "sharding": {"common", "types"},
    "nn": {"common", "sharding", "types"},
    "model": {"common", "nn", "sharding", "types"},
    "weights": {"common", "types"},
    "data": {"common", "types"},
}
MAY_IMPORT["families"] = {"weights", "data", "model"} | MAY_IMPORT["model"]
MAY_IMPORT["pretrained"] = {"families"} | MAY_IMPORT["families"]
MAY_IMPORT["generate"] = {"pretrained"} | MAY_IMPORT["pretrained"]
MAY_IMPORT["train"] = {"generate"} | MAY_IMPORT["generate"]
MAY_IMPORT["export"] = {"train"} | MAY_IMPORT["train"]
MAY_IMPORT["evaluate"] = {"train"} | MAY_IMPORT["train"]
MAY_IMPORT["plan"] = {"evaluate"} | MAY_IMPORT["evaluate"]
# The folders of train/, each of which may import those before it; its files stand above all of them.
TRAIN_ORDER = ("losses", "step", "runs", "monitor", "checkpoint", "input", "evaluators", "algorithms")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
BESIDE_WORKERS = {"loader", "inspection", "inspection_page", "__main__"}  # of data/, run where jax may be
DATA_WORKERS = [
    ".".join(path.relative_to(PACKAGE / "data").with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES
    if path.is_relative_to(PACKAGE / "data")
    and path.stem not in BESIDE_WORKERS
    and path != PACKAGE / "data/__init__.py"
]


def part(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: pathlib.Path):
    yield from imported_in(ast.parse(path.read_text()))


def imported_in(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module if node.level == 0 else "mllm_jax"  # by a relative name: one of ours


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    if path == PACKAGE / "__init__.py" or path.name == "__main__.py":
        return  # nobody imports a command, so it may import everything
    own = part(path)
    for module in imported_modules(path):
        if module.startswith("mllm_jax."):
            other = module.split(".")[1]
            assert other == own or other in MAY_IMPORT[own], f"{own} may not import {other}"


def test_folders_of_train_import_one_way():
    assert set(TRAIN_ORDER) == {path.name for path in (PACKAGE / "train").iterdir() if (path / "__init__.py").exists()}
    for path in SOURCES:
        own, *rest = path.relative_to(PACKAGE).parts[1:] or [""]
        if part(path) == "train" and rest:
            below = TRAIN_ORDER[: TRAIN_ORDER.index(own) + 1]
            others = {module.split(".")[2] for module in imported_modules(path) if module.startswith("mllm_jax.train.")}
            assert others <= set(below), f"train/{own} may not import train/{others - set(below)}"


@pytest.mark.parametrize("folder", ("data", "model", "nn", "plan", "pretrained", "train"))
def test_no_folders_import_each_other_in_a_circle(folder):
    """The parts of a folder, files and folders, have an order in which each imports only what comes before it."""
    graph = collections.defaultdict(set)
    for path in (PACKAGE / folder).rglob("*.py"):
        own = path.relative_to(PACKAGE / folder).with_suffix("").parts[0]
        if path.name != "__main__.py" and own != "__init__":
            for module in imported_modules(path):
                if module.startswith(f"mllm_jax.{folder}."):
                    graph[own].add(module.split(".")[2])
            graph[own].discard(own)
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_hides_in_a_function(path):
    """An import inside a function hides a circle or a cost: of our own modules there is none."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, FUNCTIONS)]
    hidden = {name for function in functions for name in imported_in(function)}
    assert {name for name in hidden if name.split(".")[0] == "mllm_jax"} == set()


def test_the_package_needs_neither_torch_nor_transformers():
    for path in SOURCES:
        assert not {module.split(".")[0] for module in imported_modules(path)} & {"torch", "transformers"}, path


def test_files_stay_small():
    folders = ("mllm_jax", "configs", "launch", "benchmarks", "tests", "colab")
    lengths = {path: len(path.read_text().splitlines()) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 600} == {}
    assert statistics.median(lengths[path] for path in SOURCES) <= 200


def test_folders_stay_small():
    """About a dozen files, templates included."""
    files = (path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".html", ".jinja"))
    counts = collections.Counter(path.parent for path in files if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > 14} == {}


def test_data_workers_and_common_import_no_jax():
    common = [f"mllm_jax.common.{path.stem}" for path in (PACKAGE / "common").glob("*.py") if path.stem != "__init__"]
    names = [*common, *(f"mllm_jax.data.{name}" for name in DATA_WORKERS)]
    code = f"import sys; [__import__(name) for name in {names}]; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metadata_names_what_is_imported():
    """Every third-party package that the code imports is declared in setup.py, and nothing is declared for nothing."""
    declared = (ROOT / "setup.py").read_text()
    names = {"PIL": "pillow", "yaml": "pyyaml", "ml_collections": "ml-collections", "orbax": "orbax-checkpoint",
             "absl": "absl-py", "tensorflow_datasets": "tensorflow-datasets", "pillow_heif": "pillow-heif"}  # fmt: skip
    for path in SOURCES:
        for module in imported_modules(path):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top not in ("mllm_jax", "ml_dtypes"):
                assert names.get(top, top) in declared, f"{path}: {top} is not in setup.py"


def test_tests_import_helpers_and_no_other_tests():
    """Shared code is in tests/helpers/, which contains no tests; a file there is imported by its name alone."""
    helpers = {path.stem for path in HELPERS.glob("*.py")}
    assert not {name for name in helpers if name.startswith("test_") or name in sys.stdlib_module_names}
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        assert not {module.split(".")[0] for module in imported_modules(path)} & (tests | {"tests"}), path
