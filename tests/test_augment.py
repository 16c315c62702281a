"""Crops, mirroring and colours: one geometry for the image and all that is aligned with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerated.augment import Windows, color_factors, cut, jitter_colors, normalize, random_windows
from tests.equality import assert_same

SEEDS = st.integers(0, 2**32 - 1)


@given(
    count=st.integers(1, 4),
    batch=st.integers(1, 6),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    crop=st.integers(1, 24),
    smallest=st.floats(0.05, 1),
    flip=st.booleans(),
    seed=SEEDS,
)
def test_every_map_gets_the_same_window(
    count: int, batch: int, height: int, width: int, crop: int, smallest: float, flip: bool, seed: int
) -> None:
    """Numbering every pixel shows where each came from: an image's own square window, mirrored or not, the same for all maps."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(count, (batch,), generator=generator)
    windows = random_windows(images, (height, width), crop, smallest, flip, generator)

    numbers = torch.arange(count * height * width).view(count, height, width)
    taken = cut(numbers, windows).numpy()
    assert taken.shape == (batch, crop, crop)
    shorter = min(height, width)
    for index, window in zip(images.tolist(), taken, strict=True):
        image, row, column = np.unravel_index(window, (count, height, width))
        assert (image == index).all()
        rows, columns = row[:, 0], column[0]
        assert (row == rows[:, None]).all() and (column == columns).all()
        if flip and columns[0] > columns[-1]:
            columns = columns[::-1]
        # The i-th of crop places lies (i + 1/2) / crop of the window's side from its start: neighbours are side / crop apart, up
        # to the rounding to whole pixels, and a side is between `smallest` and 1 times the shorter side of the image.
        for places in (rows, columns):
            span = np.arange(crop) / crop
            assert (
                (places - places[0] >= np.floor(smallest * shorter * span)) & (places - places[0] <= np.ceil(shorter * span))
            ).all()

    for aligned in (numbers.float()[..., None].expand(-1, -1, -1, 3), numbers.float(), numbers % 2 == 0, (numbers % 200).byte()):
        got = cut(aligned, windows)
        assert got.dtype == aligned.dtype
        assert (got.numpy() == aligned.reshape(count * height * width, *aligned.shape[3:]).numpy()[taken]).all()


@given(side=st.integers(1, 30), batch=st.integers(1, 4), seed=SEEDS)
def test_the_whole_image_at_its_own_size_is_the_image(side: int, batch: int, seed: int) -> None:
    images = torch.arange(batch)
    windows = random_windows(images, (side, side), side, 1.0, False, torch.Generator().manual_seed(seed))
    numbers = torch.arange(batch * side**2).view(batch, side, side)
    assert (cut(numbers, windows) == numbers).all()


def test_rows_and_columns_scale_alike_and_every_place_and_mirroring_is_drawn() -> None:
    windows = random_windows(torch.zeros(4000, dtype=torch.long), (60, 50), 10, 0.4, True, torch.Generator().manual_seed(0))
    rows, columns = windows.rows.numpy(), windows.columns.numpy()
    mirrored = columns[:, 0] > columns[:, -1]
    assert 0.45 < mirrored.mean() < 0.55
    tall, wide = np.ptp(rows, axis=1), np.ptp(columns, axis=1)
    assert (np.abs(tall - wide) <= 2).all()
    assert tall.min() in (17, 18, 19) and tall.max() in (44, 45, 46)  # 9 / 10 of 20 and of 50
    assert rows.min() <= 1 and rows.max() >= 58 and columns.min() <= 1 and columns.max() >= 48
    small = tall < 25
    assert len(np.unique(rows[small, 0])) > 25 and len(np.unique(columns[small].min(axis=1))) > 20


@pytest.mark.parametrize("smallest", [0.0, 1.01])
def test_a_window_larger_than_the_image_or_empty_is_refused(smallest: float) -> None:
    with pytest.raises(ValueError, match=f"smallest={smallest}"):
        random_windows(torch.zeros(1, dtype=torch.long), (8, 16), 8, smallest, True, torch.Generator())


def test_cut_reads_channels_last_images_without_a_copy_of_their_layout() -> None:
    """What the network reads, (B, 3, crop, crop), lies in memory channels last, as its convolutions want it."""
    windows = Windows(torch.tensor([0, 0]), torch.arange(4).repeat(2, 1), torch.arange(4).repeat(2, 1))
    image = cut(torch.rand(1, 8, 8, 3), windows).permute(0, 3, 1, 2)
    assert image.is_contiguous(memory_format=torch.channels_last)


@given(amount=st.floats(0, 0.9), seed=SEEDS)
def test_color_jitter_is_one_contrast_per_image_and_one_brightness_per_channel(amount: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 3, 4, 5, generator=generator, dtype=torch.float64)
    image -= image.mean(dim=(2, 3), keepdim=True) - 0.5  # every channel's mean is the image's: contrast leaves it alone
    jittered = jitter_colors(image, *color_factors(len(image), amount, generator))
    brightness = jittered.mean(dim=(2, 3)) / 0.5
    contrast = (jittered.std(dim=(2, 3)) / image.std(dim=(2, 3))) / brightness
    assert_same(contrast.numpy(), contrast[:, :1].expand(-1, 3).numpy(), rtol=1e-9)
    for factors in (brightness, contrast[:, 0]):
        assert (factors >= 1 - amount - 1e-9).all() and (factors <= 1 + amount + 1e-9).all()
        assert amount < 0.01 or len(np.unique(factors.numpy())) == factors.numel()
    expected = (0.5 + contrast[:, :, None, None] * (image - 0.5)) * brightness[:, :, None, None]
    assert_same(jittered.numpy(), expected.numpy(), rtol=1e-9)


@given(seed=SEEDS)
def test_normalize_is_per_channel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image, mean, std = rng.random((2, 3, 4, 5)), rng.random(3), rng.uniform(0.1, 1, 3)
    expected = np.stack([(image[:, c] - mean[c]) / std[c] for c in range(3)], axis=1)
    assert_same(normalize(torch.tensor(image), mean.tolist(), std.tolist()).numpy(), expected)
