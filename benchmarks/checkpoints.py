"""Times saving and restoring a checkpoint with and without fingerprints of its arrays (train.verify), in turn.

    python benchmarks/checkpoints.py --rounds 7                 the state of training 45M parameters, below /tmp
    python benchmarks/checkpoints.py --rounds 7 --folder /mnt   the same on another disk

A save is timed until steps may continue, and until it is on disk; a restore until the state is on the devices. Files
that were just written come from the host's page cache: on a slower disk, fingerprints take a smaller fraction.
"""

import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from lora import run_of  # noqa: E402
from ratios import ratio_text  # noqa: E402

from mllm_jax import make_mesh  # noqa: E402
from mllm_jax.common.cli import Parser  # noqa: E402
from mllm_jax.nn.lora import LoraConfig  # noqa: E402
from mllm_jax.train.checkpoint.fingerprint import fingerprints  # noqa: E402
from mllm_jax.train.checkpoint.manager import Checkpoints  # noqa: E402
from mllm_jax.train.runs.config import read_run, run_config, train_context  # noqa: E402
from mllm_jax.train.step.context import init_state  # noqa: E402

VOCABULARY = 8000  # instead of the 32,000 of benchmarks/lora.py
POSITION = {"streams": {}, "data": {}}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default 7)")
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="folder on the disk to measure (default %(default)s)"
    )
    args = parser.parse_args()
    run, mesh = run_of(LoraConfig()), make_mesh({"fsdp": 1}, jax.devices()[:1])
    tokens = replace(run.model.tokens, image=7000, video=7001, start=7002, end=7003)
    decoder = replace(run.model.decoder, vocab=VOCABULARY)
    config = run_config(replace(run, model=replace(run.model, decoder=decoder, tokens=tokens)))
    context = train_context(read_run(config), mesh)
    state = jax.block_until_ready(init_state(context, jax.random.key(0)))
    shapes, layout = context.state, context.state_shardings
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    print(f"{len(jax.tree.leaves(state))} arrays, {size / 1e6:.0f} MB")
    seconds = defaultdict(list)
    for number in range(args.rounds + 1):  # the first is not counted
        for verify in (True, False) if number % 2 else (False, True):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                checkpoints = Checkpoints(Path(folder), verify=verify)
                began = time.perf_counter()
                checkpoints.save(number, state, config, POSITION, {})
                seconds["save, steps wait", verify].append(time.perf_counter() - began)
                checkpoints.wait()
                seconds["save, on disk", verify].append(time.perf_counter() - began)
                began = time.perf_counter()
                jax.block_until_ready(checkpoints.restore(config, shapes, layout).state)
                seconds["restore", verify].append(time.perf_counter() - began)
                checkpoints.close()
        began = time.perf_counter()
        fingerprints(state._asdict())
        seconds["fingerprints alone", True].append(time.perf_counter() - began)
    for what in ("save, steps wait", "save, on disk", "restore"):
        with_, without = (np.array(seconds[what, verify][1:]) for verify in (True, False))
        print(
            f"{what:20}{statistics.median(with_):7.3f} s verified, {statistics.median(without):7.3f} s not, "
            f"ratio {ratio_text(with_, without)}"
        )
    alone = statistics.median(seconds["fingerprints alone", True][1:])
    print(f"{'fingerprints alone':20}{alone:7.3f} s, {size / alone / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
