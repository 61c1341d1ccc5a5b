"""Tests each dependency with the lowest version that setup.py allows. `make lowest` runs it.

    python tests/helpers/lowest.py FOLDER

uv resolves the direct dependencies to their lowest versions, in two virtual environments below FOLDER: "package" has
what the package itself requires, "test" also what tests compare with, which asks for newer versions of a few. torch is
pinned exactly, so pip installs it as `make test` does, from wherever pip is configured to find it.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

from paths import ROOT

TESTS = {  # dependency: the tests that would notice
    "package": {
        "jax, flax, optax, einops, numpy, tensorboardX": "train train_step optimizer vlm sharding",
        "orbax-checkpoint": "checkpoint",
        "grain": "loader",
        "array_record, msgpack, pyarrow": "formats convert sources",
        "tensorflow-datasets": "formats docs_data",
        "absl-py, ml-collections": "config command",
        "tokenizers": "records scenes packing",
        "pillow, jinja2": "report plots",
        "huggingface_hub": "hub",
        "rich": "inspect families_command evaluate",
        "pyyaml, kubeflow-trainer-api": "launch",
    },
    "test": {
        "transformers, torch, safetensors": "weights decoders qwen2_vl chat_template",
        "av": "videos",
        "pillow, pillow-heif": "images image_files resize",
        "peft, accelerate": "adapters",
        "trl": "preference ppo",
        "sentencepiece, protobuf": "sentence_piece",
        "hypothesis": "packing",
        "pytest, pytest-xdist, ruff": "",
    },
}
RUNNERS = ("pytest", "pytest-xdist", "hypothesis", "kubeflow-trainer-api")  # of the test extra, what "package" needs


def files_of(test: str) -> list[Path]:
    """The test file of this name, in whichever folder it is."""
    return list((ROOT / "tests").rglob(f"test_{test}.py"))


def environment(folder: Path, extras: str, requirements: list[str]) -> Path:
    """Makes a virtual environment with the lowest versions and returns its Python."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    (folder / "excluded.txt").write_text("torch\n")
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "uv"], check=True)
    lowest = ["--resolution", "lowest-direct", "--excludes", folder / "excluded.txt", "--python", python]
    editable = ["--editable", f"{ROOT}[{extras}]"]
    subprocess.run([python, "-m", "uv", "pip", "install", "--quiet", *lowest, *editable, *requirements], check=True)
    if "test" in extras:
        subprocess.run([*pip, "torch==2.13.0"], check=True)
    return python


def main(folder: Path) -> int:
    """Returns how many of its commands failed."""
    declared = (ROOT / "setup.py").read_text()
    lines = [line.strip().partition("#")[0].strip('", ') for line in declared.splitlines()]
    runners = [line for line in lines if line.partition(">=")[0] in RUNNERS]
    failed = 0
    for name, extras, more in (("package", "video,sentencepiece", runners), ("test", "test,sentencepiece", [])):
        python = environment(folder / name, extras, more)
        files = sorted({file for tests in TESTS[name].values() for test in tests.split() for file in files_of(test)})
        settings = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache" / name)}
        commands = [["pytest", *files], *([["ruff", "check", "."]] if name == "test" else [])]
        for command in commands:
            failed += subprocess.run([python, "-m", *command], cwd=ROOT, env=settings).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
