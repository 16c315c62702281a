"""`accelerated.serve`: what the page shows, from arrays; and the server itself, as a process that is driven over HTTP."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import accelerated
from accelerated import drawing, images, pointcloud
from accelerated.outputs import DEFAULT_FOV
from accelerated.serve import __main__ as command
from accelerated.serve import views
from tests.equality import assert_same

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("serve")  # one server
needs_gradio = pytest.mark.skipif(
    not any((Path(p) / "gradio").is_dir() for p in sys.path), reason="the page needs Gradio, the extra `serve`"
)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A picture with structure at every scale, so that a shifted or a mirrored one is another."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse).astype(int) + rng.integers(-20, 21, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


# ---- views ----


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_a_preview_keeps_the_proportions_and_a_readable_size(height, width):
    h, w = views.preview_size(height, width)
    assert views.SHORTEST <= max(h, w) <= views.LONGEST
    scale = max(h, w) / max(height, width)
    assert scale == 1 or not views.SHORTEST <= max(height, width) <= views.LONGEST
    assert min(h, w) >= 1 and abs(min(h, w) - min(height, width) * scale) <= max(0.51, 1 - min(height, width) * scale)


def test_a_preview_of_a_deep_picture_is_rounded_and_others_are_resampled():
    deep = np.linspace(0, 1, 600 * 500 * 3, dtype=np.float32).reshape(600, 500, 3)
    np.testing.assert_array_equal(views.preview(deep), np.rint(deep * 255).astype(np.uint8))
    large = picture(0, 700, 2048)
    smaller = views.preview(large)
    assert smaller.shape == (350, 1024, 3)
    means = large.reshape(350, 2, 1024, 2, 3).mean((1, 3))
    assert np.abs(smaller - means).mean() < 6  # averaged: a picked pixel would be off by the noise, 8 on the average


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_sampling_picks_the_pixel_below_each_centre(height, width, h, w):
    rows, columns = np.indices((height, width))
    picked = views.sampled(np.stack([rows, columns], -1), (h, w))
    assert picked.shape == (h, w, 2)
    # The centre (r + 1/2) H / h lies within pixel `row` of the source.
    centre = (np.arange(h) + 0.5) * height / h
    assert (picked[:, 0, 0] <= centre).all() and (centre <= picked[:, 0, 0] + 1).all()
    centre = (np.arange(w) + 0.5) * width / w
    assert (picked[0, :, 1] <= centre).all() and (centre <= picked[0, :, 1] + 1).all()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.data())
def test_a_click_on_the_preview_means_the_pixel_below_it(h, w, height, width, data):
    x, y = data.draw(st.integers(0, w - 1)), data.draw(st.integers(0, h - 1))
    rows, columns = np.indices((height, width))
    below = views.sampled(np.stack([columns, rows], -1), (h, w))[y, x]
    assert views.pixel_below((x, y), (h, w), (height, width)) == tuple(below)


def test_a_click_outside_counts_as_the_nearest_pixel():
    assert views.pixel_below((-5, 99), (10, 20), (100, 200)) == (5, 95)
    assert views.pixel_below((20, 10), (10, 20), (10, 20)) == (19, 9)


def test_a_mark_rings_its_point_and_changes_nothing_else():
    shown = np.clip(picture(0, 300, 400), 1, 254)
    before = shown.copy()
    drawn = views.marked(shown, (150, 60), (600, 800))  # the centre of that pixel is at 75.25, 30.25 of the preview
    np.testing.assert_array_equal(shown, before)
    changed = (drawn != shown).any(-1)
    assert set(np.unique(drawn[changed])) == {0, 255}  # black and white, to be seen on dark and on bright
    ys, xs = np.nonzero(changed)
    np.testing.assert_allclose([xs.mean(), ys.mean()], [75.25, 30.25], atol=0.75)
    assert not changed[28:33, 73:78].any(), "the marked patch itself must stay visible"
    assert 8 <= xs.max() - xs.min() <= 30 and 8 <= ys.max() - ys.min() <= 30


def test_a_legend_names_the_classes_by_their_share():
    classes = np.zeros((10, 100), np.uint8)
    classes[:4], classes[9, 99], classes[9, :20] = 2, 3, 4
    text = views.legend(classes, np.arange(15, dtype=np.uint8).reshape(5, 3), ("a", "b", "<c>", "d", "e"), most=3)
    rows = re.findall(r"rgb\((.*?)\)\"></i>(.*?)<b>(.*?)</b>", text)
    assert rows == [("0,1,2", "a", "58 %"), ("6,7,8", "&lt;c&gt;", "40 %"), ("12,13,14", "e", "2.0 %")]
    assert "and 1 more" in text
    assert "more" not in views.legend(classes, np.zeros((5, 3), np.uint8), tuple("abcde"))


@given(st.floats(1e-6, 1))
def test_a_share_reads_as_a_percentage_of_two_figures(share):
    text = views.percent(share)
    if share < 0.001:
        assert text == "&lt; 0.1 %"
    else:
        assert abs(float(text.removesuffix(" %")) - 100 * share) <= (0.5 if share >= 0.0995 else 0.05) + 1e-9


def decoded(text: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    data = json.loads(text)
    points = np.frombuffer(base64.b64decode(data["points"]), "<f4").reshape(-1, 3)
    return data, points, np.frombuffer(base64.b64decode(data["colors"]), np.uint8).reshape(-1, 3)


def test_a_cloud_holds_every_point_with_its_colour_and_the_axis_it_turns_about():
    depth = np.random.default_rng(0).uniform(1, 9, (6, 8)).astype(np.float32)
    shown = picture(1, 12, 16)
    data, points, colors = decoded(views.cloud(depth, shown, 70))
    np.testing.assert_array_equal(points, pointcloud.point_cloud(depth, 70).reshape(-1, 3))
    np.testing.assert_array_equal(colors, shown[1::2, 1::2].reshape(-1, 3))
    assert data["fov"] == 70 and data["aspect"] == 8 / 6
    assert data["pivot"] == pytest.approx([0, 0, -np.median(depth)])
    neighbours = pointcloud.point_cloud(np.ones((6, 8), np.float32), 70)
    assert data["step"] == pytest.approx(float(neighbours[0, 1, 0] - neighbours[0, 0, 0]), rel=1e-6)


def test_a_cloud_leaves_out_what_has_no_place():
    depth = np.array([[1, np.nan, -2], [np.inf, 0, 3]], np.float32)
    shown = picture(2, 2, 3)
    data, points, colors = decoded(views.cloud(depth, shown, 50))
    np.testing.assert_array_equal(points, pointcloud.point_cloud(depth, 50)[[0, 1], [0, 2]])
    np.testing.assert_array_equal(colors, shown[[0, 1], [0, 2]])
    assert data["pivot"] == [0, 0, -2]
    _, points, colors = decoded(views.cloud(np.zeros((2, 3), np.float32), shown, 50))
    assert len(points) == len(colors) == 0


@pytest.mark.parametrize("shape", [(3, 5), (2000, 1000), (1, 500_000), (300, 300)])
def test_a_large_depth_map_is_thinned_not_mixed(shape):
    values = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    thin = views.cloud_depth(values)
    assert thin.size <= 1.05 * views.CLOUD_POINTS or min(shape) == 1
    assert thin.size == values.size if values.size <= views.CLOUD_POINTS else thin.size >= 0.9 * views.CLOUD_POINTS * 0.01
    assert np.isin(thin, values).all() and (np.diff(thin, axis=1) > 0).all() and (np.diff(thin, axis=0) > 0).all()


# ---- the command line, as far as it needs no server ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing says which model"),
        (["--weights", "w", "--port", "65536"], "'65536': expected a number from 0"),
        (["--weights", "w", "--port", "-1"], "expected"),
        (["--weights", "w", "--port", "²"], "'²': expected a number"),
        (["--weights", "w", "--size", "0"], "'0': expected pixels"),
        (["--weights", "w", "--size", "3x4x5"], "'3x4x5': expected pixels"),
        (["--weights", "w", "--share"], "--share"),
        (["--weights", "w", "--host", "0.0.0.0"], "--host"),
    ],
)
def test_a_command_line_without_sense_is_one_sentence_and_status_2(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_sizes_are_numbers_or_pairs():
    options = command._options
    assert options(["--weights", "w", "--size", "352x1216"]).size == (352, 1216)
    assert options(["--weights", "w", "--size", "384"]).size == 384
    assert options(["--weights", "w"]).size is None and options(["--weights", "w"]).port == 7860


def run(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "accelerated.serve"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_without_gradio_one_sentence_names_the_extra(tmp_path):
    code = """
import sys
sys.modules["gradio"] = None
from accelerated.serve.__main__ import main
sys.exit(main())
"""
    found = run("--weights", "w.safetensors", "--port", "0", code=code)
    assert found.returncode == 1 and found.stdout == ""
    assert re.fullmatch(r"error: the page needs Gradio, .*pip install '\.\[serve\]'\n", found.stderr)


def test_a_port_in_use_is_one_sentence_before_anything_is_loaded(capsys):
    with command.listen(0) as taken:
        port = taken.getsockname()[1]
        assert command.main(["--weights", "nothing.safetensors", "--port", str(port)]) == 1
    assert capsys.readouterr().err == (
        f"error: port {port} of 127.0.0.1 is in use: choose another with --port, or 0 for any free one\n"
    )


@needs_gradio
def test_weights_that_are_not_there_are_one_sentence(capsys):
    assert command.main(["--weights", "nothing.safetensors", "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert "nothing.safetensors" in error and error.startswith("error: ") and error.count("\n") == 1


# ---- the server ----


class Server:
    """A running `python -m accelerated.serve`, its model, and its end."""

    def __init__(self, model: accelerated.DPT, folder: Path) -> None:
        weights = folder / "weights.safetensors"
        accelerated.save(model, weights)
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.predictor = accelerated.Predictor(weights, device="cpu")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "accelerated.serve", "--weights", str(weights), "--device", "cpu", "--port", "0"],
            cwd=ROOT, env=os.environ | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1", "GRADIO_SERVER_NAME": "0.0.0.0"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait(self) -> Server:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.match(r"(http://127\.0\.0\.1:(\d+)) ", line)
        assert match, line + self.stop()[1]
        self.url, self.port = match[1], int(match[2])
        return self

    def stop(self) -> tuple[int, str]:
        """Press Ctrl-C; return the exit status and what was said on stderr."""
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


class Visitor:
    """A browser tab, as the server sees one: uploads, events with a session of its own, and files fetched."""

    def __init__(self, server: Server) -> None:
        self.url, self.session = server.url, secrets.token_hex(6)
        self.config = json.loads(self.get("/config"))
        self.events = {event["api_name"]: event for event in self.config["dependencies"]}
        self.names = {part["id"]: part["props"].get("elem_id") or part["type"] for part in self.config["components"]}

    def get(self, path: str, **headers: str) -> bytes:
        url = path if path.startswith("http") else self.url + path
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.read()

    def upload(self, content: bytes, name: str = "picture.png") -> dict[str, Any]:
        boundary = secrets.token_hex(16)
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        request = urllib.request.Request(
            f"{self.url}/gradio_api/upload",
            head + content + f"\r\n--{boundary}--\r\n".encode(),
            {"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            [path] = json.load(answer)
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def call(self, event: str, *data: Any, index: list[int] | None = None) -> dict[str, Any]:
        """Send an event; return what it sets, by the names of the components."""
        body = {"data": data, "fn_index": self.events[event]["id"], "session_hash": self.session}
        body |= {"event_data": {"index": index, "value": None} if index else None}
        request = urllib.request.Request(
            f"{self.url}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            wanted = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{self.url}/gradio_api/queue/data?session_hash={self.session}", timeout=60) as stream:
            for line in stream:
                message = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
                if message.get("msg") == "process_completed" and message["event_id"] == wanted:
                    assert message["success"], message
                    names = [self.names[part] for part in self.events[event]["outputs"]]
                    return dict(zip(names, message["output"]["data"], strict=True))
        raise AssertionError("the server closed the stream without an answer")

    def open(self, content: bytes, name: str = "picture.png") -> dict[str, Any]:
        return self.call("open", self.upload(content, name))

    def pixels(self, file: dict[str, Any]) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.get(file["url"]))).convert("RGB"))

    def attention(self, event: str, block: int, head: str, *more: Any, index: list[int] | None = None) -> np.ndarray:
        answer = self.call(event, None, block, head, *more, index=index)
        return self.pixels(answer["dpt-attention"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    torch.manual_seed(0)
    model = accelerated.create_model("dpt_tiny")
    torch.nn.init.constant_(model.head.conv3.bias, 1.0)  # keep the last ReLU open, so that there is a depth to see
    with torch.no_grad():
        for block in model.backbone.blocks:
            block.attn.qkv.weight *= 8  # random weights look everywhere alike; these prefer some patches
    server = Server(model, tmp_path_factory.mktemp("serve"))
    try:
        yield server.wait()
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def listening(pid: int) -> set[tuple[str, int]]:
    """(address in hexadecimal, port) of every TCP socket that a process listens on, from Linux's /proc."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # one that was closed since the folder was listed
            sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and fields[9] in sockets:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


@needs_gradio
def test_it_listens_on_the_loopback_address_and_on_no_other(server):
    assert listening(server.process.pid) == {("0100007F", server.port)}
    with socket.create_connection(("127.0.0.1", server.port), timeout=5):
        pass


@needs_gradio
def test_it_answers_its_own_pages_only_which_fetch_from_nowhere_else(server):
    visitor = Visitor(server)
    with urllib.request.urlopen(server.url) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    own = f"127.0.0.1:{server.port}"
    assert visitor.get("/config", Host=f"localhost:{server.port}") and visitor.get("/config", Origin=f"http://{own}")
    for headers in ({"Host": "example.org"}, {"Host": "127.0.0.1:1"}, {"Origin": "http://example.org"}, {"Origin": "null"}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            visitor.get("/config", **headers)
    assert visitor.config["analytics_enabled"] is False


@needs_gradio
@pytest.mark.parametrize("size", [(70, 110), (1100, 1060)])
def test_an_upload_shows_the_picture_beside_its_depth_and_in_space(server, size):
    image = picture(3, *size)
    visitor = Visitor(server)
    answer = visitor.open(encoded(image))
    assert answer["dpt-status"] == "" and answer["dpt-results"]["visible"] is True
    left, right = (visitor.pixels(file) for file in answer["dpt-compare"])
    depth = server.predictor(image)
    np.testing.assert_array_equal(left, views.preview(image))
    np.testing.assert_array_equal(right, images.depth_to_color(views.smooth(depth, left.shape[:2])))
    assert len(np.unique(right.reshape(-1, 3), axis=0)) > 50, "the model draws nothing: the test would see nothing"
    _, points, colors = decoded(visitor.call("turn", None, DEFAULT_FOV)["dpt-cloud"])
    thin = views.cloud_depth(pointcloud.relative_depth(depth))
    assert_same(points, pointcloud.point_cloud(thin, DEFAULT_FOV).reshape(-1, 3), 1e-5)
    np.testing.assert_array_equal(colors, views.sampled(left, thin.shape).reshape(-1, 3))
    _, wider, _ = decoded(visitor.call("fov", None, 100)["dpt-cloud"])
    assert_same(wider, pointcloud.point_cloud(thin, 100).reshape(-1, 3), 1e-5)


def expected_attention(server: Server, image: np.ndarray, *arguments: Any) -> np.ndarray:
    """The picture that `Predictor.attention` gives, painted and marked."""
    shown = views.preview(image)
    painted = drawing.heat(shown, views.smooth(server.predictor.attention(image, *arguments), shown.shape[:2]))
    point = arguments[2]
    return painted if point is None else views.marked(painted, point, image.shape[:2])


@needs_gradio
def test_a_click_shows_the_attention_of_its_patch(server):
    image = picture(4, 300, 520)  # its preview is itself
    visitor = Visitor(server)
    visitor.open(encoded(image))
    seen = {None: visitor.attention("first", 2, "mean")}
    np.testing.assert_array_equal(seen[None], expected_attention(server, image, 2, None, None))
    for point, block, head in [((0, 0), 2, "mean"), ((519, 299), 0, "1"), ((400, 60), 1, "2"), ((70, 250), 2, "0")]:
        seen[point] = visitor.attention("click", block, head, index=list(point))
        found = expected_attention(server, image, block, None if head == "mean" else int(head), point)
        np.testing.assert_array_equal(seen[point], found)
    assert len({array.tobytes() for array in seen.values()}) == len(seen)
    # The controls keep the point that was clicked, until the readout token is asked for, or another picture comes.
    other = visitor.attention("block", 0, "0", None)
    np.testing.assert_array_equal(other, expected_attention(server, image, 0, 0, (70, 250)))
    other = visitor.attention("head", 0, "mean", None)
    np.testing.assert_array_equal(other, expected_attention(server, image, 0, None, (70, 250)))
    np.testing.assert_array_equal(visitor.attention("readout", 2, "mean"), seen[None])
    np.testing.assert_array_equal(visitor.attention("head", 2, "mean", None), seen[None])


@needs_gradio
def test_a_click_on_a_reduced_preview_means_the_pixel_of_the_picture(server):
    image = picture(5, 500, 2048)
    visitor = Visitor(server)
    visitor.open(encoded(image))
    answer = visitor.call("click", None, 1, "mean", index=[900, 30])
    assert "pixel (1801, 61)" in answer["dpt-attention-words"] and "block 1, the mean of 3 heads" in answer["dpt-attention-words"]
    found = visitor.pixels(answer["dpt-attention"])
    np.testing.assert_array_equal(found, expected_attention(server, image, 1, None, (1801, 61)))


@needs_gradio
def test_turned_and_deep_pictures_are_read_as_predict_reads_them(server):
    visitor = Visitor(server)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.rot90(picture(7, 200, 520), -1)
    left = visitor.pixels(visitor.open(encoded(picture(7, 200, 520), exif=exif))["dpt-compare"][0])
    np.testing.assert_array_equal(left, upright)
    grey = np.linspace(0, 65535, 520 * 200).reshape(520, 200).astype(np.uint16)
    left = visitor.pixels(visitor.open(encoded(grey))["dpt-compare"][0])
    np.testing.assert_array_equal(left[..., 1], np.rint(grey.astype(np.float32) / 257).astype(np.uint8))


@needs_gradio
def test_bad_uploads_are_a_sentence_on_the_page_and_the_server_lives_on(server):
    visitor = Visitor(server)
    good = encoded(picture(8, 64, 64))
    visitor.open(good)
    bad = {
        "letter.png": (b"Dear model, this is no picture.", "letter.png: not an image of a known format"),
        "half.png": (good[: len(good) // 2], "half.png: cannot be read, or is damaged or cut short"),
        "empty.jpg": (b"", "empty.jpg: not an image of a known format"),
        "huge.png": (encoded(np.zeros((12000, 9000), bool)), "huge.png: 9000 x 12000 are 108,000,000 pixels, more than"),
    }
    for name, (content, said) in bad.items():
        answer = visitor.open(content, name)
        assert said in answer["dpt-status"] and str(server.temporary) not in answer["dpt-status"]
        assert 'role="alert"' in answer["dpt-status"] and "Traceback" not in answer["dpt-status"]
        assert answer["dpt-results"]["visible"] is False and answer["dpt-compare"] is None
        assert visitor.call("first", None, 2, "mean")["dpt-attention"] is None
        assert visitor.call("turn", None, 55)["dpt-cloud"] == ""
        assert visitor.call("click", None, 2, "mean", index=[1, 1])["dpt-attention"] is None
    assert visitor.open(good)["dpt-status"] == ""
    assert "Drop a photograph" in visitor.call("open", None)["dpt-status"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (images.ImageError("folder/x/cat.png: too many pixels"), "cat.png: too many pixels"),
        (ValueError("too thin"), "cat.png: too thin"),
        (MemoryError("not enough memory for this"), "cat.png: not enough memory for this"),
        (MemoryError(), "cat.png: not enough memory for a picture of this size"),
    ],
)
def test_what_an_upload_is_at_fault_for_is_said_without_the_path_of_the_server(error, said):
    from accelerated.serve.page import sentence

    assert sentence("folder/x/cat.png", "cat.png", error) == said
    with pytest.raises(KeyError, match="a mistake of ours"):
        sentence("folder/x/cat.png", "cat.png", KeyError("a mistake of ours"))


@needs_gradio
def test_names_and_messages_are_text_on_the_page_not_markup(server):
    from accelerated.serve.page import Trouble, _wrong

    assert "&lt;img&gt;" in _wrong(Trouble("<img>")) and "<img>" not in _wrong(Trouble("<img>"))


@needs_gradio
def test_too_many_bytes_and_foreign_paths_are_refused(server):
    visitor = Visitor(server)
    assert visitor.config["max_file_size"] == command.MAX_FILE_SIZE
    with pytest.raises(AssertionError, match="success"):
        visitor.call("open", {"path": str(ROOT / "docs/images/demo.png"), "meta": {"_type": "gradio.FileData"}})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        visitor.get(f"/gradio_api/file={ROOT / 'README.md'}")
    assert visitor.open(encoded(picture(9, 40, 40)))["dpt-status"] == ""


@needs_gradio
def test_visitors_in_turn_keep_their_own_pictures_and_points(server):
    mine = [picture(10, 256, 512), picture(11, 512, 256)]
    points = [(500, 20), (20, 500)]
    visitors = [Visitor(server) for _ in mine]
    for visitor, image in zip(visitors, mine, strict=True):
        visitor.open(encoded(image))
    for visitor, point in zip(visitors, points, strict=True):
        visitor.attention("click", 1, "mean", index=list(point))
    for visitor, image, point in zip(visitors, mine, points, strict=True):  # the first acts after the second has
        np.testing.assert_array_equal(visitor.attention("head", 2, "0", None), expected_attention(server, image, 2, 0, point))
        data, _, _ = decoded(visitor.call("turn", None, 55)["dpt-cloud"])
        assert data["aspect"] == pytest.approx(image.shape[1] / image.shape[0], rel=0.02)
        seen = visitor.attention("click", 0, "1", index=[7, 9])
        np.testing.assert_array_equal(seen, expected_attention(server, image, 0, 1, (7, 9)))
        np.testing.assert_array_equal(visitor.attention("readout", 1, "2"), expected_attention(server, image, 1, 2, None))


@needs_gradio
def test_visitors_at_the_same_time_see_their_own_pictures(server):
    pictures = [picture(10, 256, 512), picture(11, 512, 256), picture(12, 300, 512)]
    wrong: list[str] = []

    def visit(image: np.ndarray, point: tuple[int, int], block: int) -> None:
        visitor = Visitor(server)
        for _ in range(2):
            left, _ = visitor.open(encoded(image))["dpt-compare"]
            if not np.array_equal(visitor.pixels(left), image):
                wrong.append("another visitor's picture")
            found = visitor.attention("click", block, "mean", index=list(point))
            if not np.array_equal(found, expected[point]):
                wrong.append(f"another visitor's attention at {point}")

    visits = list(zip(pictures, [(500, 20), (20, 500), (250, 150)], range(3), strict=True))
    expected = {point: expected_attention(server, image, block, None, point) for image, point, block in visits}
    threads = [threading.Thread(target=visit, args=each) for each in visits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads) and not wrong


@needs_gradio
def test_ctrl_c_ends_it_with_status_0_and_leaves_nothing(server):
    """The last test of the server, while a page is open."""
    Visitor(server).upload(b"left behind")
    assert [path.name for path in server.temporary.glob("*/*/*")] and len(list(server.temporary.iterdir())) == 1
    with urllib.request.urlopen(f"{server.url}/gradio_api/heartbeat/{secrets.token_hex(6)}", timeout=60):
        status, said = server.stop()
    assert status == 0
    # The forged path of another test is all that may have been complained of.
    assert said.count("Traceback") == said.count("InvalidPathError: Cannot move") and "ASGI" not in said
    assert not list(server.temporary.iterdir())


def test_the_model_is_used_by_one_visitor_at_a_time(tmp_path):
    """Attention is read by hooks on the one model, which would read another visitor's picture."""
    from accelerated.serve.page import Studio

    class Counting:
        """A model that notices when it is called while it is being called."""

        task, metric, config = "depth", False, {"encoder": "none"}
        running, most = 0, 0

        def __call__(self, image: np.ndarray) -> np.ndarray:
            self.running += 1
            self.most = max(self.most, self.running)
            time.sleep(0.05)
            self.running -= 1
            return np.ones(image.shape[:2], np.float32)

        def attention(self, image: np.ndarray, block: int, head: int | None, point: tuple[int, int] | None) -> np.ndarray:
            return self(image)

    (tmp_path / "p.png").write_bytes(encoded(picture(14, 64, 64)))
    studio = Studio(Counting())
    scene = studio.scene(str(tmp_path / "p.png"))
    calls = [lambda: studio.scene(str(tmp_path / "p.png")), lambda: studio.attention(scene, 0, None, None)] * 2
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert studio.predictor.most == 1


# ---- models of other kinds, without a server ----


@needs_gradio
def test_a_convolutional_midas_has_no_attention_to_show():
    from accelerated.dpt import from_config
    from accelerated.serve.page import build
    from tests import midas

    torch.manual_seed(0)
    page = build(accelerated.Predictor(from_config(midas.small("midas_v21_small")), device="cpu"))
    names = {part["props"].get("elem_id") for part in page.get_config_file()["components"]}
    assert "dpt-attention" not in names and "dpt-cloud" in names


def test_a_metric_model_is_shown_in_metres(tmp_path):
    from accelerated.serve.page import Studio

    class Metres:
        """A model whose answer is known: metres that grow from left to right."""

        task, metric, config = "depth", True, {"encoder": "none"}

        def __call__(self, image: np.ndarray) -> np.ndarray:
            return np.tile(np.linspace(2, 42, image.shape[1], dtype=np.float32), (image.shape[0], 1))

    image = picture(13, 520, 600)
    (tmp_path / "p.png").write_bytes(encoded(image))
    studio = Studio(Metres())
    scene = studio.scene(str(tmp_path / "p.png"))
    depth = Metres()(image)
    assert "from 2 to 42 metres" in scene.caption
    np.testing.assert_array_equal(scene.answer, images.depth_to_color(1 / depth))  # near is bright
    np.testing.assert_array_equal(scene.depth, views.cloud_depth(depth))


@needs_gradio
def test_a_segmentation_model_shows_classes_with_their_legend_and_no_space(tmp_path):
    from accelerated.serve.page import Studio, build

    torch.manual_seed(0)
    predictor = accelerated.Predictor(accelerated.create_model("dpt_tiny", task="segmentation", num_classes=9), device="cpu")
    image = picture(6, 256, 512)
    (tmp_path / "p.png").write_bytes(encoded(image))
    scene = Studio(predictor).scene(str(tmp_path / "p.png"))
    classes = predictor(image)
    colors, names = drawing.class_palette(9)
    np.testing.assert_array_equal(scene.shown, image)
    np.testing.assert_array_equal(scene.answer, drawing.overlay(image, classes, colors))
    assert len(np.unique(classes)) > 1 and scene.caption == views.legend(classes, colors, names)
    assert scene.depth is None
    parts = build(predictor).get_config_file()
    names = {part["props"].get("elem_id") for part in parts["components"]}
    assert "dpt-cloud" not in names and {"dpt-compare", "dpt-attention"} <= names
