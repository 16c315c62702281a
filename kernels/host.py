"""Kernels on the host: the C++ compiler turns a `.cu` file and the emulation in `host/` into a shared library.

For each kernel template K and element type the library has a function `K_float32` and so on, which runs a whole launch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kernels.source import FOLDER, HOST_ELEMENTS, cached, digest, fingerprint

# Multiplications and additions stay separate on every processor, so a host result depends on the source alone.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-x", "c++")

Argument = np.ndarray | np.generic


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


def program(file: str, templates: Sequence[str]) -> str:
    """The C++ source of the library: the kernels of `file`, and one exported launch for each of them and element type."""
    lines = ['#include "emulation.h"', f'#include "{file}"']
    for template in templates:
        for dtype, element in HOST_ELEMENTS.items():
            lines.append(
                f'extern "C" void {template}_{dtype}(const dim3* grid, const dim3* block, void** arguments) '
                f"{{ emulation::launch({template}<{element}>, *grid, *block, arguments); }}"
            )
    return "\n".join(lines) + "\n"


@functools.cache
def load(file: str, templates: tuple[str, ...]) -> ctypes.CDLL:
    """The library of `file` (such as "fusion.cu"), compiled where the cache lacks it.

    RuntimeError without a compiler, with the compiler's own words where it fails, or where the cache cannot be written.
    """
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    text = program(file, templates)
    key = fingerprint([digest(), text, version, platform.machine(), *command, *FLAGS])

    def build(path: Path) -> None:
        options = [*FLAGS, f"-I{FOLDER / 'host'}", f"-I{FOLDER}", "-", "-o", str(path)]
        result = subprocess.run([*command, *options], input=text, text=True, capture_output=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)} could not compile {FOLDER / file}:\n{result.stderr}")

    return ctypes.CDLL(str(cached(f"{Path(file).stem}-{key[:32]}.so", build)))


def launcher(file: str, templates: tuple[str, ...], template: str, dtype: str) -> Callable[..., None]:
    """The kernel `template` for elements of `dtype`, as a function of grid, block and arguments that returns when it is done."""
    function = getattr(load(file, templates), f"{template}_{dtype}")

    def launch(grid: tuple[int, int, int], block: tuple[int, int, int], arguments: Sequence[Argument]) -> None:
        # As the CUDA driver takes them: a pointer to each argument's value, which for an array is its address.
        values = [np.uintp(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
        cells = [ctypes.create_string_buffer(value.tobytes(), value.nbytes) for value in values]
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        function((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), pointers)

    return launch
