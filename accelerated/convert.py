"""Convert a weight file: `python -m accelerated.convert SRC DST [--model NAME] [--force]`.

SRC is whatever `accelerated.load_checkpoint` opens: the authors' files, folders of Hugging Face's, our own. DST is
- a name ending in .safetensors: our weight file, which `accelerated.load_checkpoint` and `reference.load` read;
- a name without a suffix, or a folder that exists: a folder for Hugging Face's transformers (`accelerated.save_huggingface`).
A file, or a folder with files in it, is replaced only with --force, and of a folder only the three files that are written. SRC
itself never is. DST appears complete or not at all.

Prints the model and, with their sizes, the files. Exit status: 0 when DST is written, 1 when it is not, 2 for a command line
that makes no sense.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import accelerated
from accelerated.command_line import Parser, sentence

if TYPE_CHECKING:
    from accelerated import DPT


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], model: str | None = None, force: bool = False
) -> tuple[DPT, list[Path]]:
    """Write the model at `source`, opened by `load_checkpoint(source, model)`, to `target`; return it, and the files written.

    `force` permits a target that exists. Raises OSError or ValueError, of one sentence, and then nothing was written.
    """
    source, target = Path(source), Path(target)
    paths = _written(target)
    _refuse_to_replace(source, target, paths, force)
    found = accelerated.load_checkpoint(source, model)
    if len(paths) == 1:
        accelerated.save(found, target)
    else:
        accelerated.save_huggingface(found, target, overwrite=force)
    return found, paths


def _written(target: Path) -> list[Path]:
    """The files that writing to `target` makes: one for a weight file, three for a folder."""
    if target.is_dir() or not target.suffix:
        from accelerated.checkpoints.huggingface_export import FILES

        return [target / name for name in FILES]
    if target.suffix != ".safetensors":
        raise ValueError(
            f"{target} has the suffix {target.suffix!r}: expected .safetensors for a weight file of ours, or a name without "
            "a suffix (or a folder that exists) for a folder of Hugging Face's"
        )
    return [target]


def _refuse_to_replace(source: Path, target: Path, paths: Sequence[Path], force: bool) -> None:
    """Raise OSError where `target` cannot be written or is not to be replaced, ValueError where it would replace `source`."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: there is no folder {target.parent}")
    read = list(source.iterdir()) if source.is_dir() else [source]
    if any(path.exists() and file.exists() and path.samefile(file) for path in paths for file in read):
        raise ValueError(f"{target} would replace {source}, which is to be converted: expected another place")
    if target.is_dir() and len(paths) > 1:
        if any(target.iterdir()) and not force:
            raise FileExistsError(f"{target} has files in it: expected a new or an empty folder, or --force")
    elif os.path.lexists(target):
        if len(paths) > 1:
            raise FileExistsError(f"{target} is a file: expected a folder, or a name ending in .safetensors")
        if not force:
            raise FileExistsError(f"{target} exists: expected a new name, or --force")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m accelerated.convert", description="Convert a weight file.", allow_abbrev=False)
    parser.add_argument("source", metavar="SRC", type=Path, help="weight file or folder to convert")
    parser.add_argument(
        "target", metavar="DST", type=Path, help="file ending in .safetensors (ours), or a folder (Hugging Face's layout)"
    )
    parser.add_argument("--model", metavar="NAME", help="what SRC is, where it does not say so itself")
    parser.add_argument("--force", action="store_true", help="replace DST where it exists")
    return parser.parse_args(argv)


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    arguments = _arguments(argv)
    try:
        model, paths = convert(arguments.source, arguments.target, arguments.model, arguments.force)
    except (OSError, ValueError, ImportError, MemoryError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"error: interrupted: {arguments.target} was not written", file=sys.stderr)
        return 130
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{model.config['name']} ({model.config['task']}), {count:,} parameters")
    for path in paths:
        print(f"{path}  {_size(path)}")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(AttributeError):  # a name that the terminal's encoding lacks is escaped, not an error
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
