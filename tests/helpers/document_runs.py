"""Runs a command of the documents, with few steps where it trains."""

import os
import shlex
import subprocess
import sys

from compiler import QUICKLY
from paths import ROOT

FEW_STEPS = (
    "--config.optim.steps=2 --config.optim.warmup=1 --config.data.batch=8 --config.data.tokens=64 "
    "--config.data.patch_rows=1 "
    "--config.data.patches_per_row=112 --config.train.num_eval_examples=4 --config.train.log_every=1"
).split()


def run(command, folder, expect=0):
    """The finished process of a command of Python; its exit code must be `expect`."""
    words = [sys.executable, *shlex.split(command)[1:]]
    environment = os.environ | {"XLA_FLAGS": QUICKLY, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == expect, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done
