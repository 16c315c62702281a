"""Reading any picture as RGB or refusing it in a sentence; writing files that are complete and say what was predicted."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from accelerated import images
from accelerated.images import ImageError, read_image

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)


def saved(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("kind", ["1", "L", "LA", "P", "RGB", "RGBA", "P with transparency"])
def test_every_kind_of_pixel_is_read_as_opencv_reads_it(kind: str, tmp_path: Path) -> None:
    rgba = Image.fromarray(RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8), "RGBA")
    mode = kind[:1] if kind.startswith("P") else kind
    picture = rgba.convert(mode)
    options = {"transparency": bytes(range(100))} if "transparency" in kind else {}
    path = saved(tmp_path / "x.png", picture, **options)
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1])


def test_cmyk_is_turned_into_light(tmp_path: Path) -> None:
    inks = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0]]], np.uint8)
    path = saved(tmp_path / "x.tif", Image.fromarray(inks, "CMYK"))
    light = [[[255, 255, 255], [0, 0, 0], [0, 255, 255], [255, 0, 255], [255, 255, 0]]]
    np.testing.assert_array_equal(read_image(path), np.array(light, np.uint8))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_of_sixteen_bits_keeps_them(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    assert cv2.imwrite(str(path), DEEP)
    pixels = read_image(path)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(np.rint(pixels * 65535), np.stack([DEEP] * 3, axis=-1))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_sixteen_bits_keep_the_upper_eight(suffix: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    bgr = RNG.integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    assert cv2.imwrite(str(path), bgr)
    np.testing.assert_array_equal(read_image(path), bgr[..., 2::-1] >> 8)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("orientation", "row", "column"), [
    (1, "top", "left"), (2, "top", "right"), (3, "bottom", "right"), (4, "bottom", "left"),
    (5, "left", "top"), (6, "right", "top"), (7, "right", "bottom"), (8, "left", "bottom"),
])  # fmt: skip
def test_orientation_is_that_of_the_exif_standard(
    orientation: int, row: str, column: str, deep: bool, suffix: str, tmp_path: Path
) -> None:
    """The standard says at which visual side the stored row 0 and the stored column 0 lie."""
    stored = np.stack([DEEP] * 3, axis=-1) if deep else PICTURE
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"x.{suffix}", Image.fromarray(DEEP if deep else PICTURE), exif=exif)
    swapped = row in ("left", "right")
    upright = np.zeros_like(stored.swapaxes(0, 1) if swapped else stored)
    height, width = upright.shape[:2]
    for r in range(stored.shape[0]):
        for c in range(stored.shape[1]):
            place = {row: r, column: c}
            y = place["top"] if "top" in place else height - 1 - place["bottom"]
            x = place["left"] if "left" in place else width - 1 - place["right"]
            upright[y, x] = stored[r, c]
    pixels = read_image(path)
    np.testing.assert_array_equal(np.rint(pixels * 65535) if deep else pixels, upright)


def test_damaged_metadata_do_not_spoil_a_picture(tmp_path: Path) -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\xff\xff\xff\xff\0\0\0\0"):
        path = saved(tmp_path / "x.png", Image.fromarray(PICTURE), exif=exif)
        np.testing.assert_array_equal(read_image(path), PICTURE)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[0.5, np.nan]], np.float32), "NaN"),
        (np.array([[0.5, np.inf]], np.float32), "infinite"),
        (np.array([[0.0, 200.0]], np.float32), "from 0 to 200; a float image needs values from 0 to 1"),
        (np.array([[0, -3]], np.int32), "from -3 to 0; an integer image needs values from 0 to 65535"),
        (np.array([[0, 65536]], np.int32), "from 0 to 65536"),
    ],
)
def test_values_without_a_meaning_are_named(values: np.ndarray, words: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.tif", Image.fromarray(values))
    with pytest.raises(ImageError, match=words) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_float_and_wide_integer_images_are_brightness(tmp_path: Path) -> None:
    for values, largest in ((np.array([[0, 0.25, 1]], np.float32), 1), (np.array([[0, 1, 65535]], np.int32), 65535)):
        pixels = read_image(saved(tmp_path / "x.tif", Image.fromarray(values)))
        np.testing.assert_allclose(pixels[..., 0] * largest, values, rtol=1e-7)


ENCODINGS = [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
             ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("PPM", {})]  # fmt: skip
SMOOTH = ((np.add.outer(np.arange(40) * 3, np.arange(50) * 2)[..., None] + [0, 20, 50]) % 256).astype(np.uint8)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images") / "x"


def encoded(encoding: tuple[str, dict]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(SMOOTH).save(file, encoding[0], **encoding[1])
    return file.getvalue()


@given(st.sampled_from(ENCODINGS), st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_or_was_complete(scratch: Path, encoding: tuple[str, dict], part: float) -> None:
    content = encoded(encoding)
    scratch.write_bytes(content)
    whole = read_image(scratch)
    scratch.write_bytes(content[: int(part * len(content))])
    try:
        pixels = read_image(scratch)
    except ImageError:
        return
    np.testing.assert_array_equal(pixels, whole)


@settings(max_examples=150)  # so that decoders raise everything they raise
@given(st.sampled_from(ENCODINGS), st.data())
def test_a_damaged_file_is_read_or_refused_but_never_raises_anything_else(
    scratch: Path, encoding: tuple[str, dict], data: st.DataObject
) -> None:
    content = bytearray(encoded(encoding))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    scratch.write_bytes(content)
    try:
        pixels = read_image(scratch)
    except ImageError:
        return
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


def test_what_is_no_image_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    (tmp_path / "words.ppm").write_text("P5 four four 255\n")
    cases = {
        "words.ppm": "damaged",
        **dict.fromkeys(("text.jpg", "empty.png", "page.eps"), "not an image of a known format"),
        "none.png": "no such file",
        ".": "a folder, where an image file was expected",
        "/dev/null": "not a regular file",
        "text.jpg/x.png": "cannot be read",
        f"{'x' * 300}.png": "cannot be read",
    }
    for name, words in cases.items():
        with pytest.raises(ImageError, match=words) as caught:
            read_image(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(caught.value)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (100_000, 100_000)])
def test_too_many_pixels_are_refused_before_decoding(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))  # decoding would find it truncated
    with pytest.raises(ImageError, match=r"more .*the limit of 100,000,000"):
        read_image(path)


def test_the_limit_itself_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.png", Image.fromarray(PICTURE))
    monkeypatch.setattr(images, "MAX_PIXELS", 35)
    np.testing.assert_array_equal(read_image(path), PICTURE)
    monkeypatch.setattr(images, "MAX_PIXELS", 34)
    with pytest.raises(ImageError, match="7 x 5 are 35 pixels"):
        read_image(path)


FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(FLOATS)
@example(np.array([[-3e38, 0, 3e38]], np.float32))  # their difference is no float32
@example(np.array([[1e-45, 0]], np.float32))
def test_sixteen_bits_go_from_the_minimum_to_the_maximum(depth: np.ndarray) -> None:
    scaled = images.depth_to_uint16(depth)
    assert scaled.dtype == np.uint16
    if depth.min() == depth.max():
        assert not scaled.any()
        return
    assert (scaled[depth == depth.min()] == 0).all()
    assert (scaled[depth == depth.max()] == 65535).all()
    low, high = float(depth.min()), float(depth.max())
    assert (abs(scaled / 65535 * (high - low) + low - depth) <= (0.5 / 65535 + 1e-15) * (high - low)).all()


def test_near_is_bright_and_a_constant_has_a_colour() -> None:
    ramp = images.depth_to_color(np.arange(256, dtype=np.float32)[None])
    assert ramp.shape == (1, 256, 3)
    assert (np.diff(ramp.astype(int).sum(axis=-1)) >= 0).mean() > 0.9
    assert ramp[0, [0, -1]].tolist() == [[0, 0, 4], [252, 255, 164]], "the ends of inferno"
    np.testing.assert_array_equal(images.depth_to_color(np.full((2, 3), 7, np.float32)), np.tile(ramp[0, 0], (2, 3, 1)))


def test_no_two_classes_share_a_colour() -> None:
    colors = images.class_colors(2048)
    assert colors.dtype == np.uint8
    assert len({tuple(color) for color in colors.tolist()}) == 2048
    np.testing.assert_array_equal(images.class_colors(9), colors[:9])
    near = np.abs(np.diff(colors[:300].astype(int), axis=0)).sum(axis=1)
    assert near.min() > 60, "neighbouring ids look alike"


@pytest.mark.parametrize("pixels", [PICTURE, PICTURE[..., 0], DEEP, PICTURE[::-1, ::-1]])
def test_png_is_what_opencv_reads(pixels: np.ndarray, tmp_path: Path) -> None:
    images.write_png(tmp_path / "x.png", pixels)
    read = cv2.imread(str(tmp_path / "x.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(read[..., ::-1] if pixels.ndim == 3 else read, pixels)
    assert read.dtype == pixels.dtype


@given(FLOATS)
def test_pfm_is_what_its_format_says_and_opencv_reads(scratch: Path, depth: np.ndarray) -> None:
    path = scratch.with_suffix(".pfm")
    images.write_pfm(path, depth)
    height, width = depth.shape
    header, size, scale, data = path.read_bytes().split(b"\n", 3)
    assert (header, size, float(scale)) == (b"Pf", f"{width} {height}".encode(), -1.0)
    np.testing.assert_array_equal(np.frombuffer(data, "<f4").reshape(height, width)[::-1], depth)
    np.testing.assert_array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), depth)


@pytest.mark.parametrize("write", [images.write_png, images.write_pfm])
def test_a_failed_write_leaves_what_was_there(write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_text("before")
    with pytest.raises((TypeError, ValueError)):
        write(path, np.full((2, 2), {}))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(path, np.zeros((2, 2), np.uint16))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_text() == "before"


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    images.write_png(tmp_path / "x.png", PICTURE)
    assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "plain").stat().st_mode
