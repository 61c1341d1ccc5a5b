"""The tiny run with a smaller model still. Where $WATCHED names a folder, every process notes there what it reads."""

import itertools
import os
import pathlib
import sys
import time

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny_run  # noqa: E402

from mllm_jax.data.scenes import Scenes  # noqa: E402

read, reads = Scenes.__getitem__, itertools.count()


def read_and_note(self, index):
    if self.split == "train":
        with open(pathlib.Path(os.environ["WATCHED"]) / f"{jax.process_index()}-{os.getpid()}", "a") as file:
            file.write(f"{index}\n")
    return read(self, index)


def read_and_hang(self, index):
    """Of several processes the last one is slow, and hangs in the middle of the run."""
    if self.split == "train" and jax.process_index() == jax.process_count() - 1:
        time.sleep(1e6 if next(reads) > 250 // jax.process_count() else 0.01)
    return read(self, index)


def get_config(variant: str = ""):
    """`short`: a set of 61 conversations. `hangs`: a conversation that never comes."""
    if variant == "short":
        Scenes.__len__ = lambda self: 61
    if variant == "hangs":
        Scenes.__getitem__ = read_and_hang
    if "WATCHED" in os.environ:
        Scenes.__getitem__ = read_and_note
    config = tiny_run.get_config()
    config.model.decoder.layers = 1
    config.optim.update(name="adamw", warmup=2, steps=16)
    config.train.update(log_every=1, save_every=4, evaluate_every=0, heldout=4)
    return config
