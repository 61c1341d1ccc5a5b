"""Hostile videos: opening one opens no other file, no socket and no program."""

import os
import socket
import threading

import av
import numpy as np
import pytest

from mllm_jax.data.video import videos

SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.0,\n{target}\n#EXT-X-ENDLIST\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>"
)
PLAYLISTS = {
    "a.m3u8": HLS,
    "a.mp4": HLS,  # whatever it is called
    "key.m3u8": HLS.replace("#EXTINF", '#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF'),
    "a.ffconcat": "ffconcat version 1.0\nfile '{target}'\n",
    "b.mp4": "ffconcat version 1.0\nfile '{target}'\n",
    "a.mpd": DASH,
    "a.sdp": SDP,
    "c.mp4": SDP,
    "a.svg": '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="{target}"/></svg>',
    "a.avs": 'FFVideoSource("{target}")',
    "a.vpy": "import os\nos.system('touch {target}')",
    "a.txt": "no video, but a terminal would show it\n" * 20,
}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("elsewhere") / "film.ts"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(10):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8))))
        file.mux(stream.encode())
    return path


@pytest.fixture
def server():
    """A socket that fails the test if anybody connects to it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()


def refused(source, match="not a readable video"):
    """Within two seconds: those that wait for a network do not answer by then."""
    found = []

    def work():
        try:
            found.append(videos.open_video(source, fps=2))
        except ValueError as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(2)
    assert found and isinstance(found[0], ValueError) and match in str(found[0]), (source, found)


@pytest.mark.parametrize("name", PLAYLISTS)
def test_playlists_and_scripts_are_refused(name, film, server, tmp_path):
    port = server.getsockname()[1]
    for target in (
        film,
        os.path.relpath(film, tmp_path),
        f"http://127.0.0.1:{port}/film.ts",
        f"tcp://127.0.0.1:{port}",
    ):
        path = tmp_path / name
        path.write_text(PLAYLISTS[name].format(target=target, port=port))
        refused(path)
        refused(path.read_bytes(), match="<bytes>: not a readable video")


def test_names_that_are_protocols_or_patterns_are_those_of_files(film, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "concat:a|b.ts").write_bytes(film.read_bytes())
    assert videos.open_video("concat:a|b.ts", fps=2).frames == 10
    for name in (
        "http://127.0.0.1:9/a.ts",
        "pipe:0",
        "udp://127.0.0.1:9",
        f"concat:{film}|{film}",
        f"subfile,,:{film}",
    ):
        with pytest.raises(FileNotFoundError, match="no such video"):
            videos.open_video(name, fps=2)
    for number in range(3):
        (tmp_path / f"frame{number}.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no such video"):
        videos.open_video("frame%d.png", fps=2)
    (tmp_path / "frame%d.png").write_bytes(film.read_bytes())
    refused("frame%d.png")


def test_images_are_no_videos(tmp_path):
    from PIL import Image

    for suffix in ("png", "jpg", "webp", "bmp", "tiff"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"a.{suffix}")
        refused(tmp_path / f"a.{suffix}")
        refused((tmp_path / f"a.{suffix}").read_bytes())


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", "/dev/zero", tmp_path):
        refused(path, match="no regular file")
