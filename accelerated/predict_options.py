"""The command line of `accelerated.predict`: what may be said on it, and what of that makes sense together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerated.command_line import Parser, add_model_options, check_model, matched
from accelerated.outputs import DEFAULT_FOV, DEFAULT_KINDS, DEFAULT_VIDEO_KINDS, KINDS

TAPS = "taps"
_EVERY_KIND = tuple(dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Ends the process with status 2 and one sentence where it makes no sense, whatever the model."""
    parser = _parser()
    options = parser.parse_intermixed_args(argv)
    check_model(parser, options)
    if options.fov is not None and "ply" not in (options.save or ()):
        parser.error("--fov is for the point clouds of --save ply, which is not among what is saved")
    if options.attention is None and not (options.head == options.point is None):
        parser.error("--attention-head and --attention-point say more about --attention BLOCK, which is missing")
    if options.fov is None:
        options.fov = DEFAULT_FOV
    return options


def _parser() -> Parser:
    parser = Parser(
        prog="python -m accelerated.predict", description="Predict depth or classes for pictures and videos.", allow_abbrev=False
    )
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="+", help='pictures, videos, folders of them, patterns such as "photos/**/*.jpg"')
    add("--output", metavar="DIR", required=True, type=Path, help="folder for the results, created where missing")
    add = add_model_options(parser).add_argument
    add("--compile", action="store_true", help="through torch.compile: takes its time for every new size, then is faster")
    add("--batch-size", metavar="N", type=_count, default=1, help="how many pictures or frames to predict at once (default: 1)")
    add("--multi-scale", action="store_true", help="segmentation over scales, windows and mirror images: slow, and better")
    add("--kitti-crop", action="store_true", help="look at the bottom-centre 1216 x 352 pixels only, as KITTI's benchmark does")
    group = parser.add_argument_group("what to write")
    add = group.add_argument
    kinds = "; ".join(f"{task}: {', '.join(there)} (default: {','.join(DEFAULT_KINDS[task])})" for task, there in KINDS.items())
    add("--save", metavar="KIND[,KIND...]", type=_kinds, help=f"{kinds}; default for videos: {','.join(DEFAULT_VIDEO_KINDS)}")
    add("--fov", metavar="DEGREES", type=_fov, help=f"horizontal field of view of point clouds (default: {DEFAULT_FOV:g})")
    blocks = f'where a block of the transformer looks; may be repeated; "{TAPS}": all that are tapped'
    add("--attention", metavar="BLOCK", type=_block, action="append", help=blocks)
    add("--attention-head", dest="head", metavar="N|mean", type=_head, help="which head, or the mean over heads (default)")
    point = "for the token of the patch under this pixel (default: the readout token)"
    add("--attention-point", dest="point", metavar="X,Y", type=_point, help=point)
    return parser


def _count(text: str) -> int:
    return int(matched(r"[1-9][0-9]{0,5}", text, "a whole number of at least 1")[0])


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(text.split(",")))
    unknown = [kind for kind in kinds if kind not in _EVERY_KIND]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {', '.join(_EVERY_KIND)}, with commas between them")
    return kinds


def _fov(text: str) -> float:
    try:
        degrees = float(text)
    except ValueError:
        degrees = 0.0
    if not 0 < degrees < 180:
        raise argparse.ArgumentTypeError(f"{text!r}: expected degrees, more than 0 and less than 180")
    return degrees


def _block(text: str) -> int | str:
    expected = f"the number of a block, from 0, or {TAPS}"
    return text if text == TAPS else int(matched(r"[0-9]{1,6}", text, expected)[0])


def _head(text: str) -> int | str:
    return text if text == "mean" else int(matched(r"[0-9]{1,6}", text, "the number of a head, from 0, or mean")[0])


def _point(text: str) -> tuple[int, int]:
    match = matched(r"([0-9]{1,9}),([0-9]{1,9})", text, "a pixel X,Y counted from 0,0 in the upper left, as in 120,80")
    return int(match[1]), int(match[2])
