"""The page: how it is laid out, and what it answers when a picture is dropped, a point clicked, or a control moved.

All sessions share one `Predictor`, which one of them at a time uses; what a session sees is a `Scene` of its own.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelerated import drawing, images, pointcloud
from accelerated.outputs import DEFAULT_FOV, Products
from accelerated.serve import views

if TYPE_CHECKING:
    import gradio

    from accelerated.predictor import Predictor

SESSIONS = 8  # whose pictures are kept; the one that was used least recently is forgotten first


class Trouble(Exception):
    """What the page cannot do for this visitor, in one sentence."""


@dataclass(frozen=True)
class Scene:
    """One visitor's picture and prediction; never changed, only replaced."""

    image: np.ndarray  # as read, (H, W, 3)
    shown: np.ndarray  # its preview, (h, w, 3) uint8
    answer: np.ndarray  # what the slider compares it with, (h, w, 3) uint8
    caption: str  # HTML below the slider
    depth: np.ndarray | None  # for the point cloud, reduced; None for classes


class Studio:
    """The answers of the page, from one predictor. Every method raises Trouble for what the visitor should be told."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.products = Products(predictor)  # so that depth has the colours of the files that `accelerated.predict` writes
        self.one_at_a_time = threading.Lock()  # attention is read by hooks on the one model
        self.segments = predictor.task == "segmentation"
        self.blocks = 0 if "encoder" in predictor.config else len(predictor.model.backbone.blocks)  # a MiDaS has none
        self.heads: int = predictor.config["num_heads"] if self.blocks else 0

    def scene(self, path: str) -> Scene:
        """Read and predict an uploaded file."""
        name = Path(path).name
        try:
            image = images.read_image(path)
            with self.one_at_a_time:
                prediction = self.predictor(image)
        except Exception as error:
            raise Trouble(sentence(path, name, error)) from error
        shown = views.preview(image)
        size = (shown.shape[0], shown.shape[1])
        if self.segments:
            classes = views.sampled(prediction, size)
            colors, names = drawing.class_palette(self.predictor.config["num_classes"])
            caption = views.legend(prediction, colors, names)
            return Scene(image, shown, drawing.overlay(shown, classes, colors), caption, None)
        answer = images.depth_to_color(views.smooth(self.products.nearness(prediction), size))
        depth = prediction if self.predictor.metric else pointcloud.relative_depth(prediction)
        return Scene(image, shown, answer, self.depth_caption(prediction), views.cloud_depth(depth))

    def depth_caption(self, depth: np.ndarray) -> str:
        if self.predictor.metric:
            return f"Bright is near, dark is far: from {depth.min():.3g} to {depth.max():.3g} metres."
        return "Bright is near, dark is far. How far in metres, this model cannot tell from one picture."

    def attention(self, scene: Scene, block: int, head: int | None, point: tuple[int, int] | None) -> tuple[np.ndarray, str]:
        """Paint where the token below pixel `point` of the picture (None: the readout token) looks; and say so in words."""
        try:
            with self.one_at_a_time:
                weights = self.predictor.attention(scene.image, block, head=head, point=point)
        except Exception as error:
            raise Trouble(sentence("", "The attention", error)) from error
        size = (scene.shown.shape[0], scene.shown.shape[1])
        picture = drawing.heat(scene.shown, np.maximum(views.smooth(weights, size), 0))
        who = "The readout token, which stands for no patch,"
        if point is not None:
            picture = views.marked(picture, point, scene.image.shape[:2])
            who = f"The patch at pixel ({point[0]}, {point[1]}), in the ring,"
        heads = f"the mean of {self.heads} heads" if head is None else f"head {head}"
        return picture, f"{who} looks at what is bright (block {block}, {heads})."

    def cloud(self, scene: Scene, fov: float) -> str:
        """Return the point cloud as `views.cloud` does, of a scene that has depth."""
        assert scene.depth is not None
        return views.cloud(scene.depth, scene.shown, fov)


def sentence(path: str, name: str, error: Exception) -> str:
    """Say in one sentence, without the server's own path, what is wrong with an upload; raise again what is no one's input."""
    if isinstance(error, images.ImageError):
        return f"{name}: {str(error).removeprefix(f'{path}: ')}"
    if isinstance(error, ValueError):
        return f"{name}: {error}"
    if isinstance(error, MemoryError):
        return f"{name}: {str(error) or 'not enough memory for a picture of this size'}"
    raise error


def build(predictor: Predictor) -> gradio.Blocks:
    """Return the page for one predictor. Raises ImportError where Gradio is not installed."""
    import gradio as gr

    studio = Studio(predictor)
    with gr.Blocks(title="DPT on this computer", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(_heading(predictor), elem_classes="dpt-head")
        scene = gr.State(None)
        file = gr.File(label="Photograph", height=140, elem_id="dpt-file")
        status = gr.HTML(_empty(studio), elem_id="dpt-status")
        with gr.Column(visible=False, elem_id="dpt-results") as results:
            with gr.Row():
                with gr.Column(min_width=300):
                    gr.HTML(_card("Classes" if studio.segments else "Depth", "Drag the line across the picture."))
                    compare = gr.ImageSlider(format="png", interactive=False, show_label=False, elem_id="dpt-compare")
                    caption = gr.HTML(elem_id="dpt-caption", elem_classes="dpt-card")
                sections = [_attention_section(scene, studio)] if studio.blocks else []
            if not studio.segments:
                sections.append(_cloud_section(scene, studio))

        def opened(path: str | None) -> tuple[Any, ...]:
            if path is None:
                return None, _empty(studio), gr.Column(visible=False), None, ""
            try:
                new = studio.scene(path)
            except Trouble as trouble:
                return None, _wrong(trouble), gr.Column(visible=False), None, ""
            return new, "", gr.Column(visible=True), (new.shown, new.answer), new.caption

        event = file.change(opened, file, [scene, status, results, compare, caption], api_name="open", show_progress_on=status)
        for handler, inputs, outputs in sections:
            event = event.then(handler, inputs, outputs, api_visibility="private")
    page.state_session_capacity = SESSIONS
    page.has_launched = page.is_running = True  # or, in an application of our own, Gradio takes any path for an upload
    return page


# A handler that shows a picture in a section, with its inputs and outputs: run again for every new picture.
Section = tuple[Callable[..., Any], list[Any], list[Any]]


def _attention_section(scene: gradio.State, studio: Studio) -> Section:
    """Lay out the picture to click on, and its controls."""
    import gradio as gr

    with gr.Column(min_width=300):
        gr.HTML(_card("Attention", "Click on the picture: where does the token of that patch look?"))
        picture = gr.Image(format="png", interactive=False, show_label=False, buttons=[], elem_id="dpt-attention")
        words = gr.HTML(elem_id="dpt-attention-words", elem_classes="dpt-card")
        with gr.Row():
            last = studio.blocks - 1
            block = gr.Slider(0, last, value=last, step=1, label=f"Block, of 0 to {last}", min_width=200, elem_id="dpt-block")
            heads = ["mean", *map(str, range(studio.heads))]
            head = gr.Dropdown(heads, value="mean", label="Head, or the mean of all", min_width=200, elem_id="dpt-head")
        readout = gr.Button("Back to the readout token", size="sm", elem_id="dpt-readout")
    point = gr.State(None)

    def look(scene: Scene | None, block: int, head: str, point: tuple[int, int] | None) -> tuple[Any, ...]:
        if scene is None:
            return None, "", None
        try:
            return *studio.attention(scene, int(block), None if head == "mean" else int(head), point), point
        except Trouble as trouble:
            return None, _wrong(trouble), None

    def first(scene: Scene | None, block: int, head: str) -> tuple[Any, ...]:
        return look(scene, block, head, None)

    def click(scene: Scene | None, block: int, head: str, event: gradio.SelectData) -> tuple[Any, ...]:
        if scene is None:
            return None, "", None
        return look(scene, block, head, views.pixel_below(event.index, scene.shown.shape[:2], scene.image.shape[:2]))

    click.__annotations__["event"] = gr.SelectData  # the class itself, by which Gradio knows what to pass
    outputs = [picture, words, point]
    controls = [scene, block, head]
    picture.select(click, controls, outputs, api_name="click", trigger_mode="always_last", show_progress="minimal")
    for control, name in ((block, "block"), (head, "head")):
        control.input(look, [*controls, point], outputs, api_name=name, trigger_mode="always_last", show_progress="minimal")
    readout.click(first, controls, outputs, api_name="readout")
    return first, controls, outputs


def _cloud_section(scene: gradio.State, studio: Studio) -> Section:
    """Lay out the turning points, and the field of view."""
    import gradio as gr

    with gr.Row():
        with gr.Column(min_width=300):
            gr.HTML(
                _card("In space", "Every pixel at its depth. Drag to turn; a double click goes back to where the camera stood.")
            )
            points = gr.HTML(
                "",
                html_template="<canvas aria-label='The picture as points in space, turning'></canvas>",
                js_on_load=(Path(__file__).parent / "cloud.js").read_text(encoding="utf-8"),
                elem_id="dpt-cloud",
            )
        with gr.Column(min_width=300):
            fov = gr.Slider(20, 120, value=DEFAULT_FOV, step=1, label="Field of view, in degrees", info=_FOV, elem_id="dpt-fov")
            gr.HTML(_card("", _METRIC if studio.predictor.metric else _RELATIVE))

    def turn(scene: Scene | None, fov: float) -> str:
        return "" if scene is None else studio.cloud(scene, fov)

    fov.input(turn, [scene, fov], [points], api_name="fov", trigger_mode="always_last", show_progress="hidden")
    return turn, [scene, fov], [points]


_FOV = "How wide the camera saw. The picture itself does not say: try what makes right angles right."
_METRIC = "Depth is in metres, as the model gives it."
_RELATIVE = (
    "This model tells depth only up to a scale and a shift. For this view, the nearest pixel is put at distance 1 and the "
    "farthest at 10: a choice, so whether the scene is deep or flat is not to be read from it."
)


def _heading(predictor: Predictor) -> str:
    name, dtype = html.escape(str(predictor.config["name"])), str(predictor.dtype).removeprefix("torch.")
    return (
        "<h1>What a dense prediction transformer sees</h1>"
        f"<p>{name}, {predictor.task}, on {predictor.device} in {dtype}. Your pictures stay on this computer.</p>"
    )


def _empty(studio: Studio) -> str:
    """What there is to do, before there is a picture."""
    seen = [
        "its <b>classes</b>: what the model takes each pixel for, with a slider between picture and classes"
        if studio.segments
        else "its <b>depth</b>: how near each pixel is, with a slider between picture and depth"
    ]
    if studio.blocks:
        seen.append("its <b>attention</b>: click on a place, and see where the transformer looks from there")
    if not studio.segments:
        seen.append("the scene <b>in space</b>: its pixels as points that turn before you")
    lines = "".join(f"<li>{line};</li>" for line in seen[:-1]) + f"<li>{seen[-1]}.</li>"
    begin = "Drop a photograph into the box above, or tap it to choose one. You will see"
    return f'<div class="dpt-empty">{begin}<ul>{lines}</ul></div>'


def _card(title: str, text: str) -> str:
    heading = f"<h2>{title}</h2>" if title else ""
    return f'<div class="dpt-card">{heading}<p>{text}</p></div>'


def _wrong(trouble: Trouble) -> str:
    return f'<p class="dpt-sentence wrong" role="alert">{html.escape(str(trouble))}</p>'
