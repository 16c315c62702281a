"""What carries the kernels: NVRTC, the C++ compiler, the cache of what they made, and the package's data files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from kernels import alignment, attention, confusion, cross_entropy, fusion, host, losses, reassemble, source
from kernels import compile as kernel_compiler
from kernels.fusion import SOURCE


@pytest.fixture
def nvrtc():
    try:
        return kernel_compiler.nvrtc()
    except ImportError as error:
        pytest.skip(str(error))


# The most registers that a thread of each may take, so that enough threads are at work on a multiprocessor (65536 registers):
# those of attention come in blocks of 128, those of the depth loss in blocks of 512.
LADDERS = {alignment: 128, attention: 255, confusion: 32, cross_entropy: 96, fusion: 128, losses: 64, reassemble: 128}
SOURCES = {of: limit for module, limit in LADDERS.items() for of in vars(module).values() if isinstance(of, source.Source)}


def test_kernel_sources_are_all_compiled():
    assert {of.file for of in SOURCES} == {path.name for path in source.FOLDER.glob("*.cu")}


@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("of", SOURCES, ids=lambda of: of.file)
def test_kernel_compiles_to_machine_code(nvrtc, of, architecture):
    compiled = kernel_compiler.compile_source(of, architecture)
    assert compiled.cubin.startswith(b"\x7fELF")
    names = {
        template.format(element)
        for template in of.templates
        for dtype, element in source.DEVICE_ELEMENTS.items()
        if of.has(template, dtype) and not (architecture < 80 and template in of.half and dtype == "bfloat16")
    }
    assert set(compiled.symbols) == set(compiled.resources) == names
    for name, symbol in compiled.symbols.items():
        assert symbol.encode() in compiled.cubin
        assert f"'{symbol}' for 'sm_{architecture}'" in compiled.log
        registers, spilled = compiled.resources[name]
        assert 0 < registers <= 255, name
        assert architecture > 90 or (registers <= SOURCES[of] and spilled == 0), name  # what they are written for


def test_kernel_resources_are_read_from_the_log():
    log = """ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas         .     8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90'
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers"""
    assert kernel_compiler.resources(log.splitlines()) == {"_Z1fv": (255, 40), "_Z1gv": (10, 0)}


def test_kernel_compiler_says_what_is_wrong(nvrtc, monkeypatch, tmp_path):
    major = nvrtc.getVersion()[0]
    with pytest.raises(ValueError, match=r"compiles for the architectures .*, not for 12$"):
        kernel_compiler.compile_source(SOURCE, 12)
    shutil.copytree(source.FOLDER, tmp_path / "kernels")
    (tmp_path / "kernels" / "fusion.cu").write_text("template <typename T> __global__ void f(T x) { y = x; }")
    with monkeypatch.context() as patch:
        patch.setattr(kernel_compiler, "FOLDER", tmp_path / "kernels")
        with pytest.raises(RuntimeError, match=r'(?s)could not compile .*fusion.cu for sm_90:.*identifier "y" is undefined'):
            kernel_compiler.compile_source(source.Source("fusion.cu", ("f<{}>",)), 90)
    other = tmp_path / "cuda" / "include"
    other.mkdir(parents=True)
    (other / "cuda_fp16.h").touch()
    (other / "cuda.h").write_text(f"#define CUDA_VERSION {1000 * (major - 1)}\n")
    with monkeypatch.context() as patch:
        patch.setattr(kernel_compiler, "_include_folders", lambda: iter([tmp_path / "none", other]))
        with pytest.raises(RuntimeError, match=r"(?s)header cuda_fp16.h: pip install nvidia-cuda-runtime.*another CUDA version"):
            kernel_compiler.include_folder(major)
    (other / "cuda.h").write_text(f"#define CUDA_VERSION {1000 * major + 90}\n")
    with monkeypatch.context() as patch:
        patch.setattr(kernel_compiler.importlib.util, "find_spec", lambda name: None)
        patch.setenv("CUDA_PATH", str(other.parent))
        assert kernel_compiler.include_folder(major) == other


def test_kernel_compiler_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(ImportError, match="pip install cupy-cuda13x nvidia-cuda-nvrtc"):
        kernel_compiler.nvrtc()


def test_kernel_host_compiler_is_chosen_or_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(RuntimeError, match=r"\$CXX, which is 'no-such-compiler -O3', and no such command is found"):
        host.compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"need a C\+\+ compiler, and none of c\+\+, g\+\+, clang\+\+ is found: install one"):
        host.compiler()


def test_kernel_cache_holds_whole_files_of_this_source(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def killed(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.cached("file", killed)
    path = source.cached("file", lambda path: path.write_text("whole"))
    assert path.read_text() == "whole"
    assert source.cached("file", killed) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert path.parent.stat().st_mode & 0o77 == 0, "another user could put a library there"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    with pytest.raises(RuntimeError, match=r"cannot be written .*: set XDG_CACHE_HOME"):
        source.cached("other", killed)

    original, before = source.FOLDER, source.digest()
    for changed in ("fusion.cu", "element.cuh", "host/cuda_fp16.h"):
        copy = tmp_path / changed.replace("/", "-")
        shutil.copytree(original, copy)
        monkeypatch.setattr(source, "FOLDER", copy)
        assert source.digest() == before
        (copy / changed).write_text((copy / changed).read_text() + "\n")
        assert source.digest() != before


def run_python(code: str, packages: Path, cache: Path) -> str:
    """Run Python in a folder that is not the checkout; `packages` is searched first."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_kernel_package_works_wherever_it_is_installed(tmp_path):
    """Its Python files and its data, copied elsewhere as a wheel would install them, run with no sight of the checkout."""
    checkout = Path(kernels.__file__).parent
    installed = tmp_path / "kernels"
    for pattern in ("*.py", "*.cu", "*.cuh", "host/*.h"):
        for path in checkout.glob(pattern):
            target = installed / path.relative_to(checkout)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    code = (
        "import numpy as np, kernels.source; from kernels.fusion import upsample_add\n"
        "print(kernels.source.FOLDER, upsample_add(np.ones((1, 1, 2, 2)), np.ones((1, 1, 3, 3))).sum())"
    )
    cache = tmp_path / "cache"
    cache.mkdir()
    printed = run_python(code, tmp_path, cache)
    assert printed.split() == [str(installed), "18.0"]
    assert len(list(cache.rglob("fusion-*.so"))) == 1


def test_kernels_run_without_cupy(tmp_path):
    code = (
        "import sys; sys.modules['cupy'] = None; import numpy as np; from kernels.fusion import upsample_add\n"
        "print(upsample_add(np.ones((1, 1, 2, 2)), np.ones((1, 1, 3, 3))).sum())"
    )
    assert run_python(code, Path(kernels.__file__).parent.parent, tmp_path) == "18.0\n"
