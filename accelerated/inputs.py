"""What people name as input, and the pictures and videos it stands for: files, folders, patterns like "photos/**/*.jpg"."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from accelerated.images import ImageError
from accelerated.video import is_video

PICTURE_SUFFIXES = (
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tif",
    ".tiff", ".webp",
)  # fmt: skip


def expand(name: str | os.PathLike[str]) -> list[Path]:
    """Return the files that `name` stands for, in natural order (2 before 10), without opening any.

    - A folder: the pictures and videos directly in it, known by their suffixes; hidden files do not count.
    - A pattern with *, ? or [...] (unless there is a file of that very name): the pictures and videos that match it, where "**"
      stands for any number of folders. Python expands it, so that it means the same quoted as unquoted, and on every system.
    - Anything else: itself, be it there or not.
    Raises ImageError for a folder or a pattern without pictures and videos, and for a folder that cannot be read.
    """
    path = Path(name)
    if path.is_dir():
        try:
            found = _known(path / child for child in os.listdir(path))
        except OSError as error:
            raise ImageError(f"{path}: this folder cannot be read ({error.strerror})") from None
        if not found:
            raise ImageError(f"{path}: a folder without pictures and videos, known by suffixes such as .jpg, .png and .mp4")
        return found
    if os.path.lexists(path) or not glob.has_magic(str(name)):
        return [path]
    found = _known(map(Path, glob.iglob(str(name), recursive=True)))
    if not found:
        raise ImageError(f"{name}: no picture or video matches this pattern")
    return found


def _known(paths: Iterable[Path]) -> list[Path]:
    """Those that are pictures or videos by their names, each once, in natural order."""
    known = {
        path
        for path in paths
        if (path.suffix.lower() in PICTURE_SUFFIXES or is_video(path)) and not path.name.startswith(".") and not path.is_dir()
    }
    return sorted(known, key=_natural)


def _natural(path: Path) -> tuple[list[tuple[list[tuple[str, int]], str]], str]:
    """A key by which x2 comes before x10, in names as in folders; upper and lower case alike, but never equal."""
    parts = []
    for part in path.parts:
        # Letters and the number after them, in turns; the text itself decides between x1 and x01.
        pieces = [(letters, int(digits or -1)) for letters, digits in re.findall(r"([^0-9]*)([0-9]*)", part.casefold())]
        parts.append((pieces, part))
    return parts, str(path)
