"""The tiny run with a smaller model still. Where $WATCHED names a folder, every process notes there what it reads."""

import os
import pathlib
import sys

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny_run  # noqa: E402

from mllm_jax.data.scenes import Scenes  # noqa: E402

read = Scenes.__getitem__


def read_and_note(self, index):
    if self.split == "train":
        with open(pathlib.Path(os.environ["WATCHED"]) / f"{jax.process_index()}-{os.getpid()}", "a") as file:
            file.write(f"{index}\n")
    return read(self, index)


def get_config(variant: str = ""):
    """`short`: a set of 61 conversations."""
    if variant == "short":
        Scenes.__len__ = lambda self: 61
    if "WATCHED" in os.environ:
        Scenes.__getitem__ = read_and_note
    config = tiny_run.get_config()
    config.model.decoder.layers = 1
    config.optim.update(name="adamw", warmup=2, steps=16)
    config.train.update(log_every=1, save_every=4, evaluate_every=0, heldout=4)
    return config
