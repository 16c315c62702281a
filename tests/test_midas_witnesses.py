"""MiDaS against restatements that share nothing with either form: the published decoder in plain torch, others' encoders."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st

import reference
import reference.configs
from accelerated.dpt import from_config
from reference.efficientnet import efficientnet
from reference.midas import rectified_conv_unit
from reference.resnext import Norms, resnext
from tests.equality import MODEL, assert_same, assert_same_dict
from tests.midas import NAMES, RESNETS, assert_same_gradients
from tests.models import model_parameters, random_parameters

# Witnesses: the published description in plain torch, around encoders of torchvision and of timm


def in_place_unit(params, prefix, x):
    """The residual unit of v2.1 as published: its first ReLU overwrites x, which is then added."""
    x = x.clone()
    y = F.conv2d(F.relu_(x), params[f"{prefix}.conv1.weight"], params[f"{prefix}.conv1.bias"], padding=1)
    y = F.conv2d(F.relu_(y), params[f"{prefix}.conv2.weight"], params[f"{prefix}.conv2.bias"], padding=1)
    return y + x


def plain_unit(params, prefix, x):
    y = F.conv2d(x.relu(), params[f"{prefix}.conv1.weight"], params[f"{prefix}.conv1.bias"], padding=1)
    y = F.conv2d(y.relu(), params[f"{prefix}.conv2.weight"], params[f"{prefix}.conv2.bias"], padding=1)
    return y + x


def decoder_restated(params, maps, unit, projects):
    """The decoder, for maps whose sizes halve exactly."""
    x = 0
    for k in (3, 2, 1, 0):
        skip = F.conv2d(maps[k], params[f"reassemble.{k}.out.weight"], padding=1)
        x = skip if k == 3 else x + unit(params, f"fusion.{k}.rcu1", skip)
        x = F.interpolate(unit(params, f"fusion.{k}.rcu2", x), scale_factor=2, mode="bilinear", align_corners=True)
        if projects:
            x = F.conv2d(x, params[f"fusion.{k}.project.weight"], params[f"fusion.{k}.project.bias"])
    x = F.conv2d(x, params["head.conv1.weight"], params["head.conv1.bias"], padding=1)
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    x = F.conv2d(x, params["head.conv2.weight"], params["head.conv2.bias"], padding=1).relu()
    return F.conv2d(x, params["head.conv3.weight"], params["head.conv3.bias"]).relu()[:, 0]


def torchvision_maps(network, image):
    x, maps = network.maxpool(network.relu(network.bn1(network.conv1(image)))), []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = stage(x)
        maps.append(x)
    return maps


def whole_restated(name, params, image):
    tensors = {key: torch.from_numpy(value) for key, value in params.items()}
    backbone = {key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")}
    with torch.device("meta"):
        if name in RESNETS:
            build = {"midas_v21": torchvision.models.resnext101_32x8d, "midas_resnet50": torchvision.models.resnet50}[name]
            network = build(weights=None)
        else:
            network = timm.create_model("tf_efficientnet_lite3", features_only=True, out_indices=(1, 2, 3, 4))
    missing, unexpected = network.load_state_dict(backbone, strict=False, assign=True)
    assert not unexpected
    assert all(key.startswith("fc.") or key.endswith("num_batches_tracked") for key in missing)
    network.eval()
    x = torch.from_numpy(image)
    maps = torchvision_maps(network, x) if name in RESNETS else network(x)
    return decoder_restated(tensors, maps, in_place_unit if name in RESNETS else plain_unit, projects=name not in RESNETS).numpy()


@given(batch=st.integers(1, 2), size=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 99))
def test_the_rectified_unit_is_the_published_one_that_works_in_place(batch, size, seed):
    rng = np.random.default_rng(seed)
    shapes = {"u.conv1.weight": (5, 5, 3, 3), "u.conv1.bias": (5,), "u.conv2.weight": (5, 5, 3, 3), "u.conv2.bias": (5,)}
    params = random_parameters(shapes, rng)
    x, dy = rng.standard_normal((2, batch, 5, *size))
    y, vjp = rectified_conv_unit(params, "u", x)
    tensors = {key: torch.tensor(value, requires_grad=True) for key, value in params.items()}
    leaf = torch.tensor(x, requires_grad=True)
    expected = in_place_unit(tensors, "u", leaf)
    expected.backward(torch.tensor(dy))
    dx, grads = vjp(dy)
    assert_same(y, expected.detach().numpy())
    assert_same(dx, leaf.grad.numpy())
    assert_same_dict(grads, {key: tensor.grad.numpy() for key, tensor in tensors.items()})


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group("large")) for name in NAMES])
def test_a_full_size_model_in_both_forms(name):
    config = reference.configuration(name)
    params = random_parameters(reference.parameter_shapes(config), np.random.default_rng(7))
    image = np.random.default_rng(8).standard_normal((1, 3, 64, 96))
    depth, _ = reference.apply(params, image, config)
    with torch.device("meta"):
        model = from_config(config).eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in params.items()}, assign=True)
    with torch.inference_mode():
        expected = model(torch.from_numpy(image)).numpy()
        restated = whole_restated(name, params, image)
    assert depth.std() > 0
    assert_same(depth, expected, MODEL)
    assert_same(depth, restated, MODEL)


@pytest.mark.parametrize("training", [False, True])
def test_the_resnext_is_torchvisions_in_values_gradients_and_statistics(training):
    layers, groups = [2, 1, 1, 1], 8
    network = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, layers, groups=groups, width_per_group=4)
    network = network.double().train(training)
    del network.fc
    shapes = {f"b.{k}": tuple(v.shape) for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    params, rng = random_parameters(shapes, np.random.default_rng(2)), np.random.default_rng(5)
    network.load_state_dict({k.removeprefix("b."): torch.tensor(v) for k, v in params.items()}, strict=False)
    image, statistics = rng.standard_normal((2, 3, 49, 66)), {}
    outputs, vjp = resnext(params, "b", image, layers, groups, Norms(1e-5, training, statistics))
    leaf = torch.tensor(image, requires_grad=True)
    expected = torchvision_maps(network, leaf)
    for y, want in zip(outputs, expected, strict=True):
        assert_same(y, want.detach().numpy(), MODEL)
    dys = [rng.standard_normal(y.shape) for y in outputs]
    torch.autograd.backward(expected, [torch.tensor(dy) for dy in dys])
    dimage, grads = vjp(dys)
    assert_same(dimage, leaf.grad.numpy(), MODEL)
    assert_same_dict(grads, {f"b.{k}": p.grad.numpy() for k, p in network.named_parameters()}, MODEL)
    running = {f"b.{k}": v.numpy() for k, v in network.state_dict().items() if "running" in k}
    assert_same_dict(statistics, running if training else {}, MODEL)


def test_the_efficientnet_is_timms_in_values_gradients_and_statistics():
    config = reference.configuration("midas_v21_small")
    params = {k: v for k, v in model_parameters(config, 4).items() if k.startswith("backbone.")}
    rng, statistics = np.random.default_rng(6), {}
    network = timm.create_model("tf_efficientnet_lite3", features_only=True, out_indices=(1, 2, 3, 4)).double().train()
    network.load_state_dict({k.removeprefix("backbone."): torch.tensor(v) for k, v in params.items()}, strict=False)
    image = rng.standard_normal((2, 3, 101, 66))
    outputs, vjp = efficientnet(params, "backbone", image, config, Norms(1e-3, True, statistics))
    leaf = torch.tensor(image, requires_grad=True)
    expected = network(leaf)
    for y, want in zip(outputs, expected, strict=True):
        assert_same(y, want.detach().numpy(), MODEL)
    dys = [rng.standard_normal(y.shape) for y in outputs]
    torch.autograd.backward(expected, [torch.tensor(dy) for dy in dys])
    dimage, grads = vjp(dys)
    assert_same(dimage, leaf.grad.numpy(), MODEL)
    expected_grads = {f"backbone.{k}": p.grad.numpy() for k, p in network.named_parameters()}
    assert_same_gradients(grads, expected_grads, config, training=True)
    running = {f"backbone.{k}": v.numpy() for k, v in network.state_dict().items() if "running" in k}
    assert_same_dict(statistics, running, MODEL)


@pytest.mark.parametrize("name", NAMES)
def test_timm_has_imagenet_weights_of_these_dimensions(name):
    config = reference.configuration(name)
    assert timm.is_model_pretrained(config["backbone"])
    with torch.device("meta"):
        theirs = timm.create_model(config["backbone"], num_classes=0).state_dict()
        ours = from_config(config).backbone.state_dict()
    assert ours.keys() <= theirs.keys()
    assert all(theirs[key].shape == value.shape for key, value in ours.items())
    rest = {key for key in theirs.keys() - ours.keys() if not key.endswith("num_batches_tracked")}
    classifier = {"conv_head.weight", "bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var"}
    assert rest == (classifier if name == "midas_v21_small" else set())


# The published figures, in millions: 105 and 21 in the table of models of the MiDaS repository (its 3.1). They include one tensor
# group that nothing reads, the deepest fusion block's RCU1, of which ours has none.
@pytest.mark.parametrize(
    ("name", "millions", "published", "width"), [("midas_v21", 104.2, 105, 256), ("midas_v21_small", 16.6, 21, 512)]
)
def test_parameter_counts_are_the_published_ones(name, millions, published, width):
    shapes = reference.parameter_shapes(reference.configuration(name))
    count = sum(int(np.prod(shape)) for key, shape in shapes.items() if "running" not in key)
    assert round(count / 1e6, 1) == millions
    dead = 2 * (9 * width * width + width)
    assert round((count + dead) / 1e6) == published
