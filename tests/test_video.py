"""Frames come out of a video as they went in, upright and counted, whatever is wrong with the file; a written one is complete."""

from __future__ import annotations

import builtins
import os
import resource
import struct
import sys
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accelerated import images, video
from accelerated.images import ImageError
from accelerated.video import SUFFIXES, Video, VideoWriter, is_video

RATE = Fraction(25)


def smooth(count: int, height: int, width: int) -> list[np.ndarray]:
    """Return pictures that differ from each other, and whose coding costs little: every quarter of each has its own colour."""
    row, column = np.mgrid[:height, :width]
    colors = np.array([[[230, 40, 40], [40, 200, 60]], [[50, 60, 220], [210, 210, 90]]])
    still = colors[(2 * row) // height, (2 * column) // width]
    return [np.clip(still + 40 * np.sin(i) + [0, i, 0], 0, 255).astype(np.uint8) for i in range(count)]


def write(path: Path, frames: list[np.ndarray], rate: Fraction | float = RATE) -> Path:
    with VideoWriter(path, rate) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def encode(path: Path, frames: list[np.ndarray], codec: str, **options: str) -> Path:
    """Write a video with PyAV alone, in the format that the path's suffix names."""
    index_first = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", container_options=index_first) as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def read(path: Path) -> tuple[list[np.ndarray], int]:
    """Return the frames of a video, and how many were damaged."""
    with Video(path) as opened:
        return list(opened), opened.damaged


def read_damaged(path: Path) -> tuple[list[np.ndarray], int, str | None]:
    """Return the frames of a video, how many were damaged, and the sentence in which it was refused, when it had no frame."""
    seen: list[np.ndarray] = []
    opened = None
    try:
        with Video(path) as opened:
            assert opened.rate > 0
            assert opened.frames is None or opened.frames > 0
            seen.extend(opened)
    except ImageError as caught:
        error = str(caught)
    else:
        return seen, opened.damaged, None
    assert not seen
    assert error.startswith(f"{path}: ")
    assert "\n" not in error
    return seen, opened.damaged if opened else 0, error


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(abs(one.astype(float) - other.astype(float)).mean())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("video")


@pytest.fixture(scope="module")
def whole(scratch: Path) -> bytes:
    """A video of 40 frames, every tenth coded for itself, the others from what came before; the index comes first."""
    return encode(scratch / "whole.mp4", smooth(40, 48, 64), "libx264", g="10", bf="0").read_bytes()


def test_a_name_says_whether_it_is_a_videos() -> None:
    for suffix in SUFFIXES:
        assert is_video(f"a{suffix}")
        assert is_video(Path(f"b/a.b{suffix.upper()}"))
    for name in ("a.png", "a.mp4.png", "mp4", ".mp4", "a.mp3", "a"):
        assert not is_video(name)


@settings(max_examples=12)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.sampled_from([25, Fraction(30000, 1001), 0.1, 1000]))
@example(1, 1, 1, 25)
@example(37, 63, 3, 29.97)
def test_what_is_written_is_read_again(scratch: Path, height: int, width: int, count: int, rate: Fraction | float) -> None:
    frames = [
        np.full((height, width, 3), color, np.uint8) for color in ([250, 20, 90], [10, 200, 30], [255] * 3, [0] * 3)[:count]
    ]
    path = write(scratch / "x.mp4", frames, rate)
    with Video(path) as opened:
        assert opened.frames == count
        if count > 1:  # with one frame, no time passes
            assert abs(opened.rate / Fraction(rate) - 1) < 1e-6
        seen = list(opened)
        assert opened.damaged == 0
    assert len(seen) == count
    for before, after in zip(frames, seen, strict=True):
        assert after.shape == (height + height % 2, width + width % 2, 3)
        assert after.dtype == np.uint8
        assert after.flags.c_contiguous
        # One colour has one Y, Cb and Cr, each rounded to 1 of 219 or 224 steps; crf 18 quantises them again.
        assert abs(after.astype(int) - before[0, 0]).max() <= 6


def test_an_odd_size_repeats_the_last_row_and_column(tmp_path: Path) -> None:
    frame = np.zeros((5, 7, 3), np.uint8)
    frame[4], frame[:, 6] = 255, 255
    (seen,), _ = read(write(tmp_path / "x.mp4", [frame]))
    assert seen.shape == (6, 8, 3)
    assert seen[5].mean() > 200
    assert seen[:, 7].mean() > 200
    assert seen[:3, :5].mean() < 60


def test_opencv_sees_the_same_video(tmp_path: Path) -> None:
    frames = smooth(5, 48, 64)
    path = write(tmp_path / "x.mp4", frames, Fraction(30000, 1001))
    capture = cv2.VideoCapture(str(path))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(30000 / 1001)
    fourcc = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little")
    assert fourcc in (b"h264", b"avc1")
    for before, ours in zip(frames, Video(path), strict=True):
        theirs = capture.read()[1][..., ::-1]
        assert distance(ours, theirs) < 1
        assert distance(before, theirs) < 4
    assert not capture.read()[0]


def test_a_player_can_begin_before_it_has_all(tmp_path: Path) -> None:
    content = write(tmp_path / "x.mp4", smooth(2, 16, 16)).read_bytes()
    boxes, position = [], 0
    while position < len(content):
        (size,) = struct.unpack(">I", content[position : position + 4])
        boxes.append(content[position + 4 : position + 8])
        position += size
    assert boxes.index(b"moov") < boxes.index(b"mdat")


def test_colours_and_chroma_are_said_to_the_player(tmp_path: Path) -> None:
    with av.open(str(write(tmp_path / "x.mp4", smooth(2, 16, 16)))) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)


@pytest.mark.parametrize(("name", "codec", "stated"), [
    ("x.mov", "libx264", 6), ("x.mkv", "libx264", None), ("x.webm", "libvpx-vp9", None), ("x.webm", "libvpx", None),
    ("x.avi", "mpeg4", 6), ("x.mpg", "mpeg2video", None), ("x.m2ts", "libx264", None), ("x.flv", "libx264", None),
    ("x.wmv", "wmv2", None), ("x.mp4", "libx265", 6),
])  # fmt: skip
def test_other_formats_are_read_too(name: str, codec: str, stated: int | None, tmp_path: Path) -> None:
    frames = smooth(6, 48, 64)
    path = encode(tmp_path / name, frames, codec)
    assert is_video(path)
    with Video(path) as opened:
        assert (opened.rate, opened.frames) == (RATE, stated)
        seen = list(opened)
        assert opened.damaged == 0
    assert len(seen) == 6
    for before, after in zip(frames, seen, strict=True):
        assert distance(before, after) < 12


def turned(content: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Write a, b, c, d into the matrix of the track header, at the place that ISO 14496-12 gives it."""
    start = content.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 2 * 4
    a, b, c, d = (value << 16 for value in matrix)
    return content[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + content[start + 36 :]


@pytest.mark.parametrize(("matrix", "turn"), [
    ((1, 0, 0, 1), lambda f: f),
    ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),  # (x, y) -> (-y, x), y down: clockwise, as a phone upright
    ((-1, 0, 0, -1), lambda f: np.rot90(f, 2)),
    ((0, -1, 1, 0), lambda f: np.rot90(f, 1)),
    ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
    ((1, 0, 0, -1), lambda f: f[::-1]),
    ((0, 1, 1, 0), lambda f: f.swapaxes(0, 1)),
    ((0, -1, -1, 0), lambda f: f[::-1, ::-1].swapaxes(0, 1)),
])  # fmt: skip
def test_frames_are_upright(matrix: tuple[int, int, int, int], turn: Callable, tmp_path: Path) -> None:
    frames = smooth(3, 32, 48)
    path = write(tmp_path / "x.mp4", frames)
    plain, _ = read(path)
    path.write_bytes(turned(path.read_bytes(), matrix))
    seen, damaged = read(path)
    assert damaged == 0
    np.testing.assert_array_equal(seen, [turn(frame) for frame in plain])
    for frame, original in zip(seen, frames, strict=True):
        assert frame.flags.c_contiguous
        assert distance(frame, turn(original)) < 4


@given(st.floats(-180, 180), st.booleans())
def test_a_slanted_camera_is_turned_by_the_nearest_quarter(angle: float, mirrored: bool) -> None:
    quarter = round(angle / 90)
    if abs(angle - 90 * quarter) > 44:
        return  # between two quarter turns, either will do
    pixels = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    matrix = np.array([[cosine, sine], [-sine, cosine]])  # (x, y) -> (x cos - y sin, x sin + y cos): clockwise, as y is down
    expected = np.rot90(pixels, -quarter)
    if mirrored:
        matrix, expected = matrix @ np.diag([-1, 1]), expected[:, ::-1]
    np.testing.assert_array_equal(video._upright(pixels, 65536 * matrix), expected)


@given(st.floats(0, 1, exclude_max=True))
@example(0.0)
@example(0.9995)
def test_a_file_cut_short_gives_what_is_there_and_counts_the_rest(scratch: Path, whole: bytes, part: float) -> None:
    path = scratch / "cut.mp4"
    path.write_bytes(whole)
    intact, _ = read(path)
    path.write_bytes(whole[: int(part * len(whole))])
    seen, damaged, error = read_damaged(path)
    if int(part * len(whole)) < whole.index(b"mdat") + 4:
        assert error is not None, "without its index, there is no video"
    else:
        assert len(seen) + damaged == 40
    np.testing.assert_array_equal(seen, intact[: len(seen)])
    assert part < 0.99 or len(seen) > 30


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_file_gives_frames_or_a_sentence(scratch: Path, whole: bytes, data: st.DataObject) -> None:
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + data.draw(st.sampled_from([1, 4, 100, 1000]))] = data.draw(st.binary(max_size=9))
    path = scratch / "damaged.mp4"
    path.write_bytes(content)
    seen, _, _ = read_damaged(path)
    assert len({frame.shape for frame in seen}) <= 1


def test_bytes_lost_in_the_middle_cost_only_the_frames_there(scratch: Path, whole: bytes) -> None:
    """Every tenth frame is coded for itself, so what follows the next of these is as it was."""
    path = scratch / "x.mp4"
    path.write_bytes(whole)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    places = sorted(packet.pos for packet in packets)
    intact, none = read(path)
    assert (len(intact), none) == (40, 0)
    content = bytearray(whole)
    content[places[12] + 4 : places[15]] = bytes(places[15] - places[12] - 4)
    path.write_bytes(content)
    seen, damaged = read(path)
    assert damaged >= 3
    assert len(seen) + damaged == 40
    np.testing.assert_array_equal(seen[:10], intact[:10])
    np.testing.assert_array_equal(seen[-20:], intact[-20:])


def test_a_video_without_one_good_frame_is_named(scratch: Path, whole: bytes) -> None:
    path = scratch / "x.mp4"
    start = whole.index(b"mdat") + 4
    path.write_bytes(whole[:start] + bytes(len(whole) - start))
    with Video(path) as opened, pytest.raises(ImageError, match=r"x.mp4: holds no frame that can be decoded$"):
        list(opened)
    assert opened.damaged == 40


def test_frames_that_are_decoded_with_errors_are_left_out(scratch: Path) -> None:
    """A decoder patches a damaged frame up from its neighbours, and says so: such a frame never was."""
    frames = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(4)]
    path = encode(scratch / "noise.mp4", frames, "libx264", g="1")
    intact, _ = read(path)
    with av.open(str(path)) as container:
        second = next(p for p in container.demux(video=0) if p.pts and p.size)
        start, size = second.pos, second.size
    content = bytearray(path.read_bytes())
    content[start + size // 2 : start + size // 2 + 50] = b"\xa5" * 50
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert len(list(container.decode(video=0))) == 4, "the decoder gives all four"
    seen, damaged = read(path)
    assert damaged == 1
    np.testing.assert_array_equal(seen, [intact[0], *intact[2:]])


class Broken:
    """A container whose reads of these numbers, counted from 1, fail; its end may be PyAV's IndexError."""

    def __init__(self, container: av.container.InputContainer, failing: set[int], crash: bool = False) -> None:
        self.container, self.failing, self.crash, self.reads = container, failing, crash, 0
        self.packets = container.demux(container.streams.video[0])

    def demux(self, stream: av.VideoStream) -> Iterator[av.Packet]:
        while True:
            self.reads += 1
            if self.reads in self.failing:
                raise av.InvalidDataError(1, "a hole")
            try:
                yield next(self.packets)
            except StopIteration:
                if self.crash:
                    raise IndexError("list index out of range") from None
                return

    def close(self) -> None:
        self.container.close()


def test_holes_in_a_file_are_counted_and_a_reader_that_stands_still_is_left(tmp_path: Path) -> None:
    """Frames are coded in another order than they are seen in, so that the decoder holds some back; each ten stand alone."""
    path = encode(tmp_path / "x.mp4", smooth(40, 48, 64), "libx264", g="10", bf="3")
    intact, _ = read(path)
    with Video(path) as opened:
        opened._container = Broken(opened._container, {5, 6, 20} | {40 + i for i in range(99)})
        np.testing.assert_array_equal(list(opened), intact)
        assert opened.damaged == 3, "each stretch counts as one"
    with Video(path) as opened:
        opened._container = Broken(opened._container, set(range(21, 10_000)))
        np.testing.assert_array_equal(list(opened), intact[:20])
        assert opened.damaged == 20, "the index knows of twenty more"
        assert opened._container.reads == 120
    with Video(path) as opened:
        opened._container = Broken(opened._container, set(), crash=True)
        np.testing.assert_array_equal(list(opened), intact)
        assert opened.damaged == 0


@pytest.mark.parametrize(("rates", "expected"), [
    ((Fraction(30000, 1001), Fraction(30)), Fraction(30000, 1001)), ((None, Fraction(24)), 24), ((None, None), 25),
    ((0, Fraction(1, 1000)), Fraction(1, 1000)), ((Fraction(1, 1001), 2_000_000), 25), ((1_000_000, None), 1_000_000),
])  # fmt: skip
def test_a_rate_that_nobody_could_write_is_not_believed(
    rates: tuple, expected: Fraction | int, scratch: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = scratch / "x.mp4"
    path.write_bytes(whole)

    class Stream:
        average_rate, guessed_rate = rates
        frames = 0

    monkeypatch.setattr(Video, "_choose_stream", lambda _: Stream())
    with Video(path) as opened:
        assert opened.rate == expected
        assert opened.frames is None
    VideoWriter(path, opened.rate)


def test_the_end_of_the_frames_is_the_end(scratch: Path, whole: bytes) -> None:
    path = scratch / "x.mp4"
    path.write_bytes(whole)
    with Video(path) as opened:
        assert len(list(opened)) == 40
        with pytest.raises(ValueError, match="x.mp4: its frames are read once"):
            iter(opened)
    with Video(path) as opened:
        frames = iter(opened)
        next(frames)
    with pytest.raises(ValueError, match="x.mp4: is closed"):
        list(frames)


def test_a_size_that_changes_on_the_way_is_scaled_to_the_first(tmp_path: Path) -> None:
    """Two streams of MPEG-2, one behind the other, are a stream."""
    first, second = (encode(tmp_path / f"{size}.mpg", smooth(4, size, 2 * size), "mpeg2video").read_bytes() for size in (32, 64))
    path = tmp_path / "x.mpg"
    path.write_bytes(first + second)
    seen, _ = read(path)
    assert len(seen) > 5
    assert {frame.shape for frame in seen} == {(32, 64, 3)}
    assert distance(seen[-1], smooth(4, 32, 64)[-1]) < 12


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "parts.mp4").write_text("ffconcat version 1.0\nfile real.mp4\n")
    write(tmp_path / "real.mp4", smooth(2, 16, 16))
    images.write_png(tmp_path / "picture.mp4", smooth(1, 16, 16)[0])
    with wave.open(str(tmp_path / "sound.avi"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    cases = {
        **dict.fromkeys(("text.mp4", "empty.mp4", "list.mp4", "parts.mp4", "picture.mp4", "sound.avi"), "not a video of a known"),
        "sound.mp4": "holds no video",
        "none.mp4": "no such file",
        ".": "a folder, where a video file was expected",
        "/dev/null": "not a regular file",
        "text.mp4/x.mp4": "cannot be read",
        f"{'x' * 300}.mp4": "cannot be read",
    }
    for name, words in cases.items():
        with pytest.raises(ImageError, match=words) as caught:
            Video(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(caught.value)


def test_the_cover_of_an_album_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(smooth(1, 16, 16)[0], format="rgb24")))
        container.mux(cover.encode(None))
    with pytest.raises(ImageError, match="holds no video"):
        Video(tmp_path / "song.mp4")


def test_too_many_pixels_are_refused_before_decoding(scratch: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = scratch / "x.mp4"
    path.write_bytes(whole)
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64)
    assert len(read(path)[0]) == 40
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(ImageError, match="64 x 48 are 3,072 pixels, more than the limit of 3,071"):
        Video(path)


def test_frames_that_grow_beyond_the_limit_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.mpg"
    path.write_bytes(b"".join(encode(path, smooth(4, size, size), "mpeg2video").read_bytes() for size in (32, 128)))
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 64)
    seen, damaged = read(path)
    assert 0 < len(seen) <= 4
    assert damaged >= 3


@pytest.mark.parametrize("name", ["video:1.mp4", "-x.mp4", "%d.mp4", "a b\n.mp4", "ü.mp4", os.fsdecode(b"\xff.mp4")])
def test_any_name_will_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file:1").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (Path(name), Path("file:1", name)):
        write(path, smooth(2, 16, 16))
        assert len(read(path)[0]) == 2
    assert set(os.listdir()) == {name, "file:1"}
    assert os.listdir("file:1") == [name]


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.mp4", smooth(2, 16, 16))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(ImageError, match=r"x.mp4: cannot be read \(Permission denied\)"):
        Video(path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.mp4"
    path.write_text("before")
    frames = smooth(3, 16, 16)
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, RATE) as writer:  # noqa: PT012
        writer.write(frames[0])
        assert len(os.listdir(tmp_path)) == 2, "it is being written"
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="no frame was written"), VideoWriter(path, RATE):
        pass
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            write(path, frames)
    assert os.listdir(tmp_path) == ["x.mp4"]
    assert path.read_text() == "before"
    assert len(read(write(path, frames))[0]) == 3, "and then it is replaced"


def test_a_frame_that_does_not_fit_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    frames = smooth(3, 16, 18)
    with VideoWriter(tmp_path / "x.mp4", RATE) as writer:
        for bad, words in (
            (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
            (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\) and uint8, where \(H, W, 3\)"),
            (np.zeros((4, 20000, 3), np.uint8), r"\(4, 20000, 3\), where sides of up to 16,384"),
        ):
            with pytest.raises(ValueError, match=words):
                writer.write(bad)
        for frame in frames:
            writer.write(frame)
            for bad in (frame[:15], frame[:, :16], frame[..., :2], frame[..., 0], frame.astype(np.float32)):
                with pytest.raises(ValueError, match=f"a frame of shape .*{bad.shape[1]}.* expected"):
                    writer.write(bad)
    assert len(read(tmp_path / "x.mp4")[0]) == 3


def test_a_size_that_the_encoder_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_LARGEST_SIDE", 20_000)
    with pytest.raises(ValueError, match=r"x.mp4: frames of shape \(4, 20000, 3\) cannot be coded as H.264"):
        write(tmp_path / "x.mp4", [np.zeros((4, 20_000, 3), np.uint8)])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("limit", [20, 20_000])
def test_a_full_disk_is_an_oserror_and_leaves_nothing(limit: int, tmp_path: Path) -> None:
    noise = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(60)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "x.mp4", noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("rate", [0, -25, float("nan"), float("inf"), 1e-9, 1e9])
def test_an_impossible_rate_is_named(rate: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"a rate of {rate} frames per second"):
        VideoWriter(tmp_path / "x.mp4", rate)


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), VideoWriter(tmp_path / "none" / "x.mp4", RATE):
        pass


def test_without_pyav_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.mp4", smooth(2, 16, 16))
    monkeypatch.setitem(sys.modules, "av", None)
    for use in (lambda: Video(path), lambda: VideoWriter(path, RATE).__enter__()):
        with pytest.raises(ImportError, match=r"videos need PyAV, which .*\[accelerated\]"):
            use()
