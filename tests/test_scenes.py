"""Embedded data: the rendered scenes' geometry against analytic planes and spheres, their pictures, their determinism."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mitsuba")

from accelerated.data import scene_objects, scenes
from accelerated.data.scene_description import Camera, Material, SceneDescription, ball, panel
from accelerated.data.scene_materials import palette
from accelerated.data.scene_rendering import geometry, staged
from accelerated.data.scenes import CLASSES, HELD_OUT_SEED, SKY, TRAIN_SEED, load_scenes, render_scene

GREY = Material("diffuse", (0.5, 0.5, 0.5))
SIZE = 16
angles = st.floats(-3.1, 3.1)
cameras = st.builds(
    Camera,
    position=st.tuples(*[st.floats(-5, 5)] * 3),
    yaw=angles,
    pitch=st.floats(-1.4, 1.4),
    roll=st.floats(-0.5, 0.5),
    fov=st.floats(0.5, 1.6),
)


def look(parts: list, camera: Camera, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    with staged(SceneDescription(camera, parts, None)) as stage:
        return geometry(stage, size)


def rays(camera: Camera, size: int = SIZE) -> np.ndarray:
    """(S, S, 3): through the pixels' centres, each with coordinate 1 along the optical axis."""
    offset = (2 * (np.arange(size) + 0.5) / size - 1) * math.tan(camera.fov / 2)
    yaw, pitch = camera.yaw, camera.pitch
    forward = np.array([-math.sin(yaw) * math.cos(pitch), math.cos(yaw) * math.cos(pitch), math.sin(pitch)])
    right = np.array([math.cos(yaw), math.sin(yaw), 0.0])
    up = np.cross(right, forward)
    right, up = (
        math.cos(camera.roll) * right - math.sin(camera.roll) * up,
        math.cos(camera.roll) * up + math.sin(camera.roll) * right,
    )
    return forward + offset[None, :, None] * right - offset[:, None, None] * up


def plane(point: np.ndarray, normal: np.ndarray, half: float, label: str = "wall"):
    normal = normal / np.linalg.norm(normal)
    u = np.cross(normal, [0.3, 0.5, 0.81])
    u /= np.linalg.norm(u)
    v = np.cross(normal, u)
    return panel(label, GREY, point - half * (u + v), 2 * half * u, 2 * half * v)


@settings(max_examples=30, deadline=None)
@given(cameras, st.floats(0.5, 50))
def test_a_wall_across_the_optical_axis_has_one_depth(camera, distance):
    forward = rays(camera).mean((0, 1))
    wall = plane(np.array(camera.position) + distance * forward, forward, 3 * distance)
    depth, label = look([wall], camera)
    np.testing.assert_allclose(depth, distance, rtol=2e-5)
    assert (label == CLASSES.index("wall")).all()


@settings(max_examples=30, deadline=None)
@given(cameras, st.floats(0.5, 50), st.floats(0, 0.7), angles)
def test_the_depth_of_a_tilted_plane_is_the_coordinate_along_the_optical_axis(camera, distance, tilt, around):
    directions = rays(camera)
    forward, origin = directions.mean((0, 1)), np.array(camera.position)
    side = np.cross(forward, [0.2, 0.4, 0.9])
    side /= np.linalg.norm(side)
    normal = math.cos(tilt) * forward + math.sin(tilt) * (math.cos(around) * side + math.sin(around) * np.cross(forward, side))
    point = origin + distance * forward
    slope = directions @ normal
    expected = np.where(slope > 0.1, ((point - origin) @ normal) / np.where(slope > 0.1, slope, 1), 0)
    depth, _ = look([plane(point, normal, 200 * distance)], camera)
    seen = expected > 0
    np.testing.assert_allclose(depth[seen], expected[seen], rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(cameras, st.floats(1, 8), st.floats(0.2, 0.8), st.floats(-0.3, 0.3), st.floats(-0.3, 0.3))
def test_a_ball_before_a_wall_covers_the_pixels_whose_rays_meet_it(camera, distance, share, right, up):
    directions = rays(camera)
    forward, origin = directions.mean((0, 1)), np.array(camera.position)
    centre = distance * (
        forward + right * (directions[0, -1] - directions[0, 0]) / 2 + up * (directions[0, 0] - directions[-1, 0]) / 2
    )
    radius = share * distance
    wall = plane(origin + 3 * distance * forward, forward, 20 * distance)
    depth, label = look([wall, ball("ball", GREY, radius, tuple(origin + centre))], camera)
    a, b, c = (directions**2).sum(-1), directions @ centre, centre @ centre - radius**2
    room = b**2 - a * c
    hit, clear = room > 0, np.abs(room) > 1e-2 * b**2  # at the outline rounding decides
    expected = np.where(hit, (b - np.sqrt(np.maximum(room, 0))) / a, 3 * distance)
    assert ((label == CLASSES.index("ball")) == hit)[clear].all()
    np.testing.assert_allclose(depth[clear], expected[clear], rtol=1e-4)


def stages(count: int, seed: int = 7):
    """The scenes, geometry only, that the generator would render."""
    for index in range(count):
        description = scenes.describe(seed, index)
        with staged(description) as stage:
            yield description, *geometry(stage, 32)


def test_the_classes_and_sky_without_depth():
    found = np.zeros(len(CLASSES), int)
    for description, depth, label in stages(80):
        assert depth.dtype == np.float32
        assert label.dtype == np.uint8
        assert ((label == SKY) == (depth == 0)).all()
        assert np.isfinite(depth).all()
        assert depth.min() >= 0
        assert depth.max() < (12 if any(part.label == "ceiling" for part in description.parts) else 65)
        assert set(np.unique(label)) <= {SKY, *(CLASSES.index(part.label) for part in description.parts)}
        found[np.unique(label)] += 1
    assert len(CLASSES) >= 8
    assert (found > 0).all(), [name for name, times in zip(CLASSES, found, strict=True) if not times]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_taking_a_class_away_uncovers_what_lay_behind_it(index, choice):
    description = scenes.describe(11, index)
    with staged(description) as stage:
        depth, label = geometry(stage, 24)
    present = sorted(set(np.unique(label)) - {SKY})
    if not present:
        return
    taken = present[choice % len(present)]
    rest = [part for part in description.parts if CLASSES.index(part.label) != taken]
    behind, others = look(rest, description.camera, 24) if rest else (np.zeros_like(depth), np.full_like(label, SKY))
    was = label == taken
    assert (others != taken).all()
    np.testing.assert_array_equal(others[~was], label[~was])
    np.testing.assert_allclose(behind[~was], depth[~was], rtol=1e-5)
    assert ((behind[was] > depth[was] * (1 - 1e-5)) | (others[was] == SKY)).all()


@pytest.mark.parametrize("kind", ["crate", "sphere", "pillar", "cone", "table", "chair", "shelf", "tree", "house"])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_objects_stand_on_the_ground_within_their_footprint(kind, seed):
    rng = np.random.default_rng(seed)
    thing = getattr(scene_objects, kind)(rng, palette(rng), 1.0)
    points = []
    for part in thing.parts:
        corners = (
            np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) if part.vertices is None else part.vertices
        )
        points.append(corners @ part.to_world[:3, :3].T + part.to_world[:3, 3])
    points = np.concatenate(points)
    assert points[:, 2].min() == pytest.approx(0, abs=1e-9)
    assert np.hypot(points[:, 0], points[:, 1]).max() <= thing.radius * 1.45 + 0.1


def test_a_scene_is_a_function_of_seed_and_index():
    first, again = render_scene(3, 4, SIZE), render_scene(3, 4, SIZE)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert TRAIN_SEED != HELD_OUT_SEED
    for other in (render_scene(3, 6, SIZE), render_scene(5, 4, SIZE)):
        assert (other.image != first.image).mean() > 0.5


def test_a_scene_is_the_same_at_every_size():
    """Three times the size: the pixels in the middle of each 3 x 3 have the same centres."""
    for index in range(4):
        small, large = render_scene(19, index, 16), render_scene(19, index, 48)
        np.testing.assert_array_equal(small.label, large.label[1::3, 1::3])
        np.testing.assert_allclose(small.depth, large.depth[1::3, 1::3], rtol=1e-5)


def test_scenes_not_worth_showing_are_replaced():
    replaced = 0
    for index in range(24):
        with staged(scenes.describe(23, index)) as stage:
            first = geometry(stage, 32)
        if not scenes.worth_showing(*first):
            scene = render_scene(23, index, 32)
            assert scenes.worth_showing(scene.depth, scene.label)
            replaced += 1
        elif index < 4:
            np.testing.assert_array_equal(render_scene(23, index, 32).depth, first[0])
    assert 0 < replaced < 12
    wall = np.full((32, 32), CLASSES.index("wall"))
    wall[:4], wall[4:8] = CLASSES.index("floor"), CLASSES.index("box")
    slope = np.tile(np.linspace(1, 4, 32, dtype=np.float32), (32, 1))
    assert scenes.worth_showing(slope, wall)
    assert not scenes.worth_showing(slope / 3, wall)  # much of it too close
    assert not scenes.worth_showing(np.where(slope < 3, 0, slope), np.where(slope < 3, SKY, wall))  # mostly sky
    assert not scenes.worth_showing(np.full_like(slope, 2), wall)  # flat
    assert not scenes.worth_showing(slope, np.full_like(wall, CLASSES.index("wall")))


def test_pictures_are_neither_black_nor_blown_out_and_never_from_inside_an_object():
    for index in range(16):
        scene = render_scene(13, index, 32)
        assert scene.image.shape == (32, 32, 3)
        assert scene.image.dtype == np.uint8
        assert 50 < scene.image.mean() < 205
        assert (scene.image.min(-1) > 250).mean() < 0.4
        assert scene.image.std() > 8
        assert scene.depth[scene.depth > 0].min() > 0.2


def test_several_processes_render_what_one_renders(tmp_path):
    serial = load_scenes(17, 5, SIZE, tmp_path / "serial", workers=1, progress=False)
    parallel = load_scenes(17, 5, SIZE, tmp_path / "parallel", workers=2, progress=False)
    for i in range(5):
        for a, b, c in zip(serial, parallel, render_scene(17, i, SIZE), strict=True):
            np.testing.assert_array_equal(a[i], b[i])
            np.testing.assert_array_equal(a[i], c)


def test_bad_arguments_each_give_one_sentence(tmp_path, monkeypatch):
    for arguments in [(1, 0), (1, -3), (-1, 2), (1, 2, 7), (1, 2, 0)]:
        with pytest.raises(ValueError, match="expected at least"):
            load_scenes(*arguments, cache=tmp_path)
    with pytest.raises(ValueError, match="workers 0"):
        load_scenes(1, 2, 16, tmp_path, workers=0)
    for arguments in [(-1, 0), (0, -1), (0, 0, 4)]:
        with pytest.raises(ValueError, match="expected at least"):
            render_scene(*arguments)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/cache.* cannot be written"):
        load_scenes(1, 2, 16, tmp_path / "file" / "cache")
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[train\]"'):
        load_scenes(1, 2, 16, tmp_path / "fresh")
