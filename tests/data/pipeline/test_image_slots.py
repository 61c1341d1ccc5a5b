"""A number of images per patch row, for connectors that give every image the same number of visual tokens."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from examples import END, IMAGE, START, VALUES, random_params, tiny_config
from tiny_run import load_config

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.loader import Info
from mllm_jax.data.pipeline.packing import Budget, Packer, TooLarge, collate, fill, place, smallest_budget
from mllm_jax.data.tools.inspection import Inspection
from mllm_jax.generate.buckets import pad_prompts
from mllm_jax.model.connectors.perceiver import PerceiverConfig
from mllm_jax.model.vlm import VLM
from mllm_jax.train.input.processors import chat_processor
from mllm_jax.train.runs.config import read_run
from mllm_jax.types import Example, ImagePatches

QUERIES = 3
CONFIG = tiny_config()
CONFIG = replace(
    CONFIG,
    encoder=replace(CONFIG.encoder, deepstack_layers=()),
    connector=PerceiverConfig(QUERIES, width=24, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=32),
)


def conversation(seed: int, *grids) -> Example:
    """Two tokens, and START, the queries and END of each image, then two more tokens."""
    rng = np.random.default_rng(seed)
    ids = [7, 8, *(token for _ in grids for token in (START, *[IMAGE] * QUERIES, END)), 9, 10]
    visual = np.array(ids) == IMAGE
    pixels = lambda h, w: rng.integers(0, 256, (h * w, VALUES), dtype=np.uint8)
    return Example(
        tokens=np.array(ids, np.int32),
        weight=np.ones(len(ids), np.float32),
        position=np.repeat(np.arange(len(ids), dtype=np.int32)[:, None], 3, axis=1),
        vision_index=np.where(visual, np.cumsum(visual) - 1, -1),
        images=tuple(ImagePatches(pixels(h, w), (h, w)) for h, w in grids),
    )


def test_places_respect_the_number_of_images():
    budget = Budget(8, 3, 100, images_per_row=2)
    places = place([10, 20, 30, 40, 50], budget)
    assert [row for row, _, _ in places] == [2, 1, 1, 0, 0] and [slot for _, _, slot in places] == [0, 1, 0, 1, 0]
    assert place([1] * 6, budget) is not None and place([1] * 7, budget) is None
    assert {row for row, _, _ in place([1] * 50, budget._replace(images_per_row=0))} == {0}


def test_visual_tokens_are_those_of_the_slots():
    rows = [[conversation(0, (2, 3), (4, 4)), conversation(1), conversation(2, (1, 5))], [], [conversation(3, (2, 2))]]
    budget = Budget(64, 2, 24, images_per_row=2)
    batch = collate(rows, budget, **CONFIG.layout)
    assert batch.vision.slots.shape == (3, 2, 2)
    of_visual = np.repeat(batch.vision.slots.reshape(3, -1), QUERIES, axis=1)  # image number of every visual token
    for row, examples in enumerate(rows):
        images = [image for example in examples for image in example.images]
        visual = batch.vision_index[row] >= 0
        numbers = of_visual[row][batch.vision_index[row][visual]]
        np.testing.assert_array_equal(numbers, np.repeat(np.arange(len(images)) + 1, QUERIES))
        for number, image in enumerate(images, 1):
            np.testing.assert_array_equal(batch.vision.patches[row][batch.vision.image[row] == number], image.patches)
    assert fill(batch)["images"] == 4 / 12
    assert "images" not in fill(collate(rows[1:2], budget, merge=1, values=VALUES))


def test_without_a_number_the_shape_is_that_of_the_fullest_row():
    examples = [conversation(0, (2, 2), (1, 1), (2, 1)), conversation(1)]
    budget = smallest_budget(examples)
    assert budget.images_per_row == 0
    assert collate([[e] for e in examples], budget, **CONFIG.layout).vision.slots.shape == (2, 2, 2)
    assert collate([[], []], Budget(8, 1, 4), **CONFIG.layout).vision.slots.shape == (2, 1, 1)


def test_too_many_images_do_not_fit():
    budget, many = Budget(64, 1, 100, images_per_row=2), conversation(0, (1, 1), (2, 2), (1, 2))
    with pytest.raises(TooLarge, match="do not fit"):
        Packer(budget).add(0, many)
    with pytest.raises(TooLarge, match="1 rows of 100 and 2 images"):
        collate([[many]], budget, **CONFIG.layout)


def test_conversations_of_one_row_do_not_see_each_other():
    """Packed in any way, padded to any bucket: the logits of each conversation alone."""
    examples = [conversation(0, (2, 3), (4, 4)), conversation(1, (1, 5)), conversation(2), conversation(3, (6, 1))]
    params = random_params(CONFIG)
    run = jax.jit(lambda batch: VLM(CONFIG).apply({"params": params}, batch).logits)

    def alone(example):
        return np.asarray(run(collate([[example]], smallest_budget([example]), **CONFIG.layout)))[0]

    expected = np.concatenate([alone(example) for example in examples])
    for budget in (Budget(64, 2, 24, 2), Budget(64, 1, 40, 4), Budget(64, 4, 16, 3)):
        batch = collate([examples, []], budget, **CONFIG.layout)
        np.testing.assert_allclose(np.asarray(run(batch))[0, : len(expected)], expected, atol=2e-5)
    padded = pad_prompts(collate([[e] for e in examples], smallest_budget(examples), **CONFIG.layout), 1, QUERIES)
    logits = np.asarray(run(padded))
    for row, example in enumerate(examples):
        np.testing.assert_allclose(logits[row, : len(example.tokens)], alone(example), atol=2e-5)


def test_a_run_trains_on_them():
    """The examples of a processor have the queries of every image and frame of a video."""
    config = load_config("compose", "siglip,perceiver,llama")
    run = read_run(config)
    processor, queries = chat_processor(run.processor, run.model, run.data), run.model.queries
    source, budget = run.data.source("train"), run.data.budget
    examples = [processor.example(source[number], budget) for number in range(12)]
    assert any(len(example.images) > 1 for example in examples)
    seen = Inspection(processor, rows=2, samples=2)
    batch = processor.collate([[example] for example in examples], budget)
    seen.add(batch, Info(12, 0, 0, fill(batch), [[""]] * 12, 0, {}))
    assert seen.images == [len(example.images) for example in examples]
    assert seen.visual == [queries * images for images in seen.images]
    for example in examples:
        assert np.sum(example.vision_index >= 0) == queries * len(example.images)
    config.data.images_per_row = 0
    with pytest.raises(ConfigError, match="config.data.images_per_row=0: config.model.connector has 25 queries"):
        read_run(config)
    config.data.images_per_row = 1
    small = read_run(config).data.budget
    with pytest.raises(TooLarge, match="2 rows of 40 patches and 1 images"):
        processor(_with_images(3), budget=small)


def _with_images(count: int):
    image = {"type": "image", "image": np.zeros((16, 16, 3), np.uint8)}
    return [{"role": "user", "content": [*[image] * count, {"type": "text", "text": "?"}]}]
