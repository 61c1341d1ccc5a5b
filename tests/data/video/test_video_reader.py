"""Video files of many containers, as PyAV writes and decodes them: times, tracks, orientation, colors, damage."""

import fractions
import io
import itertools
import struct

import av
import numpy as np
import pytest

from mllm_jax.data.video import pixels, reader, videos

HEIGHT, WIDTH, FRAMES = 48, 64, 100
MS = fractions.Fraction(1, 1000)
NTSC = fractions.Fraction(30000, 1001)
VARIED = [0, *itertools.accumulate([33, 34, 100, 33, 700, 50, 34, 33, 33][i % 9] for i in range(FRAMES - 1))]
FAST = {"g": "30", "deadline": "realtime", "cpu-used": "8"}
KINDS = {  # codec, times in ticks, tick, the rate that the container is told, the rate that is right, options
    "even.mp4": ("libx264", range(FRAMES), 1 / NTSC, NTSC, NTSC, {"g": "30"}),
    "open.mp4": ("libx264", range(FRAMES), 1 / NTSC, NTSC, NTSC, {"x264-params": "open-gop=1:keyint=30:bframes=3"}),
    "fragments.mp4": ("libx264", range(FRAMES), 1 / NTSC, NTSC, NTSC, {"g": "30"}),
    "clock.webm": ("libvpx", range(0, 33 * FRAMES, 33), MS, 1000, 1000 / 33, FAST),
    "rounded.webm": ("libvpx", [round(i * 1000 / NTSC) for i in range(FRAMES)], MS, NTSC, NTSC, FAST),
    "slow.mkv": ("libx264", [round(i * 1000 / 3) for i in range(FRAMES)], MS, 30, 3, {"g": "30"}),
    "late.mkv": ("mpeg4", range(5000, 5000 + 40 * FRAMES, 40), MS, 25, 25, {"g": "30"}),
    "even.ts": ("libx264", range(0, 3003 * FRAMES, 3003), fractions.Fraction(1, 90000), NTSC, NTSC, {"g": "30"}),
    "even.mpg": ("mpeg2video", range(FRAMES), fractions.Fraction(1, 25), 25, 25, {"g": "15", "bf": "2"}),
    "clock.flv": ("libx264", range(0, 50 * FRAMES, 50), MS, 1000, 20, {"g": "30"}),
    "even.avi": ("mpeg4", range(FRAMES), fractions.Fraction(1, 10), 10, 10, {"g": "30", "bf": "2"}),
    "unordered.avi": ("libx264", range(FRAMES), fractions.Fraction(1, 10), 10, 10, {"g": "30"}),
    "stream.h264": ("libx264", range(FRAMES), fractions.Fraction(1, 10), 10, 10, {"g": "30"}),
    "even.gif": ("gif", range(FRAMES), fractions.Fraction(1, 10), 10, 10, {}),
    "varied.mp4": ("libx264", VARIED, MS, 30, None, {"g": "30"}),
    "varied.webm": ("libvpx", VARIED, MS, 30, None, FAST),
    "varied.ts": ("libx264", [90 * time for time in VARIED], fractions.Fraction(1, 90000), 30, None, {"g": "30"}),
    "varied.flv": ("flv", VARIED, MS, 1000, None, {"g": "30"}),
}


def image(number):
    """u8[48 64 3]: a bar whose position and brightness encode the number."""
    pixels = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    pixels[:, number % 30 * 2 : number % 30 * 2 + 4] = 100 + number
    return pixels


def write(path, codec, times, tick, rate, options=(), images=None, container=(), **fields):
    """A file whose frames are shown at `times`, in ticks."""
    with av.open(str(path), "w", options=dict(container)) as file:
        stream = file.add_stream(codec, rate=rate, options=dict(options))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "rgb8" if codec == "gif" else "yuv420p"
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else stream.pix_fmt
        stream.time_base = stream.codec_context.time_base = tick
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(image(number) if images is None else images[number])
            frame.pts, frame.time_base = time, tick
            for field, value in fields.items():
                setattr(frame, field, value)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def decoded(source):
    """All frames of the first video track, one after the other."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(file.streams.video[0])]


def damaged(path, numbers):
    """Bytes of the file with the packets of these numbers zeroed."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(file.streams.video[0]) if packet.size]
    for number in numbers:
        place = content.index(bytes(packets[number]), packets[number].pos)
        content[place : place + packets[number].size] = bytes(packets[number].size)
    return bytes(content)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, (codec, times, tick, rate, _, options) in KINDS.items():
        container = {"movflags": "frag_keyframe+empty_moov"} if name.startswith("fragments") else {}
        write(folder / name, codec, times, tick, rate, options, container=container)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_frames_and_rates(name, files):
    """Any requested frames equal those from decoding the full file at their times."""
    _, times, tick, _, rate, _ = KINDS[name]
    every = decoded(files / name)
    assert len(every) == FRAMES
    video = videos.open_video(files / name, fps=2)
    assert (video.frames, video.height, video.width) == (FRAMES, HEIGHT, WIDTH)
    if rate is None:  # what is on the screen at i / fps
        seconds = [(time - times[0]) * tick for time in times]
        assert FRAMES / float(seconds[-1] + 0.8) < video.fps < FRAMES / float(seconds[-1])
        shown = [sum(second <= i / video.fps + 0.0005 for second in seconds) - 1 for i in range(FRAMES)]
        assert len(set(shown)) < FRAMES
    else:
        assert video.fps == pytest.approx(float(rate), rel=1e-9)
        shown = range(FRAMES)
    # FAR apart they are sought; after a seek, some containers stand behind the key frame that is needed
    for indices in (
        range(FRAMES),
        [0, FRAMES - 1],
        [28, 29, 61, 62],
        range(0, FRAMES, 31),
        [59],
        [FRAMES - 1],
        [0],
        [],
    ):
        for index, frame in zip(indices, video.read(indices), strict=True):
            np.testing.assert_array_equal(np.asarray(frame), every[shown[index]], err_msg=f"{indices} {index}")
    assert not video.broken
    with pytest.raises(ValueError, match=f"{name}: ends before frame {FRAMES}"):
        list(video.read([0, FRAMES]))


def test_a_browser_recording(tmp_path):
    """WebM as it is streamed: without an index, a length, or a rate."""
    times = [0, *itertools.accumulate([32, 35, 31, 36, 47, 19, 33][i % 7] for i in range(FRAMES - 1))]
    path = write(
        tmp_path / "a.webm", "libvpx", times, MS, 30, FAST, container={"live": "1", "cluster_time_limit": "500"}
    )
    content, rate = path.read_bytes(), bytes.fromhex("23e38384")  # DefaultDuration, of four bytes
    assert content.count(rate) == 1
    at = content.index(rate)
    path.write_bytes(content[:at] + b"\xec\x86" + bytes(6) + content[at + 8 :])  # Void
    with av.open(str(path)) as file:
        assert file.streams.video[0].average_rate in (None, 1000) and file.duration is None  # its clock
    video, every = videos.open_video(path, fps=2), decoded(path)
    assert video.frames == FRAMES and 1000 * FRAMES / (times[-1] + 50) < video.fps < 1000 * FRAMES / times[-1]
    for indices in ([0, 99], [28, 61], range(0, FRAMES, 31)):
        for index, frame in zip(indices, video.read(indices), strict=True):
            shown = sum(time <= index * 1000 / video.fps + 0.5 for time in times) - 1
            np.testing.assert_array_equal(np.asarray(frame), every[shown], err_msg=str(index))


def test_bytes_are_read_like_files(files):
    for name in ("even.mp4", "varied.webm", "unordered.avi"):
        one, two = (videos.open_video(source, fps=2) for source in (files / name, (files / name).read_bytes()))
        assert (one.frames, one.fps) == (two.frames, two.fps)
        for frame, other in zip(one.read([3, 80]), two.read([3, 80]), strict=True):
            np.testing.assert_array_equal(np.asarray(frame), np.asarray(other))


def test_packets_are_read_only_where_the_index_does_not_say_it(files, monkeypatch):
    demuxed = []
    plain = reader.measured_times
    monkeypatch.setattr(reader, "measured_times", lambda packets, *rest: demuxed.append(1) or plain(packets, *rest))
    for name in ("even.mp4", "open.mp4"):
        videos.open_video(files / name, fps=2)
    assert not demuxed
    for name in ("varied.mp4", "fragments.mp4", "clock.webm", "unordered.avi"):
        videos.open_video(files / name, fps=2)
    assert len(demuxed) == 4


def edited(content, media_time, duration):
    """An MP4 whose only edit shows `duration` (in the movie's ticks) from `media_time` (in the track's)."""
    at = content.index(b"elst") + 4
    assert content[at] == 0 and content[at + 4 : at + 8] == struct.pack(">I", 1)
    return content[: at + 8] + struct.pack(">Ii", duration, media_time) + content[at + 16 :]


@pytest.mark.parametrize("first, last", [(20, FRAMES), (0, 70), (33, 70)])
def test_frames_that_an_edit_list_hides_do_not_count(first, last, files, tmp_path):
    path = write(
        tmp_path / "whole.mp4", "libx264", range(FRAMES), fractions.Fraction(1, 10), 10, {"g": "30", "bf": "2"}
    )
    content = path.read_bytes()
    start = struct.unpack(">i", content[content.index(b"elst") + 16 :][:4])[0]  # of the first frame that is shown
    content = edited(content, start + first * 1024, (last - first) * 100)
    with av.open(io.BytesIO(content)) as file:
        assert file.streams.video[0].time_base == fractions.Fraction(1, 10240)
    video, every = videos.open_video(content, fps=2), decoded(path)
    assert (video.frames, video.fps) == (last - first, 10.0)
    for indices in (range(video.frames), [0, video.frames - 1], [video.frames // 2]):
        for index, frame in zip(indices, video.read(indices), strict=True):
            np.testing.assert_array_equal(np.asarray(frame), every[first + index])


def test_what_is_put_together_from_two_files_is_counted(files):
    """Times begin anew in the middle."""
    content = (files / "even.ts").read_bytes()
    video = videos.open_video(content + content, fps=2)
    assert (video.frames, video.fps) == (2 * FRAMES, pytest.approx(float(NTSC)))
    every = decoded(content + content)
    for index, frame in zip([5, 150], video.read([5, 150]), strict=True):
        np.testing.assert_array_equal(np.asarray(frame), every[index])


def test_one_frame(tmp_path):
    for name, codec in (("one.mp4", "libx264"), ("one.webm", "libvpx"), ("one.avi", "mjpeg")):
        video = videos.open_video(write(tmp_path / name, codec, [0], fractions.Fraction(1, 10), 10), fps=2)
        assert (video.frames, len(list(video.read([0])))) == (1, 1)
        assert video.fps == 10


def test_tags_in_any_encoding(tmp_path):
    path = tmp_path / "tag.avi"
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "cafés"
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(image(0))))
        file.mux(stream.encode())
    content = path.read_bytes().replace("é".encode(), "é ".encode("latin-1"))
    assert content != path.read_bytes()
    assert videos.open_video(content, fps=2).frames == 1


def write_tracks(path, tracks, sound=False):
    """A file of tracks (codec, frames, level, disposition), the larger the later."""
    with av.open(str(path), "w") as file:
        if sound:
            audio = file.add_stream("aac" if path.suffix != ".mkv" else "libopus", rate=48000)
        streams = [file.add_stream(codec, rate=10) for codec, *_ in tracks]
        for number, (stream, (codec, *_, disposition)) in enumerate(zip(streams, tracks)):
            stream.width, stream.height = WIDTH + 16 * number, HEIGHT + 16 * number
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = disposition.value
        for stream, (_, frames, level, _) in zip(streams, tracks):
            for number in range(frames):
                pixels = np.full((stream.height, stream.width, 3), level, np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels)
                frame.pts, frame.time_base = number, fractions.Fraction(1, 10)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        if sound:
            samples = av.AudioFrame.from_ndarray(np.zeros((2, 4800), np.float32), format="fltp", layout="stereo")
            samples.rate, samples.pts = 48000, 0
            if path.suffix == ".mkv":
                samples = av.AudioResampler(format="flt", rate=48000).resample(samples)[0]
            file.mux(audio.encode(samples))
            file.mux(audio.encode())
    return path


NO = av.stream.Disposition(0)
DEFAULT, COVER = av.stream.Disposition.default, av.stream.Disposition.attached_pic


@pytest.mark.parametrize(
    "name, cover",
    [("a.mp4", COVER), ("a.mkv", COVER), ("a.mkv", NO), ("a.mkv", DEFAULT), ("a.mov", DEFAULT)],
)
def test_a_cover_is_not_the_film(name, cover, tmp_path):
    film = ("libx264", 12, 60, NO)
    for tracks in ([("mjpeg", 1, 200, cover), film], [film, ("mjpeg", 1, 200, cover)]):
        video = videos.open_video(write_tracks(tmp_path / name, tracks), fps=2)
        assert (video.frames, video.fps) == (12, 10.0)
        np.testing.assert_allclose([np.asarray(frame).mean() for frame in video.read([0, 11])], 60, atol=4)


def test_sound_is_no_video(tmp_path):
    for name, tracks in (("a.mp4", [("mjpeg", 1, 200, COVER)]), ("b.m4a", []), ("c.mkv", [])):
        with pytest.raises(ValueError, match=f"{name}: no video track"):
            videos.open_video(write_tracks(tmp_path / name, tracks, sound=True), fps=2)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_track_of_a_file_with_several(suffix, tmp_path):
    for first, second, chosen in ((DEFAULT, NO, 0), (NO, DEFAULT, 1)):
        tracks = [("libx264", 6, 60, first), ("mjpeg", 1, 10, COVER), ("libx264", 8, 160, second)]
        tracks = tracks if suffix == "mp4" else [tracks[0], tracks[2]]
        path = write_tracks(tmp_path / f"{first.value}.{suffix}", tracks)
        with av.open(str(path)) as file:
            best = file.streams.best("video")
            assert videos.open_video(path, fps=2).width == best.width
        for track, frames, level in ((None, (6, 8)[chosen], (60, 160)[chosen]), (0, 6, 60), (1, 8, 160)):
            video = videos.open_video(path, fps=2, track=track)
            assert video.frames == frames
            np.testing.assert_allclose([np.asarray(frame).mean() for frame in video.read([0, 5])], level, atol=4)
        for track in (2, -1):
            with pytest.raises(ValueError, match=f"track={track} is not one of its 2 video tracks"):
                videos.open_video(path, fps=2, track=track)


@pytest.mark.parametrize(
    "matrix", [*itertools.product((1, -1), (0,), (0,), (1, -1)), *itertools.product((0,), (1, -1), (1, -1), (0,))]
)
def test_turned_and_mirrored_tracks(matrix, tmp_path):
    """Against the definition of the matrix in ISO/IEC 14496-12: (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    path = write(tmp_path / "a.mp4", "libx264", range(3), fractions.Fraction(1, 10), 10)
    stored, content = decoded(path)[1], path.read_bytes()
    at = content.index(b"tkhd") + 4 + 4 + 36
    fields = a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30
    content = content[:at] + struct.pack(">9i", *fields) + content[at + 36 :]
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    column, row = a * x + c * y, b * x + d * y
    expected = np.zeros((np.ptp(row) + 1, np.ptp(column) + 1, 3), np.uint8)
    expected[row - row.min(), column - column.min()] = stored
    video = videos.open_video(content, fps=2)
    assert (video.height, video.width) == expected.shape[:2]
    np.testing.assert_array_equal(np.asarray(next(video.read([1]))), expected)


def test_orientation_beside_data_that_pyav_does_not_know(tmp_path):
    """A camera's MJPEG whose images carry EXIF."""
    from PIL import Image

    exif, jpeg = Image.Exif(), io.BytesIO()
    exif[0x112], exif[0x10F] = 6, "Maker"
    Image.fromarray(image(3)).save(jpeg, "JPEG", exif=exif)
    with av.open(str(tmp_path / "a.avi"), "w") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        packet = av.Packet(jpeg.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, fractions.Fraction(1, 10)
        file.mux(packet)
    video, stored = videos.open_video(tmp_path / "a.avi", fps=2), decoded(tmp_path / "a.avi")[0]
    (frame,) = video.read([0])
    if video.height == WIDTH:  # FFmpeg from 8.1 on reads it
        stored = np.rot90(stored, -1)
    np.testing.assert_array_equal(np.asarray(frame), stored)


def test_a_broken_packet_repeats_the_frame_before(files, caplog):
    """A key packet, one amid others, the last; in a decoder that waits for more, and in one that does not."""
    for name, number in (("late.mkv", 41), ("late.mkv", FRAMES - 1), ("even.mp4", 41), ("even.mp4", FRAMES - 1)):
        content, every = damaged(files / name, [number]), decoded(files / name)
        video = videos.open_video(content, fps=2)
        assert (video.frames, video.broken) == (FRAMES, set())
        frames = [np.asarray(frame) for frame in video.read(range(FRAMES))]
        (lost,) = video.broken
        assert abs(lost - number) < 5  # frames are stored in another order than they are shown in
        np.testing.assert_array_equal(frames[lost], frames[lost - 1])
        for index in range(lost):
            np.testing.assert_array_equal(frames[index], every[index], err_msg=f"{name} {index}")
        assert caplog.messages[-1] == "<bytes>: 1 broken frames, replaced by the frames before them"
        again = videos.open_video(content, fps=2)
        assert len(list(again.read([0, FRAMES // 2, FRAMES - 1]))) == 3
        assert again.broken == video.broken & {FRAMES - 1}


def test_a_broken_key_packet_loses_all_up_to_the_next(files):
    content, every = damaged(files / "rounded.webm", [0]), decoded(files / "rounded.webm")  # the next is 30
    video, indices = videos.open_video(content, fps=2), [29, *range(30, 60)]
    frames = [np.asarray(frame) for frame in video.read(indices)]
    for index, frame in zip(indices, frames):
        np.testing.assert_array_equal(frame, every[max(index, 30)])
    assert video.broken == {29}
    with pytest.raises(ValueError, match="<bytes>: ends before frame 10, or is broken there"):
        list(video.read(range(FRAMES)))


@pytest.mark.parametrize("name", ["late.mkv", "even.mp4", "rounded.webm", "even.avi"])
def test_a_video_that_is_broken_beyond_that_is_refused(name, files):
    content = damaged(files / name, range(3, FRAMES, 7))
    with pytest.raises(ValueError, match="<bytes>: (broken at|ends before)"):
        list(videos.open_video(content, fps=2).read(range(FRAMES)))
    content = damaged(files / name, range(FRAMES))
    with pytest.raises(ValueError, match="<bytes>: (no frame|not a readable video)"):
        videos.open_video(content, fps=2)


def test_files_that_were_cut_are_as_long_as_they_are(files):
    """A recording that was interrupted. Where an index promises more than there is, the file is refused."""
    for name in ("clock.webm", "slow.mkv", "even.ts", "fragments.mp4"):
        content = (files / name).read_bytes()
        video = videos.open_video(content[: len(content) * 3 // 4], fps=2)
        assert FRAMES // 2 < video.frames < FRAMES
        assert video.fps == pytest.approx(float(KINDS[name][4]), rel=0.05)
        assert len(list(video.read(range(video.frames)))) == video.frames


BARS = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 180, 40)])
LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}  # of red and blue, by the code of H.273


def bars(matrix, full):
    """u8 planes [72 64] of yuv420p in closed form: Y, then Cb and Cr."""
    red, blue = LUMA[matrix]
    rgb = np.repeat(np.repeat(BARS[None] / 255, HEIGHT, 0), WIDTH // 4, 1)
    y = rgb @ [red, 1 - red - blue, blue]
    chroma = (rgb[::2, ::2, 2] - y[::2, ::2]) / (2 - 2 * blue), (rgb[::2, ::2, 0] - y[::2, ::2]) / (2 - 2 * red)
    scale = (255, 0, 255) if full else (219, 16, 224)
    planes = [y * scale[0] + scale[1], *(part * scale[2] + 128 for part in chroma)]
    return np.concatenate([np.rint(plane).reshape(-1, WIDTH) for plane in planes]).astype(np.uint8)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("stored, stated", [(1, 1), (5, 5), (9, 9), (5, 2), (5, 3)])
def test_colors_are_those_of_the_matrix_and_range(stored, stated, full, tmp_path):
    """An unspecified (2) or reserved (3) matrix means BT.601, as in FFmpeg."""
    frame = av.VideoFrame.from_ndarray(bars(stored, full), format="yuv420p")
    frame.colorspace, frame.color_range = stated, 2 if full else 1
    frame.color_trc, frame.color_primaries = 3, 3  # reserved
    found = np.asarray(pixels.upright(frame, (1, 1, False))).astype(int)[HEIGHT // 2, [8, 24, 40, 56]]
    assert np.abs(found - BARS).max() <= 3
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"qp": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = stated, 2 if full else 1
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    (image,) = videos.open_video(tmp_path / "a.mp4", fps=2).read([0])
    assert np.abs(np.asarray(image).astype(int)[HEIGHT // 2, [8, 24, 40, 56]] - BARS).max() <= 4


def test_colors_that_cannot_be_converted_are_refused(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.colorspace = 8  # YCgCo
        file.mux(stream.encode(av.VideoFrame.from_ndarray(bars(5, False), format="yuv420p")))
        file.mux(stream.encode())
    with pytest.raises(ValueError, match="a.mp4: its color matrix 8 is not supported. Convert it to BT.709."):
        videos.open_video(tmp_path / "a.mp4", fps=2)
