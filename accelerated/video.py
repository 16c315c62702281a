"""Videos in, videos out: the frames of a file as pictures, and pictures as the frames of an MP4 file. Needs PyAV.

Reading: every frame becomes RGB (H, W, 3) uint8, upright: the display matrix, by which phones say how they were held, is applied,
to the nearest quarter turn. Frames that cannot be decoded are left out and counted. Pixels are taken as square, sound is ignored.

Writing: H.264 with 4:2:0 chroma in an MP4 file, which browsers and players take; its index is at the front, so it plays while
it is still being fetched. The file appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Self, cast

import numpy as np

from accelerated import images
from accelerated.images import ImageError

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer, OutputContainer

SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm", ".wmv",
)  # fmt: skip

# Demuxers that read one file, and no other that it names: a playlist could name any file or address.
_FORMATS = "asf,avi,flv,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpeg,mpegts,mpegvideo,ogg"
_BT709 = 1  # in ITU-T H.273, for the primaries, the transfer function and the matrix
_LARGEST_SIDE = 16_384  # of libx264
_SLOWEST, _FASTEST = Fraction(1, 1000), 1_000_000  # frames per second
_MOST_FAILED_READS = 100  # in a row, after which the rest of a damaged file is given up


def is_video(path: str | os.PathLike[str]) -> bool:
    """Say whether the name of a file ends like a video's, in either case: nothing is opened."""
    return Path(path).suffix.lower() in SUFFIXES


class Video:
    """The frames of a video file, from the first to the last, once.

        with Video("walk.mp4") as video:
            for frame in video:  # (H, W, 3) uint8, RGB, all of the first one's size
                ...

    `rate`: frames per second, a Fraction, on average where they vary, and 25 where the file states none between 0.001 and
    1,000,000. `frames`: their number as the file states it, or None. `damaged`: how many so far were left out because they could
    not be decoded without errors. A stretch that cannot be read counts as one; at the end, what a file cut short lacks is
    added, as far as its index tells.

    Raises ImageError for a path that is no readable file, for content that is no video of a known format or holds no frame
    (which may show only where the frames end), and for frames of more than `images.MAX_PIXELS`, before any is decoded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.damaged = 0
        self._path = path
        self._begun = self._closed = False
        self._container = _open_container(path)
        try:
            self._stream = self._choose_stream()
        except ImageError:
            self._container.close()
            raise
        rates = (self._stream.average_rate, self._stream.guessed_rate)
        self.rate = next((rate for rate in rates if rate and _SLOWEST <= rate <= _FASTEST), Fraction(25))
        self.frames: int | None = self._stream.frames or None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed = True
        self._container.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._begun:
            raise ValueError(f"{self._path}: its frames are read once, and it has to be opened again to be read again")
        self._begun = True
        return self._pictures()

    def _choose_stream(self) -> VideoStream:
        from av.stream import Disposition

        # The cover of an album is a video stream too.
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise ImageError(f"{self._path}: holds no video")
        codec = streams[0].codec_context
        if codec is None:
            raise ImageError(f"{self._path}: its video is coded in a way that cannot be decoded here")
        width, height = codec.width, codec.height
        if width * height > images.MAX_PIXELS:
            pixels = f"{width} x {height} are {width * height:,} pixels"
            raise ImageError(f"{self._path}: {pixels}, more than the limit of {images.MAX_PIXELS:,}")
        codec.options = _pixel_limit()  # for a size that changes on the way
        codec.thread_type = "SLICE"  # not by frames: those on their way would be lost with a damaged one
        return streams[0]

    def _pictures(self) -> Iterator[np.ndarray]:
        """Yield the decoded frames as arrays."""
        size, matrix = None, np.eye(2)
        for frame in self._decoded_frames():
            if size is None:
                size, matrix = (frame.width, frame.height), _display_matrix(frame)
            # A size that changes on the way, as in the recording of a call, is scaled to the first.
            yield _upright(frame.to_ndarray(format="rgb24", width=size[0], height=size[1]), matrix)
        if size is None:
            raise ImageError(f"{self._path}: holds no frame that can be decoded")

    def _decoded_frames(self) -> Iterator[VideoFrame]:
        """Yield the frames that are decoded without errors, and count the others."""
        for packet in self._packets():
            try:
                frames = self._stream.decode(packet)
            except _pyav().FFmpegError:
                self.damaged += 1
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self.damaged += 1
                else:
                    yield frame

    def _packets(self) -> Iterator[Packet[VideoStream] | None]:
        """Yield the packets, and last an empty one or None, which empties the decoder; count what is missing."""
        error = _pyav().FFmpegError
        found = holes = failures = 0
        packets = self._container.demux(self._stream)
        while failures < _MOST_FAILED_READS:
            if self._closed:  # FFmpeg would read freed memory
                raise ValueError(f"{self._path}: is closed, so no frame can be read")
            try:
                packet = next(packets)
            except (StopIteration, IndexError):  # PyAV raises the second where a stream was added on the way
                break
            except error:
                holes += failures == 0
                failures += 1
                packets = self._container.demux(self._stream)  # goes on behind what could not be read
                continue
            found += packet.size > 0
            failures = 0
            yield packet
        else:
            yield None
        self.damaged += max(holes, len(self._stream.index_entries) - found)


class VideoWriter:
    """An MP4 file to which frames are written, one after the other: H.264, constant quality, `rate` frames per second.

        with VideoWriter("depth.mp4", video.rate) as writer:
            writer.write(frame)  # (H, W, 3) uint8, RGB

    All frames have the size of the first. H.264's chroma has half the resolution, so an odd height or width is made even by
    repeating the last row or column. The file takes its name when the block ends; where it ends in an error, or no frame was
    written (a ValueError), nothing is left, and what had the name before stays.

    Raises ValueError for a `rate` outside 0.001 to 1,000,000, OSError where the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], rate: float | Fraction) -> None:
        if not _SLOWEST <= rate <= _FASTEST:
            raise ValueError(f"a rate of {rate} frames per second, where 0.001 to 1,000,000 was expected")
        self._path = path
        self._rate = Fraction(rate).limit_denominator(1_000_000)
        self._stream: VideoStream | None = None
        self._shape: tuple[int, ...] = ()
        self._count = 0

    def __enter__(self) -> Self:
        av = _pyav()
        with contextlib.ExitStack() as stack:
            part = stack.enter_context(images.complete_path(self._path))
            part.touch(exist_ok=False)  # FFmpeg would first notice at the first frame that it cannot write there
            container = av.open(f"file:{part}", "w", format="mp4", container_options={"movflags": "+faststart"})
            self._container: OutputContainer = stack.enter_context(container)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        with contextlib.ExitStack() as stack:
            stack.push(self._open)  # closes the file, and then renames or removes it
            if kind is None:
                if self._stream is None:
                    raise ValueError(f"{self._path}: no frame was written, and a video needs one")
                with self._coding(self._shape):
                    self._container.mux(self._stream.encode(None))  # what the encoder still holds
            return stack.pop_all().__exit__(kind, error, trace)

    def write(self, frame: np.ndarray) -> None:
        """Add a frame (H, W, 3) uint8, RGB.

        Raises ValueError for another kind of array, another size than the first frame's, and sides beyond 16,384, after which the
        next frame may be written; ValueError for more pixels than H.264 has, and OSError where the file cannot be written.
        """
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0 or frame.dtype != np.uint8:
            raise ValueError(f"a frame of shape {frame.shape} and {frame.dtype}, where (H, W, 3) and uint8 were expected")
        if max(frame.shape) > _LARGEST_SIDE:
            raise ValueError(f"a frame of shape {frame.shape}, where sides of up to {_LARGEST_SIDE:,} pixels were expected")
        if self._shape not in ((), frame.shape):
            raise ValueError(f"a frame of shape {frame.shape}, where that of the first, {self._shape}, was expected")
        with self._coding(frame.shape):
            picture = self._picture(frame)
            if self._stream is None:
                self._stream, self._shape = self._add_stream(frame.shape), frame.shape
            self._container.mux(self._stream.encode(picture))
        self._count += 1

    @contextlib.contextmanager
    def _coding(self, shape: tuple[int, ...]) -> Iterator[None]:
        try:
            yield
        except _pyav().FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise ValueError(f"{self._path}: frames of shape {shape} cannot be coded as H.264 ({error.strerror})") from None

    def _add_stream(self, shape: tuple[int, ...]) -> VideoStream:
        # Quality at which the eye sees no difference, at a speed that does not hold up a network.
        stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": "18", "preset": "veryfast"})
        stream.height, stream.width = (side + side % 2 for side in shape[:2])
        stream.pix_fmt = "yuv420p"
        # Unsaid, each player would guess how the colours were coded.
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        return stream

    def _picture(self, frame: np.ndarray) -> VideoFrame:
        """Return the next picture of the stream, of an even height and width, as the encoder takes it."""
        odd = [(0, side % 2) for side in frame.shape[:2]]
        rgb = _pyav().VideoFrame.from_ndarray(np.ascontiguousarray(np.pad(frame, [*odd, (0, 0)], mode="edge")), format="rgb24")
        picture = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        picture.pts, picture.time_base = self._count, 1 / self._rate
        return picture


def _pyav() -> ModuleType:
    """Import PyAV. Raises ImportError with a sentence where it is missing."""
    try:
        import av
    except ImportError:
        raise ImportError("videos need PyAV, which `pip install 'dense-prediction-transformers[accelerated]'` brings") from None
    return av


def _pixel_limit() -> dict[str, str]:
    return {"max_pixels": str(images.MAX_PIXELS)}


def _open_container(path: str | os.PathLike[str]) -> InputContainer:
    av = _pyav()
    images.check_regular_file(path, "a video file")
    # Titles in no known encoding are no obstacle. Of PyAV 19 they are read when asked for, which nobody does.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    try:
        with open(path, "rb"):  # whatever fails from here on is the content's fault
            pass
        return av.open(
            f"file:{os.fsdecode(path)}",
            options=_pixel_limit(),
            container_options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
            **lenient,
        )
    except av.FFmpegError as error:
        raise ImageError(f"{path}: not a video of a known format, or damaged ({error.strerror})") from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None


def _display_matrix(frame: VideoFrame) -> np.ndarray:
    """Return how the frame is to be shown: [[a, b], [c, d]] of the matrix of ISO 14496-12, (x, y) -> (a x + c y, b x + d y)."""
    side_data = cast("Mapping[str, bytes]", frame.side_data)
    if "DISPLAYMATRIX" not in side_data:
        return np.eye(2)
    matrix = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), np.int32)
    return matrix.reshape(3, 3)[:2, :2].astype(np.float64)


def _upright(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn and mirror (H, W, 3) by what is nearest to the display matrix among quarter turns and their mirror images."""
    (a, b), (c, d) = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):  # columns become rows
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
