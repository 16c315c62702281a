"""Back-projection is the inverse of OpenCV's projection; a PLY file is what its specification and another reader say."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from accelerated import pointcloud
from accelerated.pointcloud import point_cloud, relative_depth, write_ply

RNG = np.random.default_rng(0)
SIDES = st.integers(1, 9)
FOVS = st.floats(1, 175)


def depths(low: float = 0.125, high: float = 100) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, st.tuples(SIDES, SIDES), elements=st.floats(low, high, width=32))


@given(depths(), FOVS)
def test_opencv_projects_every_point_back_into_the_centre_of_its_pixel(depth: np.ndarray, fov: float) -> None:
    """OpenCV: x right, y down, z forward, and pixel centres at integers. Its focal length follows from the field of view."""
    points = point_cloud(depth, fov)
    assert points.shape == (*depth.shape, 3)
    assert points.dtype == np.float32
    height, width = depth.shape
    focal = 0.5 * width / math.tan(0.5 * fov * math.pi / 180)
    camera = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    opengl_to_opencv = np.diag([1.0, -1.0, -1.0])
    seen, _ = cv2.projectPoints(
        points.reshape(-1, 3).astype(np.float64), cv2.Rodrigues(opengl_to_opencv)[0], np.zeros(3), camera, None
    )
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    # x and y are rounded to float32 twice, as the ray's slope and as its product with the depth: eps of the way from the middle.
    bound = np.finfo(np.float32).eps * max(width, height) / 2 + 1e-12
    np.testing.assert_allclose(seen.reshape(height, width, 2), np.stack([column, row], axis=-1), rtol=0, atol=bound)
    np.testing.assert_array_equal(points[..., 2], -depth)


def test_the_field_of_view_is_that_of_the_whole_width() -> None:
    """At 90 degrees, the left and right borders of the picture lie as far to the side as they are away."""
    left, right = point_cloud(np.full((1, 2), 4, np.float32), 90)[0]
    np.testing.assert_allclose(left, [-2, 0, -4], atol=1e-6)
    np.testing.assert_allclose(right, [2, 0, -4], atol=1e-6)
    top, bottom = point_cloud(np.full((2, 1), 4, np.float32), 90)[:, 0]
    np.testing.assert_allclose(top, [0, 4, -4], atol=1e-6, err_msg="y is up, and the pixels are square")
    np.testing.assert_allclose(bottom, [0, -4, -4], atol=1e-6)


@given(depths(-100, 100), st.floats(1.01, 1000))
@example(np.array([[-3e38, 3e38]], np.float32), 10.0)
@example(np.array([[1, np.nextafter(np.float32(1), 2)]], np.float32), 10.0)
def test_relative_depth_is_an_inverse_line_from_one_to_the_farthest(inverse: np.ndarray, farthest: float) -> None:
    depth = relative_depth(inverse, farthest)
    assert depth.shape == inverse.shape
    assert depth.dtype == np.float32
    low, high = float(inverse.min()), float(inverse.max())
    if low == high:
        assert (depth == 1).all()
        return
    part = (inverse.astype(np.float64) - low) / (high - low)
    np.testing.assert_allclose(1 / depth.astype(np.float64), part + (1 - part) / farthest, rtol=1e-6)
    np.testing.assert_allclose(depth[inverse == high], 1, rtol=1e-7)
    np.testing.assert_allclose(depth[inverse == low], farthest, rtol=1e-6)


def test_the_farthest_is_ten_unless_said() -> None:
    np.testing.assert_allclose(relative_depth(np.array([[0.0, 1.0]])), [[10, 1]])
    np.testing.assert_allclose(relative_depth(np.array([[0, 200, 255]], np.uint8))[0, ::2], [10, 1], rtol=1e-6)


def parsed(path: Path) -> tuple[list[str], np.ndarray]:
    """Read a PLY file by the text of its specification: a header of lines, then the vertices, packed."""
    header, body = path.read_bytes().split(b"end_header\n", 1)
    vertex = np.dtype([(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")])
    return header.decode("ascii").splitlines(), np.frombuffer(body, vertex)


@given(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4), st.integers(1, 7))
def test_a_ply_file_is_what_its_specification_says(tmp_path_factory: pytest.TempPathFactory, shape: tuple, chunk: int) -> None:
    path = tmp_path_factory.getbasetemp() / "cloud.ply"
    points = RNG.normal(size=(*shape, 3)).astype(np.float32)
    points[..., 2] = -abs(points[..., 2]) - 1
    colors = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointcloud, "_CHUNK", chunk)
        assert write_ply(path, points, colors) == math.prod(shape)
    header, vertices = parsed(path)
    assert header == [
        "ply", "format binary_little_endian 1.0", f"element vertex {math.prod(shape)}",
        "property float x", "property float y", "property float z",
        "property uchar red", "property uchar green", "property uchar blue",
    ]  # fmt: skip
    np.testing.assert_array_equal(np.stack([vertices[n] for n in "xyz"], axis=-1), points.reshape(-1, 3))
    np.testing.assert_array_equal(np.stack([vertices[n] for n in ("red", "green", "blue")], axis=-1), colors.reshape(-1, 3))


def test_another_reader_reads_it(tmp_path: Path) -> None:
    plyfile = pytest.importorskip("plyfile")
    points = np.array([[1, 2, -3], [4, 5, -6]], np.float32)
    write_ply(tmp_path / "cloud.ply", points, np.array([[1, 2, 3], [200, 100, 0]], np.uint8))
    read = plyfile.PlyData.read(str(tmp_path / "cloud.ply"))
    assert [tuple(vertex) for vertex in read["vertex"].data] == [(1, 2, -3, 1, 2, 3), (4, 5, -6, 200, 100, 0)]


def test_only_pixels_of_finite_depth_above_zero_are_written(tmp_path: Path) -> None:
    depth = np.array([[1, 0, -1], [np.nan, np.inf, -np.inf], [2, -0.0, 3e38]], np.float32)
    colors = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    with np.errstate(all="raise"):  # nothing that is asked for by an infinite depth is worth a warning
        points = point_cloud(depth, 170)  # so wide that the last point is farther to the side than float32 goes
    assert write_ply(tmp_path / "cloud.ply", points, colors) == 2
    header, vertices = parsed(tmp_path / "cloud.ply")
    assert "element vertex 2" in header
    np.testing.assert_array_equal(vertices["z"], [-1, -2])
    np.testing.assert_array_equal(vertices["red"], [0, 18])
    middle = point_cloud(np.full((1, 1), np.inf, np.float32), 60)  # no NaN in the picture's middle makes a point of infinity
    with pytest.raises(ValueError, match="none of 1 points is in front of the camera"):
        write_ply(tmp_path / "none.ply", middle, colors[:1, :1])
    assert [path.name for path in tmp_path.iterdir()] == ["cloud.ply"]


def test_wider_numbers_than_float32_are_judged_as_what_is_written(tmp_path: Path) -> None:
    points = np.array([[0, 0, -1e-60], [1e300, 0, -1], [0, 0, -1e300], [1, 2, -3]])
    with np.errstate(over="raise"):
        assert write_ply(tmp_path / "cloud.ply", points, np.zeros((4, 3), np.uint8)) == 1
        assert point_cloud(np.array([[1e300, 1.0]]), 60)[0, :, 2].tolist() == [-np.inf, -1]


def test_whole_numbers_are_depths_too() -> None:
    np.testing.assert_array_equal(point_cloud(np.array([[1, 3]], np.uint16), 60), point_cloud(np.array([[1.0, 3.0]]), 60))


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cloud.ply"
    path.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_ply(path, -np.ones((2, 3), np.float32), np.zeros((2, 3), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["cloud.ply"]
    assert path.read_text() == "before"


@pytest.mark.parametrize("fov", [0, 180, -1, 360, math.nan, math.inf])
def test_an_impossible_field_of_view_is_named(fov: float) -> None:
    with pytest.raises(ValueError, match=f"{fov} degrees, where one between 0 and 180"):
        point_cloud(np.ones((2, 2), np.float32), fov)


@pytest.mark.parametrize("farthest", [1, 0, -3, math.nan, math.inf])
def test_an_impossible_farthest_is_named(farthest: float) -> None:
    with pytest.raises(ValueError, match=f"farthest is {farthest}"):
        relative_depth(np.ones((2, 2), np.float32), farthest)


@pytest.mark.parametrize("values", [np.ones(4), np.ones((1, 2, 2)), np.ones((0, 3)), np.ones((2, 2), bool), np.full((2, 2), "a")])
def test_what_is_no_map_is_named(values: np.ndarray) -> None:
    for function in (relative_depth, lambda depth: point_cloud(depth, 60)):
        with pytest.raises(ValueError, match=r"depth of shape .*\(H, W\) were expected") as caught:
            function(values)
        assert str(values.shape) in str(caught.value)


def test_values_that_cannot_be_mapped_are_named() -> None:
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            relative_depth(np.array([[1, value]], np.float32))


@pytest.mark.parametrize(
    ("points", "colors", "words"),
    [
        (np.ones((4, 2)), np.ones((4, 2), np.uint8), r"points of shape \(4, 2\)"),
        (np.ones((4, 3), int), np.ones((4, 3), np.uint8), "and int64"),
        (np.ones((4, 3)), np.ones((3, 3), np.uint8), r"colors of shape \(3, 3\) and uint8, where \(4, 3\)"),
        (np.ones((4, 3)), np.ones((4, 3)), r"and float64, where \(4, 3\) and uint8"),
        (np.ones((4, 3)), np.ones((4, 4), np.uint8), r"colors of shape \(4, 4\)"),
    ],
)
def test_points_and_colours_that_do_not_fit_are_named(points: np.ndarray, colors: np.ndarray, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        write_ply(tmp_path / "cloud.ply", points, colors)
    assert not list(tmp_path.iterdir())
