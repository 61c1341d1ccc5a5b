"""Random conversations and the tiny model that tests of training share."""

import jax
import numpy as np

from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds, abstract_params
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.runtime import Runtime
from mllm_jax.types import Example, ImagePatches

IMAGE, VIDEO, START, END = 150, 151, 152, 153
MERGE, VALUES = 2, 3 * 2 * 4 * 4


def tiny_config(tie: bool = False, **runtime) -> ModelConfig:
    """Every part of a Qwen3-VL, small: 96 values a patch, 2 x 2 patches a visual token, two taps, grouped heads."""
    return ModelConfig(
        VitConfig(width=64, layers=3, heads=4, mlp=128, patch_size=4, position_grid=6, deepstack_layers=(0, 1)),
        PatchMergerConfig(MERGE),
        DecoderConfig(200, 64, 3, AttentionConfig(4, 2, 32, rope_sections=(6, 5, 5)), 128, tie_embeddings=tie),
        VisionTokenIds(IMAGE, VIDEO, START, END),
        Runtime(**runtime),
    )


def random_params(config: ModelConfig, seed: int = 0):
    """Random weights, none of which is zero or one. Unlike those of `init_params` they need no compilation."""
    draw = np.random.default_rng(seed).standard_normal

    def weight(path, x):
        scale = path[-1].key == "scale"
        return (scale + 0.1 * draw(x.shape)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(weight, abstract_params(config))


def random_example(rng, text: int, *grids, answer: int | None = None, kind: str = "") -> Example:
    """A conversation of `text` random tokens with images (h, w) and videos (t, h, w), sides in patches, in its middle.

    The last `answer` tokens (half of the text unless told) are predicted, with weight 1.
    """
    answer = text // 2 if answer is None else answer
    ids, visual, position, images = [], [], [], []
    now = 0

    def add_text(tokens):
        nonlocal now
        ids.extend(tokens)
        visual.extend([False] * len(tokens))
        position.extend([(now + i,) * 3 for i in range(len(tokens))])
        now += len(tokens)

    add_text(rng.integers(5, 149, text // 3).tolist())
    for grid in grids:
        frames, height, width = (1, *grid) if len(grid) == 2 else grid
        for time in range(frames):
            add_text([START])
            sides = (height // MERGE, width // MERGE)
            ids.extend([IMAGE if len(grid) == 2 else VIDEO] * (sides[0] * sides[1]))
            visual.extend([True] * (sides[0] * sides[1]))
            position.extend([(now, now + y, now + x) for y in range(sides[0]) for x in range(sides[1])])
            now += max(sides)
            patches = rng.integers(0, 256, (height * width, VALUES), dtype=np.uint8)
            images.append(ImagePatches(patches, (height, width), time))
            add_text([END])
    add_text(rng.integers(5, 149, text - text // 3).tolist())
    weight = np.zeros(len(ids), np.float32)
    weight[len(ids) - answer :] = 1
    return Example(
        tokens=np.array(ids, np.int32),
        weight=weight,
        position=np.array(position, np.int32).reshape(-1, 3),
        vision_index=np.where(visual, np.cumsum(visual) - 1, -1),
        images=tuple(images),
        kind=kind,
    )
