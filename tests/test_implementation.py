"""The choice between the NumPy forms and their compiled twins."""

from __future__ import annotations

import importlib
import threading

import pytest

from reference.implementation import implementation, use

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


def test_cython_without_the_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "_TWINS", ("absent_cython",))
    switch._compiled.cache_clear()
    try:
        assert implementation() == "numpy"
        with use("numpy"):
            pass
        with pytest.raises(RuntimeError, match=r"not compiled: run `python setup\.py build_ext --inplace`"):
            use("cython")
    finally:
        switch._compiled.cache_clear()


def test_a_twin_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError(f"{name}: wrong ELF class")

    monkeypatch.setattr(switch, "import_module", broken)
    switch._compiled.cache_clear()
    try:
        with pytest.raises(ImportError, match="wrong ELF class"):
            implementation()
    finally:
        switch._compiled.cache_clear()
