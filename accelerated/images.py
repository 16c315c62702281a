"""Pictures in, pictures out: reading photographs safely, writing what a model predicts.

Reading: any picture becomes RGB of shape (H, W, 3), uint8 for sources of 8 bits, float32 in [0, 1] for deeper grey ones. The
conventions are those of OpenCV's `IMREAD_COLOR`, with which the authors' published inference code reads: grey is repeated
three times, alpha is dropped (not blended), EXIF orientation is applied, colour profiles are ignored, of several frames or
pages the first is read. A grey picture of 16 bits keeps them; a coloured one keeps the upper 8 bits of each channel.

Writing: the authors' depth files (16-bit PNG, scaled from the picture's minimum to its maximum; PFM with the values as they
are), a colour map of depth, class ids and their colours. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # a picture of 100 megapixels takes nearly 3 GB of memory from file to files

# Formats that Pillow decodes by itself: EPS, for one, would start another program.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "QOI", "TIFF", "WEBP")

_ORIENTATION = 0x0112  # the EXIF tag
_FLIPS = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}  # axes to flip, after transposing for 5 to 8


class ImageError(ValueError):
    """A picture or video that cannot be used. The message is one sentence that begins with its path."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a picture as RGB of shape (H, W, 3), uint8 or float32 in [0, 1], as the head of this module says.

    The number of pixels is checked against `MAX_PIXELS` before anything is decoded. Raises ImageError for a path that is no
    readable file, content that is no picture or is cut short, too many pixels, and values without a meaning as brightness
    (NaN, or numbers outside the range of the format).
    """
    check_regular_file(path, "an image file")
    try:
        # As a file, not by its path: Pillow maps some TIFFs that it opens by path into memory, and turns those the wrong way.
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata, and about sizes that are checked below
            return _read(file)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None
    except Exception as error:  # a decoder raises whatever malformed or missing data lead it to
        raise ImageError(f"{path}: cannot be read, or is damaged or cut short ({_reason(error)})") from None


def unit_range(values: np.ndarray) -> np.ndarray:
    """Scale finite (H, W) float32 from [minimum, maximum] to [0, 1], in float64; a constant becomes 0."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.zeros(values.shape)
    return (values.astype(np.float64) - low) / (high - low)


def depth_to_uint16(depth: np.ndarray) -> np.ndarray:
    """Scale finite (H, W) float32 from [minimum, maximum] to the integers 0 to 65535, to the nearest; a constant becomes 0."""
    return np.rint(unit_range(depth) * 65535).astype(np.uint16)


def depth_to_color(depth: np.ndarray) -> np.ndarray:
    """Draw finite (H, W) float32 with matplotlib's `inferno`, scaled as in `depth_to_uint16`: near is bright. (H, W, 3) uint8."""
    import matplotlib

    colors = np.rint(matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)
    return colors[np.rint(unit_range(depth) * 255).astype(np.uint8)]


def class_colors(count: int) -> np.ndarray:
    """Return one colour per class id, (count, 3) uint8, different from each other for up to 2048 classes.

    The hue advances by the golden angle, so neighbouring ids contrast; saturation and value change from turn to turn.
    """
    from matplotlib.colors import hsv_to_rgb

    ids = np.arange(count)
    hue = ids * ((3 - 5**0.5) / 2) % 1
    saturation = np.array([0.85, 0.55, 0.70])[ids % 3]
    value = np.array([0.95, 0.60, 0.80, 0.70])[ids % 4]
    return np.rint(hsv_to_rgb(np.stack([hue, saturation, value], axis=-1)) * 255).astype(np.uint8)


def write_png(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Write (H, W) uint8 or uint16, or (H, W, 3) uint8, as PNG. Raises OSError where the file cannot be written."""
    with complete_file(path) as file:
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG", compress_level=4)


def write_pfm(path: str | os.PathLike[str], values: np.ndarray) -> None:
    """Write (H, W) float32 as PFM: rows from the bottom up, little-endian (scale -1). Raises OSError as `write_png`."""
    height, width = values.shape
    with complete_file(path) as file:
        file.write(f"Pf\n{width} {height}\n-1.0\n".encode("ascii"))
        file.write(np.ascontiguousarray(values[::-1], dtype="<f4").data)


def write_npy(path: str | os.PathLike[str], values: np.ndarray) -> None:
    """Write an array of numbers, of any shape and dtype, in NumPy's own format (`numpy.load` reads it). Raises as `write_png`."""
    with complete_file(path) as file:
        np.save(file, values, allow_pickle=False)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Return a picture as `read_image` gives it, uint8 or floating point in [0, 1], as uint8 (to the nearest), of the same shape.

    Raises ValueError for another dtype, and for values outside [0, 1], NaN among them.
    """
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f":
        raise ValueError(f"a picture of dtype {image.dtype}, where uint8, or floating point in [0, 1], was expected")
    if image.size and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"a picture with values from {image.min():g} to {image.max():g}, where 0 to 1 was expected")
    return np.rint(image * image.dtype.type(255)).astype(np.uint8)


@contextlib.contextmanager
def complete_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the name, beside `path`, of a file to be written; it is renamed to `path` when the block ends.

    On an error or an interruption within the block, nothing is left of it, and what `path` was before stays.
    """
    target = Path(path)
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield part
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def complete_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a new binary file that takes its name when it is complete, as `complete_path`. Raises OSError."""
    with complete_path(path) as part, open(part, "xb") as file:
        yield file


def check_regular_file(path: str | os.PathLike[str], expected: str) -> None:
    """Raise ImageError unless `path` is a file that ends; `expected` ("an image file") is for the sentence."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read ({_reason(error)})") from None
    if not stat.S_ISREG(mode):  # a pipe or a device could be read for ever
        raise ImageError(f"{path}: {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}, where {expected} was expected")


def _read(file: IO[bytes]) -> np.ndarray:
    """Read an open file. Raises ImageError, without the path, and what decoders raise."""
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        picture = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise ImageError(f"not an image of a known format ({', '.join(formats)})") from None
    except Image.DecompressionBombError:
        raise ImageError(f"more pixels than the limit of {MAX_PIXELS:,}") from None
    with picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ImageError(f"{width} x {height} are {width * height:,} pixels, more than the limit of {MAX_PIXELS:,}")
        picture.load()
        # The orientation is read after load(), by which Pillow has turned a TIFF upright, and has taken the tag away.
        return _upright(_to_rgb(picture), _orientation(picture))


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """Decode a loaded picture as (H, W, 3). Raises ImageError, without the path, for values that mean no brightness."""
    if picture.mode == "F":
        return _repeat(_unit_grey(np.asarray(picture, dtype=np.float32), 1, "a float image needs values from 0 to 1"))
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return _repeat(_unit_grey(np.asarray(picture), 65535, "an integer image needs values from 0 to 65535"))
    if picture.mode == "RGB":
        return np.array(picture)
    try:
        return np.array(picture.convert("RGB"))
    except ValueError:
        raise ImageError(f"pixels of the kind {picture.mode} have no known conversion to RGB") from None


def _unit_grey(values: np.ndarray, largest: int, expected: str) -> np.ndarray:
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN propagates through both
        raise ImageError(f"it has pixels that are NaN or infinite; {expected}")
    if low < 0 or high > largest:
        raise ImageError(f"its values go from {low:g} to {high:g}; {expected}")
    return values.astype(np.float32) / np.float32(largest)


def _repeat(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of an intact picture: upright, as without metadata
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation, 1 to 8 (anything else counts as 1), to (H, W, 3)."""
    if orientation not in _FLIPS:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(np.flip(pixels, _FLIPS[orientation]))
