"""MiDaS, the convolutional baseline: both forms equal, one table, one weight file, the same words for what is wrong."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accelerated
import accelerated.configs
import reference
import reference.configs
from accelerated.dpt import from_config
from accelerated.fusion import upsample
from accelerated.midas import MiDaS, RectifiedFusion
from accelerated.predictor import Predictor
from accelerated.preprocess import network_shape, preprocess
from reference.midas import encode, rectified_fusion
from tests.equality import MODEL, assert_same, assert_same_dict
from tests.midas import NAMES, assert_same_gradients, small
from tests.models import assert_same_operation, model_parameters, torch_vjp
from tests.noise import FACTOR, floor, relative


def run_both(config, seed, image, training):
    """Compare the depth, the image's gradient and every parameter's gradient; in training the running statistics too."""
    rng = np.random.default_rng(seed)
    params, statistics = model_parameters(config, seed), {}
    model = from_config(config).double().train(training)
    assert {k: v.shape for k, v in params.items()} == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    depth, vjp = reference.apply(params, image, config, training=training, statistics=statistics)
    (expected,), torch_pull = torch_vjp(model, params, [image])
    assert_same(depth, expected, MODEL, what="depth")
    ddepth = rng.standard_normal(depth.shape)
    dimage, grads = vjp(ddepth)
    (dexpected,), gexpected = torch_pull([ddepth])
    assert_same(dimage, dexpected, MODEL, what="gradient of the image")
    assert_same_gradients(grads, gexpected, config, training)
    model.load_state_dict({k: torch.tensor(v) for k, v in params.items()})
    model(torch.tensor(image))
    updated = {k: v.numpy() for k, v in model.state_dict().items() if "running" in k and training}
    assert_same_dict(statistics, updated, MODEL)
    return depth, grads


# Both forms


@settings(max_examples=30)
@given(
    name=st.sampled_from(NAMES),
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
    seed=st.integers(0, 999),
)
def test_both_forms_in_evaluation(name, batch, size, eps, seed):
    image = np.random.default_rng(seed).standard_normal((batch, 3, 4 * size[0], 4 * size[1]))
    depth, _ = run_both(small(name, batch_norm_eps=eps), seed, image, training=False)
    assert depth.shape == (batch, 4 * size[0], 4 * size[1])


@settings(max_examples=15)
@given(
    name=st.sampled_from(NAMES),
    batch=st.integers(2, 3),
    size=st.tuples(st.integers(12, 20), st.integers(12, 20)),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
    seed=st.integers(0, 999),
)
def test_both_forms_in_training(name, batch, size, eps, seed):
    image = np.random.default_rng(seed).standard_normal((batch, 3, 4 * size[0], 4 * size[1]))
    run_both(small(name, batch_norm_eps=eps), seed, image, training=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_is_used(name):
    config = small(name)
    params = model_parameters(config, 3)
    image = np.random.default_rng(3).standard_normal((2, 3, 64, 96))
    depth, vjp = reference.apply(params, image, config, training=True)
    assert depth.std() > 0
    _, grads = vjp(np.random.default_rng(4).standard_normal(depth.shape))
    assert [key for key, g in grads.items() if not g.any()] == []
    assert grads.keys() == {key for key in params if "running" not in key}


@pytest.mark.parametrize("name", NAMES)
def test_float32_stays_within_four_times_the_noise_floor(name):
    config = small(name)
    params = {k: v.astype(np.float32).astype(np.float64) for k, v in model_parameters(config, 11).items()}
    image = np.random.default_rng(11).standard_normal((2, 3, 64, 96)).astype(np.float32)
    exact, exact_vjp = reference.apply(params, image.astype(np.float64), config)
    dy = np.random.default_rng(1).standard_normal(exact.shape).astype(np.float32)
    exact_dimage, _ = exact_vjp(dy.astype(np.float64))
    allowed = FACTOR * floor(lambda: reference.apply(params, image.astype(np.float64), config)[0], exact)
    allowed_gradient = FACTOR * floor(
        lambda: reference.apply(params, image.astype(np.float64), config)[1](dy.astype(np.float64))[0], exact_dimage
    )
    single = {k: v.astype(np.float32) for k, v in params.items()}
    y, vjp = reference.apply(single, image, config)
    dimage, grads = vjp(dy)
    assert {y.dtype, dimage.dtype, *(g.dtype for g in grads.values())} == {np.dtype(np.float32)}
    (theirs,), _ = torch_vjp(from_config(config).eval(), single, [image])
    assert relative(y, exact) <= allowed
    assert relative(dimage, exact_dimage) <= allowed_gradient
    # Of torch the depth alone: its gradient of the image ends in one sum over the stem's 64 channels and 7 x 7 taps, whose
    # rounding the floor, one rounding for each primitive, does not hold.
    assert relative(theirs, exact) <= allowed


@given(batch=st.integers(1, 2), size=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 99))
def test_a_rectified_block_in_both_forms_at_any_size(batch, size, seed):
    rng = np.random.default_rng(seed)
    params = {key: v for key, v in model_parameters(small("midas_v21"), seed).items() if key.startswith("fusion.1.")}
    previous, skip = rng.standard_normal((2, batch, 6, *size))
    out = (2 * size[0] - 1, 2 * size[1])
    operation = rectified_fusion(params, "fusion.1", previous, skip, out)
    module = RectifiedFusion(6)
    assert_same_operation(
        operation, module, params, "fusion.1", [previous, skip], rng, call=lambda f, p, s: upsample(f(p, s), out)
    )


# Configurations, weights and words


def test_both_forms_hold_one_table():
    assert reference.configs.MIDAS == accelerated.configs.MIDAS
    assert not reference.configs.MIDAS.keys() & reference.CONFIGS.keys()
    for name in NAMES:
        ours, theirs = reference.configuration(name), accelerated.configuration(name)
        assert ours == theirs
        assert ours["name"] == name
        assert list(ours) == list(theirs)
        ours["fusion_widths"][0] = 1
        assert reference.configuration(name) == theirs


@pytest.mark.parametrize("changes", [{"task": "segmentation"}, {"readout": "add"}, {"taps": [0, 1, 2, 3]}])
def test_what_only_a_transformer_has_is_refused_alike(changes):
    for form in (reference, accelerated):
        with pytest.raises(ValueError, match="midas_v21 is a MiDaS: expected task='depth', and neither readout nor taps"):
            form.configuration("midas_v21", **changes)


def test_an_image_is_prepared_as_the_authors_do():
    config = reference.configuration("midas_v21")
    assert network_shape(480, 640, config) == (288, 384)
    assert network_shape(480, 640, reference.configuration("midas_v21_small")) == (192, 256)
    gray = preprocess(np.full((32, 32, 3), 0.5), config)
    assert_same(gray[0, :, 0, 0].numpy(), (0.5 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225]))


def test_a_picture_is_predicted_at_its_own_size():
    picture = np.random.default_rng(0).integers(0, 256, (41, 70, 3), np.uint8)
    depth = Predictor(from_config(small("midas_v21_small", network_size=64)))(picture)
    assert depth.shape == (41, 70)
    assert np.isfinite(depth).all()
    assert depth.std() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_file_of_one_form_is_read_by_the_other(name, tmp_path):
    config = small(name)
    params = {k: v.astype(np.float32) for k, v in model_parameters(config, 1).items()}
    reference.save(tmp_path / "a", params, config)
    model = accelerated.load(tmp_path / "a")
    assert isinstance(model, MiDaS)
    assert model.config == config
    accelerated.save(model, tmp_path / "b")
    loaded, loaded_config = reference.load(tmp_path / "b")
    assert loaded_config == config
    assert list(accelerated.to_numpy(model)) == list(model.state_dict())
    for arrays in (loaded, accelerated.to_numpy(model)):
        assert arrays.keys() == params.keys()
        assert all((arrays[key] == params[key]).all() for key in params)


def test_a_model_copies_pickles_and_parts_its_parameters():
    model = from_config(small("midas_v21_small")).eval()
    image = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is MiDaS
        assert torch.equal(other(image), model(image))
    parts = [*model.backbone_parameters(), *model.decoder_parameters()]
    assert {id(p) for p in parts} == {id(p) for p in model.parameters()}
    assert len(parts) == len(list(model.parameters()))
    assert {id(p) for p in model.backbone_parameters()} == {id(p) for k, p in model.named_parameters() if "backbone" in k}


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_models_norms_neither_scale_nor_shift(name):
    """As `reference.initialize` has them: timm's own choice for a ResNet starts the last norm of a block at zero."""
    state = accelerated.to_numpy(from_config(small(name)))
    norms = {key.rpartition(".")[0] for key in state if key.endswith("running_var")}
    assert all((state[f"{norm}.weight"] == 1).all() and not state[f"{norm}.bias"].any() for norm in norms)


def test_create_model_makes_one_that_trains():
    torch.manual_seed(0)
    model = accelerated.create_model("midas_v21_small")
    assert isinstance(model, MiDaS)
    assert model.training
    assert model.config == accelerated.configuration("midas_v21_small")
    depth = model(torch.randn(2, 3, 64, 64))
    assert depth.shape == (2, 64, 64)
    assert (depth > 0).float().mean() > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_initialize_gives_the_tensors_of_the_configuration_and_a_depth_that_is_alive(name):
    config = small(name)
    params = reference.initialize(config, np.random.default_rng(0))
    assert {k: v.shape for k, v in params.items()} == reference.parameter_shapes(config)
    assert {v.dtype for v in params.values()} == {np.dtype(np.float32)}
    for key, value in params.items():
        if value.ndim == 4:  # a convolution: uniform within 1 / sqrt(fan_in)
            bound = 1 / np.sqrt(np.prod(value.shape[1:]))
            assert np.abs(value).max() <= bound * (1 + 1e-6), key
            assert value.std() > bound / 4, key
        elif f"{key.rpartition('.')[0]}.running_var" in params:
            assert (value == (key.endswith(("weight", "running_var")))).all(), key
    depth, _ = reference.apply(params, np.random.default_rng(1).standard_normal((2, 3, 64, 64)).astype(np.float32), config)
    assert (depth > 0).mean() > 0.5


def test_a_first_stage_of_the_stems_width_needs_no_projection_beside_it():
    config = small("midas_resnet50") | {"resnet_widths": [64, 128, 256, 512]}
    keys = set(reference.parameter_shapes(config))
    assert "backbone.layer1.0.conv3.weight" in keys
    assert "backbone.layer1.0.downsample.0.weight" not in keys
    assert "backbone.layer2.0.downsample.0.weight" in keys


def test_observe_sees_every_stage_and_changes_nothing():
    config, seen = small("midas_v21_small"), {}
    params = model_parameters(config, 0)
    image = np.random.default_rng(0).standard_normal((1, 3, 36, 64))
    watched, _ = reference.apply(params, image, config, observe=lambda name, a: seen.update({name: a.shape}))
    assert (watched == reference.apply(params, image, config)[0]).all()
    assert seen == {
        "tap.0": (1, 16, 9, 16),
        "tap.1": (1, 8, 5, 8),
        "tap.2": (1, 8, 3, 4),
        "tap.3": (1, 24, 2, 2),
        "reassemble.0": (1, 4, 9, 16),
        "reassemble.1": (1, 6, 5, 8),
        "reassemble.2": (1, 8, 3, 4),
        "reassemble.3": (1, 10, 2, 2),
        "fusion.0": (1, 4, 18, 32),
        "fusion.1": (1, 4, 9, 16),
        "fusion.2": (1, 6, 5, 8),
        "fusion.3": (1, 8, 3, 4),
    }


def test_a_strided_block_never_skips():
    """Not even where it changes neither the number of channels nor, at a single pixel, the size."""
    config = small("midas_v21_small", efficientnet_widths=[8, 16, 8, 16, 8, 8, 24])
    run_both(config, 0, np.random.default_rng(0).standard_normal((2, 3, 16, 16)), training=False)


def test_stages_after_the_last_tap_are_not_there():
    changes = {"efficientnet_strides": [1, 2, 2, 2, 2, 1, 1], "efficientnet_taps": [1, 2, 3, 4]}
    config = small("midas_v21_small", **changes)
    assert not any(key.startswith("backbone.blocks.5") for key in reference.parameter_shapes(config))
    run_both(config, 0, np.random.default_rng(0).standard_normal((1, 3, 64, 32)), training=False)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 32), r"shape \(3, 32, 32\).*\(B, 3, H, W\)"),
        ((1, 1, 32, 32), r"shape \(1, 1, 32, 32\)"),
        ((1, 3, 32, 0), r"shape \(1, 3, 32, 0\)"),
        ((1, 3, 32, 42), "32 x 42 pixels.*multiples of 4"),
        ((1, 3, 33, 32), "33 x 32 pixels.*multiples of 4"),
    ],
)
def test_a_bad_image_is_refused_in_words_by_both_forms(shape, message):
    config = small("midas_v21")
    with pytest.raises(ValueError, match=message):
        reference.apply(model_parameters(config, 0), np.zeros(shape), config)
    with pytest.raises(ValueError, match=message):
        from_config(config)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "vgg"}, "unknown encoder 'vgg'"),
        ({"fusion_block": "plain"}, "unknown fusion_block 'plain'"),
        ({"task": "segmentation"}, "unknown task 'segmentation'"),
    ],
)
def test_a_configuration_that_makes_no_midas_is_refused_in_words_by_both_forms(changes, message):
    config = small("midas_v21")
    params = model_parameters(config, 0)
    with pytest.raises(ValueError, match=message):
        reference.apply(params, np.zeros((1, 3, 32, 32)), config | changes)
    with pytest.raises(ValueError, match=message):
        reference.parameter_shapes(config | changes)
    with pytest.raises(ValueError, match=message):
        from_config(config | changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("midas_v21", {"fusion_widths": [4, 8, 8, 8]}, r"fusion_widths are \[4, 8, 8, 8\]: expected four, all the same"),
        ("midas_v21", {"fusion_widths": [8, 8, 8]}, r"fusion_widths are \[8, 8, 8\]: expected four"),
        ("midas_v21", {"resnet_layers": [1, 1, 1]}, r"resnet_layers \[1, 1, 1\] .* expected four stages"),
        ("midas_v21", {"resnet_widths": [16, 24, 32, 42]}, r"resnet_widths are \[16, 24, 32, 42\].* multiples of 4"),
        ("midas_v21", {"resnet_base_width": 8}, "resnet_base_width is 8: .* a channel in every group"),
        ("midas_v21", {"resize_method": "fit"}, "unknown resize_method 'fit'"),
        ("midas_v21", {"resize_multiple": 14}, "resize_multiple is 14: expected a multiple of 4"),
        ("midas_v21_small", {"efficientnet_layers": [1, 1]}, r"of lengths \[2, 7, 7, 7, 7\]"),
        ("midas_v21_small", {"efficientnet_taps": [1, 2, 6]}, r"efficientnet_taps are \[1, 2, 6\]: expected four increasing"),
        ("midas_v21_small", {"efficientnet_taps": [1, 2, 4, 7]}, "expected four increasing stages from 0 to 6"),
        ("midas_v21_small", {"efficientnet_taps": [0, 1, 2, 4]}, r"the stride is \[2, 4, 8, 16\]: expected \[4, 8, 16, 32\]"),
        ("midas_v21_small", {"efficientnet_widths": [8, 12, 8, 16, 8, 16, 24]}, "expected multiples of 8 once expanded"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused_in_words(name, changes, message):
    with pytest.raises(ValueError, match=message):
        from_config(small(name, **changes))


def test_a_missing_key_is_named():
    config = small("midas_v21_small")
    del config["efficientnet_taps"]
    with pytest.raises(ValueError, match="the configuration lacks efficientnet_taps"):
        from_config(config)


def test_the_encoders_maps_round_odd_sizes_up():
    for name in NAMES:
        config = small(name)
        maps, _ = encode(model_parameters(config, 0), np.ones((1, 3, 65, 40)), config)
        assert [m.shape[2:] for m in maps] == [(17, 10), (9, 5), (5, 3), (3, 2)]


def test_a_file_that_lacks_many_parameters_names_three(tmp_path):
    config = small("midas_resnet50")
    params = reference.initialize(config, np.random.default_rng(0))
    few = dict(list(params.items())[:-9])
    with pytest.raises(ValueError, match=r"9 missing \([^,]+, [^,]+, [^,]+, \.\.\.\)"):
        reference.save(tmp_path / "few.safetensors", few, config)
