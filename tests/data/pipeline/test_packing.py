"""Packing: every conversation exactly once, budgets kept, images contiguous, no leak between neighbors."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_examples import MERGE, VALUES, conversation

from mllm_jax.data.pipeline import packing as pack_module
from mllm_jax.data.pipeline.packing import Budget, Packer, TooLarge, collate, fill, place


def pack(examples, budget, window=2.0):
    packer, rows = Packer(budget, window), []
    for key, example in enumerate(examples):
        packer.add(key, example)
        while packer.ready:
            rows.append(packer.take())
    while len(packer):
        rows.append(packer.take())
    return rows


def check_row(batch, b, examples):
    """Row `b` of `batch` equals its conversations one by one, whatever shares the row."""
    start = 0
    for number, e in enumerate(examples, 1):
        n = len(e.tokens)
        where = np.flatnonzero(batch.segment[b] == number)
        assert where.tolist() == list(range(start, start + n))
        np.testing.assert_array_equal(batch.tokens[b, where], e.tokens)
        np.testing.assert_array_equal(batch.position[b, where], e.position)
        np.testing.assert_array_equal(batch.targets[b, where][:-1], e.tokens[1:])
        np.testing.assert_array_equal(batch.weight[b, where][:-1], e.weight[1:])
        assert n == 0 or (batch.weight[b, where][-1] == 0 and batch.targets[b, where][-1] == 0)
        np.testing.assert_array_equal(batch.vision_index[b, where] >= 0, e.visual)
        if e.images:  # the visual tokens point at the patches of this conversation's images, in order
            blocks = batch.vision.patches[b].reshape(-1, MERGE**2, VALUES)[batch.vision_index[b, where][e.visual]]
            np.testing.assert_array_equal(blocks.reshape(-1, VALUES), np.concatenate([p.patches for p in e.images]))
        start += n
    assert not batch.segment[b, start:].any() and not batch.weight[b, start:].any()
    assert (batch.vision_index[b, start:] == -1).all()
    if batch.vision is None:
        return
    image = batch.vision.image[b]
    images = [p for e in examples for p in e.images]
    assert set(image[image > 0].tolist()) == set(range(1, len(images) + 1))
    for number, p in enumerate(images, 1):
        rows, offsets = np.nonzero(image == number)
        assert len(set(rows.tolist())) == 1 and offsets.tolist() == list(range(offsets[0], offsets[0] + len(p.patches)))
        assert (batch.vision.grid[b][image == number] == p.grid).all()
        coords = batch.vision.coords[b][image == number]
        assert (coords[:, 0] == p.time).all()
        assert {tuple(c) for c in coords[:, 1:]} == {(y, x) for y in range(p.grid[0]) for x in range(p.grid[1])}
        blocks = coords[:, 1:].reshape(-1, MERGE**2, 2) // MERGE  # consecutive patches make one visual token
        assert (blocks == blocks[:, :1]).all()
    assert (batch.vision.grid[b][image == 0] == 1).all() and not batch.vision.patches[b][image == 0].any()


grids = st.lists(st.tuples(st.sampled_from([2, 4, 6]), st.sampled_from([2, 4])), max_size=4)
conversations = st.lists(st.builds(conversation, st.integers(1, 20), grids, st.integers(0, 99)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(conversations, st.sampled_from([0.3, 1.0, 3.0]))
def test_every_conversation_in_one_row_and_intact(examples, window):
    budget = Budget(48, 3, 32)
    placed = lambda e: place([len(p.patches) for p in e.images], budget) is not None
    fits = [e for e in examples if placed(e) and len(e.tokens) <= budget.tokens]
    rows = pack(fits, budget, window)
    assert sorted(key for row in rows for key, _ in row) == list(range(len(fits)))
    batch = collate([[e for _, e in row] for row in rows], budget, merge=MERGE, values=VALUES)  # raises over budget
    assert batch.tokens.shape == (len(rows), 48) and batch.vision.patches.shape == (len(rows), 3, 32, VALUES)
    for b, row in enumerate(rows):
        check_row(batch, b, [e for _, e in row])


@pytest.mark.parametrize(
    "examples",
    [
        [],
        [conversation(9)],
        [conversation(0, [(2, 2)])],
        [conversation(5, [(16, 16)])],
        [conversation(1, [(2, 2)] * 40), conversation(3)],
        [conversation(2, [(2, 8), (16, 2)]), conversation(1), conversation(4, [(4, 4)])],
    ],
    ids=["nothing", "no image", "image only", "one image fills a patch row", "forty small", "mixed"],
)
def test_corner_cases(examples):
    batch = collate([examples, []], Budget(80, 2, 256), merge=MERGE, values=VALUES)
    check_row(batch, 0, examples)
    check_row(batch, 1, [])


def test_shapes_and_dtypes_do_not_depend_on_the_content():
    budget = Budget(80, 2, 256)
    plain = collate([[conversation(9)]], budget, merge=MERGE, values=VALUES)
    full = collate([[conversation(5, [(16, 16)])]], budget, merge=MERGE, values=VALUES)
    describe = lambda batch: [(x.shape, x.dtype) for x in jax.tree.leaves(batch)]
    assert describe(plain) == describe(full)
    assert plain.vision.patches.dtype == np.uint8


def test_normalized_images_stay_float():
    budget = Budget(80, 1, 64)
    example = conversation(3, [(2, 2)], dtype=np.float32)
    assert collate([[example]], budget, merge=MERGE, values=VALUES).vision.patches.dtype == np.float32
    with pytest.raises(ValueError, match="share a dtype"):
        collate([[example, conversation(3, [(2, 2)])]], budget, merge=MERGE, values=VALUES)


def test_batch_without_image_budget():
    batch = collate([[conversation(3)]], Budget(8), merge=MERGE, values=VALUES)
    assert batch.vision is None and fill(batch) == {"tokens": 3 / 8, "patches": 1.0}
    with pytest.raises(TooLarge, match="do not fit 0 rows"):
        collate([[conversation(3, [(2, 2)])]], Budget(8), merge=MERGE, values=VALUES)


def test_errors_name_the_thing():
    with pytest.raises(TooLarge, match="9 tokens"):
        Packer(Budget(8)).add(0, conversation(9))
    with pytest.raises(TooLarge, match="256"):
        Packer(Budget(99, 4, 64)).add(0, conversation(1, [(16, 16)]))
    with pytest.raises(TooLarge, match="18 tokens"):
        collate([[conversation(9), conversation(9)]], Budget(16), merge=MERGE, values=VALUES)
    with pytest.raises(ValueError, match="visual token 3, but the images have 0"):
        collate([[conversation(3, [(4, 4)])._replace(images=())]], Budget(16, 1, 16), merge=MERGE, values=VALUES)
    with pytest.raises(ValueError, match="multiple of merge"):
        collate([], Budget(16, 1, 18), merge=MERGE, values=VALUES)


def test_waiting_keys_restore_the_packer():
    rng = np.random.default_rng(3)
    examples = [conversation(int(rng.integers(1, 20)), [(4, 4)] * int(rng.integers(0, 3)), i) for i in range(80)]
    budget = Budget(48, 1, 64)
    keys = lambda rows: [[key for key, _ in row] for row in rows]
    straight = keys(pack(examples, budget))
    for stop in (1, 3, len(straight) - 2):
        packer, seen, rows = Packer(budget, 2.0), 0, []
        while len(rows) < stop:
            while not packer.ready:
                packer.add(seen, examples[seen])
                seen += 1
            rows.append(packer.take())
        restored = Packer(budget, 2.0)
        for key in packer.waiting:
            restored.add(key, examples[key])
        for key in range(seen, len(examples)):
            restored.add(key, examples[key])
            while restored.ready:
                rows.append(restored.take())
        while len(restored):
            rows.append(restored.take())
        assert keys(rows) == straight


def test_a_mixed_set_fills_both_budgets():
    """Texts and images of very different sizes; budgets in the proportion of the set, with 7 % room for patches."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(1500):
        count = rng.choice([0, 1, 1, 1, int(rng.integers(2, 9))])
        grids = [tuple(2 * int(s) for s in np.clip(rng.lognormal(1.3, 0.4, 2), 1, 8)) for _ in range(count)]
        examples.append(conversation(int(np.clip(rng.lognormal(4, 0.8), 10, 500)), grids))
    tokens = sum(len(e.tokens) for e in examples)
    patches = sum(len(p.patches) for e in examples for p in e.images)
    budget = Budget(2048, 2, int(1.07 * 1024 * patches / tokens) // 4 * 4)
    rows = [[e for _, e in row] for row in pack(examples, budget, window=4.0)][:-5]  # the end of a set cannot be full
    share = fill(collate(rows, budget, merge=MERGE, values=VALUES))
    assert share["tokens"] >= 0.98 and share["patches"] >= 0.90, share


def test_rows_cost_about_the_same(monkeypatch):
    """With large images beside many small ones, the spread of costs falls by a third and rows stay full."""
    rng, examples = np.random.default_rng(0), []
    for _ in range(800):
        grids = rng.choice([2, 4, 8, 16], size=(rng.integers(0, 4), 2), p=[0.4, 0.3, 0.2, 0.1])
        examples.append(conversation(int(np.clip(rng.lognormal(3, 0.7), 8, 200)), [tuple(s) for s in grids.tolist()]))
    budget, found = Budget(512, 4, 256), {}
    for balance in (0.0, pack_module.BALANCE):
        monkeypatch.setattr(pack_module, "BALANCE", balance)
        rows = [[e for _, e in row] for row in pack(examples, budget, window=4.0)][:-5]
        costs = np.array([sum(map(pack_module.attention_cost, row)) for row in rows])
        tokens = sum(len(e.tokens) for row in rows for e in row) / len(rows) / budget.tokens
        found[balance] = costs.std() / costs.mean(), tokens
    (before, _), (after, full) = found.values()
    assert after < 0.67 * before and full >= 0.98, found


def test_no_conversation_starves():
    packer = Packer(Budget(100), window=2.0)
    packer.add(0, conversation(60))  # never the best companion of 50s
    for key in range(1, 6):
        packer.add(key, conversation(50))
    assert packer.take()[0][0] == 0
