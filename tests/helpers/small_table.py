"""A small table of weights, with every kind of row, and random weights for it."""

import jax
import numpy as np

from mllm_jax.common.trees import unflatten
from mllm_jax.weights.table import Row

ROWS = [
    ("patch/w", "visual.patch.weight", "d c t y x -> (c t y x) d", {"c": 3, "t": 2, "y": 2}),
    ("position", "visual.pos_embed.weight", "(y x) d -> y x d", {}),
    Row("layers/qkv/w", "model.layers.{n}.qkv.weight", "(c n h) d -> d c n h"),
    Row("layers/out/w", "model.layers.{n}.out.weight", "d (n h) -> n h d"),
    Row("layers/norm/scale", "model.layers.{n}.norm.weight"),
    Row("layers/gate", "model.layers.{n}.gate"),
    Row("experts/up/w", "model.experts.{n}.{e}.up.weight", "f d -> d f"),
    Row("embed", "model.embed.weight", "..."),
    Row("temperature", "temperature"),
    Row("head/w", "lm_head.weight", "v d -> d v"),
]
SHAPES = {
    "patch/w": (24, 16),
    "position": (3, 5, 16),
    "layers/qkv/w": (5, 16, 3, 4, 2),
    "layers/out/w": (5, 4, 2, 16),
    "layers/norm/scale": (5, 16),
    "layers/gate": (5,),
    "experts/up/w": (2, 3, 16, 8),
    "embed": (7, 16),
    "temperature": (),
    "head/w": (16, 8),
}


def abstract(shapes=SHAPES):
    """Shapes of the tree that the table is for."""
    return unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})


def random_params(dtype="float32", shapes=SHAPES):
    rng = np.random.default_rng(0)
    return unflatten({path: rng.normal(size=shape).astype(np.dtype(dtype)) for path, shape in shapes.items()})
