"""The commands in the documents: those in blocks, and those of Python within sentences and tables."""

import ast
import pathlib
import re

from paths import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
# Pages whose commands and Python run in tests/docs/test_readme.py; those of the others may need files or minutes.
RUN_AT_ONCE = ("README.md", "docs/inference.md", "docs/dual_encoders.md", "docs/sharding.md", "docs/design.md")
INLINE = re.compile(r"`((?:taskset -c 0 )?python (?:-m [\w.]+|\w+/\w+\.py)(?: [^`]+)?)`")
ABRIDGED = re.compile(r"launch\.X|\.\.\.$")  # not meant to be given as they stand


def blocks_of(text: str) -> list[tuple[str, str]]:
    """(language, text) of the blocks of code on a page."""
    return re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)


def commands_of(text: str) -> list[str]:
    """The commands in the bash blocks of a page, without their comments."""
    lines = [
        line
        for language, block in blocks_of(text)
        if language == "bash"
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [command for line in lines if (command := re.split(r"\s{2,}#", line)[0].strip())]


def inline_of(text: str) -> list[str]:
    """The commands of Python that stand within a line."""
    return [command for command in INLINE.findall(text) if not ABRIDGED.search(command)]


COMMANDS = [
    (page, command) for page, text in PAGES.items() for command in dict.fromkeys([*commands_of(text), *inline_of(text)])
]


def docstring_commands(path: pathlib.Path) -> list[str]:
    """The commands of training and planning in the docstring of a module, without what is said of them."""
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").replace("\\\n", " ")
    found = re.findall(r"^ *(python -m mllm_jax\.(?:train|plan) .*--config .*)$", text, re.MULTILINE)
    return [re.split(r"(?<=\S)\s{3,}(?!\s|--)| with experts", command)[0] for command in found]


CONFIGS = [
    (str(path.relative_to(ROOT)), command)
    for path in sorted((ROOT / "configs").rglob("*.py"))
    for command in docstring_commands(path)
]
