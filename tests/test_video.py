"""Sampling, sizing and streaming of clips, and rotary positions, against the formulas and code of Qwen3-VL."""

import builtins
import json
import types

import av
import numpy as np
import pytest
from PIL import Image

from mllm_jax.data import video
from mllm_jax.data.positions import on_a_grid, rotary_positions


def write_clip(path, frames, fps=10, height=48, width=64, codec="mpeg4"):
    """A clip whose frames differ in their grey level: 10, 20, 30 ..."""
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
    assert video.frame_count(frames, fps, target_fps=2, min_frames=4, max_frames=768) == expected


def test_frame_count_equals_the_official_results(shared):
    cases = json.loads((shared / "data/preproc/smart_resize_cases.json").read_text())["smart_nframes"]
    assert len(cases) == 77
    for case in cases:
        options, frames = case["ele"], case["total_frames"]
        if case["nframes"] == "ValueError":  # a fixed number of frames, more than there are: ours takes what there is
            assert options["nframes"] > frames
            continue
        fixed = options.get("nframes")
        count = video.frame_count(
            frames,
            case["video_fps"],
            target_fps=options.get("fps", 2.0),
            min_frames=fixed or options.get("min_frames", 4),
            max_frames=fixed or options.get("max_frames", 768),
            multiple=2,
        )
        assert count == case["nframes"], case


def test_sampled_frames_and_times():
    assert video.sample_frames(10, 4) == [0, 3, 6, 9]
    assert video.sample_frames(6, 3) == [0, 2, 5]  # 2.5 rounds to the even side
    assert video.sample_frames(5, 1) == [0]
    assert video.patch_times([0, 5, 10, 15], 10.0, temporal_patch=2) == [0.25, 1.25]
    assert video.patch_times([0, 3, 9], 3.0, temporal_patch=2) == [0.5, 3.0]
    assert video.patch_times([4], 2.0, temporal_patch=2) == [2.0]


def test_times_equal_transformers():
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    for count in range(1, 9):
        indices = video.sample_frames(50, count)
        assert video.patch_times(indices, 29.97, 2) == processor._calculate_timestamps(list(indices), 29.97, 2)


@pytest.mark.parametrize(
    "clip, expected",
    [
        ((8, 480, 640), (480, 640)),
        ((64, 720, 1280), (448, 832)),
        ((768, 1080, 1920), (128, 224)),
        ((2, 10, 20), (192, 384)),
    ],
)
def test_clip_size(clip, expected):
    bounds = {"min_pixels": 131072, "max_pixels": 25165824}
    assert video.clip_size(*clip, factor=32, temporal_patch=2, **bounds) == expected


def test_clip_of_one_frame_counts_as_a_temporal_patch():
    one, two = (video.clip_size(n, 90, 70, 32, 2, min_pixels=131072, max_pixels=25165824) for n in (1, 2))
    assert one == two


def test_file(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", frames=11)
    clip = video.open_clip(path, fps=2)
    assert (clip.frames, clip.fps, clip.height, clip.width) == (11, 10.0, 48, 64)
    blocks = list(video.read_clip(clip, [0, 5, 10], size=(32, 64), temporal_patch=2))
    assert [block.shape for block in blocks] == [(2, 32, 64, 3), (1, 32, 64, 3)]
    levels = [frame.mean() for block in blocks for frame in block]
    np.testing.assert_allclose(levels, [10, 60, 110], atol=4)


def test_file_that_states_no_number_of_frames(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", frames=7)
    clip = video.open_clip(path, fps=2)
    assert clip.frames == 7
    assert len(list(clip.read(range(7)))) == 7


def test_file_one_frame_short_repeats_its_last(tmp_path):
    clip = video.open_clip(write_clip(tmp_path / "clip.mp4", frames=5), fps=2)
    levels = [np.asarray(frame).mean() for frame in clip.read([0, 5])]
    np.testing.assert_allclose(levels, [10, 50], atol=4)
    with pytest.raises(ValueError, match="clip.mp4.*ends before frame 5"):
        list(clip.read([0, 5, 6]))


def test_damaged_files_are_named(tmp_path):
    whole = write_clip(tmp_path / "clip.mp4", frames=30).read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    for name, content in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no video"}.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.mp4"):
            video.open_clip(path, fps=2)
    with pytest.raises(FileNotFoundError, match="missing"):
        video.open_clip(tmp_path / "missing.mp4", fps=2)


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", frames=2)
    real = builtins.__import__

    def without(name, *rest):
        if name == "av":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"mllm_jax\[video\]"):
        video.open_clip(path, fps=2)
    assert video.open_clip(np.zeros((2, 4, 4, 3), np.uint8), fps=2).frames == 2


def test_clips_in_memory():
    array = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    for source in (array, list(array), [Image.fromarray(frame) for frame in array]):
        clip = video.open_clip(source, fps=4)
        assert (clip.frames, clip.fps, clip.height, clip.width) == (3, 4.0, 20, 30)
        np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in clip.read([0, 2])]), array[[0, 2]])
    for bad in ([], 3, None, np.zeros((0, 4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="clip"):
            video.open_clip(bad, fps=2)
    with pytest.raises(ValueError, match="fps"):
        video.open_clip(array, fps=0)
    with pytest.raises(ValueError, match="first frame"):
        list(video.open_clip([array[0], array[1, :10]], fps=2).read([0, 1]))


def test_real_clips(shared):
    folder = shared / "data"
    records = [json.loads(line) for line in (folder / "video/video.jsonl").read_text().splitlines()]
    records = sorted(records, key=lambda record: record["duration_s"])[:4]
    for record in records:
        clip = video.open_clip(folder / record["video"], fps=2)
        assert (clip.height, clip.width) == (record["height"], record["width"])
        assert abs(clip.frames - record["frames"]) <= 1
        assert clip.fps == pytest.approx(record["fps"], rel=0.02)
        indices = video.sample_frames(clip.frames, video.frame_count(clip.frames, clip.fps, 2, 4, 768))
        blocks = list(video.read_clip(clip, indices, (64, 96), temporal_patch=2))
        assert sum(map(len, blocks)) == len(indices)
        assert all(block.std() > 1 for block in blocks)


def test_positions_by_hand():
    """The example of the paper's rule: a picture of 2 x 3 visual tokens after four text tokens, then text."""
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
        kinds, grids, images, clips = [0] * random.integers(1, 5), [], [], []
        for _ in range(random.integers(0, 5)):
            height, width = random.integers(1, 7, 2).tolist()
            times = random.integers(1, 4) if random.random() < 0.5 else 0
            (clips if times else images).append([max(times, 1), 2 * height, 2 * width])
            for _ in range(max(times, 1)):
                kinds += [2 if times else 1] * height * width + [0] * random.integers(1, 4)
                grids.append(on_a_grid(height, width))
        expected, _ = Qwen3VLModel.get_rope_index(
            model,
            input_ids=torch.zeros(1, len(kinds), dtype=torch.long),
            mm_token_type_ids=torch.tensor([kinds]),
            image_grid_thw=torch.tensor(images) if images else None,
            video_grid_thw=torch.tensor(clips) if clips else None,
        )
        np.testing.assert_array_equal(rotary_positions(np.array(kinds) > 0, grids), expected[:, 0].T.numpy())


def test_frames_are_read_one_temporal_patch_at_a_time():
    read = []

    def frames(indices):
        for index in indices:
            read.append(index)
            yield Image.new("RGB", (64, 64))

    blocks = video.read_clip(video.Clip(8, 2.0, 64, 64, "", frames), range(8), (32, 32), temporal_patch=2)
    assert next(blocks).shape == (2, 32, 32, 3)
    assert read == [0, 1]
