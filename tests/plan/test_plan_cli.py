"""`python -m mllm_jax.plan`: its exit code, and one line for wrong input."""

import re
import subprocess
import sys

import pytest
from paths import ROOT


def plan_command(*arguments):
    command = [sys.executable, "-m", "mllm_jax.plan", "--config", "configs/qwen3_vl_8b.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_what_does_not_fit_is_exit_code_1():
    """Shapes alone show it; libtpu is not needed."""
    done = plan_command("--topology", "v4:2x2x1", "--compile=0")
    assert done.returncode == 1, done.stderr
    *table, last = done.stdout.strip().splitlines()
    peaks = [float(re.search(r"([\d.]+) GiB", line)[1]) for line in table if "GiB" in line]
    assert len(peaks) > 1 and peaks == sorted(peaks)
    assert last.startswith("does not fit: ") and f"needs {peaks[0]} GiB of 30.8 GiB" in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v9:2x2"), "there is no topology 'v9:2x2'"),
        (("--topology", "v9:2x2", "--config.data.tokens=300000"), "config.data.tokens=300000 is longer"),
        (("--topology", "v5p:4x4x4", "--config.data.bach=4"), "bach"),
        (("--topology", "v5p:4x4x4", "--html", "/nowhere/plan.html"), "there is no folder /nowhere"),
        (("--topology", "cpu:8"), "cpu:8 has no published figures to plan with"),
        ((), "topology"),
    ],
)
def test_wrong_input_ends_in_one_line_and_exit_code_2(arguments, message):
    done = plan_command(*arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.strip().count("\n") == 0 and done.stderr.startswith("error: ")
