"""Float32 through whole models, both forms, against the measured noise floor of the float64 reference."""

import numpy as np
import pytest
import torch

import reference
from accelerated.dpt import DPT
from tests.models import model_parameters, small, torch_vjp
from tests.noise import FACTOR, floor, relative

NAMES = sorted(reference.CONFIGS)


def setting(name, task, seed):
    """A small model whose parameters and image are float32 numbers, held in float64."""
    config = small(name, task)
    params = {k: v.astype(np.float32).astype(np.float64) for k, v in model_parameters(config, seed).items()}
    image = np.random.default_rng(seed).standard_normal((2, 3, 48, 64)).astype(np.float32).astype(np.float64)
    return config, params, image


def forward(params, image, config):
    output, vjp = reference.apply(params, image, config)
    return (output, vjp) if config["task"] == "depth" else (output.logits, lambda dy: vjp(reference.Segmentation(dy, None)))


@pytest.mark.parametrize("task", ["depth", "segmentation"])
@pytest.mark.parametrize("name", NAMES)
def test_float32_stays_within_four_times_the_noise_floor(name, task):
    config, params, image = setting(name, task, 11)
    exact, exact_vjp = forward(params, image, config)
    dy = np.random.default_rng(1).standard_normal(exact.shape).astype(np.float32)
    exact_dimage, _ = exact_vjp(dy.astype(np.float64))
    allowed = FACTOR * floor(lambda: forward(params, image, config)[0], exact)
    allowed_gradient = FACTOR * floor(lambda: forward(params, image, config)[1](dy.astype(np.float64))[0], exact_dimage)

    single = {k: v.astype(np.float32) for k, v in params.items()}
    y, vjp = forward(single, image.astype(np.float32), config)
    assert y.dtype == np.float32
    assert relative(y, exact) <= allowed
    assert relative(vjp(dy)[0], exact_dimage) <= allowed_gradient

    (y,), pull = torch_vjp(DPT(config).eval(), single, [image.astype(np.float32)])
    assert y.dtype == np.float32
    assert relative(y, exact) <= allowed
    assert relative(pull([dy])[0][0], exact_dimage) <= allowed_gradient


def test_the_floor_is_of_the_size_of_a_float32_rounding_and_no_larger():
    config, params, image = setting("dpt_base", "depth", 11)
    exact, _ = forward(params, image, config)
    noise = floor(lambda: forward(params, image, config)[0], exact)
    assert 2.0**-26 < noise < 1e-5


def test_an_error_of_a_bfloat16_rounding_is_seen():
    config, params, image = setting("dpt_base", "depth", 11)
    exact, _ = forward(params, image, config)
    allowed = FACTOR * floor(lambda: forward(params, image, config)[0], exact)
    coarse = {k: torch.tensor(v).bfloat16().double().numpy() for k, v in params.items()}
    assert relative(forward(coarse, image, config)[0], exact) > allowed
