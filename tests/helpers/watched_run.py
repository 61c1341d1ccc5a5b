"""The tiny run with a smaller model still. Where $WATCHED names a folder, every process notes there what it reads."""

import itertools
import os
import pathlib
import sys
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny_run  # noqa: E402

from mllm_jax.data.synthetic.scenes import Scenes  # noqa: E402
from mllm_jax.train.input.pipeline import Placer  # noqa: E402

read, reads, place, batches = Scenes.__getitem__, itertools.count(), Placer.__call__, {}
POISONED = (10, 11)  # batches
STALLED = 7  # batch


def read_and_note(self, index):
    if self.split == "train":
        with open(pathlib.Path(os.environ["WATCHED"]) / f"{jax.process_index()}-{os.getpid()}", "a") as file:
            file.write(f"{index}\n")
    return read(self, index)


def read_and_hang(self, index):
    """Hangs in the middle of the run; of several processes the last one, which is slow, more than a busy machine is."""
    count = jax.process_count()
    if self.split == "train" and jax.process_index() == count - 1:
        time.sleep(1e6 if next(reads) > 250 // count else 0.3 * (count > 1))
    return read(self, index)


def stall(seconds, processes):
    """The n-th batch of some processes comes so late; they say in $WATCHED that they wait."""

    def placed(self, batch):
        if next(reads) == STALLED - 1 and jax.process_index() in processes:
            (pathlib.Path(os.environ["WATCHED"]) / f"waits-{jax.process_index()}").touch()
            time.sleep(seconds)
        return place(self, batch)

    return placed


def placed_slowly(self, batch):
    """A run of sixteen steps takes eight seconds, so that a request to stop meets it before its end."""
    time.sleep(0.5)
    return place(self, batch)


def poison(self, batch):
    """The n-th batch of the data, however often it is read, has targets that nobody can know."""
    number = batches.setdefault(batch.tokens.tobytes(), len(batches) + 1)
    wrong = np.where(batch.weight > 0, batch.tokens[:, ::-1] + 50, batch.targets)
    return place(self, batch._replace(targets=wrong) if number in POISONED else batch)


def get_config(variant: str = ""):
    """`short`: a set of 61 conversations. `hangs`: a conversation that never comes. `spikes`: two poisoned batches.

    `stalls`: a batch that never comes, in all processes. `late`: a batch that comes 40 s late in the second one.
    `slow`: batches that come half a second apart.
    """
    if variant == "short":
        Scenes.__len__ = lambda self: 61
    if variant == "hangs":
        Scenes.__getitem__ = read_and_hang
    if variant == "spikes":
        Placer.__call__ = poison
    if variant == "stalls":
        Placer.__call__ = stall(1e6, range(8))
    if variant == "late":
        Placer.__call__ = stall(40, [1])
    if variant == "slow":
        Placer.__call__ = placed_slowly
    if "WATCHED" in os.environ:
        Scenes.__getitem__ = read_and_note
    config = tiny_run.get_config()
    config.model.decoder.layers = 1
    config.optim.update(name="adamw", warmup=2, steps=16)
    config.train.update(log_every=1, save_every=4, evaluate_every=0, num_eval_examples=4)
    return config
