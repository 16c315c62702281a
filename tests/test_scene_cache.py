"""The cache of rendered scenes: what it reuses, and what it does not trust. Rendering is replaced by drawing random numbers."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accelerated.data import scenes
from accelerated.data.scenes import CLASSES, Scene, contact_sheet, load_scenes

pytest.importorskip("mitsuba")  # load_scenes asks for it before it renders


def drawn(seed: int, index: int, size: int) -> Scene:
    """A stand-in for a rendered scene, as much a function of (seed, index)."""
    rng = np.random.default_rng([seed, index])
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Scene(image, rng.random((size, size), dtype=np.float32), image[..., 0] % len(CLASSES))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Rendering replaced by drawing; the indices drawn, in order."""
    made: list[int] = []

    def render(seed: int, index: int, size: int) -> Scene:
        made.append(index)
        return drawn(seed, index, size)

    monkeypatch.setattr(scenes, "render_scene", render)
    monkeypatch.setattr(scenes, "RECORD_EVERY", 2)
    return made


def load(cache: Path, count: int, seed: int = 1):
    arrays = load_scenes(seed, count, 8, cache, workers=1, progress=False)
    for i in range(count):
        for array, expected in zip(arrays, drawn(seed, i, 8), strict=True):
            np.testing.assert_array_equal(array[i], expected)
    return arrays


def test_a_cache_begins_every_larger_one(tmp_path, calls):
    arrays = load(tmp_path, 5)
    assert isinstance(arrays.image, np.memmap)
    assert not arrays.image.flags.writeable
    assert [(a.shape, str(a.dtype)) for a in arrays] == [((5, 8, 8, 3), "uint8"), ((5, 8, 8), "float32"), ((5, 8, 8), "uint8")]
    load(tmp_path, 3)
    load(tmp_path, 9)
    load(tmp_path, 5)
    assert calls == list(range(9))
    load(tmp_path, 2, seed=2)
    assert calls == [*range(9), 0, 1]


def folder(cache: Path) -> Path:
    return cache / "seed-1-size-8"


def truncate(name: str):
    def damage(cache: Path) -> None:
        path = folder(cache) / name
        path.write_bytes(path.read_bytes()[:-40])

    return damage


def remove(name: str):
    return lambda cache: (folder(cache) / name).unlink()


def change(field: str, value: object):
    def damage(cache: Path) -> None:
        path = folder(cache) / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate("image.npy"), "cut short"),
        (truncate("depth.npy"), "cut short"),
        (remove("label.npy"), "missing"),
        (remove("manifest.json"), "no manifest"),
        (truncate("manifest.json"), "cannot be read"),
        (change("version", -1), "version=-1"),
        (change("size", 9), "size=9"),
        (change("seed", 5), "seed=5"),
        (change("scenes", 3), "cannot be read"),
    ],
)
def test_a_damaged_cache_is_rendered_again_with_one_sentence(tmp_path, calls, damage, sentence):
    load(tmp_path, 4)
    damage(tmp_path)
    with pytest.warns(UserWarning, match=sentence) as told:
        load(tmp_path, 4)
    assert len(told) == 1
    assert calls == [0, 1, 2, 3] * 2
    load(tmp_path, 4)
    assert len(calls) == 8


@pytest.mark.parametrize("name", ["image", "depth", "label"])
def test_a_changed_byte_costs_its_scene_only(tmp_path, calls, name):
    load(tmp_path, 6)
    path = folder(tmp_path) / f"{name}.npy"
    array = np.lib.format.open_memmap(path, mode="r+")
    array[3, 2, 5] += 1
    array.flush()
    with pytest.warns(UserWarning, match="the first is 3"):
        load(tmp_path, 6)
    assert calls == [*range(6), 3]


def test_a_killed_render_leaves_nothing_that_is_trusted(tmp_path, calls):
    """A process that dies by SIGKILL in its sixth scene: four are on record, the fifth is in the files and must not count."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from accelerated.data import scenes
from tests.test_scene_cache import drawn
def render(seed, index, size):
    if index == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return drawn(seed, index, size)
scenes.render_scene, scenes.RECORD_EVERY = render, 2
scenes.load_scenes(1, 8, 8, {str(tmp_path)!r}, workers=1, progress=False)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    digests = json.loads((folder(tmp_path) / "manifest.json").read_text())["scenes"]
    assert [known is not None for known in digests] == [True] * 4 + [False] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an interrupted render is no damage
        load(tmp_path, 8)
    assert calls == [4, 5, 6, 7]


def test_a_full_disk_gives_one_sentence(tmp_path, calls):
    """A limit on the size of files stands in for the disk."""
    load(tmp_path, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"scene cache .*seed-1-size-8 cannot be written"):
            load_scenes(1, 6, 8, tmp_path, workers=1, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    load(tmp_path, 6)


def test_a_contact_sheet_shows_each_scene_once(tmp_path, calls):
    arrays = load(tmp_path, 5)
    contact_sheet(arrays, tmp_path / "sheet.png", columns=2)
    pixels = np.array(Image.open(tmp_path / "sheet.png"))
    assert pixels.shape == (3 * 12 - 4, 2 * 28 - 4, 3)
    np.testing.assert_array_equal(pixels[12:20, 28:36], arrays.image[3])
    with pytest.raises(ValueError, match="0 columns"):
        contact_sheet(arrays, tmp_path / "sheet.png", columns=0)
