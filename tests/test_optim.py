"""Optimisers against torch.optim, and both forms against each other, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import accelerated
import accelerated.optim as fast
import reference.optim as plain
from tests.equality import assert_same_dict
from tests.optim import BUFFERS, SHAPES, TRAINABLE, Arrays, draw_params, torchs

RATES = {"backbone": 1e-2, "decoder": 1e-1}
EXACT = 1e-12


def gradients_over_time(seed: int, steps: int, dtype: Any = np.float64) -> list[Arrays]:
    """Gradients of every size, some of them 0 for ever or at first."""
    rng = np.random.default_rng([seed, 1])
    sizes = {key: 10.0 ** rng.integers(-6, 3, SHAPES[key]) * (rng.random(SHAPES[key]) < 0.9) for key in TRAINABLE}
    return [
        {k: (sizes[k] * rng.standard_normal(SHAPES[k]) * (rng.random() < 0.8)).astype(dtype) for k in sizes} for _ in range(steps)
    ]


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
