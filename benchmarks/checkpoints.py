"""Saving and restoring a checkpoint with and without fingerprints of its arrays (train.verify), each in turn.

    python benchmarks/checkpoints.py --rounds 7                 the state of training 45M parameters, below /tmp
    python benchmarks/checkpoints.py --rounds 7 --folder /mnt   the same on another disk

A save is measured until steps may go on, and until it is on disk; a restore until the state is on the devices. Files
that were just written come back from the memory of the host: where a disk is slower, fingerprints are a smaller share.
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
from mllm_jax.model.vlm import abstract_params  # noqa: E402
from mllm_jax.nn.lora import LoraConfig  # noqa: E402
from mllm_jax.train.checkpoint.fingerprint import fingerprints  # noqa: E402
from mllm_jax.train.checkpoint.manager import Checkpoints  # noqa: E402
from mllm_jax.train.runs.config import read_run, run_config  # noqa: E402
from mllm_jax.train.step.optimizer import make_optimizer  # noqa: E402
from mllm_jax.train.step.state import abstract_state, init_state, state_shardings  # noqa: E402

VOCABULARY = 8000  # instead of the 32,000 of benchmarks/lora.py
POSITION = {"streams": {}, "data": {}}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default 7)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to write to (default %(default)s)")
    args = parser.parse_args()
    run, mesh = run_of(LoraConfig()), make_mesh({"fsdp": 1}, jax.devices()[:1])
    tokens = replace(run.model.tokens, image=7000, video=7001, start=7002, end=7003)
    decoder = replace(run.model.decoder, vocab=VOCABULARY)
    config = run_config(replace(run, model=replace(run.model, decoder=decoder, tokens=tokens)))
    model, optim = read_run(config).model, run.optim
    tx, _ = make_optimizer(optim, abstract_params(model))
    state = jax.block_until_ready(init_state(model, tx, mesh, jax.random.key(0)))
    shapes, layout = abstract_state(model, tx), state_shardings(model, tx, mesh, model.runtime.rules)
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
