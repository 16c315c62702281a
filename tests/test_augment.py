"""Crops, mirroring and colours: one geometry for the image and all that is aligned with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerated.augment import Windows, cut, jitter_colors, normalize, random_windows
from tests.equality import assert_same

SEEDS = st.integers(0, 2**32 - 1)


@given(
    count=st.integers(1, 4),
    batch=st.integers(1, 6),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    crop=st.integers(1, 20),
    flip=st.booleans(),
    seed=SEEDS,
)
def test_every_map_gets_the_same_window(
    count: int, batch: int, height: int, width: int, crop: int, flip: bool, seed: int
) -> None:
    """Numbering every pixel shows where each came from: an image's own, contiguous window, mirrored or not, for all maps."""
    crop = min(crop, height, width)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(count, (batch,), generator=generator)
    windows = random_windows(images, (height, width), crop, flip, generator)

    numbers = torch.arange(count * height * width).view(count, height, width)
    taken = cut(numbers, windows).numpy()
    assert taken.shape == (batch, crop, crop)
    for index, window in zip(images.tolist(), taken, strict=True):
        image, row, column = np.unravel_index(window, (count, height, width))
        assert (image == index).all()
        assert (row == row[0, 0] + np.arange(crop)[:, None]).all()
        step = 1 if crop == 1 else column[0, 1] - column[0, 0]
        assert step in ((1, -1) if flip else (1,))
        assert (column == column[0, 0] + step * np.arange(crop)).all()

    for aligned in (numbers.float()[..., None].expand(-1, -1, -1, 3), numbers.float(), numbers % 2 == 0, (numbers % 200).byte()):
        got = cut(aligned, windows)
        assert got.dtype == aligned.dtype
        assert (got.numpy() == aligned.reshape(count * height * width, *aligned.shape[3:]).numpy()[taken]).all()


def test_every_place_and_both_mirrorings_are_drawn() -> None:
    windows = random_windows(torch.zeros(2000, dtype=torch.long), (6, 5), 4, True, torch.Generator().manual_seed(0))
    seen = {(rows[0].item(), columns.min().item(), (columns[0] > columns[1]).item()) for _, rows, columns in zip(*windows)}  # noqa: B905
    assert seen == {(row, column, mirrored) for row in range(3) for column in range(2) for mirrored in (False, True)}


def test_a_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="crop of 9 x 9 does not fit in images of 8 x 16"):
        random_windows(torch.zeros(1, dtype=torch.long), (8, 16), 9, True, torch.Generator())


def test_cut_reads_channels_last_images_without_a_copy_of_their_layout() -> None:
    """What the network reads, (B, 3, crop, crop), lies in memory channels last, as its convolutions want it."""
    windows = Windows(torch.tensor([0, 0]), torch.arange(4).repeat(2, 1), torch.arange(4).repeat(2, 1))
    image = cut(torch.rand(1, 8, 8, 3), windows).permute(0, 3, 1, 2)
    assert image.is_contiguous(memory_format=torch.channels_last)


@given(amount=st.floats(0, 0.9), seed=SEEDS)
def test_color_jitter_is_one_brightness_and_one_contrast_per_image(amount: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 3, 4, 5, generator=generator, dtype=torch.float64)
    jittered = jitter_colors(image, amount, generator)
    for before, after in zip(image, jittered, strict=True):
        brightness = (after.mean() / before.mean()).item()
        contrast = (after.std() / before.std()).item() / brightness
        for factor in (brightness, contrast):
            assert 1 - amount - 1e-9 <= factor <= 1 + amount + 1e-9
        expected = brightness * (before.mean() + contrast * (before - before.mean()))
        assert_same(after.numpy(), expected.numpy(), rtol=1e-9)
    if amount > 0.01:
        assert len({after.mean().item() / before.mean().item() for before, after in zip(image, jittered, strict=True)}) == 3


@given(seed=SEEDS)
def test_normalize_is_per_channel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image, mean, std = rng.random((2, 3, 4, 5)), rng.random(3), rng.uniform(0.1, 1, 3)
    expected = np.stack([(image[:, c] - mean[c]) / std[c] for c in range(3)], axis=1)
    assert_same(normalize(torch.tensor(image), mean.tolist(), std.tolist()).numpy(), expected)
