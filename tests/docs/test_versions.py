"""The lower bounds of setup.py are those of CONTRIBUTING.md's table, and each has a test that would notice."""

import pathlib
import re

import pytest
import setuptools
from lowest import TESTS, files_of
from paths import ROOT

NAME = r"[\w-]+"


@pytest.fixture(scope="module")
def declared():
    """{dependency: the requirements of it in setup.py}, and what setup() was given."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        patch.chdir(ROOT)
        exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__name__": "__main__"})
    found = {}
    for requirement in [*given["install_requires"], *sum(given["extras_require"].values(), [])]:
        found.setdefault(re.match(NAME, requirement)[0], set()).add(re.sub(r"\[\w+\]", "", requirement))
    return found


@pytest.fixture(scope="module")
def table():
    """{package: (tested, lowest)} of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Versions that were tested together")[1]
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0].split()[0]: tuple(row[1:]) for row in rows[2:]}


def test_a_dependency_has_one_bound(declared):
    assert {name: found for name, found in declared.items() if len(found) > 1} == {}


def test_the_table_has_the_lower_bound_of_each_dependency(declared, table):
    bounds = {name: re.split(r"[=>]=", *found)[1].split(",")[0] for name, found in declared.items()}
    assert bounds == {name: lowest for name, (_, lowest) in table.items() if name not in ("Python", "libtpu")}
    assert table["Python"][1] == re.search(r'python_requires=">=([\d.]+)"', (ROOT / "setup.py").read_text())[1]


def test_each_dependency_is_tested_with_its_lowest_version(declared):
    tested = {name for tests in TESTS.values() for names in tests for name in names.split(", ")}
    elsewhere = {"tokamax"}  # it needs a GPU
    assert tested | elsewhere == set(declared)


def test_the_tests_of_dependencies_exist():
    names = {test for tests in TESTS.values() for test in " ".join(tests.values()).split()}
    assert {name for name in names if len(files_of(name)) != 1} == set()


def test_extras_are_installed_from_the_checkout():
    """The package is on no index: `pip install mllm_jax[...]` would find nothing, or another's."""
    files = [path for folder in ("mllm_jax", "docs", "tests", "launch") for path in (ROOT / folder).rglob("*.*")]
    texts = {
        path: path.read_text()
        for path in files
        if path.suffix in (".py", ".md", ".sh") and path != pathlib.Path(__file__)
    }
    named = re.compile(r"pip install [^\n]*mllm[_-]jax\\?\[")
    assert [path for path, text in texts.items() if named.search(text)] == []
