"""Plans the sizes of the images and videos of a conversation before reading pixels, and then reads them."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.video import videos
from mllm_jax.data.video.videos import Video
from mllm_jax.data.vision import images
from mllm_jax.data.vision.positions import in_a_line, on_a_grid, patch_positions
from mllm_jax.data.vision.resize import Rule, Whole
from mllm_jax.data.vision.tiles import Size
from mllm_jax.data.vision.token_blend import shifted, spread
from mllm_jax.types import NEWLINE, TokenBlend

BROKEN_FRAMES = "frames of a video cannot be decoded, and show the frame before"


class Run(NamedTuple):
    """The visual tokens of one placeholder."""

    order: np.ndarray  # i32[m] indices of visual tokens among those of the images, joined; NEWLINE
    position: np.ndarray  # i32[m 3] rotary positions, counted from the first
    advance: int  # rotary position of the next token, counted from the first
    mix: TokenBlend | None = None  # blend of `order`. None: no blend


class Plan(NamedTuple):
    """Plan for reading an image or a video."""

    sizes: tuple[Size, ...]  # (height, width) in pixels of its images: itself, its tiles, or its temporal patches
    runs: tuple[Run, ...]
    rule: Any = None  # rule that made the sizes, if any


def _run(spec: ProcessorSpec, size: Size, first: int = 0, times: tuple[int, ...] = (0,)) -> Run:
    """Returns a run of all visual tokens of images of one size. `first` is the index of the first one."""
    height, width = (side // spec.factor for side in size)
    count = spec.tokens(size) * len(times)
    place = on_a_grid(height, width, times) if spec.on_a_grid and not spec.queries else in_a_line(count)
    return Run(np.arange(first, first + count), *place)


def _shifted(run: Run, tokens: int) -> Run:
    """Returns the run of an image that comes after a number of visual tokens."""
    mix = run.mix and run.mix._replace(index=shifted(run.mix.index, tokens))
    return run._replace(order=shifted(run.order, tokens), mix=mix)


@dataclasses.dataclass(frozen=True)
class NativeImage:
    """An image at approximately its own size."""

    source: Any  # opened again when it is read: neither open files nor pixels wait in between
    height: int
    width: int
    # defects of its file, which the loader counts; filled when it is read
    notes: list[str] = dataclasses.field(default_factory=list, kw_only=True, compare=False)

    is_video = False

    @property
    def name(self) -> str:
        return images.source_name(self.source)

    def plan(self, spec: ProcessorSpec, limit: float, row: float) -> Plan:
        """Returns the plan of this image.

        limit: largest number of pixels; the minimum of the spec takes precedence.
        row: number of pixels that a patch row can hold.
        """
        size = _native(self, (spec.min_pixels, spec.max_pixels), spec.factor, limit, row)
        return Plan((size,), (_run(spec, size),))

    def frames(self, spec: ProcessorSpec, plan: Plan) -> Iterator[np.ndarray]:
        """Yields u8[t h w 3] for each image of the plan."""
        yield images.resized(self._load(spec, plan.sizes[0]), plan.sizes[0])[None]

    def _load(self, spec: ProcessorSpec, size: Size | None = None) -> Image.Image:
        image = images.load_image(self.source, spec.missing_rows, size)
        self.notes.extend(images.notes(image))
        return image


@dataclasses.dataclass(frozen=True)
class TiledImage(NativeImage):
    """An image that is cropped, stretched or cut into tiles by a rule."""

    rule: Rule

    def plan(self, spec: ProcessorSpec, limit: float, row: float) -> Plan:
        images.check_aspect(self.height, self.width)
        rule, size = self.rule.within(limit), (self.height, self.width)
        if spec.queries:
            sizes = rule.sizes(size)
            return Plan(sizes, (_run(spec, sizes[0], 0, (0,) * len(sizes)),), rule)
        order = rule.order(size, spec.factor)
        order = np.concatenate([np.arange(spec.shown, dtype=order.dtype), order + spec.shown]) if spec.shown else order
        return Plan(rule.sizes(size), (Run(order, *in_a_line(len(order)), rule.mix(size, spec.factor)),), rule)

    def frames(self, spec: ProcessorSpec, plan: Plan) -> Iterator[np.ndarray]:
        for pixels in plan.rule.images(self._load(spec)):
            yield pixels[None]


@dataclasses.dataclass(frozen=True)
class VideoFrames:
    """A video; all its frames have one size."""

    video: Video
    indices: list[int]
    even: bool = True  # whether the frames are spread evenly

    is_video = True

    @property
    def notes(self) -> tuple[str, ...]:
        """Defects of the frames that were read, which the loader counts."""
        return (BROKEN_FRAMES,) if self.video.broken else ()

    @classmethod
    def sampled(cls, video: Video, fps: float, spec: ProcessorSpec) -> "VideoFrames":
        """Samples frames at `fps` frames per second, within the spec's bounds."""
        count = cls.count(video, fps, spec)
        if spec.sampling == videos.MOTION:
            return cls(video, videos.moving_frames(video, count), even=False)
        return cls(video, cls.spread(video, count))

    @staticmethod
    def count(video: Video, fps: float, spec: ProcessorSpec) -> int:
        return videos.frame_count(video.frames, video.fps, fps, spec.min_frames, spec.max_frames)

    @staticmethod
    def spread(video: Video, count: int) -> list[int]:
        """Returns `count` evenly spaced frame numbers."""
        return videos.sample_frames(video.frames, count)

    @property
    def name(self) -> str:
        return self.video.name

    def plan(self, spec: ProcessorSpec, limit: float, row: float) -> Plan:
        video, frames = self.video, len(self.indices)
        limit = max(limit, min(max(spec.factor**2, spec.video_min_pixels / frames), row))
        bounds = spec.video_min_pixels, spec.video_max_pixels
        size = videos.video_size(frames, video.height, video.width, spec.factor, spec.temporal_patch, *bounds)
        size = _within(limit, size, video.height, video.width, spec.factor)
        count = math.ceil(frames / spec.temporal_patch)
        tokens = spec.tokens(size)
        return Plan((size,) * count, tuple(_run(spec, size, first * tokens) for first in range(count)))

    def frames(self, spec: ProcessorSpec, plan: Plan) -> Iterator[np.ndarray]:
        return videos.read_video(self.video, self.indices, plan.sizes[0], spec.temporal_patch)


@dataclasses.dataclass(frozen=True)
class VideoSpan(VideoFrames):
    """A video that is one run of visual tokens (Qwen2-VL, arXiv 2409.12191). Bounds of pixels apply to each frame."""

    @staticmethod
    def count(video: Video, fps: float, spec: ProcessorSpec) -> int:
        bounds = spec.min_frames, spec.max_frames, spec.temporal_patch
        return videos.frame_count(video.frames, video.fps, fps, *bounds)

    @staticmethod
    def spread(video: Video, count: int) -> list[int]:
        return [index * video.frames // count for index in range(count)]

    def plan(self, spec: ProcessorSpec, limit: float, row: float) -> Plan:
        video, frames = self.video, len(self.indices)
        size = _native(video, (spec.video_min_pixels, spec.video_max_pixels), spec.factor, limit, row)
        count, seconds = math.ceil(frames / spec.temporal_patch), video.frames / (frames * video.fps)
        times = patch_positions(count, spec.position_rate, spec.temporal_patch * seconds)
        if spec.position_rate and not self.even:
            times = [int(spec.position_rate * index / video.fps) for index in self.indices[:: spec.temporal_patch]]
        return Plan((size,) * count, (_run(spec, size, 0, tuple(times)),))


@dataclasses.dataclass(frozen=True)
class TimestampedFrames(VideoFrames):
    """A video whose frames are images that the spec's rule reads, from the middles of equal parts of the video."""

    @staticmethod
    def spread(video: Video, count: int) -> list[int]:
        return [(2 * part + 1) * video.frames // (2 * count) for part in range(count)]

    def plan(self, spec: ProcessorSpec, limit: float, row: float) -> Plan:
        rule, size = self._rule(spec, limit)
        order, tokens, count = rule.order(size, spec.factor), spec.tokens(rule.sized(size)), len(self.indices)
        frame = Run(order, *in_a_line(len(order)), rule.mix(size, spec.factor))
        return Plan(rule.sizes(size) * count, tuple(_shifted(frame, number * tokens) for number in range(count)), rule)

    def _rule(self, spec: ProcessorSpec, limit: float) -> tuple[Whole, Size]:
        """Returns the rule for frames of at most `limit` pixels, and the size of the video's frames."""
        video = self.video
        images.check_aspect(video.height, video.width)
        return spec.video_rule.within(limit), (video.height, video.width)

    def frames(self, spec: ProcessorSpec, plan: Plan) -> Iterator[np.ndarray]:
        for frame in self.video.read(self.indices):
            yield plan.rule.read(frame)[None]


@dataclasses.dataclass(frozen=True)
class TimestampedSpan(TimestampedFrames):
    """A video whose frames are read by the spec's rule, as one run of visual tokens that ends with a NEWLINE."""

    @staticmethod
    def spread(video: Video, count: int) -> list[int]:
        return videos.sample_frames(video.frames, count)

    def plan(self, spec: ProcessorSpec, limit: float, row: float) -> Plan:
        (rule, size), count = self._rule(spec, limit), len(self.indices)
        order, mix = frame_by_frame(rule, size, spec.factor, count)
        return Plan(rule.sizes(size) * count, (Run(order, *in_a_line(len(order)), mix),), rule)


def frame_by_frame(rule: Whole, size: Size, factor: int, count: int) -> tuple[np.ndarray, TokenBlend | None]:
    """Returns the order and the blend of the visual tokens of `count` frames of a video, with a NEWLINE at the end."""
    frame, step = (rule.order(size, factor), rule.mix(size, factor)), math.prod(s // factor for s in rule.sized(size))
    runs, firsts = [frame] * count + [(np.array([NEWLINE]), None)], [*range(0, count * step, step), 0]
    return spread(np.ones(count * len(frame[0]) + 1, bool), runs, firsts)


def _native(source: Any, bounds: tuple[int, int], factor: int, limit: float, row: float) -> Size:
    """Returns the size closest to the source's own within bounds of pixels and within a limit.

    The lower bound takes precedence over the limit, unless it exceeds a patch row.
    """
    min_pixels, max_pixels = bounds
    limit = max(limit, min(min_pixels, row))
    size = images.smart_resize(source.height, source.width, factor, min_pixels, max_pixels)
    return _within(limit, size, source.height, source.width, factor)


def _within(limit: float, size: Size, height: int, width: int, factor: int) -> Size:
    """Returns `size`, or a smaller one if it exceeds the limit."""
    if math.prod(size) <= limit:
        return size
    return min(images.fitted_size(height, width, factor, limit), size, key=math.prod)
