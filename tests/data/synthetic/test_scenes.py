"""Scenes: deterministic, disjoint, true to their images, and cheap to tokenize."""

import json
import pickle
import re

import jinja2
import numpy as np
import pytest

from mllm_jax.data.synthetic.scenes import (
    COLORS,
    KINDS,
    SCENES_TEMPLATE,
    Scene,
    Scenes,
    Thing,
    chance,
    is_held_out,
    scenes_tokenizer,
)

EVERY_KIND = dict.fromkeys(KINDS, 1.0)


def pixels(item) -> np.ndarray | None:
    """The image or video of an item as an array."""
    content = item["messages"][0]["content"]
    return None if content[0]["type"] == "text" else np.asarray(content[0][content[0]["type"]])


def ask(item) -> tuple[str, str]:
    return item["messages"][0]["content"][-1]["text"], item["messages"][1]["content"]


def mask(image: np.ndarray, color: str) -> np.ndarray:
    return np.abs(image.astype(int) - COLORS[color]).max(-1) < 25


def test_items_depend_on_nothing_but_seed_split_and_index():
    scenes = Scenes("train", 3, EVERY_KIND)
    again = pickle.loads(pickle.dumps(Scenes("train", 3, EVERY_KIND)))
    for i in (40, 7, 7, 0, 40):
        np.testing.assert_array_equal(pixels(scenes[i]), pixels(again[i]))
        assert ask(scenes[i]) == ask(again[i]) and scenes[i]["id"] == again[i]["id"]
    assert any(not np.array_equal(pixels(scenes[i]), pixels(Scenes("train", 4, EVERY_KIND)[i])) for i in range(3))


def test_splits_are_disjoint(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "mllm_jax.data.synthetic.scenes._render", lambda scene, *_: drawn.append(scene) or np.zeros((8, 8, 3), "u1")
    )
    shown = {}
    for split in ("train", "heldout"):
        drawn.clear()
        for seed in (0, 1):
            scenes = Scenes(split, seed, {"color": 1, "movement": 1}, max_cells=3)
            for i in range(1000):
                scenes[i]
        shown[split] = {(s.height, s.width, tuple(sorted(s.things)), s.step) for s in drawn}
    assert min(map(len, shown.values())) > 1000 and not shown["train"] & shown["heldout"]


def test_order_of_drawing_does_not_move_a_image_to_the_other_split():
    a, b = Thing("square", "red", 1, 2, 10), Thing("circle", "blue", 40, 30, 9)
    assert is_held_out(Scene(64, 64, (a, b))) == is_held_out(Scene(64, 64, (b, a)))


def test_images_show_what_the_answers_say():
    scenes = Scenes("train", 1, EVERY_KIND)
    seen = set()
    for i in range(400):
        item = scenes[i]
        image, (question, answer), kind = pixels(item), ask(item), item["kind"]
        assert image.dtype == np.uint8 and image.shape[-1] == 3 and image.shape[-2] % 16 == 0
        seen.add(kind)
        if kind == "color":
            assert mask(image, answer).sum() > 80
        elif kind == "presence":
            color = question.removeprefix("Any ").removesuffix("?")
            assert (mask(image, color).sum() > 15) == (answer == "yes")
        elif kind == "place":
            dark = np.argwhere(np.any([mask(image, c) for c in COLORS], axis=0)).mean(0)
            y, x = dark / image.shape[:2] - 0.5
            along = {"left": -x, "right": x, "top": -y, "bottom": y}
            assert along[answer] > max(along.values()) - 0.12  # a triangle's mass lies below the center of its box
        elif kind == "movement":
            assert image.shape == (4, 48, 64, 3)
            np.testing.assert_array_equal(image[0], image[1])
            np.testing.assert_array_equal(image[2], image[3])
            dark = [np.argwhere(np.any([mask(image[t], c) for c in COLORS], axis=0)).mean(0) for t in (0, 2)]
            dy, dx = dark[1] - dark[0]
            along = {"left": -dx, "right": dx, "up": -dy, "down": dy}
            assert answer == max(along, key=along.get)
        elif kind == "point":
            color = question.split()[-2]
            x0, y0, x1, y1 = json.loads(answer)["bbox_2d"]
            h, w = image.shape[:2]
            ys, xs = np.nonzero(mask(image, color))
            assert 0 <= min(x0, y0) and max(x1, y1) <= 1000 and len(ys) > 50
            found = {(y, x) for y, x in zip(ys * 1000 / h, xs * 1000 / w) if x0 <= x <= x1 and y0 <= y <= y1}
            assert len(found) > 50
        elif kind == "caption":
            named = {thing.split()[0] for thing in answer.split(", ")}
            assert named == {color for color in COLORS if mask(image, color).sum() > 15}
    assert seen == set(KINDS)


def test_shares_sizes_and_answers():
    scenes = Scenes("heldout", 0, {"count": 3.0, "shape": 1.0}, size=800)
    items = [scenes[i] for i in range(len(scenes))]
    counts = [ask(item)[1] for item in items if item["kind"] == "count"]
    assert 0.7 < len(counts) / 800 < 0.8
    assert set(counts) == set("12345") and max(counts.count(c) for c in "12345") / len(counts) < chance("count") + 0.07
    assert {pixels(item).shape[:2] for item in items} == {(16 * h, 16 * w) for h in (3, 4, 5) for w in (3, 4, 5)}
    with pytest.raises(IndexError):
        scenes[800]


def test_large_images_and_other_cells():
    scenes = Scenes("train", 0, EVERY_KIND, cell=32, min_cells=3, max_cells=20, size=80)
    sides = [pixels(item).shape[-3:-1] for item in map(scenes.__getitem__, range(80))]
    assert all(h % 32 == w % 32 == 0 for h, w in sides)
    assert max(max(s) for s in sides) > 500 and max(max(h, w) / min(h, w) for h, w in sides) > 3


def test_text_only_baseline_keeps_questions_and_answers():
    blind, seeing = Scenes(images=False), Scenes()
    for i in range(20):
        assert pixels(blind[i]) is None and ask(blind[i]) == ask(seeing[i])


@pytest.mark.parametrize("options", [{"split": "test"}, {"kinds": {"smell": 1}}, {"min_cells": 6}, {"min_cells": 1}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=str(next(iter(options)))[:4]):
        Scenes(**options)


def test_tokenizer_spells_everything_and_is_short():
    tokenizer = scenes_tokenizer()
    assert tokenizer.get_vocab_size() <= 512
    for special in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"):
        assert tokenizer.token_to_id(f"<|{special}|>") is not None
    for text in ["Any red?", "Größe  \n\n 日本語 🙂", "<0.2 seconds>", '{"bbox_2d": [1, 20, 300, 1000]}', " a\tb ", ""]:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    scenes = Scenes("train", 0, EVERY_KIND)
    for i in range(200):
        item = scenes[i]
        question, answer = ask(item)
        assert len(tokenizer.encode(question).ids) <= (7 if item["kind"] == "point" else 3), question
        assert len(tokenizer.encode(answer).ids) == 1 or item["kind"] in ("point", "caption"), answer
    assert len(tokenizer.encode("<0.2 seconds>").ids) == 5
    assert tokenizer.encode("Any red?").ids[1] == tokenizer.encode("red").ids[0]


def test_template_is_chat_ml():
    render = jinja2.Environment().from_string(SCENES_TEMPLATE).render
    user = {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Where?"}]}
    vision = "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
    expected = f"<|im_start|>user\n{vision}Where?<|im_end|>"
    assert render(messages=[user]) == expected
    assert render(messages=[user], add_generation_prompt=True) == expected + "<|im_start|>assistant\n"
    full = render(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "left"}])
    assert re.fullmatch(r"<\|im_start\|>user\nHi<\|im_end\|><\|im_start\|>assistant\nleft<\|im_end\|>", full)
