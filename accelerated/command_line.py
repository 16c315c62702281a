"""What the command lines share: how they complain, and the options that say which model is run, where and how."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from accelerated.placement import DEVICES, DTYPES, is_device_name


class Parser(argparse.ArgumentParser):
    """Ends the process with status 2 and one sentence where the command line makes no sense."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help explains the options)\n")


def add_model_options(parser: Parser) -> argparse._ArgumentGroup:
    """Add --weights, --model, --device, --dtype and --size, and return their group; `check_model` is for what was read."""
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add("--weights", metavar="FILE", type=Path, help="weights: as training writes them, the authors' file, Hugging Face's folder")
    add("--model", metavar="NAME", help="what the weights are; without --weights, the published model to find or fetch")
    add("--device", type=_device, default="auto", help=f"where to compute: {DEVICES} (default: auto)")
    add("--dtype", choices=list(DTYPES), default="float32", help="the network's precision (default: float32)")
    add("--size", metavar="N|HxW", type=_size, help="the network's size in pixels, in place of the one it was trained for")
    return group


def check_model(parser: Parser, options: argparse.Namespace) -> None:
    """End the process where neither --weights nor --model was given."""
    if options.weights is None and options.model is None:
        parser.error("nothing says which model: expected --weights FILE, or --model NAME for one that is published")


def sentence(error: Exception) -> str:
    """The error's own sentence, or one made of what the operating system says."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else f"{error.strerror}"
    return str(error)


def matched(pattern: str, text: str, expected: str) -> re.Match[str]:
    """Return the match of the whole text. Raises argparse.ArgumentTypeError naming the text and what was expected."""
    match = re.fullmatch(pattern, text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return match


def _device(text: str) -> str:
    if not is_device_name(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {DEVICES}")
    return text


def _size(text: str) -> int | tuple[int, int]:
    match = matched(r"([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?", text, "pixels, as in 384, or height x width, as in 352x1216")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))
