"""Reading, resizing and patchifying images, against transformers' PIL backend and the official code's results."""

import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mllm_jax.data.vision import images
from mllm_jax.data.vision.resize import Square


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(37, 91), (100, 100), (333, 517), (64, 64), (8, 1200), (700, 33), (1, 200)])
def test_equal_to_transformers(size):
    ours = images.load_image(noise(*size))
    low, high = 65536, 65536 * 4
    theirs = Qwen2VLImageProcessorPil(
        size={"shortest_edge": low, "longest_edge": high}, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )(ours)
    height, width = images.smart_resize(*size, factor=32, min_pixels=low, max_pixels=high)
    assert theirs["image_grid_thw"].tolist() == [[1, height // 16, width // 16]]
    patches = images.patchify(images.resized(ours, (height, width))[None], patch=16, temporal_patch=2, merge=2)
    assert patches.dtype == np.uint8
    expected = (np.asarray(theirs["pixel_values"]) * 0.5 + 0.5) * 255
    assert np.abs(patches - expected).max() < 1


@pytest.mark.parametrize(
    "size, expected",
    [
        ((480, 640), (480, 640)),
        ((1080, 1920), (1088, 1920)),
        ((100, 100), (256, 256)),
        ((3000, 2000), (3008, 1984)),
        ((5000, 5000), (4096, 4096)),
        ((80, 48), (352, 224)),
        ((1, 200), (32, 3648)),
    ],
)
def test_smart_resize(size, expected):
    assert images.smart_resize(*size, factor=32, min_pixels=65536, max_pixels=16777216) == expected


def test_smart_resize_refuses_extreme_shapes():
    for size in [(1, 201), (201, 1), (0, 5)]:
        with pytest.raises(ValueError, match="aspect ratio"):
            images.smart_resize(*size, factor=32, min_pixels=65536, max_pixels=16777216)


def test_smart_resize_equals_the_official_results(shared):
    cases = json.loads((shared / "data/preproc/smart_resize_cases.json").read_text())["smart_resize"]
    assert len(cases) == 205
    for case in cases:
        arguments = [case[name] for name in ("height", "width", "factor", "min_pixels", "max_pixels")]
        if case["resized_hw"] is None:
            with pytest.raises(ValueError):
                images.smart_resize(*arguments)
        else:
            assert images.smart_resize(*arguments) == tuple(case["resized_hw"]), case


@pytest.mark.parametrize(
    ("size", "tokens", "expected"),
    [
        ((400, 8000), 1, (1, 16)),  # over the limit: less would be squeezed
        ((400, 8000), 45, (1, 20)),  # and not 1 x 30
        ((8000, 400), 45, (20, 1)),
        ((400, 8000), 64, (2, 32)),
        ((400, 8000), 1024, (7, 143)),
        ((100, 10000), 256, (1, 100)),
        ((50, 9950), 400, (1, 199)),
        ((480, 640), 256, (13, 18)),  # as the rule of transformers has it
        ((100, 100), 1, (1, 1)),
    ],
)
def test_fitted_size(size, tokens, expected):
    assert images.fitted_size(*size, factor=32, max_pixels=tokens * 32**2 + 7) == tuple(32 * side for side in expected)


def test_a_small_budget_does_not_distort():
    """In any shape and budget; an image whose shape does not fit a row of tokens is over the budget."""
    random = np.random.default_rng(0)
    for _ in range(2000):
        aspect, tokens, short = np.exp(random.uniform(0, np.log(200))), int(random.integers(1, 400)), 997
        size = (short, int(short * aspect))
        height, width = images.fitted_size(*size, 28, tokens * 28**2)
        assert (width, height) == images.fitted_size(*size[::-1], 28, tokens * 28**2)
        aspect, count = size[1] / short, height * width / 28**2
        assert count <= max(tokens, math.ceil(aspect / images.DISTORTED))
        if aspect >= 2 or tokens > 1:
            most = images.DISTORTED if aspect >= 2 else 2**0.5  # 1.4:1 is 1 x 1 or 1 x 2
            assert 1 / most <= width / height / aspect * (1 + 1e-9) and width / height / aspect <= most * (1 + 1e-9)


def test_pixels_equal_the_stored_reference(shared):
    folder = shared / "data/preproc"
    size = images.smart_resize(360, 540, factor=28, min_pixels=3136, max_pixels=12845056)
    frames = images.resized(images.load_image(folder / "australia.jpg"), size)[None]
    patches = images.patchify(frames, patch=14, temporal_patch=2, merge=2) / 255
    mean = np.repeat([0.48145466, 0.4578275, 0.40821073], 2 * 14 * 14)
    std = np.repeat([0.26862954, 0.26130258, 0.27577711], 2 * 14 * 14)
    stored = (folder / "qwen2.5vl_pixel_values_first1000.txt").read_text().replace(",", " ").split()
    np.testing.assert_allclose(((patches - mean) / std).ravel()[:1000], np.array(stored, float), atol=1e-5)


def test_patch_order():
    """Each value encodes its origin: blocks row by row, patches in a block row by row, then channel, time, y, x."""
    frames = np.arange(2 * 4 * 8 * 3, dtype=np.uint8).reshape(2, 4, 8, 3)
    patches = images.patchify(frames, patch=2, temporal_patch=2, merge=2)
    assert patches.shape == (8, 24)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (0, 4), (0, 6), (2, 4), (2, 6)]
    for row, (y, x) in zip(patches, corners):
        block = frames[:, y : y + 2, x : x + 2]
        np.testing.assert_array_equal(row, block.transpose(3, 0, 1, 2).ravel())


def test_missing_frames_repeat_the_last():
    frame = noise(32, 32)[None]
    twice = images.patchify(np.concatenate([frame, frame]), patch=16, temporal_patch=2, merge=2)
    np.testing.assert_array_equal(images.patchify(frame, patch=16, temporal_patch=2, merge=2), twice)


def test_transparency_is_laid_on_white():
    image = Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], np.uint8))
    assert np.asarray(images.load_image(image)).tolist() == [[[255, 255, 255], [255, 0, 0], [127, 127, 127]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    for transparency in (0, bytes([0, 255])):
        data = saved(palette, "PNG", transparency=transparency)
        assert np.asarray(images.load_image(data)).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    keyed = saved(Image.fromarray(noise(1, 2)), "PNG", transparency=tuple(map(int, noise(1, 2)[0, 0])))
    assert np.asarray(images.load_image(keyed))[0, 0].tolist() == [255, 255, 255]
    gray = Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8), "LA")
    assert np.asarray(images.load_image(gray)).tolist() == [[[255] * 3, [9] * 3]]


def test_every_mode_becomes_rgb():
    deep = np.array([[0, 257, 65535]], np.uint16)
    for image in (saved(Image.fromarray(deep), "PNG"), Image.fromarray(deep.astype(np.int32)), Image.fromarray(deep)):
        assert np.asarray(images.load_image(image)).tolist() == [[[0] * 3, [1] * 3, [255] * 3]]
    floating = Image.fromarray(np.array([[0, 0.2, 1]], np.float32))
    assert np.asarray(images.load_image(floating))[..., 0].tolist() == [[0, 51, 255]]
    one_bit = Image.new("1", (2, 1))
    one_bit.putpixel((1, 0), 1)
    assert np.asarray(images.load_image(one_bit))[..., 0].tolist() == [[0, 255]]
    inks = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert images.load_image(inks).getpixel((0, 0)) == (255, 0, 0)
    for mode in ("L", "YCbCr", "HSV", "RGBX"):
        assert images.load_image(Image.new(mode, (3, 2))).mode == "RGB"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 77])
def test_exif_rotation(form, orientation):
    source = Image.new("RGB", (64, 32), "black")
    source.paste("white", (0, 0, 16, 32))  # white on the left
    exif = Image.Exif()
    exif[274] = orientation
    data = saved(source, form, exif=exif)
    upright = images.load_image(data)
    assert images.upright_size(images.open_image(data)) == (upright.height, upright.width)
    white = {1: (4, 16), 3: (60, 16), 6: (16, 4), 8: (16, 60), 77: (4, 16)}[orientation]
    assert upright.size == ((32, 64) if orientation in (6, 8) else (64, 32))
    assert min(upright.getpixel(white)) > 200


def test_sources(tmp_path):
    pixels = noise(5, 7)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    same = [tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), Image.fromarray(pixels)]
    for source in [*same, pixels]:
        np.testing.assert_array_equal(np.asarray(images.load_image(source)), pixels)
    np.testing.assert_array_equal(np.asarray(images.load_image(pixels[..., :1])), pixels[..., :1].repeat(3, axis=2))
    np.testing.assert_array_equal(np.asarray(images.load_image(pixels[..., 0])), pixels[..., :1].repeat(3, axis=2))
    for bad in (pixels.astype(np.float32), pixels[None], 3, None):
        with pytest.raises(ValueError, match="image"):
            images.load_image(bad)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_files_are_named(tmp_path, form):
    data = saved(Image.fromarray(noise(80, 80)), form)
    for name, content in {
        "cut": data[: len(data) // 2],
        "header": data[:20],
        "empty": b"",
        "text": b"no image",
    }.items():
        path = tmp_path / f"{name}.{form.lower()}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=path.name):
            images.load_image(path)
    with pytest.raises(FileNotFoundError, match="missing.png: no such image"):
        images.load_image(tmp_path / "missing.png")


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("1", (400, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    with pytest.raises(ValueError, match="bomb.png.*400x300"):
        images.open_image(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="bomb.png"):
        images.open_image(tmp_path / "bomb.png")


def test_bands_of_rows_change_nothing(monkeypatch):
    deep = np.random.default_rng(0).integers(0, 65536, (37, 5), np.uint16)
    cases = [Image.fromarray(noise(37, 5, 4)), Image.fromarray(deep), Image.fromarray(noise(37, 5)).convert("P")]
    cases += [Image.fromarray(deep.astype(kind) / 256) for kind in (np.float32,)] + [Image.new("CMYK", (5, 37))]
    cases += [Image.fromarray(deep.astype(np.int32))]
    keyed = saved(cases[2], "PNG", transparency=3)
    whole = [np.asarray(images.load_image(source)) for source in [*cases, keyed]]
    monkeypatch.setattr(images, "BAND", 20)
    for source, expected in zip([*cases, keyed], whole):
        np.testing.assert_array_equal(np.asarray(images.load_image(source)), expected)


def test_memory_is_bounded_by_what_a_mode_takes(monkeypatch):
    """Pixels x bytes of a mode, and again 4 bytes for each copy as RGB and turned."""
    exif = Image.Exif()
    exif[274] = 6
    progressive = saved(Image.fromarray(noise(64, 64)), "JPEG", progressive=True, subsampling=0)
    taken = {
        saved(Image.new("RGB", (100, 50)), "PNG"): 5000 * 4,
        saved(Image.new("RGB", (100, 50)), "PNG", exif=exif): 5000 * 8,
        saved(Image.new("RGBA", (100, 50)), "PNG"): 5000 * 8,
        saved(Image.new("L", (100, 50)), "PNG"): 5000 * 5,
        saved(Image.new("1", (100, 50)), "PNG"): 5000 * 5,
        saved(Image.fromarray(np.zeros((50, 100), np.uint16)), "PNG"): 5000 * 6,
        saved(Image.new("RGB", (100, 50)), "WEBP"): 5000 * 8,
        saved(Image.new("CMYK", (100, 50)), "JPEG"): 5000 * 8,
        progressive: 64 * 64 * (4 + 2 * 3),
    }
    for data, needed in taken.items():
        monkeypatch.setattr(images, "MAX_BYTES", needed)
        images.load_image(data)
        monkeypatch.setattr(images, "MAX_BYTES", needed - 1)
        with pytest.raises(ValueError, match=r"pixels of mode .* MB of memory, over"):
            images.load_image(data)
    monkeypatch.setattr(images, "MAX_BYTES", 4 * 100**2 - 1)
    with pytest.raises(ValueError, match="100x50 pixels on a square take"):
        Square(8, (0, 0, 0)).read(Image.new("RGB", (100, 50)))


def test_a_large_jpeg_is_decoded_at_a_reduced_size_where_that_suffices(monkeypatch):
    exif = Image.Exif()
    exif[274] = 6
    smooth = Image.fromarray(noise(9, 16)).resize((512, 288), Image.Resampling.BICUBIC)
    for data, turned in ((saved(smooth, "JPEG"), False), (saved(smooth, "JPEG", exif=exif), True)):
        size = (32, 18)[:: 1 if turned else -1]
        expected = images.resized(images.load_image(data, size=size), size)
        assert images.load_image(data, size=size).size[turned] == 512
        with monkeypatch.context() as patched:
            patched.setattr(images, "LARGE", 10_000)
            assert images.load_image(data).size[turned] == 512
            assert images.load_image(data, size=(288, 288)).size[turned] == 512
            assert images.load_image(data, size=size).size[turned] == 64  # an eighth is twice the size
            assert images.load_image(data, size=(size[0] + 1, size[1] + 1)).size[turned] == 128
            found = images.resized(images.load_image(data, size=size), size)
        assert np.abs(found.astype(int) - expected).max() < 8
