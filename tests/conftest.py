"""Fixtures of the whole suite: eight virtual devices, jax's compilation cache, and the optional folder of real data."""

import os
import pathlib
import shutil
import signal
import subprocess

from compiler import PATIENTLY, QUICKLY

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {QUICKLY} {PATIENTLY}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import pytest  # noqa: E402


def pytest_configure():
    """Lets tests and the programs that they start hear Ctrl-C, which a shell has jobs in its background ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Refuses names of tests that differ between the workers of pytest-xdist, which would run none of them."""
    if changing := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"the name of a test holds an address in memory: {changing[0]}")


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Real data beside the checkout; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared")
    return folder


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> pathlib.Path:
    """A git repository of the package, its configs and launchers as they are here, changes included."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path_factory.mktemp("repository").resolve()
    for name in ("configs", "launch", "mllm_jax"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]):
        subprocess.run([*git, *words], check=True)
    return folder


@pytest.fixture
def checkout(repository, monkeypatch) -> pathlib.Path:
    """That repository as the checkout that launchers send, whatever is not committed in this one."""
    for module in ("hosts", "checks", "tpu_pod"):
        monkeypatch.setattr(f"launch.{module}.ROOT", repository)
    return repository
