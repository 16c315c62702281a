"""The choice between the NumPy forms and their compiled twins."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from reference import nn
from reference.implementation import implementation, use

ROOT = Path(__file__).parents[1]
switch = importlib.import_module("reference.implementation")  # its name in the package is the function


def test_cython_is_the_default_where_it_is_compiled() -> None:
    assert implementation() == "cython"


def test_a_choice_holds_inside_its_block_and_nests() -> None:
    with use("numpy"):
        assert implementation() == "numpy"
        with use("cython"):
            assert implementation() == "cython"
        assert implementation() == "numpy"
    assert implementation() == "cython"


def test_a_choice_ends_with_its_block_when_that_fails() -> None:
    with pytest.raises(ZeroDivisionError), use("numpy"):
        raise ZeroDivisionError
    assert implementation() == "cython"


def test_a_choice_is_this_threads_alone() -> None:
    seen = []
    with use("numpy"):
        thread = threading.Thread(target=lambda: seen.append(implementation()))
        thread.start()
        thread.join()
    assert seen == ["cython"]


def test_another_name_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"unknown implementation 'fortran': expected one of 'numpy', 'cython'"):
        use("fortran")


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is compiled, as in a checkout without a build."""
    monkeypatch.setattr(switch, "_TWINS", ("absent_cython",))
    forget()
    yield
    forget()


def forget() -> None:
    switch._compiled.cache_clear()
    switch._default.cache_clear()


@pytest.mark.usefixtures("no_extension")
def test_without_the_extension_the_numpy_form_runs_and_says_once_that_it_is_slow() -> None:
    x = np.array([-1.0, 2.0])
    with pytest.warns(RuntimeWarning, match=r"not compiled.*slow NumPy.*`python setup\.py build_ext --inplace`"):
        y, vjp = nn.relu(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not a second time
        np.testing.assert_array_equal([y, vjp(x)], [[0, 2], [0, 2]])
        assert implementation() == "numpy"


@pytest.mark.usefixtures("no_extension")
def test_whoever_chose_is_not_warned() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with use("numpy"):
            nn.relu(np.ones(3))


@pytest.mark.usefixtures("no_extension")
def test_cython_without_the_extension_says_how_to_build_it() -> None:
    with pytest.raises(RuntimeError, match=r"not compiled: run `python setup\.py build_ext --inplace`"):
        use("cython")


def test_a_twin_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError(f"{name}: wrong ELF class")

    monkeypatch.setattr(switch, "import_module", broken)
    forget()
    try:
        with pytest.raises(ImportError, match="wrong ELF class"):
            implementation()
    finally:
        forget()


def test_every_twin_in_the_folder_is_demanded_and_all_that_is_asked_of_a_twin_is_there() -> None:
    folder = Path(nn.__file__).parent
    assert sorted(switch._TWINS) == sorted(path.stem for path in folder.glob("*_cython.pyx"))
    asked = {path.stem: decorated_with("twinned", path) for path in folder.glob("*.py")}
    assert "correlate" in asked["conv2d"]
    for name, functions in asked.items():
        for function in functions:
            compiled = importlib.import_module(f"reference.nn.{name}_cython")
            assert callable(getattr(compiled, function, None)), f"reference.nn.{name} asks for {function}"


def test_whatever_a_twin_offers_under_the_name_of_a_numpy_form_is_asked_of_it() -> None:
    """A form that is not marked would run in NumPy, unnoticed."""
    folder = Path(nn.__file__).parent
    for path in folder.glob("*_cython.pyx"):
        plain = folder / f"{path.stem.removesuffix('_cython')}.py"
        if plain.exists():
            offered = set(re.findall(r"^def (\w+)\(", path.read_text(), re.MULTILINE))
            written = {node.name for node in ast.parse(plain.read_text()).body if isinstance(node, ast.FunctionDef)}
            private = {name for name in offered if name.startswith("_")}
            assert (offered & written) - private == set(decorated_with("twinned", plain)), plain.name


def decorated_with(decorator: str, path: Path) -> list[str]:
    """The names of the functions of a source that are decorated with `@decorator`."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if decorator in [ast.unparse(d) for d in f.decorator_list]]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """Bit for bit, of arrays large enough to be shared among threads."""
    code = """
import hashlib, numpy as np
from reference import losses, nn
rng, digest = np.random.default_rng(0), hashlib.sha256()

def run(operation, *inputs):
    y, vjp = operation(*(array.astype(np.float32) for array in inputs))
    parts = vjp(rng.standard_normal(y.shape).astype(np.float32))
    for array in (y, *(parts if isinstance(parts, tuple) else [parts])):
        digest.update(np.ascontiguousarray(array).tobytes())

def batch_norm(x, w, b):
    result, vjp = nn.batch_norm(x, w, b, b, w, training=True)
    return result.y, lambda dy: vjp(nn.BatchNorm(dy, None, None))

x, w = rng.standard_normal((2, 12, 61, 67)), rng.random(12)
for operation in (nn.gelu, nn.softmax, nn.relu):
    run(operation, x)
run(lambda x: nn.max_pool2d(x, 3, 2, 1), x)
run(lambda x: nn.resize_bilinear(x, (121, 150), True), x)
run(lambda x, w, b: nn.group_norm(x, 3, w, b), x, w, w)
run(batch_norm, x, w, w)
run(lambda x, w, b: nn.layer_norm(x, w, b, 1e-6), x, rng.random(67), rng.random(67))
run(lambda p: losses.depth_loss(p, x[1], x[1] > -1), x[0])
rows, weight, bias = rng.standard_normal((301, 300)), rng.standard_normal((900, 300)), rng.random(900)
run(nn.linear, rows, weight, bias)
run(nn.linear, weight, rows, bias[:301])
run(nn.matmul, rows.reshape(7, 43, 300), weight[:35].reshape(7, 300, 5))
run(nn.scaled_dot_product_attention, *rng.standard_normal((3, 2, 3, 201, 20)))
for stride in (1, 2, 3):  # 4087, 1054 and 483 positions
    run(lambda x, w, b: nn.conv2d(x, w, b, stride, 1), x, rng.standard_normal((30, 12, 3, 3)), bias[:30])
    run(lambda x, w, b: nn.conv2d(x, w, b, stride, 0), x, rng.standard_normal((30, 12, 1, 1)), bias[:30])
run(lambda x, w, b: nn.conv_transpose2d(x, w, b, 2), x, rng.standard_normal((12, 5, 2, 2)), bias[:5])
print(digest.hexdigest())
"""
    digests = set()
    for threads in ("1", "2", "3"):
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        digests.add(result.stdout)
    assert len(digests) == 1
