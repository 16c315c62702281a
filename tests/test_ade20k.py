"""The names and colours of ADE20K's 150 classes are those that are published."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from accelerated.ade20k import COLORS, NAMES


def test_the_names_are_the_benchmarks_in_its_order() -> None:
    """The digest is that of the first synonyms of GluonCV's table, one a line; the benchmark renamed class 89 since."""
    assert len(NAMES) == len(set(NAMES)) == 150
    names = list(NAMES)
    assert names[:8] == ["wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed"]
    assert (names[12], names[20], names[149]) == ("person", "car", "flag")
    assert names[89] == "television"
    names[89] = "television receiver"
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert digest == "f9dbd8a75a0722c971d8c82db76dc205e06cb422d98153f4e5bbf90408ef5438"


def test_the_colours_are_those_of_two_published_tables() -> None:
    """The digest is that of the bytes of MMSegmentation's table, and of GluonCV's, which has one colour more, in front."""
    assert COLORS.shape == (150, 3)
    assert COLORS.dtype == np.uint8
    digest = hashlib.sha256(COLORS.tobytes()).hexdigest()
    assert digest == "ce475c9151035eff51f4cf27fd7d906959b1480f6d15b9423ae2417c1b23a0ed"


def test_only_road_and_skyscraper_share_a_colour() -> None:
    colors = [tuple(color) for color in COLORS.tolist()]
    alike = [NAMES[i] for i in range(150) if colors.count(colors[i]) > 1]
    assert alike == ["road", "skyscraper"]


def test_nobody_can_change_the_table() -> None:
    with pytest.raises(ValueError, match="read-only"):
        COLORS[0] = 0
