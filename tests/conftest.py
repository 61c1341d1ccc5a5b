"""Fixtures of the whole suite: eight virtual devices, jax's compilation cache, and the optional folder of real data."""

import ctypes
import gc
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

import jax  # noqa: E402
import pytest  # noqa: E402

MEMORY = 2.5e9  # bytes of a process above which compiled programs are freed; without a limit a worker grows to 6 GB


def pytest_configure():
    """Lets tests and the programs that they start hear Ctrl-C, which a shell has jobs in its background ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Refuses names of tests that differ between the workers of pytest-xdist, which would run none of them."""
    if changing := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"the name of a test holds an address in memory: {changing[0]}")


def resident_bytes() -> int:
    """Resident memory of this process. 0: the system does not tell it, as on macOS."""
    status = pathlib.Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.is_file() else 0


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Frees the compiled programs of earlier modules when they take too much memory, and returns it to the system."""
    yield
    if resident_bytes() > MEMORY:
        jax.clear_caches()
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps freed blocks
            trim(0)


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
