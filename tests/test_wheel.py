"""An installed package holds what the checkout does: CUDA sources, recipes, and the compiled extension with its source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("reference", "accelerated", "kernels")

pytestmark = pytest.mark.xdist_group("wheel")  # one process builds it, once


def command(*arguments: str | Path, **options) -> None:
    result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources alone, without the network."""
    copy = tmp_path_factory.mktemp("wheel") / "source"
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.c")
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=built)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    command("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", copy.parent, copy)
    [path] = copy.parent.glob("*.whl")
    return path


def test_a_wheel_holds_every_source_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = wheel.parent / "source"
    expected = {
        path.relative_to(source).as_posix()
        for room in ROOMS
        for path in (source / room).rglob("*")
        if path.is_file() and path.suffix in {".py", ".pyx", ".pxd", ".cu", ".cuh", ".h", ".yaml", ".css", ".js"}
    }
    assert expected >= {"kernels/fusion.cu", "accelerated/recipes/demo.yaml", "reference/nn/conv2d_cython.pyx"}
    compiled = {name for name in packed if name.endswith(".so")}
    assert packed - compiled == expected
    assert {name.partition(".")[0] for name in compiled} == {name.partition(".")[0] for name in expected if name.endswith(".pyx")}


def test_a_wheel_works_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import pathlib, sys
import accelerated, kernels, reference
home = pathlib.Path(sys.argv[1])
assert all(home in pathlib.Path(room.__file__).parents for room in (accelerated, kernels, reference))
assert reference.implementation() == "cython", reference.implementation()
from kernels.source import FOLDER
assert (FOLDER / "fusion.cu").read_text() and list((FOLDER / "host").glob("*.h"))
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command("-c", code, tmp_path, cwd=tmp_path, env=environment)
