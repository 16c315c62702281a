"""Inference: within `without_vjps()` a primitive returns the same result, and nothing that holds what a vjp would need."""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from reference import nn
from tests.primitives import PRIMITIVES, each_implementation, normal_arrays  # noqa: F401

SENTENCE = "computed for inference, which keeps nothing for a vjp: use reference.apply for both"
OTHERS = {
    "BatchNorm",
    "attention_weights",
    "same_padding",
    "without_vjps",
}  # offered beside the primitives with a vjp

both = pytest.mark.usefixtures("each_implementation")
every_primitive = pytest.mark.parametrize("name", sorted(PRIMITIVES))


def inputs_of(name: str) -> list[np.ndarray]:
    return normal_arrays(np.random.default_rng(0), *PRIMITIVES[name].shapes)


def test_every_primitive_is_tried_here() -> None:
    """A new one belongs into the table, or among the others."""
    assert set(PRIMITIVES) == set(nn.__all__) - OTHERS
    for name in sorted(OTHERS & {name for name in nn.__all__ if inspect.isfunction(getattr(nn, name))}):
        assert "Vjp" not in str(inspect.signature(getattr(nn, name)).return_annotation), f"{name} returns a vjp"


@both
@every_primitive
def test_the_result_is_the_same_and_its_vjp_refuses_in_words(name: str) -> None:
    y, _ = PRIMITIVES[name].operation(*inputs_of(name))
    with nn.without_vjps():
        alone, vjp = PRIMITIVES[name].operation(*inputs_of(name))
        with pytest.raises(RuntimeError, match=SENTENCE):
            vjp(np.ones_like(y))
    np.testing.assert_array_equal(alone, y)
    with pytest.raises(RuntimeError, match=SENTENCE):  # what was dropped does not come back
        vjp(np.ones_like(y))


@both
@every_primitive
def test_nothing_is_kept(name: str) -> None:
    """Its inputs die, though the result and the vjp are held."""
    inputs = inputs_of(name)
    references = [weakref.ref(array) for array in inputs]
    with nn.without_vjps():
        held = PRIMITIVES[name].operation(*inputs)
    del inputs
    assert [reference() for reference in references] == [None] * len(references)
    del held


@both
@every_primitive
def test_a_vjp_made_outside_works_inside_and_one_made_after_the_block_too(name: str) -> None:
    y, vjp = PRIMITIVES[name].operation(*inputs_of(name))
    dy = np.cos(y)
    expected = vjp(dy)
    with nn.without_vjps():
        np.testing.assert_equal(vjp(dy), expected)
    np.testing.assert_equal(PRIMITIVES[name].operation(*inputs_of(name))[1](dy), expected)


def keeps() -> bool:
    """Whether a vjp that is made here works."""
    y, vjp = nn.relu(np.ones(3))
    try:
        vjp(y)
    except RuntimeError:
        return False
    return True


def test_a_block_nests() -> None:
    with nn.without_vjps():
        with nn.without_vjps():
            assert not keeps()
        assert not keeps()
    assert keeps()


def test_a_block_ends_when_it_fails() -> None:
    with pytest.raises(ZeroDivisionError), nn.without_vjps():
        raise ZeroDivisionError
    assert keeps()


def test_a_block_is_this_threads_alone() -> None:
    seen: list[Any] = []
    inside, outside = threading.Event(), threading.Event()

    def infer() -> None:
        with nn.without_vjps():
            inside.set()
            outside.wait(10)
            seen.append(keeps())
        seen.append(keeps())

    other = threading.Thread(target=infer)
    other.start()
    try:
        assert inside.wait(10)
        assert keeps()  # while the other is in its block
        with nn.without_vjps():
            thread = threading.Thread(target=lambda: seen.append(keeps()))
            thread.start()
            thread.join()
    finally:
        outside.set()
        other.join()
    assert seen == [True, False, True]


def test_the_decorator_changes_nothing_else() -> None:
    for name in PRIMITIVES:
        function = getattr(nn, name)
        assert function.__name__ == name
        assert function.__doc__ == inspect.unwrap(function).__doc__
        assert inspect.signature(function) == inspect.signature(inspect.unwrap(function))
    with nn.without_vjps(), pytest.raises(ValueError, match="softmax: axis is 4"):
        nn.softmax(np.ones((2, 3)), axis=4)
