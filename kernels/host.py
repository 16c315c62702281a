"""Kernels on the host: the C++ compiler turns a `.cu` file and the emulation in `host/` into a shared library.

For each kernel template K and element type the library has a function `K_float32` and so on, which runs a whole launch: one
thread after the other up to where they wait for each other, in an order drawn from a seed. `with schedule(seed=3):` draws another
order, and `with schedule(races=True):` runs a build that watches every access and ends a launch in which two are not ordered
(`host/races.h`).
With the environment variable KERNELS_SANITIZE set to "address", everything is compiled under the address and undefined-behaviour
sanitizers, for a Python that has loaded their libraries.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kernels.source import FOLDER, HOST_ELEMENTS, Source, cached, digest, fingerprint, symbol

# Multiplications and additions stay separate on every processor, so a host result depends on the source alone.
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra")
PLAIN = ("-O2", "-Werror")  # the sanitizers' checks make compilers warn of what is none
RACES = ("-O1", "-fsanitize=thread")  # for its calls alone, which host/races.h answers; its library is not linked
ADDRESS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

Argument = np.ndarray | np.generic


class Schedule(NamedTuple):
    """In which order the threads of a block run (0: that of their indices), and whether their accesses are watched for races."""

    seed: int = 0
    races: bool = False


_schedule: contextvars.ContextVar[Schedule] = contextvars.ContextVar("schedule")


@contextlib.contextmanager
def schedule(seed: int = 0, races: bool = False) -> Iterator[None]:
    """Run the launches of this block, in this thread, with another order of threads, and watched for races or not.

    A race makes the launch raise RuntimeError. ValueError for a seed that is no whole number from 0 to 2^64 - 1.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}: expected a whole number from 0 to 2^64 - 1")
    token = _schedule.set(Schedule(seed, races))
    try:
        yield
    finally:
        _schedule.reset(token)


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, or the first found of c++, g++ and clang++. RuntimeError where there is none."""
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        if shutil.which(command[0]) is None:
            raise RuntimeError(f"the host kernels are compiled by $CXX, which is {chosen!r}, and no such command is found")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise RuntimeError(
        "kernels on NumPy arrays need a C++ compiler, and none of c++, g++, clang++ is found: "
        "install one (on Debian or Ubuntu: apt install g++) or name yours in CXX"
    )


def program(source: Source) -> str:
    """The C++ source of the library: the kernels of a file, and one exported launch for each of them and element type."""
    lines = ['#include "emulation.h"', f'#include "{source.file}"']
    for template in source.templates:
        for dtype, element in HOST_ELEMENTS.items():
            if source.has(template, dtype):
                lines.append(
                    f'extern "C" __attribute__((visibility("default"))) const char* {symbol(template)}_{dtype}('
                    "const dim3* grid, const dim3* block, std::size_t shared, std::uint64_t seed, void** arguments) "
                    f"{{ return emulation::launch({template.format(element)}, *grid, *block, shared, seed, arguments); }}"
                )
    return "\n".join(lines) + "\n"


@functools.cache
def load(source: Source, races: bool = False) -> ctypes.CDLL:
    """The library of a source, compiled where the cache lacks it.

    RuntimeError without a compiler, with the compiler's own words where it fails, or where the cache cannot be written.
    """
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    text = program(source)
    sanitized = os.environ.get("KERNELS_SANITIZE") == "address"
    build = RACES if races else ADDRESS if sanitized else PLAIN
    own = (FOLDER / source.file).read_text(encoding="utf-8")
    key = fingerprint([digest(), own, text, version, platform.machine(), *command, *FLAGS, *build])

    def compile_and_link(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unlinked = f"{folder}/unlinked.o"
            includes = [f"-I{FOLDER / 'host'}", f"-I{FOLDER}"]
            linked = [option for option in build if option.startswith("-fsanitize")] if build is ADDRESS else []
            for options in (
                [*FLAGS, *build, *includes, "-x", "c++", "-c", "-", "-o", unlinked],
                ["-shared", *linked, unlinked, "-o", str(path)],
            ):
                result = subprocess.run([*command, *options], input=text, text=True, capture_output=True, check=False)
                if result.returncode != 0:
                    raise RuntimeError(f"{shlex.join(command)} could not compile {FOLDER / source.file}:\n{result.stderr}")

    library = ctypes.CDLL(str(cached(f"{Path(source.file).stem}-{key[:32]}.so", compile_and_link)))
    for template in source.templates:
        for dtype in HOST_ELEMENTS:
            if source.has(template, dtype):
                getattr(library, f"{symbol(template)}_{dtype}").restype = ctypes.c_char_p
    return library


def launch(
    source: Source,
    template: str,
    dtype: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: Sequence[Argument],
    shared: int = 0,
) -> None:
    """Run the kernel `template` for elements of `dtype`, and return when it is done; `shared` is in bytes.

    RuntimeError where its threads wait for what never comes, misuse a shuffle, or, if watched, race.
    """
    seed, races = _schedule.get(Schedule())
    function = getattr(load(source, races), f"{symbol(template)}_{dtype}")
    # As the CUDA driver takes them: a pointer to each argument's value, which for an array is its address.
    values = [np.uintp(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
    cells = [ctypes.create_string_buffer(value.tobytes(), value.nbytes) for value in values]
    pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
    words = function(
        (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), ctypes.c_size_t(shared), ctypes.c_uint64(seed), pointers
    )
    if words is not None:
        raise RuntimeError(f"{template.format(dtype)}, seed {seed}: {words.decode()}")
