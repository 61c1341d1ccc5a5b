"""`scenes`: questions about images and videos that are drawn on the fly from a seed.

An embedded default, so that training, evaluation and generation run anywhere without a download. It is not a benchmark:
a small model learns the easy kinds from random weights in minutes, and its scores tell nothing about photographs.
Train and held-out splits are disjoint by construction: a hash of an image's content (its size, every object in it, its
movement; not the shade of its background, its noise or the question) selects the split.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

COLORS = {
    "red": (200, 40, 40),
    "blue": (40, 70, 200),
    "green": (30, 140, 60),
    "black": (20, 20, 20),
    "purple": (140, 50, 160),
    "orange": (220, 130, 20),
}
SHAPES = ("square", "circle", "triangle")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WORDS = tuple(
    "cat dog sun map cup hat box key pen car bus egg fish bird tree star moon milk rice door book lamp road ship "
    "rain snow wind fire leaf rose king gold iron salt corn bear wolf lion frog duck".split()
)
LARGE, SMALL = (16 / 16, 26 / 16), (9 / 16, 13 / 16)  # [low, high) sides of things, in cells
NOISE = 4.0  # standard deviation, in levels of 255
HELD_OUT = 8  # one in this many images belongs to the held-out split
DEFAULT_KINDS = {"color": 0.06, "shape": 0.22, "place": 0.12, "count": 0.2, "presence": 0.28, "movement": 0.12}
SCENES = "scenes"  # names the processor of the embedded set in `config.processor`
SCENES_TEMPLATE = (Path(__file__).parent / "scenes.jinja").read_text(encoding="utf-8")


class Thing(NamedTuple):
    shape: str  # one of SHAPES, or a word to be written
    color: str
    x: int  # left edge, pixels
    y: int  # top edge
    size: int  # side; of a word: the font's size


class Scene(NamedTuple):
    """Content of an image before it is drawn. All in pixels."""

    height: int
    width: int
    things: tuple[Thing, ...]
    step: tuple[int, int] | None = None  # (x, y) from the first frame of a video to the second; None = a still image


class Question(NamedTuple):
    scene: Scene
    text: str
    answer: str


class Scenes:
    """A random-access set of drawn conversations: item i is a pure function of the options, seed, split and i.

    An item is {"messages": [user, assistant], "kind": str, "id": str}. The user's message holds a PIL image or a video
    u8[4 h w 3]: two drawn frames, each twice, so that each becomes one temporal patch of two frames.

    Args:
        split: "train" or "heldout".
        seed: another seed gives other images of the same split.
        kinds: share of each kind of question, out of `KINDS`; shares are normalized.
        size: number of conversations.
        cell: side in pixels of a square of the grid that image sides are multiples of: best one visual token.
        min_cells, max_cells: range of both sides of a still image, in cells. Larger images also show larger things.
        images: False leaves the images out, for a text-only baseline.

    Raises ValueError for an unknown split or kind, or a range of sizes that is empty.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        kinds: Mapping[str, float] = DEFAULT_KINDS,
        *,
        size: int = 1_000_000,
        cell: int = 16,
        min_cells: int = 3,
        max_cells: int = 5,
        images: bool = True,
    ):
        if split not in ("train", "heldout"):
            raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"unknown kinds {sorted(unknown)}, the known ones are {sorted(KINDS)}")
        if not 3 <= min_cells <= max_cells:
            raise ValueError(f"need 3 <= min_cells <= max_cells, got {min_cells} and {max_cells}")
        self.split, self.seed, self.size, self.images = split, seed, size, images
        self.cell, self.min_cells, self.max_cells = cell, min_cells, max_cells
        self._kinds, self._shares = list(kinds), list(kinds.values())

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        name = f"scenes/{self.split}/{self.seed}/{index}"
        r = Random(name)
        kind = r.choices(self._kinds, self._shares)[0]
        while True:
            height, width = (self.cell * r.randint(self.min_cells, self.max_cells) for _ in range(2))
            question = KINDS[kind].draw(r, height, width, self.cell)
            if question and is_held_out(question.scene) == (self.split == "heldout"):
                break
        content = [self._image(r, question.scene)] if self.images else []
        user = {"role": "user", "content": [*content, {"type": "text", "text": question.text}]}
        return {"messages": [user, {"role": "assistant", "content": question.answer}], "kind": kind, "id": name}

    def _image(self, r: Random, scene: Scene) -> dict[str, Any]:
        light = r.uniform(170, 230)
        background = tuple(int(light + r.uniform(-8, 8)) for _ in range(3))
        noise = np.random.Generator(np.random.SFC64(r.getrandbits(64)))
        steps = [(0, 0)] if scene.step is None else [(0, 0), scene.step]
        frames = [_render(scene, background, step, noise) for step in steps]
        if scene.step is None:
            return {"type": "image", "image": Image.fromarray(frames[0])}
        return {"type": "video", "video": np.repeat(np.stack(frames), 2, axis=0), "fps": 2.0}


def is_held_out(scene: Scene) -> bool:
    """Returns whether the content of this image belongs to the held-out split."""
    things = sorted(map(tuple, scene.things))  # the order of drawing does not show
    return zlib.crc32(repr((scene.height, scene.width, things, scene.step)).encode()) % HELD_OUT == 0


def chance(kind: str) -> float:
    """Share of right answers of a guess among the possible answers to this kind of question."""
    return KINDS[kind].chance


_font = lru_cache(ImageFont.load_default)


def _render(scene: Scene, background: tuple[int, ...], step: tuple[int, int], noise: np.random.Generator) -> np.ndarray:
    image = Image.new("RGB", (scene.width, scene.height), background)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        color, size = COLORS[thing.color], thing.size
        x, y = thing.x + step[0], thing.y + step[1]
        if thing.shape == "square":
            pen.rectangle((x, y, x + size, y + size), fill=color)
        elif thing.shape == "circle":
            pen.ellipse((x, y, x + size, y + size), fill=color)
        elif thing.shape == "triangle":
            pen.polygon([(x + size // 2, y), (x + size, y + size), (x, y + size)], fill=color)
        else:
            pen.text((x, y), thing.shape, fill=color, font=_font(size), anchor="lt")
    pixels = np.asarray(image, np.float32)
    return np.clip(pixels + NOISE * noise.standard_normal(pixels.shape, np.float32), 0, 255).astype(np.uint8)


def _scale(r: Random, height: int, width: int, cell: int) -> float:
    """Size of objects relative to that in an image of at most 5 x 5 cells."""
    return r.uniform(1, max(1, min(height, width) / (5 * cell)))


def _things(r: Random, height: int, width: int, cell: int, sides: tuple[float, float], count: int) -> tuple[Thing, ...]:
    """Up to `count` things that neither touch nor leave the image: fewer where no free place is found."""
    unit = cell * _scale(r, height, width, cell)
    things: list[Thing] = []
    for _ in range(count):
        for _attempt in range(30):
            size = r.randrange(int(sides[0] * unit), int(sides[1] * unit))
            x, y = r.randrange(width - size), r.randrange(height - size)
            gap = int(sides[1] * unit) + 2
            if all(abs(x - other.x) > gap or abs(y - other.y) > gap for other in things):
                things.append(Thing(r.choice(SHAPES), r.choice(list(COLORS)), x, y, size))
                break
    return tuple(things)


def _color(r: Random, height: int, width: int, cell: int) -> Question:
    scene = Scene(height, width, _things(r, height, width, cell, LARGE, 1))
    return Question(scene, "What color?", scene.things[0].color)


def _shape(r: Random, height: int, width: int, cell: int) -> Question:
    scene = Scene(height, width, _things(r, height, width, cell, LARGE, 1))
    return Question(scene, "What shape?", scene.things[0].shape)


def _place(r: Random, height: int, width: int, cell: int) -> Question | None:
    scene = Scene(height, width, _things(r, height, width, cell, LARGE, 1))
    thing = scene.things[0]
    x, y = (thing.x + thing.size / 2) / width - 0.5, (thing.y + thing.size / 2) / height - 0.5
    if abs(abs(x) - abs(y)) < 0.05:  # ambiguous
        return None
    horizontal, vertical = ("left" if x < 0 else "right"), ("top" if y < 0 else "bottom")
    return Question(scene, "Where?", horizontal if abs(x) > abs(y) else vertical)


def _count(r: Random, height: int, width: int, cell: int) -> Question:
    scene = Scene(height, width, _things(r, height, width, cell, SMALL, r.randint(1, 5)))
    return Question(scene, "How many?", str(len(scene.things)))


def _presence(r: Random, height: int, width: int, cell: int) -> Question:
    scene = Scene(height, width, _things(r, height, width, cell, SMALL, r.randint(1, 3)))
    present = sorted({thing.color for thing in scene.things})
    yes = r.random() < 0.5
    color = r.choice(present if yes else [c for c in COLORS if c not in present])
    return Question(scene, f"Any {color}?", "yes" if yes else "no")


def _movement(r: Random, height: int, width: int, cell: int) -> Question:
    height, width = 3 * cell, 4 * cell  # one size for all videos: questions ask about movement, not places
    size, step = r.randrange(cell, cell * 22 // 16), r.randrange(cell * 10 // 16, cell * 20 // 16)
    answer = r.choice(list(MOVES))
    dx, dy = (step * d for d in MOVES[answer])
    x = r.randrange(max(0, -dx), width - size - max(0, dx))
    y = r.randrange(max(0, -dy), height - size - max(0, dy))
    thing = Thing(r.choice(SHAPES), r.choice(list(COLORS)), x, y, size)
    return Question(Scene(height, width, (thing,), (dx, dy)), "Which way?", answer)


def _word(r: Random, height: int, width: int, cell: int) -> Question:
    word = r.choice(WORDS)
    size = int(r.randint(12, 14) * _scale(r, height, width, cell) * cell / 16)
    _, _, w, h = _font(size).getbbox(word, anchor="lt")
    x, y = r.randrange(max(1, width - int(w))), r.randrange(max(1, height - int(h)))
    return Question(Scene(height, width, (Thing(word, r.choice(list(COLORS)), x, y, size),)), "What word?", word)


def _point(r: Random, height: int, width: int, cell: int) -> Question | None:
    scene = Scene(height, width, _things(r, height, width, cell, LARGE, r.randint(1, 3)))
    thing = scene.things[0]
    if any(other[:2] == thing[:2] for other in scene.things[1:]):
        return None
    edges = (thing.x, thing.y, thing.x + thing.size, thing.y + thing.size)
    box = [round(1000 * edge / side) for edge, side in zip(edges, (width, height, width, height))]
    return Question(scene, f"Box of the {thing.color} {thing.shape}?", json.dumps({"bbox_2d": box}))


def _caption(r: Random, height: int, width: int, cell: int) -> Question:
    scene = Scene(height, width, _things(r, height, width, cell, SMALL, r.randint(1, 4)))
    order = sorted(scene.things, key=lambda thing: (thing.y // cell, thing.x))
    return Question(scene, "What?", ", ".join(f"{thing.color} {thing.shape}" for thing in order))


class Kind(NamedTuple):
    draw: Callable[[Random, int, int, int], Question | None]  # (random, height, width, cell); None = draw again
    chance: float


KINDS = {
    "color": Kind(_color, 1 / len(COLORS)),
    "shape": Kind(_shape, 1 / len(SHAPES)),
    "place": Kind(_place, 1 / 4),
    "count": Kind(_count, 1 / 5),
    "presence": Kind(_presence, 1 / 2),
    "movement": Kind(_movement, 1 / len(MOVES)),
    "word": Kind(_word, 1 / len(WORDS)),
    "point": Kind(_point, 0.0),
    "caption": Kind(_caption, 0.0),
}


def scenes_pair_tokenizer() -> Tokenizer:
    """The tokenizer of `scenes` for single texts: each ends in <|im_end|>."""
    tokenizer, end = scenes_tokenizer(), "<|im_end|>"
    special = [(end, tokenizer.token_to_id(end))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=special)
    return tokenizer


def scenes_tokenizer() -> Tokenizer:
    """A tokenizer of under 512 pieces: each word of `scenes` is one token, any other text falls back to its bytes.

    Pieces carry the blank that follows them, so that a color at the end of a question is the same token as an answer.
    """
    specials = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    asked = "What Where How many Any Which way Box of the color shape word seconds bbox top bottom yes no".split()
    words = [*asked, *COLORS, *SHAPES, *MOVES]
    marks = ["user\n", "assistant\n", "system\n", " seconds>", '{"', '": ', ", ", "]}"]
    pieces = [*words, *(word + " " for word in words), *WORDS, *marks]
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = ["".join(part for part, _ in to_letters.pre_tokenize_str(piece)) for piece in pieces]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *spelled])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    split = Regex(r" seconds>|\p{N}|\p{L}+[ \n]?|[^\p{L}\p{N}\s]+ ?|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), to_letters])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<|{name}|>" for name in specials])
    return tokenizer


def scenes_vision_ids() -> list[int]:
    """The ids of <|image_pad|>, <|video_pad|>, <|vision_start|> and <|vision_end|> in `scenes_tokenizer`."""
    tokenizer = scenes_tokenizer()
    return [tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")]
