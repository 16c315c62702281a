"""Optimisers against torch.optim, the min-norm point against SciPy, and both forms against each other, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

import accelerated
import accelerated.optim as fast
import reference.optim as plain
from tests.equality import assert_same, assert_same_dict

SHAPES = {
    "backbone.blocks.0.attn.qkv.weight": (4, 3),
    "backbone.norm.bias": (5,),
    "fusion.0.bn1.weight": (2,),
    "fusion.0.bn1.running_mean": (2,),
    "fusion.0.bn1.running_var": (2,),
    "head.conv1.weight": (2, 3, 3, 3),
    "head.backbone.bias": (1,),  # of the decoder: its key only contains the word
}
BUFFERS = {"fusion.0.bn1.running_mean", "fusion.0.bn1.running_var"}
TRAINABLE = [key for key in SHAPES if key not in BUFFERS]
RATES = {"backbone": 1e-2, "decoder": 1e-1}
EXACT = 1e-12

Arrays = dict[str, np.ndarray]


def draw_params(seed: int, dtype: Any = np.float64) -> Arrays:
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape).astype(dtype) for key, shape in SHAPES.items()}


def gradients_over_time(seed: int, steps: int, dtype: Any = np.float64) -> list[Arrays]:
    """Gradients of every size, some of them 0 for ever or at first."""
    rng = np.random.default_rng([seed, 1])
    sizes = {key: 10.0 ** rng.integers(-6, 3, SHAPES[key]) * (rng.random(SHAPES[key]) < 0.9) for key in TRAINABLE}
    return [
        {k: (sizes[k] * rng.standard_normal(SHAPES[k]) * (rng.random() < 0.8)).astype(dtype) for k in sizes} for _ in range(steps)
    ]


def torchs(params: Arrays) -> dict[str, torch.nn.Parameter]:
    return {key: torch.nn.Parameter(torch.tensor(params[key])) for key in TRAINABLE}


def groups(parameters: dict[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
    """torch.optim's groups, the second of which takes the optimiser's own rate."""
    inside = [p for key, p in parameters.items() if key.startswith("backbone.")]
    return [
        {"params": inside, "lr": RATES["backbone"]},
        {"params": [p for p in parameters.values() if all(p is not q for q in inside)]},
    ]


def assert_same_steps(
    seed: int, step: Callable[..., Any], state: Callable[..., Any], make: Callable[..., torch.optim.Optimizer], steps: int = 6
) -> None:
    """Compare `steps` of our optimiser with torch's, parameter by parameter after each step, under polynomial decay."""
    params = draw_params(seed)
    parameters = torchs(params)
    optimizer = make(groups(parameters), lr=RATES["decoder"])
    factors = [plain.polynomial_factor(i, steps) for i in range(steps)]
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    rates, state = plain.group_rates(params, **RATES), state(params)
    for factor, grads in zip(factors, gradients_over_time(seed, steps), strict=True):
        before = {k: v.copy() for k, v in [*params.items(), *(("gradient of " + k, g) for k, g in grads.items())]}
        old = params
        params, state = step(old, grads, state, plain.scaled(rates, factor))
        for key, value in [*old.items(), *(("gradient of " + k, g) for k, g in grads.items())]:
            np.testing.assert_array_equal(value, before[key], err_msg=f"the step changed its argument: {key}")
        for key, parameter in parameters.items():
            parameter.grad = torch.tensor(grads[key])
        optimizer.step()
        scheduler.step()
        assert_same_dict({key: params[key] for key in TRAINABLE}, {k: p.detach().numpy() for k, p in parameters.items()}, EXACT)
        assert all(params[key] is old[key] for key in BUFFERS)
        assert params.keys() == SHAPES.keys()
    assert state.step == steps


@given(seed=st.integers(0, 999), momentum=st.sampled_from([0.0, 0.9]), decay=st.sampled_from([0.0, 0.1]))
def test_sgd_is_torchs(seed: int, momentum: float, decay: float) -> None:
    def step(params: Arrays, grads: Arrays, state: Any, rates: Any) -> Any:
        return plain.sgd(params, grads, state, rates, momentum, decay)

    assert_same_steps(seed, step, plain.sgd_state, lambda g, lr: torch.optim.SGD(g, lr=lr, momentum=momentum, weight_decay=decay))


BETAS = st.sampled_from([(0.9, 0.999), (0.5, 0.7), (0.0, 0.9)])


@given(seed=st.integers(0, 999), betas=BETAS, eps=st.sampled_from([1e-8, 1e-2]), decay=st.sampled_from([0.0, 0.1]))
def test_adam_is_torchs(seed: int, betas: tuple[float, float], eps: float, decay: float) -> None:
    def step(params: Arrays, grads: Arrays, state: Any, rates: Any) -> Any:
        return plain.adam(params, grads, state, rates, betas, eps, decay)

    def make(g: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(g, lr=lr, betas=betas, eps=eps, weight_decay=decay)

    assert_same_steps(seed, step, plain.adam_state, make)


@given(seed=st.integers(0, 999), betas=BETAS, eps=st.sampled_from([1e-8, 1e-2]), decay=st.sampled_from([0.0, 0.1]))
def test_adamw_is_torchs(seed: int, betas: tuple[float, float], eps: float, decay: float) -> None:
    def step(params: Arrays, grads: Arrays, state: Any, rates: Any) -> Any:
        return plain.adamw(params, grads, state, rates, betas, eps, decay)

    def make(g: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(g, lr=lr, betas=betas, eps=eps, weight_decay=decay)

    assert_same_steps(seed, step, plain.adam_state, make)


@pytest.mark.parametrize(
    ("step", "state", "witness"),
    [
        (plain.sgd, plain.sgd_state, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
        (plain.adam, plain.adam_state, lambda p: torch.optim.Adam(p, lr=1e-2)),
        (plain.adamw, plain.adam_state, lambda p: torch.optim.AdamW(p, lr=1e-2)),
    ],
)
def test_our_defaults_are_torchs(step: Any, state: Any, witness: Any) -> None:
    params = draw_params(0)
    parameters = torchs(params)
    optimizer, state = witness(list(parameters.values())), state(params)
    for grads in gradients_over_time(0, 3):
        params, state = step(params, grads, state, plain.group_rates(params, 1e-2, 1e-2))
        for key, parameter in parameters.items():
            parameter.grad = torch.tensor(grads[key])
        optimizer.step()
    assert_same_dict({key: params[key] for key in TRAINABLE}, {k: p.detach().numpy() for k, p in parameters.items()}, EXACT)


@pytest.mark.parametrize(
    ("step", "state"), [(plain.sgd, plain.sgd_state), (plain.adam, plain.adam_state), (plain.adamw, plain.adam_state)]
)
def test_a_step_keeps_float32(step: Any, state: Any) -> None:
    params = draw_params(1, np.float32)
    updated, after = step(params, gradients_over_time(1, 1, np.float32)[0], state(params), plain.group_rates(params, **RATES))
    assert {value.dtype for value in updated.values()} == {np.dtype(np.float32)}
    assert {value.dtype for part in after[1:] for value in part.values()} == {np.dtype(np.float32)}
    exact, _ = step(draw_params(1), gradients_over_time(1, 1)[0], state(draw_params(1)), plain.group_rates(params, **RATES))
    for key in TRAINABLE:  # the parameters' last digit, and ten roundings of a step that divides a gradient by its own size
        moved = np.abs(exact[key] - draw_params(1)[key])
        assert (np.abs(updated[key] - exact[key]) <= 2.0**-22 * (np.abs(exact[key]) + 5 * moved)).all(), key


def test_the_rates_follow_the_groups() -> None:
    rates = plain.group_rates(draw_params(0), backbone=1e-5, decoder=1e-4)
    assert set(rates) == set(TRAINABLE)
    assert {key for key, rate in rates.items() if rate == 1e-5} == {"backbone.blocks.0.attn.qkv.weight", "backbone.norm.bias"}
    assert {rate for key, rate in rates.items() if not key.startswith("backbone.")} == {1e-4}
    assert plain.scaled(rates, 0.5) == {key: rate / 2 for key, rate in rates.items()}
    with pytest.raises(ValueError, match="the rate decoder is -1.0: expected a finite number >= 0"):
        plain.group_rates(draw_params(0), backbone=1e-5, decoder=-1.0)


@pytest.mark.parametrize(
    ("step", "state"), [(plain.sgd, plain.sgd_state), (plain.adam, plain.adam_state), (plain.adamw, plain.adam_state)]
)
def test_a_step_names_the_parameter_that_lacks_something(step: Any, state: Any) -> None:
    params, grads = draw_params(0), gradients_over_time(0, 1)[0]
    rates, key = plain.group_rates(params, **RATES), "head.conv1.weight"
    start, name = state(params), step.__name__
    without = {k: g for k, g in grads.items() if k != key}
    with pytest.raises(ValueError, match=f"{name}: the parameter '{key}' has no gradient"):
        step(params, without, start, rates)
    with pytest.raises(ValueError, match=f"{name}: the parameter '{key}' has no learning rate"):
        step(params, grads, start, {k: r for k, r in rates.items() if k != key})
    with pytest.raises(ValueError, match=f"{name}: 'fusion.0.bn1.running_mean' has a gradient but is no trainable parameter"):
        step(params, grads | {"fusion.0.bn1.running_mean": np.zeros(2)}, start, rates)
    with pytest.raises(
        ValueError, match=rf"{name}: the gradient of '{key}' is float64 of shape \(2, 27\): expected float64 of \(2, 3, 3, 3\)"
    ):
        step(params, grads | {key: grads[key].reshape(2, 27)}, start, rates)
    with pytest.raises(ValueError, match=f"the gradient of '{key}' is float32"):
        step(params, grads | {key: grads[key].astype(np.float32)}, start, rates)


# ---- schedules -----------------------------------------------------------------------------------------------------------------


@given(steps=st.integers(1, 50), power=st.sampled_from([0.9, 1.0, 2.0]))
def test_polynomial_decay_is_torchs(steps: int, power: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizers = [torch.optim.SGD([weight], lr=0.3), torch.optim.SGD([weight], lr=0.3)]
    ours = fast.polynomial_decay(optimizers[0], steps, power)
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimizers[1], steps, power)
    for step in range(steps + 1):
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert rates[0] == pytest.approx(rates[1], rel=1e-11, abs=1e-15)  # torch multiplies factors up, step by step
        assert rates[0] == pytest.approx(0.3 * plain.polynomial_factor(step, steps, power), rel=1e-15)
        assert plain.constant_factor(step, steps) == 1
        if step < steps:
            for optimizer, scheduler in zip(optimizers, (ours, theirs), strict=True):
                optimizer.step()
                scheduler.step()
    assert rates[0] == 0


@pytest.mark.parametrize(("step", "steps"), [(-1, 4), (5, 4), (0, 0)])
def test_a_schedule_has_an_end(step: int, steps: int) -> None:
    for factor in (plain.polynomial_factor, plain.constant_factor, fast.polynomial_factor):
        with pytest.raises(ValueError, match=f"{factor.__name__}: step is {step} of {steps} steps"):
            factor(step, steps)


# ---- the min-norm point --------------------------------------------------------------------------------------------------------


def shortest(points: np.ndarray) -> np.ndarray:
    """The shortest vector in the hull of `points` (n, D), by SciPy's non-negative least squares.

    min |P'u|^2 + (1'u - 1)^2 over u >= 0: for any sum t of u, the first term is least at t times the hull's shortest point.
    """
    size = np.abs(points).max() or 1.0
    u, _ = nnls(np.vstack([points.T / size, np.ones(len(points))]), np.append(np.zeros(points.shape[1]), 1.0))
    return u @ points / u.sum()


@st.composite
def hulls(draw: Any) -> np.ndarray:
    """1 to 5 gradients (n, D): random, of several lengths, on a grid (dependent, opposite, zero), with copies and multiples."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    n, size = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["normal", "lengths", "grid", "one side", "repeated"]))
    if kind == "grid":
        return rng.integers(-2, 3, (n, size)).astype(float)
    points = rng.standard_normal((n, size))
    if kind == "lengths":
        points *= 10.0 ** rng.integers(-3, 4, (n, 1))
    if kind == "one side":
        points += 3 * rng.standard_normal(size)
    if kind == "repeated":
        points = points[rng.integers(0, n, n)] * rng.choice([1, 1, 1, 2, -1, 0], (n, 1))
    return points


def both_min_norm_points(points: np.ndarray) -> list[np.ndarray]:
    gram = points @ points.T
    return [plain.min_norm_point(gram), fast.min_norm_point(torch.tensor(gram)).numpy()]


@settings(max_examples=80)
@given(points=hulls())
def test_the_min_norm_point_is_scipys(points: np.ndarray) -> None:
    for weights in both_min_norm_points(points):
        assert weights.shape == (len(points),)
        assert weights.dtype == np.float64
        assert (weights >= 0).all()
        assert abs(weights.sum() - 1) <= 1e-12
        assert_same(weights @ points, shortest(points), scale=float(np.abs(points).max()))


@given(seed=st.integers(0, 9999), n=st.integers(1, 5))
def test_both_forms_give_the_weights_where_these_are_unique(seed: int, n: int) -> None:
    points = np.random.default_rng(seed).standard_normal((n, 8)) + np.random.default_rng([seed, 1]).standard_normal(8)
    first, second = both_min_norm_points(points)
    assert_same(second, first)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[3.0, 4.0]], [1.0]),
        ([[2.0, 0.0], [0.0, 1.0]], [0.2, 0.8]),  # the foot of the perpendicular
        ([[1.0, 0.0], [2.0, 0.5]], [1.0, 0.0]),  # its foot lies outside: the shorter one
        ([[2.0, 0.5], [1.0, 0.0]], [0.0, 1.0]),
        ([[1.0, 0.0], [-3.0, 0.0]], [0.75, 0.25]),  # opposite: 0
        ([[1.0, 1.0], [0.0, 0.0]], [0.0, 1.0]),  # a zero gradient is the shortest of all
        ([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], [1 / 3, 1 / 3, 1 / 3]),
        ([[1e6, 1.0], [-1e-6, 1.0]], [1e-12, 1 - 1e-12]),  # lengths that differ by a million
    ],
)
def test_the_min_norm_point_by_hand(points: list[list[float]], expected: list[float]) -> None:
    for weights in both_min_norm_points(np.array(points)):
        np.testing.assert_allclose(weights, expected, rtol=1e-10, atol=1e-15)


@settings(max_examples=60)
@given(seed=st.integers(0, 9999), n=st.integers(6, 9), size=st.integers(2, 8))
def test_the_min_norm_point_of_many(seed: int, n: int, size: int) -> None:
    """Beside the origin, so that several gradients leave the face in one walk."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((n, size)) * rng.uniform(0.1, 3, size) + rng.standard_normal(size)
    for weights in both_min_norm_points(points):
        assert_same(weights @ points, shortest(points), scale=float(np.abs(points).max()))


def test_a_gram_matrix_may_be_rounded() -> None:
    """What should be 0 may be 0 on one side of the diagonal and noise on the other."""
    gram = np.array([[1.0, 1e-17], [0.0, 1.0]])
    for weights in (plain.min_norm_point(gram), fast.min_norm_point(torch.tensor(gram)).numpy()):
        np.testing.assert_allclose(weights, [0.5, 0.5], rtol=1e-12)


@pytest.mark.parametrize(
    "gram", [np.zeros((0, 0)), np.ones((2, 3)), np.array([[1.0, np.nan], [np.nan, 1.0]]), np.array([[1.0, 0.5], [0.2, 1.0]])]
)
def test_a_gram_matrix_must_be_one(gram: np.ndarray) -> None:
    for form in (plain.min_norm_point, lambda g: fast.min_norm_point(torch.tensor(g))):
        with pytest.raises(ValueError, match=r"min_norm_point: gram has shape \(\d, \d\): expected \(n, n\), n >= 1, finite"):
            form(gram)


def test_a_gram_matrix_has_no_negative_eigenvalue() -> None:
    gram = np.array([[1.0, 3.0], [3.0, 1.0]])
    for form in (plain.min_norm_point, lambda g: fast.min_norm_point(torch.tensor(g))):
        with pytest.raises(ValueError, match="gram has the eigenvalue -2: expected inner products, which have none below 0"):
            form(gram)


# ---- mgda ----------------------------------------------------------------------------------------------------------------------


def losses_of(parameters: dict[str, torch.Tensor], n: int, seed: int) -> list[torch.Tensor]:
    """n scalars, curved in every parameter."""
    rng = np.random.default_rng([seed, 2])
    centres = [{k: torch.tensor(rng.standard_normal(SHAPES[k])) for k in TRAINABLE} for _ in range(n)]
    return [sum((((p - centre[k]) ** 2).sum() for k, p in parameters.items()), torch.zeros(())) for centre in centres]


@given(seed=st.integers(0, 999), n=st.integers(1, 4))
def test_mgda_in_both_forms(seed: int, n: int) -> None:
    """The same combined gradient and weights; it is the shortest, and each loss falls along its opposite."""
    params = draw_params(seed)
    parameters = torchs(params)
    losses = losses_of(parameters, n, seed)
    gradients = [
        dict(
            zip(
                parameters,
                (g.numpy() for g in torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)),
                strict=True,
            )
        )
        for loss in losses
    ]
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)  # replaced, not added to
    weights = fast.mgda_backward(losses, parameters.values())
    combined, plain_weights = plain.mgda(gradients)
    assert_same(weights.numpy(), plain_weights)
    assert_same_dict({key: p.grad.numpy() for key, p in parameters.items()}, combined)
    points = np.array([np.concatenate([g.ravel() for g in grads.values()]) for grads in gradients])
    flat = np.concatenate([g.ravel() for g in combined.values()])
    assert_same(flat, shortest(points))
    assert (points @ flat >= (1 - 1e-10) * flat @ flat).all()


def test_mgda_keeps_float32_and_survives_what_float32_cannot_square() -> None:
    """Inner products are summed in float64: those of gradients of 1e-25 underflow in float32."""
    gradients = [{"w": np.array([2e-25, 0], np.float32)}, {"w": np.array([0, 1e-25], np.float32)}]
    combined, weights = plain.mgda(gradients)
    np.testing.assert_allclose(weights, [0.2, 0.8], rtol=1e-6)
    assert combined["w"].dtype == np.float32
    w = torch.nn.Parameter(torch.zeros(2))
    other = fast.mgda_backward([(w * torch.tensor(g["w"])).sum() for g in gradients], [w])
    np.testing.assert_allclose(other.numpy(), weights, rtol=1e-12)
    np.testing.assert_allclose(w.grad.numpy(), combined["w"], rtol=1e-6)


def test_a_loss_that_does_not_see_a_parameter_has_gradient_zero_there() -> None:
    a, b = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    weights = fast.mgda_backward([2 * a.sum(), b.sum()], [a, b])
    np.testing.assert_allclose(weights.numpy(), [0.2, 0.8], rtol=1e-12)
    np.testing.assert_allclose([a.grad.item(), b.grad.item()], [0.4, 0.8], rtol=1e-12)


def test_losses_may_share_their_graph() -> None:
    """As datasets of one batch do: the second backward pass still finds what the first one used."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    shared = w.exp() * w
    weights = fast.mgda_backward([shared[0], 3 * shared[0], shared[1]], [w])
    gradients = [{"w": np.array(g)} for g in ([2 * math.e, 0], [6 * math.e, 0], [0, 3 * math.e**2])]
    combined, expected = plain.mgda(gradients)
    assert_same(weights.numpy(), expected)
    assert_same(w.grad.numpy(), combined["w"])


def test_mgda_names_what_it_cannot_combine() -> None:
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match=r"no loss depends on parameter 1, of shape \(3,\)"):
        fast.mgda_backward([a.sum(), a.prod()], [a, b])
    with pytest.raises(ValueError, match="the gradient of loss 1 is not finite"):
        fast.mgda_backward([a.sum(), a.sum() * torch.inf], [a])
    with pytest.raises(ValueError, match="there are no losses: expected at least one"):
        fast.mgda_backward([], [a])
    one = np.ones(2)
    with pytest.raises(ValueError, match="only one of the tasks 0 and 1 has a gradient of 'b'"):
        plain.mgda([{"a": one, "b": one}, {"a": one}])
    with pytest.raises(ValueError, match="there are no gradients"):
        plain.mgda([])


# ---- the optimisers of a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "rates"),
    [
        (fast.adam, torch.optim.Adam, (1e-5, 1e-4)),
        (fast.adamw, torch.optim.AdamW, (1e-5, 1e-4)),
        (fast.sgd, torch.optim.SGD, (2e-3, 2e-3)),
    ],
)
def test_every_parameter_of_a_model_is_in_its_group(make: Any, kind: type, rates: tuple[float, float]) -> None:
    """The same keys at the same rates as the reference's, by default and when given."""
    model = accelerated.create_model("dpt_tiny", task="segmentation")
    params = accelerated.to_numpy(model)
    for optimizer, given_rates in ((make(model), rates), (make(model, 0.25, 0.5), (0.25, 0.5))):
        assert type(optimizer) is kind
        rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        have = {name: rate_of[id(parameter)] for name, parameter in model.named_parameters()}
        assert have == plain.group_rates(params, *given_rates)
    assert set(have.values()) == {0.25, 0.5}


@pytest.mark.parametrize(
    ("make", "step", "state", "options"),
    [
        (fast.adam, plain.adam, plain.adam_state, {"weight_decay": 0.1}),
        (fast.adamw, plain.adamw, plain.adam_state, {"weight_decay": 0.1}),
        (fast.sgd, plain.sgd, plain.sgd_state, {"weight_decay": 0.1, "momentum": 0.8}),
        (fast.adam, plain.adam, plain.adam_state, {}),
        (fast.adamw, plain.adamw, plain.adam_state, {}),
        (fast.sgd, plain.sgd, plain.sgd_state, {}),
    ],
)
def test_a_model_takes_the_same_steps_in_both_forms(make: Any, step: Any, state: Any, options: dict[str, float]) -> None:
    """Two steps on given gradients, in float64, polynomial decay between them; the batch statistics stay."""
    model = accelerated.create_model("dpt_tiny", task="segmentation").double()
    params = {key: value.copy() for key, value in accelerated.to_numpy(model).items()}
    optimizer, rng = make(model, 0.01, 0.1, **options), np.random.default_rng(0)
    scheduler = fast.polynomial_decay(optimizer, 2)
    rates, now = plain.group_rates(params, 0.01, 0.1), state(params)
    for i in range(2):
        grads = {}
        for name, parameter in model.named_parameters():
            grads[name] = rng.standard_normal(tuple(parameter.shape))
            parameter.grad = torch.tensor(grads[name])
        params, now = step(params, grads, now, plain.scaled(rates, plain.polynomial_factor(i, 2)), **options)
        optimizer.step()
        scheduler.step()
    assert_same_dict(accelerated.to_numpy(model), params, EXACT)
