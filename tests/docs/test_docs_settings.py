"""Settings that documents name in the form `name=value` exist, also after one of them was renamed."""

import ast
import re

import pytest
from documents import PAGES, ROOT

FOLDERS = ("mllm_jax", "launch", "configs", "benchmarks")
FOREIGN = {"PreemptMode", "PreemptParameters", "save_original_format"}  # of Slurm and transformers
CODE = re.compile(r"```.*?```|`([^`\n]+)`", re.DOTALL)


def names_in(tree: ast.AST) -> set[str]:
    """Names of fields and of arguments, and those of flags and keys, which are strings."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value.lstrip("-"))
    return names


@pytest.fixture(scope="module")
def known():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return FOREIGN.union(*(names_in(ast.parse(path.read_text())) for path in files))


def settings_of(page: str) -> set[str]:
    """Names before an equals sign in inline code, a path such as `config.optim.steps` in its parts."""
    spans = [code for code in CODE.findall(page) if code]
    paths = [path for code in spans for path in re.findall(r"(?:^|[\s,(.-])(\w[\w.]*)=", code)]
    return {name for path in paths for name in path.split(".") if name not in ("path", "to")}  # as in config.path.to


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page, known):
    assert settings_of(PAGES[page]) - known == set()


def test_an_old_name_is_found(known):
    page = "Set `beta=1`, `--config.algorithm.smoothing=0.1` or\n```bash\nrun --gone=1\n``` or `f(mesh=...)`."
    assert settings_of(page) == {"beta", "config", "algorithm", "smoothing", "mesh"}
    assert settings_of(page) - known == {"smoothing"}
