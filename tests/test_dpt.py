"""The whole model: every configuration in both forms, forward and backward."""

import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import accelerated
import reference
from accelerated.dpt import DPT
from reference.dpt import check_taps
from reference.parameters import take
from tests import midas
from tests.equality import MODEL, assert_same, assert_same_dict
from tests.models import configs, grids, model_parameters, small, torch_vjp


def run_both(config, params, image, training, rng, dropout_masks=None):
    """Compare outputs, the image's gradient and every parameter's gradient."""
    output, vjp = reference.apply(params, image, config, training=training, dropout_masks=dropout_masks)
    model = DPT(config).double().train(training)
    assert {k: v.shape for k, v in params.items()} == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    ys, torch_pull = torch_vjp(model, params, [image])
    outputs = [output] if config["task"] == "depth" else [y for y in output if y is not None]
    assert len(outputs) == len(ys)
    for y, expected in zip(outputs, ys, strict=True):
        assert_same(y, expected, MODEL, what="output")
    douts = [rng.standard_normal(y.shape) for y in outputs]
    doutput = douts[0] if config["task"] == "depth" else reference.Segmentation(*(douts if len(douts) == 2 else [*douts, None]))
    dimage, grads = vjp(doutput)
    (dexpected,), gexpected = torch_pull(douts)
    assert_same(dimage, dexpected, MODEL, what="gradient of the image")
    assert_same_dict(grads, gexpected, MODEL)
    return outputs, grads


@settings(max_examples=40)
@given(config=configs(), batch=st.integers(1, 2), grid=grids(), seed=st.integers(0, 999))
def test_depth_model_in_both_forms(config, batch, grid, seed):
    rng = np.random.default_rng(seed)
    params = model_parameters(config, seed)
    image = rng.standard_normal((batch, 3, 16 * grid[0], 16 * grid[1]))
    (depth,), grads = run_both(config, params, image, False, rng)
    assert depth.shape == (batch, 16 * grid[0], 16 * grid[1])
    assume(depth.any())
    assert all(g.any() for k, g in grads.items() if k.startswith(("head.conv3", "fusion.0.project")))


@settings(max_examples=15)
@given(config=configs(), grid=grids(), scale=st.floats(0.01, 1), shift=st.floats(0.01, 1), seed=st.integers(0, 999))
def test_metric_model_in_both_forms(config, grid, scale, shift, seed):
    """The same network gives inverse depth without, and metres with the two numbers, which are no parameters."""
    rng = np.random.default_rng(seed)
    params = model_parameters(config, seed)
    image = rng.standard_normal((2, 3, 16 * grid[0], 16 * grid[1]))
    metric = config | {"metric_scale": scale, "metric_shift": shift, "metric_png_scale": 256}
    (depth,), _ = run_both(metric, params, image, False, rng)
    inverse = reference.apply(params, image, config)[0]
    assert_same(depth, 1 / (scale * inverse + shift), MODEL)


@given(
    config=configs("segmentation"), training=st.booleans(), batch=st.integers(2, 3), grid=grids(3, 4), seed=st.integers(0, 999)
)
def test_segmentation_model_in_both_forms(config, training, batch, grid, seed):
    rng = np.random.default_rng(seed)
    config["dropout"] = 0.0
    params = model_parameters(config, seed)
    image = rng.standard_normal((batch, 3, 16 * grid[0], 16 * grid[1]))
    outputs, _ = run_both(config, params, image, training, rng)
    half = (batch, 5, 8 * grid[0], 8 * grid[1])
    full, quarter = (batch, 5, 16 * grid[0], 16 * grid[1]), (batch, 5, 4 * grid[0], 4 * grid[1])
    assert [y.shape for y in outputs] == ([half, quarter] if training else [full])


@pytest.mark.parametrize("name", sorted(reference.CONFIGS))
def test_every_trainable_parameter_is_used(name):
    """No dead tensors: with everything random, every parameter has a gradient."""
    for task in reference.configs.TASKS:
        config = small(name, task)
        params = model_parameters(config, 0)
        image = np.random.default_rng(0).standard_normal((2, 3, 48, 48))
        output, vjp = reference.apply(params, image, config, training=True)
        dy = [np.random.default_rng(1).standard_normal(y.shape) for y in ([output] if task == "depth" else output)]
        _, grads = vjp(dy[0] if task == "depth" else reference.Segmentation(*dy))
        assert [k for k, g in grads.items() if not g.any()] == []
        assert grads.keys() == {k for k in params if "running" not in k}


@pytest.mark.parametrize("task", reference.configs.TASKS)
@pytest.mark.parametrize("name", sorted(reference.CONFIGS))
def test_both_forms_have_the_same_tensors_at_full_size(name, task):
    config = reference.configuration(name, task)
    with torch.device("meta"):
        model = DPT(config)
    assert reference.parameter_shapes(config) == {k: tuple(v.shape) for k, v in model.state_dict().items()}


@pytest.mark.parametrize(("name", "millions"), [("dpt_base", 109.7), ("dpt_hybrid", 121.2), ("dpt_large", 341.8)])
def test_parameter_counts_are_the_published_ones(name, millions):
    shapes = reference.parameter_shapes(reference.configuration(name))
    assert round(sum(int(np.prod(shape)) for shape in shapes.values()) / 1e6, 1) == millions


def test_training_updates_the_running_statistics_of_torch():
    config = small("dpt_hybrid", "segmentation", dropout=0.0)
    params = model_parameters(config, 3)
    image = np.random.default_rng(3).standard_normal((2, 3, 48, 64))
    model = DPT(config).double().train()
    model.load_state_dict({k: torch.tensor(v) for k, v in params.items()})
    model(torch.tensor(image))
    statistics = {}
    reference.apply(params, image, config, training=True, statistics=statistics)
    assert_same_dict(statistics, {k: v.numpy() for k, v in model.state_dict().items() if "running" in k}, MODEL)


def test_observe_sees_every_stage_and_changes_nothing():
    config = small("dpt_hybrid")
    params, seen = model_parameters(config, 0), {}
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 48))
    watched, _ = reference.apply(params, image, config, observe=lambda name, a: seen.update({name: a.shape}))
    assert (watched == reference.apply(params, image, config)[0]).all()
    assert {k: seen[k] for k in ("embed", "tap.R0", "tap.3", "reassemble.3", "fusion.0", "attention.3")} == {
        "embed": (1, 7, 16),
        "tap.R0": (1, 32, 8, 12),
        "tap.3": (1, 7, 16),
        "reassemble.3": (1, 8, 1, 2),
        "fusion.0": (1, 8, 16, 24),
        "attention.3": (1, 2, 7, 7),
    }


# Inference


@pytest.mark.parametrize("task", reference.configs.TASKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", sorted(reference.CONFIGS))
def test_forward_is_the_output_of_apply_bit_for_bit(name, dtype, task):
    config = small(name, task)
    params = {k: v.astype(dtype) for k, v in model_parameters(config, 2).items()}
    image = np.random.default_rng(2).standard_normal((2, 3, 32, 48)).astype(dtype)
    expected, _ = reference.apply(params, image, config)
    actual = reference.forward(params, image, config)
    assert type(actual) is type(expected)
    if task == "segmentation":
        assert actual.auxiliary is expected.auxiliary is None
        actual, expected = actual.logits, expected.logits
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", sorted(reference.MIDAS))
def test_forward_runs_midas_too(name):
    config = midas.small(name)
    params = model_parameters(config, 2)
    image = np.random.default_rng(2).standard_normal((1, 3, 36, 48))
    np.testing.assert_array_equal(reference.forward(params, image, config), reference.apply(params, image, config)[0])


def test_forward_shows_what_apply_shows():
    config = small("dpt_hybrid")
    params, seen = model_parameters(config, 0), []
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 48))
    for run in (reference.apply, reference.forward):
        seen.append({})
        run(params, image, config, observe=lambda name, a: seen[-1].update({name: a.copy()}))
    assert_same_dict(*seen, rtol=0)


def test_a_vjp_made_for_inference_says_so_and_the_next_works():
    config = small("dpt_tiny")
    params = model_parameters(config, 0)
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32))
    with reference.nn.without_vjps():
        depth, vjp = reference.apply(params, image, config)
    with pytest.raises(RuntimeError, match="computed for inference"):
        vjp(depth)
    with pytest.raises(ValueError, match="both sides must be multiples"):
        reference.forward(params, image[..., :24, :24], config)
    depth, vjp = reference.apply(params, image, config)
    vjp(depth)


def test_forward_keeps_only_its_output():
    """What it passes through dies with the call, and does not grow with the number of blocks; apply's vjp keeps it."""
    image = np.random.default_rng(0).standard_normal((1, 3, 160, 160))
    kept, peaks = {}, {}
    for depth in (4, 24):
        config = small("dpt_base", depth=depth, taps=[0, 1, 2, depth - 1], grid=10)
        params = model_parameters(config, 0)
        for run in (reference.apply, reference.forward):
            run(params, image, config)  # a thread's first call asks for its workspaces
            stages = []
            tracemalloc.start()
            output = run(params, image, config, observe=lambda _, a, stages=stages: stages.append(weakref.ref(a)))
            kept[run, depth], peaks[run, depth] = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert any(stage() is not None for stage in stages) == (run is reference.apply)
            del output
    assert kept[reference.forward, 24] < 1.5 * 160 * 160 * 8
    tokens = (1 + 10 * 10) * config["embed_dim"] * 8
    assert peaks[reference.forward, 24] - peaks[reference.forward, 4] < 20 * tokens  # not one array a block
    assert kept[reference.apply, 24] - kept[reference.apply, 4] > 20 * 4 * tokens


@pytest.mark.parametrize("name", ["dpt_tiny", "dpt_base"])
def test_a_batch_is_its_images_one_by_one(name):
    config = small(name)
    params = model_parameters(config, 5)
    image = np.random.default_rng(5).standard_normal((3, 3, 32, 48))
    together, _ = reference.apply(params, image, config)
    for i in range(3):
        assert_same(together[i : i + 1], reference.apply(params, image[i : i + 1], config)[0], MODEL)


def test_float32_stays_float32_and_near_float64():
    config = small("dpt_hybrid")
    params = model_parameters(config, 0)
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32))
    single = {k: v.astype(np.float32) for k, v in params.items()}
    depth, vjp = reference.apply(single, image.astype(np.float32), config)
    dimage, grads = vjp(np.ones_like(depth))
    assert {depth.dtype, dimage.dtype, *(g.dtype for g in grads.values())} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((3, 32, 32)), ValueError, r"shape \(3, 32, 32\).*\(B, 3, H, W\)"),
        (np.zeros((1, 1, 32, 32)), ValueError, r"shape \(1, 1, 32, 32\)"),
        (np.zeros((0, 3, 32, 32)), ValueError, r"shape \(0, 3, 32, 32\)"),
        (np.zeros((1, 3, 32, 40)), ValueError, "32 x 40 pixels.*multiples of 16"),
        (np.zeros((1, 3, 32, 32), np.uint8), TypeError, "uint8.*float32 or float64"),
        (np.full((1, 3, 32, 32), np.nan), ValueError, r"nan at \(0, 0, 0, 0\)"),
    ],
)
def test_a_bad_image_is_refused_in_words(image, error, message):
    config = small("dpt_base")
    with pytest.raises(error, match=message):
        reference.apply(model_parameters(config, 0), image, config)


@pytest.mark.parametrize("taps", [[0, 1, 2], [0, 2, 1, 3], [0, 1, 2, 4], ["R0", "R1", 1, 3], [-1, 0, 1, 2], ["R1", "R0", 1, 3]])
def test_bad_taps_are_refused_in_words(taps):
    with pytest.raises(ValueError, match="taps .* were given: expected four increasing block indices below 4"):
        check_taps(small("dpt_base", taps=taps))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dpt_huge"}, "unknown model 'dpt_huge': expected one of dpt_base"),
        ({"name": "dpt_base", "task": "normals"}, "unknown task 'normals'"),
        ({"name": "dpt_base", "num_classes": 3}, "num_classes=3 "),
    ],
)
def test_bad_configurations_are_refused_in_words_by_both_forms(arguments, message):
    for form in (reference, accelerated):
        with pytest.raises(ValueError, match=message):
            form.configuration(**arguments)


def test_initialize_gives_the_tensors_of_the_configuration_and_a_depth_that_is_alive():
    config = reference.configuration("dpt_tiny")
    params = reference.initialize(config, np.random.default_rng(0))
    assert {k: v.shape for k, v in params.items()} == reference.parameter_shapes(config)
    assert {v.dtype for v in params.values()} == {np.dtype(np.float32)}
    depth, _ = reference.apply(params, np.random.default_rng(1).standard_normal((1, 3, 64, 64)).astype(np.float32), config)
    assert (depth > 0).mean() > 0.5


@pytest.mark.parametrize("name", ["dpt_tiny", "dpt_base"])
def test_the_transformer_begins_near_zero_without_biases_and_the_decoder_uniform(name):
    """Truncated normal weights of standard deviation 0.02 and zero biases; convolutions uniform within 1 / sqrt(fan_in)."""
    config = small(name) if name == "dpt_base" else reference.configuration(name)
    params = reference.initialize(config, np.random.default_rng(0))
    seen = 0
    for key, value in params.items():
        if key.startswith("backbone.blocks") and "norm" not in key:
            if key.endswith("bias"):
                assert not value.any(), key
            else:
                assert 0 < np.abs(value).max() <= 0.04 + 1e-6, key
                assert value.size < 200 or 0.015 < value.std() < 0.02, key
                seen += 1
        elif value.ndim == 4:
            bound = 1 / np.sqrt(np.prod(value.shape[1:]))
            assert bound / 4 < value.std() and np.abs(value).max() <= bound * (1 + 1e-6), key
        elif "norm" in key:
            assert (value == key.endswith("weight")).all(), key
    assert seen >= 4


@pytest.mark.parametrize("changed", [{"resnet_layers": [1, 1]}, {"reassemble_widths": [8, 8, 8]}])
def test_a_list_of_a_configuration_that_is_too_short_is_refused(changed):
    with pytest.raises(ValueError, match="zip"):
        reference.parameter_shapes(reference.configuration("dpt_tiny") | changed)


def test_a_missing_parameter_is_named_with_the_three_nearest():
    params = {f"fusion.{k}.project.weight": np.ones(1) for k in range(5)}
    with pytest.raises(KeyError) as caught:
        take(params, "fusion.9.project.weight")
    assert str(caught.value).count(".project.weight") == 1 + 3
