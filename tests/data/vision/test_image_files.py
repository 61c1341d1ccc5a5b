"""Image files that PIL fails on, and their EXIF data; the tests build files byte by byte."""

import io
import itertools
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin

from mllm_jax.data.vision import image_files, images

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # bytes of EXIF's types
ORIENTATION, SHORT = ExifTags.Base.Orientation, 3
FAR = 10**8  # behind the end of every file here


def exif(*entries, order="<"):
    """EXIF of entries (tag, type, count, bytes of the value or where they stand)."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    body, values = b"", b""
    for tag, kind, count, value in sorted(entries, key=lambda entry: entry[0]):
        if not isinstance(value, int) and len(value) > 4:
            value, values = len(head) + 12 * len(entries) + 4 + len(values), values + value
        value = struct.pack(order + "I", value) if isinstance(value, int) else value.ljust(4, b"\0")
        body += struct.pack(order + "HHI", tag, kind, count) + value
    return head + body + bytes(4) + values


def turned(orientation, order="<"):
    return ORIENTATION, SHORT, 1, struct.pack(order + "H", orientation)


def drawing():
    """u8[32 48 3] whose four quarters differ."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24], pixels[:16, 24:], pixels[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return pixels


def saved(form, about=None):
    """The drawing with this EXIF."""
    if form == "TIFF":
        pixels = drawing()
        sizes = [(256, 48), (257, 32), (259, 1), (262, 2), (277, 3), (278, 32), (279, pixels.size)]
        entries = [(258, SHORT, 3, struct.pack("<3H", 8, 8, 8)), *about]
        make = lambda start: exif(*[(tag, 4, 1, value) for tag, value in [*sizes, (273, start)]], *entries)
        return make(len(make(0))) + pixels.tobytes()
    file, image = io.BytesIO(), Image.fromarray(drawing())
    more = {"save_all": True, "append_images": [image]} if form == "MPO" else {}
    more |= {"lossless": True} if form == "WEBP" else {}
    image.save(file, form, **more, **({} if about is None else {"exif": b"Exif\0\0" + about}))
    return file.getvalue()


def with_exif(form, *entries, order="<"):
    return saved(form, entries if form == "TIFF" else exif(*entries, order=order))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "MPO", "TIFF"])
def test_all_orientations_in_closed_form(form):
    """Orientation as EXIF defines it: which side of the image are its first stored row and column."""
    upright = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: p[::-1].transpose(1, 0, 2),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: p[:, ::-1].transpose(1, 0, 2),
    }
    for orientation in range(11):
        expected = upright.get(orientation, upright[1])(drawing())
        data = with_exif(form, turned(orientation))
        assert images.upright_size(images.open_image(data)) == expected.shape[:2]
        difference = np.abs(np.asarray(images.load_image(data), int) - expected)
        assert np.quantile(difference, 0.75) < 12  # all but the edges of a JPEG's blocks


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "MPO"])
def test_a_tag_of_an_odd_type_does_not_touch_the_image(form):
    upright = np.asarray(images.load_image(with_exif(form, turned(6))))
    for tag, (kind, size), count in itertools.product((271, 282, 296, 34665), [*SIZES.items(), (99, 4)], (0, 1, 3)):
        for order, place in (("<", b"6" * size * count), (">", b"6" * size * count), ("<", FAR)):
            data = with_exif(form, (tag, kind, count, place), turned(6, order), order=order)
            assert images.upright_size(images.open_image(data)) == (48, 32), (tag, kind, count, place)
            np.testing.assert_array_equal(np.asarray(images.load_image(data)), upright)


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_an_orientation_of_another_type_counts_as_in_pil(form):
    """A number does, also as a fraction; a text and several numbers do not."""
    odd = [(2, 2, b"6\0"), (3, 2, b"\6\0\6\0"), (4, 1, b"\6\0\0\0"), (1, 1, b"\6"), (11, 1, struct.pack("<f", 6))]
    odd += [(5, 1, struct.pack("<II", 6, 1)), (12, 1, struct.pack("<d", 6)), (7, 2, b"\6\0"), (3, 0, b"")]
    for kind, count, value in odd:
        data = with_exif(form, (ORIENTATION, kind, count, value))
        theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert images.load_image(data).size == theirs.size, (kind, count)
        assert images.upright_size(images.open_image(data)) == theirs.size[::-1]


@pytest.mark.parametrize("about", [b"", b"II", b"II*\0", exif(turned(6))[:12], exif(turned(6))[:18], b"no EXIF at all"])
def test_truncated_exif_counts_as_upright(about):
    for form in ("JPEG", "PNG", "WEBP"):
        assert images.load_image(saved(form, about)).size == (48, 32)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(before=b"", behind=b"", data=None):
    """A PNG with more chunks before and behind its pixels."""
    data = saved("PNG") if data is None else data
    start, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    return data[:start] + before + data[start:end] + behind + data[end:]


LARGE = zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1))
TEXTS = {
    "compressed": chunk(b"zTXt", b"prompt\0\0" + LARGE),
    "international": chunk(b"iTXt", b"prompt\0\1\0\0\0" + LARGE),
    "metadata": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
    "profile": chunk(b"iCCP", b"wide\0\0" + LARGE),
    "plain": 70 * chunk(b"tEXt", b"prompt\0" + b"x" * 2**20),
    "wrong checksum": chunk(b"tEXt", b"prompt\0x")[:-1] + b"?",
    "damaged": chunk(b"zTXt", b"Raw profile type exif\0\0no zlib"),
    "unknown": chunk(b"nOnE", b"?"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_a_png_do_not_matter(kind, tmp_path):
    for data in (png(before=TEXTS[kind]), png(behind=TEXTS[kind])):
        (tmp_path / "a.png").write_bytes(data)
        for source in (data, tmp_path / "a.png"):
            np.testing.assert_array_equal(np.asarray(images.load_image(source)), drawing())


def test_a_png_states_its_orientation_in_any_place():
    about = exif(turned(6))
    raw = f"\nexif\n{len(about) + 6:8}\n{(b'Exif' + bytes(2) + about).hex()}\n".encode()
    xmp = b"XML:com.adobe.xmp\0" + bytes(4) + b'<x tiff:Orientation="6"/>'
    packed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b'<x tiff:Orientation="6"/>')
    tags = [
        chunk(b"eXIf", about),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        chunk(b"iTXt", xmp),
        chunk(b"iTXt", packed),
    ]
    for tag, place in itertools.product(tags, ("before", "behind")):
        data = png(**{place: tag})
        assert images.load_image(data).size == (32, 48) == images.upright_size(images.open_image(data))[::-1]
        assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (32, 48)


def test_pixels_of_a_png_are_those_of_pil():
    """Every bit depth and interlacing, many small chunks of pixels, and what stands behind the end."""
    rng = np.random.default_rng(0)
    for mode, shape, kind in (("RGBA", (33, 41, 4), np.uint8), ("L", (33, 41), np.uint8), ("I;16", (9, 7), np.uint16)):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, shape, kind)).save(file, "PNG")
        data = file.getvalue()
        start, pixels = data.index(b"IDAT") - 4, zlib.decompress(data[data.index(b"IDAT") + 4 : -16])
        packed = zlib.compress(pixels)
        parts = b"".join(chunk(b"IDAT", packed[i : i + 7]) for i in range(0, len(packed), 7))
        again = data[:start] + TEXTS["compressed"] + parts + data[-12:] + b"more"
        np.testing.assert_array_equal(np.asarray(images.load_image(again)), np.asarray(images.load_image(data)))
        assert images.open_image(again).mode == mode
    frames = io.BytesIO()
    first, second = Image.fromarray(drawing()), Image.new("RGB", (48, 32))
    first.save(frames, "PNG", save_all=True, append_images=[second])
    np.testing.assert_array_equal(np.asarray(images.load_image(frames.getvalue())), drawing())


def test_switches_of_pil_are_left_alone():
    images.load_image(png(before=TEXTS["compressed"]))
    assert (PngImagePlugin.MAX_TEXT_CHUNK, ImageFile.LOAD_TRUNCATED_IMAGES) == (2**20, False)


@pytest.mark.parametrize("name", ["cat.jpg", "cat.eps", "cat.png"])
def test_no_format_starts_a_program(tmp_path, monkeypatch, name):
    """EPS is drawn by Ghostscript, which may read and write files."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / name).write_bytes(drawing)
    with pytest.raises(ValueError, match=f"{name}: not a readable image"):
        images.load_image(tmp_path / name)


@pytest.mark.parametrize("form", sorted({*image_files.FORMATS, "JPEG", "PNG"} - {"QOI"}))
def test_every_format_is_read(form, tmp_path):
    path = tmp_path / "a.file"  # by what it holds, not by its name
    Image.fromarray(drawing()).resize((48, 48)).save(path, form)
    assert images.load_image(path).size == images.load_image(path.read_bytes()).size == (48, 48)


def test_heic_is_read_or_its_package_is_named(tmp_path, monkeypatch):
    brand = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pillow_heif", None)
        (tmp_path / "a.heic").write_bytes(brand)
        with pytest.raises(ValueError, match=r"a.heic: .*pip install -e '\.\[heic\]'"):
            images.open_image(tmp_path / "a.heic")
    pillow_heif = pytest.importorskip("pillow_heif")
    file = pillow_heif.from_pillow(Image.fromarray(drawing()).resize((96, 64)))
    file.save(tmp_path / "b.heic", quality=-1)
    pixels = np.asarray(images.load_image(tmp_path / "b.heic"), int)
    assert images.upright_size(images.open_image(tmp_path / "b.heic")) == (64, 96)
    assert np.quantile(np.abs(pixels - np.asarray(Image.fromarray(drawing()).resize((96, 64)), int)), 0.9) < 8
    with pytest.raises(ValueError, match="a.heic: not a readable image"):
        images.open_image(tmp_path / "a.heic")


def photo(mode="RGB"):
    """u8[70 91 3] of a smooth image whose lower half is gray, as missing rows are."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    image = Image.fromarray(pixels).resize((91, 70), Image.Resampling.BICUBIC)
    image.paste((128, 128, 128), (0, 40, 91, 70))
    return image.convert(mode)


FORMS = [{}, {"progressive": True}, {"subsampling": 0, "optimize": True}, {"restart_marker_rows": 1}]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_mark_is_whole(tmp_path, form, mode):
    file, about = io.BytesIO(), exif(turned(6))
    photo(mode).save(file, "JPEG", exif=b"Exif\0\0" + about, **form)
    whole, path = file.getvalue(), tmp_path / "a.jpg"
    expected = np.asarray(images.load_image(whole))
    for data in (whole[:-1], whole[:-2], whole[:-2] + bytes(999), whole + b"more"):
        path.write_bytes(data)
        for source in (data, path):
            image = images.load_image(source)
            np.testing.assert_array_equal(np.asarray(image), expected)
            assert images.notes(image) == []


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_truncated_jpeg_is_refused_unless_so_many_rows_may_be_missing(tmp_path, form):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 96, 3), np.uint8)).save(file, "JPEG", **form)
    whole, path = file.getvalue(), tmp_path / "a.jpg"
    expected, shares = np.asarray(images.load_image(whole)), []
    for left in (0.99, 0.75, 0.5, 0.25):
        cut = int(left * len(whole))
        for data in (whole[:cut], whole[:cut] + bytes(len(whole) - cut)):  # the second as a download that has ended
            path.write_bytes(data)
            with pytest.raises(ValueError, match=r"a.jpg: not a readable image \(it is cut off: .*% of its rows are"):
                images.load_image(path)
            image = images.load_image(path, missing_rows=1)
            missing = image.info["missing_rows"]
            there = round((1 - missing) * 160)
            np.testing.assert_array_equal(np.asarray(image)[:there], expected[:there])
            assert images.notes(image) == [images.TRUNCATED]
            images.load_image(path, missing_rows=missing)
            with pytest.raises(ValueError, match="cut off"):
                images.load_image(path, missing_rows=missing - 0.001)
        shares.append(missing)
    assert sorted(shares) == shares
    if "progressive" not in form:  # rows of noise take equally many bytes; a row of blocks has 16 pixels at most
        pixels = len(whole) - whole.index(b"\xff\xda")
        lost = [(len(whole) - int(left * len(whole))) / pixels for left in (0.99, 0.75, 0.5, 0.25)]
        assert all(-0.01 < share - least < 0.12 for share, least in zip(shares, lost))
    else:  # all rows lack the details that were to come
        assert shares[1] > 0.5 and shares[2:] == [1, 1]


def test_no_other_damage_of_a_jpeg_counts_as_truncation():
    whole = saved("JPEG")
    start = whole.index(b"\xff\xda")
    for data in (whole[:start], whole[: start + 8], b"\xff\xd8\xff", whole[:start] + b"\xff\xd9", whole[:200]):
        with pytest.raises(ValueError, match="not a readable image"):
            images.load_image(data, missing_rows=0.99)
