"""The paper's three models at full depth and width, once each: forward and every gradient, both forms, in float64."""

import numpy as np
import pytest
import torch

import reference
from accelerated.dpt import DPT
from tests.equality import MODEL, assert_same
from tests.models import random_parameters

MODELS = [pytest.param(name, marks=pytest.mark.xdist_group("large")) for name in ("dpt_base", "dpt_hybrid", "dpt_large")]


@pytest.mark.parametrize("name", MODELS)
def test_a_full_size_model_in_both_forms(name):
    config = reference.configuration(name)
    params = random_parameters(reference.parameter_shapes(config), np.random.default_rng(7))
    image = np.random.default_rng(8).standard_normal((1, 3, 64, 96))
    depth, vjp = reference.apply(params, image, config)
    ddepth = np.random.default_rng(9).standard_normal(depth.shape)
    dimage, grads = vjp(ddepth)

    with torch.device("meta"):
        model = DPT(config).eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in params.items()}, assign=True)
    x = torch.from_numpy(image).requires_grad_()
    y = model(x)
    y.backward(torch.from_numpy(ddepth))
    assert x.grad is not None
    assert depth.std() > 0
    assert_same(depth, y.detach().numpy(), MODEL)
    assert_same(dimage, x.grad.numpy(), MODEL)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert_same(grads.pop(key), parameter.grad.numpy(), MODEL, what=key)
    assert grads == {}
