"""Settings of a model's input, and the files of Hugging Face's processors that contain them."""

import dataclasses
import math
import pathlib
from typing import Annotated, Any

from mllm_jax.common.fields import (
    Field,
    FieldError,
    count,
    flag,
    inside,
    listed,
    number,
    only,
    positive,
    read,
    section,
    word,
)
from mllm_jax.common.settings import (
    Config,
    Finite,
    Fraction,
    Int,
    NonNegative,
    NonNegativeInt,
    OneOf,
    Positive,
    PositiveInt,
)
from mllm_jax.data.records.grounding import QWEN3_VL, Grounding
from mllm_jax.data.text.json_files import read_json, write_json
from mllm_jax.data.video.videos import EVEN, SAMPLINGS
from mllm_jax.data.vision.resize import Rule, Whole, rule_from_hf
from mllm_jax.data.vision.tiles import AnyRes, Tiles


@dataclasses.dataclass(frozen=True)
class ProcessorSpec(Config):
    """Settings of a model's input. The defaults are those published with Qwen3-VL.

    A text-only model has None for the tokens of vision; `end_of_turn` None is the tokenizer's end of text.
    """

    patch: PositiveInt = 16  # side in pixels
    temporal_patch: PositiveInt = 2  # frames
    merge: PositiveInt = 2  # a visual token is merge x merge patches
    queries: NonNegativeInt = 0  # visual tokens of every image; 0 = as many as it has squares of merge x merge patches
    num_prefix_tokens: NonNegativeInt = 0  # empty patches before an image's own
    shown: NonNegativeInt = 0  # visual tokens that represent these places: all of them, or 0
    instruction_positions: NonNegativeInt = 0  # tokens of the text that the connector may read with an image; 0 = none
    rule: Rule | None = None  # how images get their sizes, or are cut (tiles.py); None = nearly as they are
    video_rule: Whole | None = None  # how each frame of a video does, all in one block; None = nearly as they are
    min_pixels: PositiveInt = 65536  # of an image, without another rule
    max_pixels: PositiveInt = 16777216
    missing_rows: Fraction = 0.0  # largest share of its rows that a truncated JPEG may lack
    video_min_pixels: PositiveInt = 4096  # of all frames of a video together, or of each if a video is one block
    video_max_pixels: PositiveInt = 25165824
    fps: Positive = 2.0  # at which videos are sampled
    sampling: Annotated[str, OneOf(SAMPLINGS)] = EVEN  # of `video.SAMPLINGS`: how the frames are spread
    min_frames: PositiveInt = 4
    max_frames: PositiveInt = 768
    label: str | None = "<{seconds:.1f} seconds>"  # before every temporal patch of a video; None = a video is one block
    between: str = ""  # text between the frames of a video
    frame_token: str | None = None  # after the label of each; None = the video token
    position_rate: NonNegative = 0.0  # rotary positions per second in such a block; 0 = one per temporal patch
    on_a_grid: bool = True  # rotary positions of rows and columns; or else visual tokens are counted like text
    brackets: bool = False  # the chat template leaves out those around an image
    mean: tuple[Finite, ...] = (0.5, 0.5, 0.5)  # the model reads (u8 / 255 - mean) / std
    std: tuple[Positive, ...] = (0.5, 0.5, 0.5)
    image_token: str | None = "<|image_pad|>"
    image_id: Int | None = None  # its id, if no vocabulary has it
    video_token: str | None = "<|video_pad|>"
    vision_start: str | None = "<|vision_start|>"
    vision_end: str | None = "<|vision_end|>"
    end_of_turn: str | None = "<|im_end|>"
    prefix: bool = False  # all tokens attend to the tokens before the answer
    mixes: bool = False  # grids of visual tokens are resampled
    framed: bool = False  # the tokens that the tokenizer adds before a text also precede chats
    user_content_tokens: bool = False  # tokens as <think> are read in texts of users, as in answers
    grounding: Grounding | None = QWEN3_VL  # format of boxes and points. None: there is no published one
    template: str | None = None  # chat template in jinja2, for folders without a file of it
    processor_class: str = "Qwen3VLProcessor"  # names in Hugging Face's files
    image_processor_type: str = "Qwen2VLImageProcessor"
    video_processor_type: str | None = "Qwen3VLVideoProcessor"

    def __post_init__(self):
        super().__post_init__()
        if not self.min_frames <= self.max_frames:
            raise ValueError(f"min_frames={self.min_frames} must not be more than max_frames={self.max_frames}")

    def asked(self, item: dict[str, Any]) -> "ProcessorSpec":
        """The spec with a video's own settings in a message: number of frames and their distribution."""
        frames = {} if item.get("nframes") is None else dict.fromkeys(("min_frames", "max_frames"), item["nframes"])
        spread = {"sampling": item["sampling"]} if item.get("sampling") else {}
        return dataclasses.replace(self, **frames, **spread)

    @property
    def factor(self) -> int:
        """Side of a visual token in pixels."""
        return self.patch * self.merge

    def tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image of this (height, width)."""
        return self.queries or self.shown + self.squares(size)

    def squares(self, size: tuple[int, int]) -> int:
        """Squares of merge x merge patches in an image of this (height, width)."""
        return math.prod(side // self.factor for side in size)

    @property
    def layout(self) -> dict[str, Any]:
        """Arguments of `data.pack.collate` that lay out batches for this model."""
        values = 3 * self.temporal_patch * self.patch**2
        return dict(
            merge=self.merge,
            values=values,
            prefix=self.prefix,
            mixes=self.mixes,
            queries=self.queries,
            instructions=self.instruction_positions > 0,
        )


SEEING = ProcessorSpec()
NATIVE = {"merge_size", "patch_size", "min_pixels", "max_pixels"}  # settings of images that keep their approximate size
NATIVE_SIZE = {"longest_edge", "min_pixels", "max_pixels"}  # and of the bounds of that size
TEXT = ProcessorSpec(
    image_token=None, video_token=None, vision_start=None, vision_end=None, end_of_turn=None, grounding=None
)


_EDGES = {
    name: count(None) for name in ("height", "width", "shortest_edge", "longest_edge", "min_pixels", "max_pixels")
}
_PIXELS = {
    "min_pixels": count(None),
    "max_pixels": count(None),
    "patch_size": count(None),
    "temporal_patch_size": count(None),
    "merge_size": count(None),
    "image_mean": listed(number(), None, lone=True),
    "image_std": listed(positive(), None, lone=True),
    "do_resize": only(True),
    "do_rescale": only(True),
    "do_normalize": only(True),
    "rescale_factor": number(1 / 255, low=0.0039215, high=0.0039216),
}
IMAGE = _PIXELS | {
    "processor_class": word(None),
    "resample": count(None, low=0, high=5),
    "do_pad": flag(None),
    "do_center_crop": flag(None),
    "max_num_patches": count(None),
    "image_grid_pinpoints": listed(listed(count()), None),
    "crop_to_patches": flag(None),
    "min_patches": count(None),
    "max_patches": count(None),
}
CLIP = _PIXELS | {
    "fps": positive(None),
    "num_frames": count(None),
    "min_frames": count(None),
    "max_frames": count(None),
}


FILES = {
    "image_processor": ("preprocessor_config.json", IMAGE),
    "video_processor": ("video_preprocessor_config.json", CLIP),
}
BOTH = "processor_config.json"  # one file since transformers 5, two before


def read_processor(folder: pathlib.Path, part: str) -> tuple[pathlib.Path, dict[str, Any]]:
    """Returns the file of a folder that describes images or videos (`part` of FILES), and its fields.

    Raises ValueError, naming the file and the field, for one that holds what it cannot.
    """
    name, fields = FILES[part]
    path, stated = folder / name, read_json(folder / name)
    try:
        if stated:
            return path, _stated(stated, fields)
        path, whole = folder / BOTH, read(read_json(folder / BOTH), {part: section({})})
        with inside(part):
            return path, _stated(whole[part], fields)
    except FieldError as error:
        raise ValueError(f"{path}: {error}") from None


def _stated(stated: dict[str, Any], fields: dict[str, Field]) -> dict[str, Any]:
    """The `fields` that an object states; a size that is one number is the short side, a color of one is gray."""
    found = {name: value for name, value in read(stated, fields).items() if name in stated}
    for name in {"image_mean", "image_std"} & stated.keys():
        if len(found[name]) not in (1, 3):
            raise FieldError(name, "must be three numbers, or one for all channels.", found[name])
        found[name] = tuple(found[name]) * (3 // len(found[name]))
    for name in {"size", "crop_size"} & stated.keys():
        value = stated[name]
        if not isinstance(value, dict):
            edge = count().checked(name, value)
            found[name] = {"shortest_edge": edge} if name == "size" else {"height": edge, "width": edge}
            continue
        with inside(name):
            found[name] = {edge: number for edge, number in read(value, _EDGES).items() if number is not None}
    return found


def read_spec(folder: pathlib.Path, spec: ProcessorSpec) -> ProcessorSpec:
    """`spec` updated with the preprocessor configs of a folder.

    Raises ValueError, naming the file, for an unknown field or rule.
    """
    path, image = read_processor(folder, "image_processor")
    _, video = read_processor(folder, "video_processor")
    if not video and spec.label is None:
        video = image  # as it was before videos had a file: the bounds of an image are those of a frame
    least, most = _bounds(video)
    found = {
        "video_min_pixels": least,
        "video_max_pixels": most,
        "fps": video.get("fps"),
        "min_frames": video.get("min_frames", video.get("num_frames")),
        "max_frames": video.get("max_frames", video.get("num_frames")),
        "mean": image.get("image_mean"),
        "std": image.get("image_std"),
        "processor_class": image.get("processor_class"),
    }
    try:
        if not found["processor_class"]:
            found |= read(read_json(folder / BOTH), {"processor_class": word(None)})
        if _native(image, spec):
            least, most = _bounds(image)
            found |= {"min_pixels": least, "max_pixels": most, "patch": image.get("patch_size")}
            found |= {"temporal_patch": image.get("temporal_patch_size"), "merge": image.get("merge_size")}
        else:
            found["rule"] = _rule(image, spec)
        return dataclasses.replace(spec, **{name: value for name, value in found.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _bounds(stated: dict[str, Any]) -> tuple[int | None, int | None]:
    """Pixels that an image has at least and at most, by all names that they have."""
    size = stated.get("size", {})
    return tuple(
        stated.get(f"{name}_pixels", size.get(edge, size.get(f"{name}_pixels")))
        for name, edge in (("min", "shortest_edge"), ("max", "longest_edge"))
    )


def _native(image: dict[str, Any], spec: ProcessorSpec) -> bool:
    """Images nearly keep their size, which has bounds."""
    size = image.get("size", {})
    if "max_num_patches" in image:
        return False
    if not (image.keys() & NATIVE or size.keys() & NATIVE_SIZE):
        return not image or (spec.rule is None and not size and "crop_size" not in image)
    if size and not size.keys() & (NATIVE_SIZE | {"shortest_edge"}):
        raise FieldError("size", "must state shortest_edge and longest_edge, the bounds of an image in pixels.", size)
    return True


def _rule(image: dict[str, Any], spec: ProcessorSpec) -> Rule:
    if pinpoints := image.get("image_grid_pinpoints"):
        if odd := [size for size in pinpoints if len(size) != 2]:
            raise FieldError("image_grid_pinpoints", "must be pairs of numbers.", odd[0])
        size = image.get("crop_size") or image.get("size")
        rest = spec.rule if isinstance(spec.rule, AnyRes) else AnyRes((), 0)  # settings that only config.json has
        return dataclasses.replace(rest, pinpoints=tuple(map(tuple, pinpoints)), tile=_side(size))
    usual = spec.rule if isinstance(spec.rule, Tiles) else None  # InternVL's processors make tiles in any case
    if image.get("crop_to_patches") or usual:
        low, high = (usual.low, usual.high) if usual else (1, 12)
        return Tiles(_side(image.get("size")), image.get("min_patches", low), image.get("max_patches", high))
    return rule_from_hf(image)


def _side(size: dict[str, int] | None) -> int:
    """Side of a square, in all forms that a file may have."""
    side = (size or {}).get("height", (size or {}).get("shortest_edge"))
    if side is None:
        raise FieldError("size", "must state height and width, or shortest_edge.", size)
    return side


def write_spec(spec: ProcessorSpec, folder: pathlib.Path) -> None:
    """The inverse of `read_spec`, for it and for transformers."""
    common = {
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "processor_class": spec.processor_class,
    }
    if spec.rule is not None:
        # transformers' defaults differ by class, so all pixel settings are written
        steps = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
        counting = _counting(spec)
        seen = {"image_seq_length": counting["image_seq_length"]}  # PaliGemma's processor looks for it here
        image = common | steps | seen | spec.rule.to_hf()
        write_json(folder / "preprocessor_config.json", image)
        write_json(folder / "processor_config.json", counting | {"processor_class": image["processor_class"]})
        if spec.video_rule is not None:
            video = spec.video_rule.to_hf()
            del video["image_processor_type"]
            write_json(folder / "video_preprocessor_config.json", common | steps | video | _sampling(spec))
        return
    common |= {"patch_size": spec.patch, "temporal_patch_size": spec.temporal_patch, "merge_size": spec.merge}
    image = {
        "size": {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
        "image_processor_type": spec.image_processor_type,
    }
    write_json(folder / "preprocessor_config.json", common | image)
    if spec.video_processor_type is None:
        return
    size = {"shortest_edge": spec.video_min_pixels, "longest_edge": spec.video_max_pixels}
    write_json(folder / "video_preprocessor_config.json", common | {"size": size} | _sampling(spec))


def _counting(spec: ProcessorSpec) -> dict[str, Any]:
    """Fields by which transformers' processors of images with a rule count placeholders; each reads those that it
    knows."""
    tokens = spec.tokens(spec.rule.sizes((1, 1))[0])  # of one tile
    said = {
        "patch_size": spec.patch,
        "image_seq_length": tokens,
        "num_image_tokens": tokens,
        "num_query_tokens": spec.queries or None,
        "num_additional_image_tokens": spec.num_prefix_tokens,
        "vision_feature_select_strategy": "default" if spec.num_prefix_tokens > spec.shown else "full",
        "image_token": spec.image_token,
        "video_token": spec.video_token,
    }
    if isinstance(spec.rule, AnyRes) and spec.rule.most:
        said["vision_aspect_ratio"] = f"anyres_max_{spec.rule.most}"
    return {name: value for name, value in said.items() if value is not None}


def _sampling(spec: ProcessorSpec) -> dict[str, Any]:
    """Sampling of frames, from the file of the video processor."""
    return {
        "fps": spec.fps,
        "min_frames": spec.min_frames,
        "max_frames": spec.max_frames,
        "video_processor_type": spec.video_processor_type,
    }
