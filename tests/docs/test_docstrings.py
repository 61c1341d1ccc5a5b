"""Docstrings list arguments and fields that exist, and start with a verb or a noun."""

import ast
import re

import pytest
from paths import ROOT

FILES = [path for folder in ("mllm_jax", "launch", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
ENTRY = re.compile(r"^( *)((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*): ")
FOLDERS = ("mllm_jax", "launch", "configs", "benchmarks", "tests")
QUESTION = re.compile(r"(What|How|Of|Whether|Where|Which|Why|When|So many|So much)\b")
SECTIONS = {"Args", "Returns", "Raises", "Attributes"}


def listed(text: str) -> set[str]:
    """The names before the colons of the lines with the smallest indent, as in "rows, columns: of the table"."""
    lines = [line for line in text.split("\n") if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    found = filter(None, map(ENTRY.match, lines))
    names = [name for entry in found if len(entry[1]) == indent for name in entry[2].split(", ")]
    return {name.lstrip("*") for name in names} - SECTIONS


def unknown_arguments(function: ast.FunctionDef) -> set[str]:
    """Names in the section "Args" of a docstring that are no arguments."""
    _, _, section = (ast.get_docstring(function) or "").partition("Args:\n")
    named = function.args
    known = {argument.arg for argument in ast.walk(named) if isinstance(argument, ast.arg)}
    return listed(re.split(r"^\w+:$", section, flags=re.MULTILINE)[0]) - known


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def unknown_fields(node: ast.ClassDef) -> set[str]:
    """Names at the margin of a config's docstring that are no fields of it."""
    known = {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
    return listed(ast.get_docstring(node) or "") - known


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_list_what_there_is(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    wrong = {node.name: unknown_arguments(node) for node in nodes if isinstance(node, ast.FunctionDef)}
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    wrong |= {node.name: unknown_fields(node) for node in classes if is_dataclass(node)}
    assert {name: names for name, names in wrong.items() if names} == {}


def test_a_name_that_is_not_there_is_found():
    function = ast.parse("def f(new):\n    '''Does.\n\n    Args:\n        old: a number.\n    '''").body[0]
    node = ast.parse("@dataclass\nclass C:\n    '''\n    old, new: numbers.\n    '''\n    new: int = 1").body[0]
    assert unknown_arguments(function) == {"old"} and unknown_fields(node) == {"old"}


def questions(tree: ast.AST) -> list[str]:
    """Docstrings that start like a question or a fragment, such as "What a layer does." or "Of a layer."."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in texts if QUESTION.match(text)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_start_with_a_verb_or_a_noun(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    found = {str(path): questions(ast.parse(path.read_text())) for path in files}
    assert {path: texts for path, texts in found.items() if texts} == {}


def test_a_question_is_found():
    tree = ast.parse("def f():\n    'Whether it is.'\ndef g():\n    'Returns whether it is.'")
    assert questions(tree) == ["Whether it is."]
