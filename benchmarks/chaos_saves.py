"""Kills a program that saves a model and its adapters again and again, and checks that the old or the new one remains.

    python benchmarks/chaos_saves.py              20 kills; prints the table of docs/reliability.md
    python benchmarks/chaos_saves.py --kills 4

A child saves model 1, adapters 1, model 2, adapters 2 ... into the same two folders until SIGKILL ends it at a random
moment, half of the times as soon as it moves files. Then both folders are loaded: each must be bit-equal to the last
complete save or to the interrupted one, or be refused. The next child continues in the same folders. Exits with 1 if
any check fails.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402

import mllm_jax  # noqa: E402
from mllm_jax import ModelConfig  # noqa: E402
from mllm_jax.common.cli import Parser  # noqa: E402
from mllm_jax.families.vlms import qwen3_vl  # noqa: E402
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig  # noqa: E402
from mllm_jax.model.decoder import DecoderConfig  # noqa: E402
from mllm_jax.model.encoders.vit import VitConfig  # noqa: E402
from mllm_jax.model.vlm import VLM, abstract_params  # noqa: E402
from mllm_jax.nn.attention.layer import AttentionConfig  # noqa: E402
from mllm_jax.nn.lora import LoraConfig  # noqa: E402
from mllm_jax.pretrained.api import Pretrained  # noqa: E402
from mllm_jax.pretrained.peft import load_adapters, save_adapters  # noqa: E402

MODEL = ModelConfig(
    VitConfig(width=64, layers=2, heads=2, mlp=128, deepstack_layers=(0,)),
    PatchMergerConfig(),
    DecoderConfig(512, 64, 2, AttentionConfig(heads=4, kv_heads=2, head_dim=32, rope_sections=(8, 4, 4)), 128),
    replace(qwen3_vl.TOKENS, image=500, video=501, start=502, end=503),
)
ADAPTED = replace(MODEL, lora=LoraConfig(rank=4))
KINDS = ("model", "adapters")


def made(config: ModelConfig, number: int) -> Pretrained:
    """All weights of model `number` are that number, so that a mixture of two is seen."""
    params = jax.tree.map(lambda x: np.full(x.shape, number, np.float32), abstract_params(config))
    return Pretrained(config, VLM(config), params)


def save_forever(folder: Path, first: int) -> None:
    for number in itertools.count(first):
        mllm_jax.save_pretrained(made(MODEL, number), folder / "model")
        print("model", number, flush=True)
        save_adapters(made(ADAPTED, number), folder / "adapters")
        print("adapters", number, flush=True)


def found(folder: Path, kind: str) -> str:
    """The number that a folder holds, or that it was refused; "mixed" where weights differ."""
    try:
        if kind == "model":
            loaded = mllm_jax.load_pretrained(folder / kind).params
        else:
            adapted = load_adapters(made(MODEL, -1), folder / kind).params
            loaded = [x for x in jax.tree.leaves(adapted) if np.any(np.asarray(x) != -1)]
    except (FileNotFoundError, ValueError) as error:
        return "refused" if "a save was ended" in str(error) else f"wrong error: {error}"
    numbers = {float(value) for x in jax.tree.leaves(loaded) for value in np.unique(np.asarray(x, np.float32))}
    return str(int(*numbers)) if len(numbers) == 1 else f"mixed: {sorted(numbers)}"


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.0002)  # files are moved within a millisecond


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times (default 0)")
    parser.add_argument("--save", metavar="FOLDER", help="run as the child that saves to this folder")
    parser.add_argument("--number", type=int, default=1, help="number of the child's first save (default 1)")
    options = parser.parse_args()
    if options.save:
        save_forever(Path(options.save), options.number)
    rng, right, last = random.Random(options.seed), 0, dict.fromkeys(KINDS, 0)
    print("| | SIGKILL at | left behind | last saved | found | right |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(1, options.kills + 1):
            aimed, left, before = kill(folder, max(last.values()) + 1, rng)
            last.update(before)
            states = {kind: found(folder, kind) for kind in KINDS}
            good = all(state in ("refused", str(last[kind]), str(last[kind] + 1)) for kind, state in states.items())
            right += good
            told = [", ".join(f"{kind} {values[kind]}" for kind in KINDS) for values in (last, states)]
            print(f"| {number} | {aimed} | {left} | {told[0]} | {told[1]} | {'yes' if good else 'NO'} |", flush=True)
    print(f"\n{right} of {options.kills} are old, new or refused")
    return right != options.kills


def kill(folder: Path, number: int, rng: random.Random) -> tuple[str, str, dict[str, int]]:
    """Lets a child save, and kills it -> (aimed at, folders left, the last number told of each kind)."""
    command = [sys.executable, __file__, "--save", str(folder), "--number", str(number)]
    log = folder / "log.txt"
    aimed = rng.choice(("any moment", "a move"))
    with open(log, "w") as file:
        child = subprocess.Popen(command, stdout=file)
    wait_until(lambda: len(log.read_text().splitlines()) >= len(KINDS) or child.poll() is not None, 120)
    time.sleep(rng.uniform(0, 1))
    if aimed == "a move":
        wait_until(lambda: any(folder.glob(".*.moving")), 30)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = ", ".join(sorted(path.name for path in folder.glob(".*")))
    told = [line.split() for line in log.read_text().splitlines()]
    return aimed, left, {kind: int(value) for kind, value in told}


if __name__ == "__main__":
    sys.exit(main())
