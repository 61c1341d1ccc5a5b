"""Sampling, sizing and streaming of videos, and rotary positions, against the formulas and code of Qwen3-VL."""

import builtins
import dataclasses
import fractions
import json
import math
import pathlib
import types

import av
import numpy as np
import pytest
from PIL import Image

from mllm_jax.data.pipeline.spans import VideoFrames, VideoSpan
from mllm_jax.data.pipeline.spec import SEEING
from mllm_jax.data.records.records import BadRecord, read_record
from mllm_jax.data.video import decoder, videos
from mllm_jax.data.vision.positions import on_a_grid, patch_positions, rotary_positions


def write_video(path, frames, fps=10, height=48, width=64, codec="mpeg4"):
    """A video whose frames differ in their gray level: 10, 20, 30 ..."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            level = np.full((height, width, 3), (10 + 10 * number) % 250, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    "frames, fps, expected",
    [
        (30, 30, 4),
        (77, 30, 5),
        (243, 25, 19),
        (2, 30, 2),
        (1, 30, 1),
        (9000, 25, 720),
        (100000, 24, 768),
        (150, 30, 10),
    ],
)
def test_frame_count(frames, fps, expected):
    assert videos.frame_count(frames, fps, target_fps=2, min_frames=4, max_frames=768) == expected


def test_frame_count_equals_the_official_results(shared):
    cases = json.loads((shared / "data/preproc/smart_resize_cases.json").read_text())["smart_nframes"]
    assert len(cases) == 77
    for case in cases:
        options, frames = case["ele"], case["total_frames"]
        if case["nframes"] == "ValueError":  # a fixed number of frames, more than there are: ours takes what there is
            assert options["nframes"] > frames
            continue
        fixed = options.get("nframes")
        count = videos.frame_count(
            frames,
            case["video_fps"],
            target_fps=options.get("fps", 2.0),
            min_frames=fixed or options.get("min_frames", 4),
            max_frames=fixed or options.get("max_frames", 768),
            multiple=2,
        )
        assert count == case["nframes"], case


def test_sampled_frames_and_times():
    assert videos.sample_frames(10, 4) == [0, 3, 6, 9]
    assert videos.sample_frames(6, 3) == [0, 2, 5]  # 2.5 rounds to the even side
    assert videos.sample_frames(5, 1) == [0]
    assert videos.patch_times([0, 5, 10, 15], 10.0, temporal_patch=2) == [0.25, 1.25]
    assert videos.patch_times([0, 3, 9], 3.0, temporal_patch=2) == [0.5, 3.0]
    assert videos.patch_times([4], 2.0, temporal_patch=2) == [2.0]


def test_times_equal_transformers():
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    for count in range(1, 9):
        indices = videos.sample_frames(50, count)
        assert videos.patch_times(indices, 29.97, 2) == processor._calculate_timestamps(list(indices), 29.97, 2)


@pytest.mark.parametrize(
    "video, expected",
    [
        ((8, 480, 640), (480, 640)),
        ((64, 720, 1280), (448, 832)),
        ((768, 1080, 1920), (128, 224)),
        ((2, 10, 20), (192, 384)),
    ],
)
def test_video_size(video, expected):
    bounds = {"min_pixels": 131072, "max_pixels": 25165824}
    assert videos.video_size(*video, factor=32, temporal_patch=2, **bounds) == expected


def test_video_of_one_frame_counts_as_a_temporal_patch():
    one, two = (videos.video_size(n, 90, 70, 32, 2, min_pixels=131072, max_pixels=25165824) for n in (1, 2))
    assert one == two


def test_file(tmp_path):
    path = write_video(tmp_path / "video.mp4", frames=11)
    video = videos.open_video(path, fps=2)
    assert (video.frames, video.fps, video.height, video.width) == (11, 10.0, 48, 64)
    blocks = list(videos.read_video(video, [0, 5, 10], size=(32, 64), temporal_patch=2))
    assert [block.shape for block in blocks] == [(2, 32, 64, 3), (1, 32, 64, 3)]
    levels = [frame.mean() for block in blocks for frame in block]
    np.testing.assert_allclose(levels, [10, 60, 110], atol=4)


def test_file_that_states_no_number_of_frames(tmp_path):
    path = write_video(tmp_path / "video.mkv", frames=7)
    video = videos.open_video(path, fps=2)
    assert video.frames == 7
    assert len(list(video.read(range(7)))) == 7


def test_file_that_ends_early(tmp_path):
    """A frame that is missing at the end is the one before it; more than that is no video."""
    path, options = tmp_path / "video.mp4", {"movflags": "faststart"}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 1
        for number in range(5):
            level = np.full((48, 64, 3), 10 + 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    with av.open(str(path)) as container:
        starts = [packet.pos for packet in container.demux(container.streams.video[0]) if packet.size]
    path.write_bytes(whole[: starts[4]])
    video = videos.open_video(path, fps=2)
    levels = [np.asarray(frame).mean() for frame in video.read([0, 4])]
    np.testing.assert_allclose(levels, [10, 40], atol=4)
    assert video.broken == {4}
    path.write_bytes(whole[: starts[3]])
    with pytest.raises(ValueError, match="video.mp4.*ends before frame 4"):
        list(videos.open_video(path, fps=2).read([0, 3, 4]))


def test_damaged_files_are_named(tmp_path):
    whole = write_video(tmp_path / "video.mp4", frames=30).read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    for name, content in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no video"}.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.mp4"):
            videos.open_video(path, fps=2)
    with pytest.raises(FileNotFoundError, match="missing"):
        videos.open_video(tmp_path / "missing.mp4", fps=2)


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mp4", frames=2)
    real = builtins.__import__

    def without(name, *rest):
        if name == "av":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[video\]'"):
        videos.open_video(path, fps=2)
    assert videos.open_video(np.zeros((2, 4, 4, 3), np.uint8), fps=2).frames == 2


def test_videos_in_memory():
    array = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    for source in (array, list(array), [Image.fromarray(frame) for frame in array]):
        video = videos.open_video(source, fps=4)
        assert (video.frames, video.fps, video.height, video.width) == (3, 4.0, 20, 30)
        np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in video.read([0, 2])]), array[[0, 2]])
    for bad in ([], 3, None, np.zeros((0, 4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="video"):
            videos.open_video(bad, fps=2)
    with pytest.raises(ValueError, match="fps"):
        videos.open_video(array, fps=0)
    with pytest.raises(ValueError, match="first frame"):
        list(videos.open_video([array[0], array[1, :10]], fps=2).read([0, 1]))


def test_real_videos(shared):
    folder = shared / "data"
    records = [json.loads(line) for line in (folder / "video/video.jsonl").read_text().splitlines()]
    records = sorted(records, key=lambda record: record["duration_s"])[:4]
    for record in records:
        video = videos.open_video(folder / record["video"], fps=2)
        assert (video.height, video.width) == (record["height"], record["width"])
        assert abs(video.frames - record["frames"]) <= 1
        assert video.fps == pytest.approx(record["fps"], rel=0.02)
        indices = videos.sample_frames(video.frames, videos.frame_count(video.frames, video.fps, 2, 4, 768))
        blocks = list(videos.read_video(video, indices, (64, 96), temporal_patch=2))
        assert sum(map(len, blocks)) == len(indices)
        assert all(block.std() > 1 for block in blocks)


def test_positions_by_hand():
    """The example of the paper's rule: an image of 2 x 3 visual tokens after four text tokens, then text."""
    visual = np.array([0] * 4 + [1] * 6 + [0] * 2, bool)
    position = rotary_positions(visual, [on_a_grid(2, 3)])
    assert position.dtype == np.int32
    assert position.T.tolist() == [
        [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 7, 8],
        [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8],
        [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8],
    ]


def test_positions_edges():
    assert rotary_positions(np.zeros(0, bool), []).shape == (0, 3)
    assert rotary_positions(np.zeros(3, bool), [])[:, 1].tolist() == [0, 1, 2]
    adjacent = rotary_positions(np.ones(5, bool), [on_a_grid(1, 2), on_a_grid(3, 1)])
    assert adjacent.tolist() == [[0, 0, 0], [0, 0, 1], [2, 2, 2], [2, 3, 2], [2, 4, 2]]
    with pytest.raises(ValueError, match="5 visual tokens"):
        rotary_positions(np.ones(5, bool), [on_a_grid(1, 2)])
    with pytest.raises(ValueError, match="between"):
        rotary_positions(np.array([1, 0, 1], bool), [on_a_grid(1, 2)])


def test_positions_equal_transformers():
    import torch
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    model = types.SimpleNamespace(
        config=types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=2))
    )
    model.get_vision_position_ids = types.MethodType(Qwen3VLModel.get_vision_position_ids, model)
    random = np.random.default_rng(0)
    for _ in range(30):
        kinds, grids, images, videos = [0] * random.integers(1, 5), [], [], []
        for _ in range(random.integers(0, 5)):
            height, width = random.integers(1, 7, 2).tolist()
            times = random.integers(1, 4) if random.random() < 0.5 else 0
            (videos if times else images).append([max(times, 1), 2 * height, 2 * width])
            for _ in range(max(times, 1)):
                kinds += [2 if times else 1] * height * width + [0] * random.integers(1, 4)
                grids.append(on_a_grid(height, width))
        expected, _ = Qwen3VLModel.get_rope_index(
            model,
            input_ids=torch.zeros(1, len(kinds), dtype=torch.long),
            mm_token_type_ids=torch.tensor([kinds]),
            image_grid_thw=torch.tensor(images) if images else None,
            video_grid_thw=torch.tensor(videos) if videos else None,
        )
        np.testing.assert_array_equal(rotary_positions(np.array(kinds) > 0, grids), expected[:, 0].T.numpy())


def test_frames_are_read_one_temporal_patch_at_a_time():
    read = []

    def frames(indices):
        for index in indices:
            read.append(index)
            yield Image.new("RGB", (64, 64))

    blocks = videos.read_video(videos.Video(8, 2.0, 64, 64, "", frames), range(8), (32, 32), temporal_patch=2)
    assert next(blocks).shape == (2, 32, 32, 3)
    assert read == [0, 1]


@pytest.fixture(scope="module")
def hours(tmp_path_factory):
    """Three hours at two frames a second. A square stands still in the first half and moves in the second."""
    path, frames = tmp_path_factory.mktemp("hours") / "long.mp4", 3 * 3600 * 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 12
        for number in range(frames):
            pixels = np.zeros((72, 64), np.uint8)  # planes of yuv420p
            pixels[48:] = 128
            place = max(0, number - frames // 2) // 4 % 48
            pixels[16:32, place : place + 16] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="yuv420p")))
        container.mux(stream.encode())
    return path


def test_what_lies_between_distant_frames_is_not_decoded(hours, monkeypatch):
    decoded, plain = [], decoder.decode

    def counted(packet):
        decoded.append(packet.pts)
        return plain(packet)

    monkeypatch.setattr(decoder, "decode", counted)
    video = videos.open_video(hours, fps=2)
    assert (video.frames, video.fps) == (21600, 2.0)
    indices = videos.sample_frames(video.frames, 32)
    found = [np.asarray(frame) for frame in video.read(indices)]
    assert len(decoded) < 32 * 15
    wanted = dict.fromkeys(indices)
    with av.open(str(hours)) as container:  # all of it, from the start, counted
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number in wanted:
                wanted[number] = frame.to_ndarray(format="rgb24")
    for one, two in zip(found, wanted.values(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_hours_are_read_in_constant_memory(hours):
    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not pathlib.Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    video = videos.open_video(hours, fps=2)
    found = {}
    for number, _ in enumerate(video.read(range(video.frames))):
        if number % 500 == 0:
            found[number] = resident()
    assert number == video.frames - 1 and video.frames * 48 * 64 * 3 > 190e6  # what the frames would take
    # What the decoder and its threads need, each machine another amount, they have after the first frames.
    assert max(found.values()) - found[1000] < 40e6


def test_frames_are_denser_where_something_moves(hours):
    video = videos.open_video(hours, fps=2)
    indices = videos.moving_frames(video, 40)
    assert indices == videos.moving_frames(videos.open_video(hours, fps=2), 40)
    assert indices[0] == 0 and indices[-1] == video.frames - 1 and np.diff(indices).min() > 0
    moving = sum(index >= video.frames // 2 for index in indices)
    assert 28 <= moving <= 32  # half of the frames by time, and the other half where it moves


def test_motion_of_short_and_still_videos():
    random, still = np.random.default_rng(0), np.zeros((20, 8, 8, 3), np.uint8)
    noise = random.integers(0, 256, still.shape, np.uint8)
    burst = still.copy()
    burst[12] = 255
    for frames in (still, noise, burst):
        video = videos.open_video(frames, fps=2)
        assert videos.moving_frames(video, 20) == list(range(20))
        assert videos.moving_frames(video, 1) == [0]
        for count in (2, 7, 19):
            indices = videos.moving_frames(video, count)
            assert len(indices) == count and indices[0] == 0 and indices[-1] == 19 and np.diff(indices).min() > 0
    assert videos.moving_frames(videos.open_video(still, fps=2), 7) == videos.sample_frames(20, 7)
    assert {11, 12, 13} & set(videos.moving_frames(videos.open_video(burst, fps=2), 6)) >= {12}


@pytest.mark.parametrize("suffix, codec, options", [("mp4", "h264", {"bf": "2", "g": "30"}), ("mkv", "mpeg4", {})])
def test_seeking_finds_the_frames_that_counting_finds(tmp_path, suffix, codec, options):
    """Frames are stored in another order than shown, at a fractional rate."""
    path = tmp_path / f"video.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fractions.Fraction(30000, 1001), options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(400):
            pixels = np.full((48, 64, 3), 40, np.uint8)
            pixels[:, number % 60 : number % 60 + 4] = 40 + number % 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.video[0])]
    video = videos.open_video(path, fps=2)
    for indices in ([0, 399], [57, 58, 200, 331], list(range(0, 400, 33)), [399]):
        for index, frame in zip(indices, video.read(indices), strict=True):
            np.testing.assert_array_equal(np.asarray(frame), every[index], err_msg=str(index))


def test_a_rate_that_varies_is_read_by_time(tmp_path):
    """Ten frames in the first second, then one that stands for nine."""
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, time in enumerate([*range(10), 10, 100]):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 + 20 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, fractions.Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = videos.open_video(path, fps=2)
    levels = [np.asarray(frame).mean() for frame in video.read(range(video.frames))]
    assert video.frames == 12 and 12 / 10.6 < video.fps < 12 / 10
    expected = [10 + 20 * min(int(index / video.fps * 10), 10) for index in range(video.frames)]
    np.testing.assert_allclose(levels, expected, atol=4)


@pytest.mark.parametrize("most", [10**6, 768])
def test_positions_are_exact_past_six_hours(most):
    """Six hours and a minute at 30 frames a second, in closed form: every time and every rotary position."""
    frames, texts = 30 * (6 * 3600 + 60), []
    video = videos.Video(frames, 30.0, 32, 32, "long", lambda indices: iter(()))
    spec = dataclasses.replace(SEEING, max_frames=most, video_min_pixels=1024)
    film = VideoFrames.sampled(video, 2.0, spec)
    count = min(most, 2 * (6 * 3600 + 60))
    assert len(film.indices) == count
    exact = [fractions.Fraction((frames - 1) * i, count - 1) for i in range(count)]
    assert all(abs(index - wanted) <= fractions.Fraction(1, 2) for index, wanted in zip(film.indices, exact))
    times = videos.patch_times(film.indices, video.fps, 2)
    for i, time in enumerate(times):
        assert time == pytest.approx(float(fractions.Fraction(sum(film.indices[2 * i : 2 * i + 2]), 60)), abs=1e-9)
        texts.append(f"<{time:.1f} seconds>")
    runs = film.plan(spec, math.inf, math.inf).runs
    assert len(runs) == count // 2 and all(len(run.order) == 1 for run in runs)
    # One token for every character of a time, one before and one after the visual token that it is of.
    visual = np.zeros(sum(map(len, texts)) + 3 * len(texts), bool)
    places = np.cumsum([len(text) + 3 for text in texts]) - 2
    visual[places] = True
    position = rotary_positions(visual, [(run.position, run.advance) for run in runs])
    np.testing.assert_array_equal(position, np.repeat(np.arange(len(visual))[:, None], 3, axis=1))
    assert position[-1, 0] < 2**24 and times[-1] > 21600
    np.testing.assert_array_equal(position.astype(np.float32).astype(np.int64), position)  # what tables are made of


def test_positions_by_time_are_exact_past_six_hours():
    """Videos of one block, at two frames and as many positions per second."""
    times = patch_positions(6 * 3600 + 60, rate=2, seconds=1.0)
    assert times == list(range(0, 2 * (6 * 3600 + 60), 2))
    spec = dataclasses.replace(SEEING, max_frames=768, label=None, position_rate=2.0, sampling="motion")
    video = videos.Video(
        768 * 60, 2.0, 32, 32, "long", lambda indices: (Image.new("L", (8, 8), i % 251) for i in indices)
    )
    film = VideoSpan.sampled(video, 2.0, spec)
    (run,) = film.plan(spec, math.inf, math.inf).runs
    assert len(film.indices) == 768 and film.indices[-1] / video.fps > 6 * 3600
    tokens = len(run.position) // 384
    assert run.position[::tokens, 0].tolist() == film.indices[::2]  # two positions, and two frames, a second


def test_a_video_in_a_message_asks_for_its_frames():
    spec = SEEING.asked({"nframes": 6, "sampling": "motion"})
    assert (spec.min_frames, spec.max_frames, spec.sampling) == (6, 6, "motion")
    assert SEEING.asked({"fps": 1.0}) == SEEING
    film = VideoFrames.sampled(videos.open_video(np.zeros((50, 32, 32, 3), np.uint8), fps=5), 2.0, spec)
    assert film.indices == videos.sample_frames(50, 6)
    for wrong in ({"sampling": "fast"}, {"nframes": 0}):
        with pytest.raises(ValueError, match="sampling='fast': must be one of even|min_frames=0: must be at least 1"):
            SEEING.asked(wrong)
    part = {"type": "video", "video": "a.mp4", "nframes": 8, "sampling": "motion"}
    asked = {"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]}
    messages = [asked, {"role": "assistant", "content": "Nothing."}]
    read = lambda **more: read_record({"messages": messages} | more, "r", lambda name: name)["messages"]
    assert read()[0]["content"][0] == part
    assert read(fps=1.5, nframes=4)[0]["content"][0] == part | {"fps": 1.5}
    assert read(fps=[1.5])[0]["content"][0] == part | {"fps": 1.5}
    with pytest.raises(BadRecord, match='"fps" has 2 values for 1 videos'):
        read(fps=[1.0, 2.0])
    with pytest.raises(BadRecord, match="fps, nframes, sampling must be two numbers and a word"):
        read(fps="fast")
