"""Commands of docs/preference.md on configs/prefer.py: pairs teach truthful captions, and not to say less."""

import math
import os
import re
import shlex
import subprocess
import sys

import pytest
from documents import PAGES, ROOT, commands_of

COMMANDS = [command for command in commands_of(PAGES["docs/preference.md"]) if "--workdir /tmp/prefer" in command]
ROW = re.compile(r"(\w+) +│ +(\d+) +│ +([\d.]+)% ± ([\d.]+)% +│ +([\d.]+)% ± ([\d.]+)%")


@pytest.mark.slow
def test_the_share_of_false_objects_falls(tmp_path):
    """Counts objects named in 400 held-out captions; true objects are still named."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    for command in COMMANDS:
        words = shlex.split(command.replace("/tmp/prefer", str(tmp_path / "prefer")))
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    found = {stage: [float(number) for number in row] for stage, *row in ROW.findall(done.stdout)}
    assert found.keys() == {"learn", "dpo", "dense", "mpo"}
    _, before, error, recall, _ = found.pop("learn")
    assert recall > 75
    for stage, (_, after, error_after, recall_after, _) in found.items():
        assert before - after > max(12, 6 * math.hypot(error, error_after)), stage  # 21 points and more were measured
        assert recall - recall_after < 8, stage  # four points at most were measured
