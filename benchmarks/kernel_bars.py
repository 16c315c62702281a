"""A row of the table of `benchmarks.kernels`, and what the kernels promise about such rows on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One form of an operation in one part. None stands for what was not, or could not be, measured.

    `form` is "rung N", "operator" or a peer's name; `last` marks the ladder's last rung. `bytes` and `operations`: the least that
    the part must do; the shares: per second, of what copies and products reach. `peers`: how many times as long each peer takes.
    `error`: ‖x - exact‖ / ‖exact‖ of results and gradients, the largest. `failure`: a sentence.
    """

    operation: str
    size: dict[str, int]
    dtype: str
    layout: str
    form: str
    part: str
    last: bool = False
    seconds: float | None = None
    call_seconds: float | None = None
    bytes: int = 0
    operations: int = 0
    copy_share: float | None = None
    product_share: float | None = None
    extra_bytes: int | None = None
    peers: dict[str, float] = {}  # noqa: RUF012  never written to
    error: float | None = None
    failure: str | None = None

    @property
    def place(self) -> tuple[object, ...]:
        """What rows of one case and part have in common."""
        return self.operation, tuple(self.size.items()), self.dtype, self.layout, self.part


class Bar(NamedTuple):
    """One promise about one row: kept where `figure` is at least `least`."""

    passed: bool
    text: str
    figure: float | None
    least: float


class Promise(NamedTuple):
    """`figure(row, peers)` of the last rung's rows of these parts; `images`: of this batch alone, 0: of every size."""

    operation: str
    parts: tuple[str, ...]
    images: int
    least: float
    words: str
    figure: Callable[[Row, dict[str, Row]], float | None]


def _beside_eager(row: Row, peers: dict[str, Row]) -> float | None:
    return row.peers.get("eager")


def _beside_fused(row: Row, peers: dict[str, Row]) -> float | None:
    return row.peers.get("SDPA")


def _memory_beside_eager(row: Row, peers: dict[str, Row]) -> float | None:
    theirs = peers["eager"].extra_bytes if "eager" in peers else None
    return None if theirs is None or row.extra_bytes is None else theirs / max(row.extra_bytes, 1)


def _of_copy(row: Row, peers: dict[str, Row]) -> float | None:
    return row.copy_share


PROMISES = (
    Promise("depth_loss", ("both",), 16, 5.0, "times as fast as eager", _beside_eager),
    Promise("depth_loss", ("both",), 128, 0.2, "of the bandwidth of a copy", _of_copy),
    Promise("cross_entropy", ("both",), 0, 5.0, "times less extra memory than eager", _memory_beside_eager),
    Promise("cross_entropy", ("both",), 0, 1.0, "times as fast as eager", _beside_eager),
    Promise("upsample_add", ("forward", "backward"), 0, 0.8, "of the bandwidth of a copy", _of_copy),
    Promise("attention", ("forward", "backward"), 0, 0.4, "of the rate of scaled_dot_product_attention", _beside_fused),
)


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Every promise, for every row that it is about. What could not be measured is not kept."""
    found = []
    for promise in PROMISES:
        for row in rows:
            about = row.operation == promise.operation and row.part in promise.parts and row.last
            if not about or promise.images not in (0, row.size["images"]):
                continue
            figure = promise.figure(row, {other.form: other for other in rows if other.place == row.place})
            kept = row.failure is None and figure is not None and figure >= promise.least
            sizes = ", ".join(f"{name} {value}" for name, value in row.size.items())
            what = " ".join(word for word in (f"{row.operation} ({sizes})", row.dtype, row.layout, row.part) if word)
            measured = "not measured" if figure is None else f"{figure:.2f} {promise.words}"
            text = f"{'PASS' if kept else 'FAIL'}  {what}: {measured}, promised {promise.least:g}"
            found.append(Bar(kept, text if row.failure is None else f"{text}; {row.failure}", figure, promise.least))
    return found
