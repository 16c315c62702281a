"""Kernels compiled to machine code by NVRTC, for any architecture, with or without a GPU.

NVRTC comes with CuPy. It brings no headers: CUDA's `cuda_fp16.h` and `cuda_bf16.h` are those of the wheel
nvidia-cuda-runtime (which PyTorch with CUDA installs too) or of an installed CUDA toolkit of the same major version.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from kernels.source import DEVICE_ELEMENTS, FOLDER, Source


class Resources(NamedTuple):
    """What one kernel takes of a multiprocessor per thread: registers, and bytes spilled from them to memory."""

    registers: int
    spilled: int


class Compiled(NamedTuple):
    """The machine code of one source for one architecture; kernels are named as in C++, `upsample_add_naive<float>`."""

    cubin: bytes
    log: str
    symbols: dict[str, str]  # the mangled name of each kernel
    resources: dict[str, Resources]


def nvrtc() -> ModuleType:
    """CuPy's binding of NVRTC, loaded. ImportError that names what to install."""
    try:
        from cupy.cuda import nvrtc as binding

        binding.getVersion()
    except Exception as error:  # CuPy reports a library that it cannot load by several types
        raise ImportError(
            "compiling a kernel for a GPU needs CuPy and its NVRTC: pip install cupy-cuda13x nvidia-cuda-nvrtc "
            f"(for CUDA 12: cupy-cuda12x nvidia-cuda-nvrtc-cu12). The reason: {error}"
        ) from error
    return binding


def include_folder(major: int) -> Path:
    """The folder of CUDA's headers of this major version: a pip wheel's, else a toolkit's. RuntimeError where there is none."""
    searched = []
    for folder in _include_folders():
        if not (folder / "cuda_fp16.h").is_file():
            searched.append(str(folder))
            continue
        version = re.search(r"#define\s+CUDA_VERSION\s+(\d+)", (folder / "cuda.h").read_text(encoding="utf-8", errors="replace"))
        if version and int(version[1]) // 1000 == major:
            return folder
        searched.append(f"{folder} (another CUDA version)")
    wheel = "nvidia-cuda-runtime" if major >= 13 else f"nvidia-cuda-runtime-cu{major}"
    raise RuntimeError(
        f"NVRTC {major} needs the CUDA {major} header cuda_fp16.h: pip install {wheel}, "
        f"or set CUDA_PATH to a CUDA {major} toolkit; searched {', '.join(searched) or 'nothing'}"
    )


def _include_folders() -> Iterator[Path]:
    wheels = importlib.util.find_spec("nvidia")
    for location in (wheels.submodule_search_locations or []) if wheels else []:
        yield from sorted(header.parent for header in Path(location).glob("*/include/cuda_fp16.h"))
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "include"
    yield Path(sys.prefix) / "targets" / "x86_64-linux" / "include"  # a Conda environment
    yield Path("/usr/local/cuda/include")


@functools.cache
def compile_source(source: Source, architecture: int) -> Compiled:
    """Compile every kernel of a source for every element type of a GPU; architecture 90 is sm_90.

    Tensor cores multiply bfloat16 from sm_80 on: below, those kernels are left out.

    ImportError without NVRTC; ValueError for an architecture it does not know; RuntimeError without CUDA's headers, or with
    the compiler's own words where it fails.
    """
    binding = nvrtc()
    known = binding.getSupportedArchs()
    if architecture not in known:
        raise ValueError(f"NVRTC {binding.getVersion()} compiles for the architectures {known}, not for {architecture}")
    options = (
        f"--gpu-architecture=sm_{architecture}",
        "--std=c++17",
        "--ptxas-options=-v",
        f"-I{FOLDER}",
        f"-I{include_folder(binding.getVersion()[0])}",
    )
    names = [
        template.format(element)
        for template in source.templates
        for dtype, element in DEVICE_ELEMENTS.items()
        if source.has(template, dtype) and (architecture >= 80 or dtype != "bfloat16" or template not in source.half)
    ]
    program = binding.createProgram((FOLDER / source.file).read_text(encoding="utf-8"), source.file, (), ())
    try:
        for name in names:
            binding.addNameExpression(program, name)
        try:
            binding.compileProgram(program, options)
        except binding.NVRTCError as error:
            log = binding.getProgramLog(program)
            raise RuntimeError(f"NVRTC could not compile {FOLDER / source.file} for sm_{architecture}:\n{log}") from error
        log = binding.getProgramLog(program)
        symbols = {name: binding.getLoweredName(program, name) for name in names}
        cubin = binding.getCUBIN(program)
    finally:
        binding.destroyProgram(program)
    usage = resources(log.splitlines())
    return Compiled(cubin, log, symbols, {name: usage[symbol] for name, symbol in symbols.items()})


def resources(log: Sequence[str]) -> dict[str, Resources]:
    """What the assembler reported (--ptxas-options=-v) for each entry function, by its mangled name."""
    found: dict[str, Resources] = {}
    name, spilled = "", 0
    for line in log:
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name, spilled = entry[1], 0
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled += int(spills[1]) + int(spills[2])
        elif used := re.search(r"Used (\d+) registers", line):
            found[name] = Resources(int(used[1]), spilled)
    return found
