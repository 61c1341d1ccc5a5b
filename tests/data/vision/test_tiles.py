"""Tiles: canvases, grids, pixels and the order of visual tokens equal transformers'."""

import math

import numpy as np
import pytest
import tiny_chat
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image

from mllm_jax.data.pipeline.packing import Budget, TooLarge, collate, smallest_budget
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.text.chat_template import ChatTemplate
from mllm_jax.data.text.tokenizer import Tokenizer
from mllm_jax.data.vision.resize import Crop
from mllm_jax.data.vision.tiles import AnyRes, Tiles, best_canvas, dynamic_grid
from mllm_jax.types import NEWLINE

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SIZES = [(480, 640), (336, 336), (1000, 300), (300, 1000), (672, 672), (1080, 1920), (1, 1), (7, 333)]


def make_image(height, width):
    """Smooth colors and noise."""
    rng = np.random.default_rng(height * 10007 + width)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    return Image.fromarray((smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8))


def test_canvases_and_grids():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 3000, (500, 2)).tolist():
        assert best_canvas((height, width), PINPOINTS) == select_best_resolution((height, width), list(PINPOINTS))
        columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
        assert dynamic_grid((height, width), 1, 12, 448) == (rows, columns)
    published = {(480, 640): (3, 4), (1080, 1920): (2, 4), (300, 1000): (1, 3), (2000, 2000): (3, 3)}
    assert {size: dynamic_grid(size, 1, 12, 448) for size in published} == published


def test_tokens_of_published_sizes():
    """The grids of LLaVA-NeXT at 336 pixels a tile and 24 tokens a side, counted by its official code."""
    rule = AnyRes(PINPOINTS, 336)
    tokens = {
        (480, 640): 2340,
        (336, 336): 1176,
        (1000, 300): 2232,
        (300, 1000): 2182,
        (672, 672): 2928,
        (1080, 1920): 1948,
    }
    assert {size: len(rule.order(size, 14)) for size in tokens} == tokens
    assert math.prod((2, 2)) * 576 + 576 == 2880 == np.sum(rule.order((672, 672), 14) != NEWLINE)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_order_is_the_grid_without_its_padding(size):
    rule, side = AnyRes(PINPOINTS, 336), 24
    canvas = best_canvas(size, PINPOINTS)
    rows, columns = canvas[0] // 336, canvas[1] // 336
    tokens = torch.arange(1 + rows * columns * side**2)[1:] + side**2 - 1
    grid = tokens.view(rows, columns, side, side).permute(0, 2, 1, 3).reshape(1, rows * side, columns * side)
    grid = unpad_image(grid, size)[0]
    lines = torch.cat([grid, torch.full((len(grid), 1), NEWLINE)], dim=1)
    expected = np.concatenate([np.arange(side**2), lines.flatten().numpy()])
    np.testing.assert_array_equal(rule.order(size, 14), expected)


def levels(array, processor):
    """Normalized f[... c h w] back to levels of 0 to 255, [... h w c]."""
    mean, std = (np.array(x).reshape(-1, 1, 1) for x in (processor.image_mean, processor.image_std))
    return np.moveaxis((np.asarray(array) * std + mean) * 255, -3, -1)


@pytest.mark.parametrize("size", SIZES[:2] + SIZES[-2:], ids=str)
def test_pixels_of_anyres(size):
    sides = {"shortest_edge": 336}, {"height": 336, "width": 336}
    processor, image = LlavaNextImageProcessorPil(size=sides[0], crop_size=sides[1]), make_image(*size)
    expected = levels(processor(image, return_tensors="np")["pixel_values"][0], processor)
    rule = AnyRes(tuple(map(tuple, processor.image_grid_pinpoints)), 336)
    found = np.stack(list(rule.images(image)))
    assert found.shape == expected.shape == (len(rule.sizes(size)), 336, 336, 3)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("size", [(480, 640), (1, 1), (2000, 90), (448, 448)], ids=str)
def test_pixels_of_tiles(size):
    processor = GotOcr2ImageProcessorPil(crop_to_patches=True, max_patches=5, size={"height": 64, "width": 64})
    image, rule = make_image(*size), Tiles(64, 1, 5)
    expected = levels(processor(image, return_tensors="np")["pixel_values"], processor)
    found = np.stack(list(rule.images(image)))
    assert found.shape == expected.shape == (len(rule.sizes(size)), 64, 64, 3)
    assert np.abs(found - expected).max() <= 1
    np.testing.assert_array_equal(rule.order(size, 16), np.arange(16 * len(found)))


def test_a_limit_of_pixels_makes_fewer_tiles():
    size = (1080, 1920)
    assert len(Tiles(448).within(3 * 448**2).sizes(size)) <= 3
    assert len(Tiles(448).within(1).sizes(size)) == 1
    assert len(AnyRes(PINPOINTS, 336).within(3 * 336**2).sizes(size)) == 3
    assert AnyRes(PINPOINTS, 336).within(1).pinpoints == (PINPOINTS[0],)


@pytest.mark.parametrize(
    "rule", [AnyRes(((32, 64), (64, 32), (64, 64)), 32), Tiles(32, 1, 4), Crop(32, (32, 32))], ids=str
)
def test_messages_become_tiles_under_a_budget(rule, tmp_path):
    """Odd images, and more of them than fit: the tokens in the text are those of the images that are there."""
    spec = ProcessorSpec(patch=8, temporal_patch=1, merge=1, num_prefix_tokens=1, rule=rule, on_a_grid=False)
    folder = tiny_chat.write_tokenizer(tmp_path)
    processor = Processor(Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder), spec)
    images = [Image.new("L", (1, 1)), Image.new("CMYK", (200, 90)), Image.new("RGBA", (60, 61))]
    turns = [{"role": "user", "content": [{"type": "image", "image": image} for image in images]}]
    for budget in (None, Budget(192, 2, 7 * 17), Budget(90, 1, 3 * 17)):
        try:
            example = processor(turns, generate=True, budget=budget)
        except TooLarge:
            assert budget.tokens == 90 and isinstance(rule, AnyRes)  # its smallest canvas has two tiles and the whole
            continue
        assert {image.patches.shape for image in example.images} == {(17, 192)}
        wanted = np.concatenate([rule.order((i.height, i.width), 8) for i in images]) if budget is None else None
        assert wanted is None or example.visual.sum() == len(wanted)
        assert example.vision_index.max() < 16 * len(example.images)
        collate([[example]], budget or smallest_budget([example]), merge=1, values=192)
    long = [{"type": "image", "image": Image.new("RGB", (20000, 3))}]
    with pytest.raises(ValueError, match="20000x3 has an aspect ratio over 200"):
        processor([{"role": "user", "content": long}])
