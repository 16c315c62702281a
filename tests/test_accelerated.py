"""What the PyTorch model promises besides its equality with the reference: its file, its ways of running, its words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import accelerated
import reference
from accelerated.backbones import Backbone
from accelerated.dpt import DPT
from accelerated.fusion import BatchNorm2d
from tests.equality import LOGIC, MODEL, assert_same
from tests.models import configs, grids, model_parameters, small

TASKS = st.sampled_from(["depth", "segmentation"])


def filled(config: dict[str, Any], seed: int = 0) -> DPT:
    """The model in float64 with random parameters, none of them zero."""
    model = DPT(config).double().eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in model_parameters(config, seed).items()})
    return model


def answer(model: DPT, image: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        output = model(image)
    return (output if isinstance(output, torch.Tensor) else output.logits).numpy()


def random_image(grid: tuple[int, int], batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((batch, 3, 16 * grid[0], 16 * grid[1])))


# The weight file


@settings(max_examples=10)
@given(data=st.data(), task=TASKS, grid=grids())
def test_a_file_written_by_either_form_is_read_by_the_other(data, task, grid, tmp_path_factory):
    config = data.draw(configs(task))
    model, image, path = filled(config).float(), random_image(grid).float(), tmp_path_factory.mktemp("weights") / "a.safetensors"
    accelerated.save(model, path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "save left something beside the file"
    params, read = reference.load(path)
    assert read == config == accelerated.load(path).config
    for form in (params, accelerated.to_numpy(model), accelerated.to_numpy(accelerated.load(path))):
        assert form.keys() == model.state_dict().keys()
        assert all((form[key] == value.numpy()).all() for key, value in model.state_dict().items())
    reference.save(path, params, read)
    assert (answer(accelerated.load(path), image) == answer(model, image)).all()


def test_precision_of_a_file_is_kept_where_numpy_has_it(tmp_path):
    path, config = tmp_path / "a.safetensors", small("dpt_tiny")
    for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        accelerated.save(DPT(config).to(dtype), path)
        assert {value.dtype for value in accelerated.load(path).state_dict().values()} == {expected}
    assert {value.dtype for value in accelerated.to_numpy(DPT(config).bfloat16()).values()} == {np.dtype(np.float32)}


def test_a_loaded_model_is_ready_to_run_and_to_train(tmp_path):
    accelerated.save(DPT(small("dpt_tiny")).to(memory_format=torch.channels_last), tmp_path / "a.safetensors")
    model = accelerated.load(tmp_path / "a.safetensors")
    assert not model.training
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())


def test_to_numpy_copies():
    model = DPT(small("dpt_tiny"))
    accelerated.to_numpy(model)["backbone.pos_embed"][:] = 7
    assert not (model.backbone.pos_embed == 7).any()


def test_a_bad_weight_file_is_refused_in_words(tmp_path):
    path, model = tmp_path / "a.safetensors", DPT(small("dpt_base"))
    with pytest.raises(FileNotFoundError, match=r"there is no weight file at .*a.safetensors"):
        accelerated.load(path)
    with pytest.raises(FileNotFoundError, match=r"cannot be written: there is no folder .*nowhere"):
        accelerated.save(model, tmp_path / "nowhere" / "a.safetensors")
    accelerated.save(model, path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:1000], b"", b"hello", b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no safetensors file, or is truncated"):
            accelerated.load(path)
    tensors = model.state_dict()
    for metadata, message in (
        ({"format": "pt"}, "has no configuration in its metadata"),
        ({"config": "{"}, "has a configuration that is no JSON"),
        ({"config": "[1]"}, "has a configuration that describes no DPT"),
        ({"config": "{}"}, "has a configuration without 'task': it describes no DPT"),
        ({"config": json.dumps(model.config | {"readout": "mean"})}, "describes no DPT: unknown readout 'mean'"),
        (
            {"config": json.dumps(small("dpt_tiny"))},
            r"does not hold the dpt_tiny \(depth\) it should: tensors \d+ missing \(.* more\)",
        ),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=message):
            accelerated.load(path)


# The tensors


@settings(max_examples=10)
@given(data=st.data(), task=TASKS)
def test_no_tensor_is_dead_and_the_two_groups_hold_each_parameter_once(data, task):
    config = data.draw(configs(task))
    model = DPT(config).train()
    output = model(torch.randn(2, 3, 48, 64))
    sum(y.square().sum() for y in (output if task == "segmentation" else [output])).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    groups = [id(parameter) for parameter in [*model.backbone_parameters(), *model.decoder_parameters()]]
    assert sorted(groups) == sorted(id(parameter) for parameter in model.parameters())
    assert {id(parameter) for parameter in model.backbone_parameters()} == {
        id(parameter) for name, parameter in model.named_parameters() if name.startswith("backbone")
    }


def test_batch_norm_counts_no_batches_and_loads_strictly_from_a_plain_dict():
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    assert set(ours.state_dict()) == set(theirs.state_dict()) - {"num_batches_tracked"}
    ours.load_state_dict(dict(ours.state_dict()))
    x = torch.randn(4, 3, 2, 2)
    for training in (True, True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=0, atol=0)
    ours.reset_running_stats()
    assert ours.running_mean.eq(0).all()
    assert ours.running_var.eq(1).all()


def test_a_new_depth_model_is_alive_everywhere():
    torch.manual_seed(0)
    for name in ("dpt_tiny", "dpt_base"):
        depth = DPT(small(name))(torch.randn(2, 3, 64, 96))
        assert (depth > 0).all()


# Ways of running


@settings(max_examples=10)
@given(config=configs(), grid=grids(), seed=st.integers(0, 99))
def test_an_image_is_predicted_alone_as_in_a_batch_and_in_either_memory_format(config, grid, seed):
    model, image = filled(config, seed), random_image(grid, 3, seed)
    together = answer(model, image)
    for i in range(3):
        assert_same(together[i : i + 1], answer(model, image[i : i + 1]), LOGIC, what=f"image {i}")
    last = torch.channels_last
    assert_same(answer(model.to(memory_format=last), image.contiguous(memory_format=last)), together, LOGIC, what="channels last")


@pytest.mark.parametrize(
    ("name", "task", "training"), [("dpt_tiny", "segmentation", True), ("dpt_deit_base_distilled", "depth", False)]
)
def test_the_model_compiles_without_a_graph_break(name, task, training):
    torch.compiler.reset()
    changes = {"dropout": 0.0} if task == "segmentation" else {}
    model = filled(small(name, task, **changes)).train(training)
    image = random_image((2, 3))
    expected, actual = model(image), torch.compile(model, fullgraph=True, backend="aot_eager")(image)
    pairs = zip(expected, actual, strict=True) if task == "segmentation" else [(expected, actual)]
    for y, compiled in pairs:
        assert_same(compiled.detach().numpy(), y.detach().numpy(), MODEL)


@pytest.mark.parametrize("form", ["variance", "deviation"])
def test_mixed_precision_stays_near_and_trains(form):
    torch.manual_seed(0)
    model = DPT(small("dpt_hybrid", weight_standardization=form))
    image = torch.randn(2, 3, 64, 64)
    expected = answer(model, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        depth = model(image)
    depth.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    error = np.linalg.norm(depth.detach().float().numpy() - expected) / np.linalg.norm(expected)
    assert error < 2**-5, "a few of bfloat16's roundings, 2^-9 each"


def test_evaluation_is_deterministic_and_training_drops():
    model, image = filled(small("dpt_base", "segmentation")), random_image((3, 3))
    assert (answer(model, image) == answer(model, image)).all()
    model.train()
    first, second = model(image), model(image)
    assert not torch.equal(first.logits, second.logits)
    assert not torch.equal(first.auxiliary, second.auxiliary)


# ImageNet weights


class Hub:
    """Stands for timm's download: returns a random network of the right name and keeps it, or fails as without a network."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.backbone = filled(config, 1).backbone.float()

    def create(self, name: str, pretrained: bool, num_classes: int) -> nn.Module:
        assert pretrained
        self.backbone.norm = nn.LayerNorm(2)  # what timm's model has and ours has not
        return self.backbone

    @staticmethod
    def fail(name: str, pretrained: bool, num_classes: int) -> nn.Module:
        raise RuntimeError("Cannot reach the hub.\nSecond line")


@pytest.mark.parametrize("name", ["dpt_base", "dpt_hybrid", "dpt_deit_base_distilled"])
def test_imagenet_weights_fill_the_encoder_alone(name, monkeypatch):
    import timm

    hub = Hub(small(name))
    monkeypatch.setattr(timm, "create_model", hub.create)
    monkeypatch.setattr("accelerated.dpt.configuration", lambda *_: small(name))
    model = accelerated.create_model(name, pretrained=True)
    expected = hub.backbone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.backbone.state_dict().items())
    monkeypatch.setattr("accelerated.dpt.configuration", lambda *_: small(name, image_size=64))
    with pytest.raises(ValueError, match=rf"{name} is not of the dimensions of .*its ImageNet weights do not fit"):
        accelerated.create_model(name, pretrained=True)
    monkeypatch.setattr(timm, "create_model", hub.fail)
    with pytest.raises(
        ConnectionError, match=r"the ImageNet weights of \w+ could not be fetched through timm: Cannot reach the hub.$"
    ):
        accelerated.create_model(name, pretrained=True)


def test_the_small_model_has_no_imagenet_weights():
    with pytest.raises(ValueError, match="dpt_tiny has no ImageNet weights"):
        accelerated.create_model("dpt_tiny", pretrained=True)


@pytest.mark.parametrize("name", sorted(set(reference.CONFIGS) - {"dpt_tiny"}))
def test_timm_has_a_network_of_these_dimensions_for_every_configuration(name):
    import timm

    with torch.device("meta"):
        theirs = timm.create_model(reference.CONFIGS[name]["backbone"], num_classes=0).state_dict()
        ours = Backbone(reference.CONFIGS[name]).state_dict()
    assert {key: value.shape for key, value in theirs.items() if key not in ("norm.weight", "norm.bias")} == {
        key: value.shape for key, value in ours.items()
    }
    assert timm.is_model_pretrained(reference.CONFIGS[name]["backbone"])


# Words


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 32), r"the image has shape \(3, 32, 32\): expected \(B, 3, H, W\)"),
        ((1, 4, 32, 32), r"the image has shape \(1, 4, 32, 32\)"),
        ((0, 3, 32, 32), r"the image has shape \(0, 3, 32, 32\)"),
        ((1, 3, 0, 32), r"the image has shape \(1, 3, 0, 32\)"),
        ((1, 3, 40, 32), "the image is 40 x 32 pixels: expected multiples of the patch size, 16"),
        ((1, 3, 32, 8), "the image is 32 x 8 pixels"),
    ],
)
def test_a_bad_image_is_refused_in_words(shape, message):
    with pytest.raises(ValueError, match=message):
        DPT(small("dpt_base"))(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dpt_base", {"task": "normals"}, "unknown task 'normals': expected one of depth, segmentation"),
        ("dpt_base", {"readout": "mean"}, "unknown readout 'mean': expected one of ignore, add, project"),
        ("dpt_base", {"embedding": "linear"}, "unknown embedding 'linear'"),
        ("dpt_base", {"prefix_tokens": 3}, "unknown prefix_tokens 3"),
        ("dpt_base", {"num_heads": 3}, "embed_dim is 16: expected a multiple of num_heads, 3"),
        ("dpt_base", {"image_size": 40}, "image_size is 40: expected a multiple of patch_size, 16"),
        ("dpt_base", {"taps": [0, 1, 2]}, r"taps are \[0, 1, 2\]: expected four increasing block indices from 0 to 3"),
        ("dpt_base", {"taps": [0, 2, 1, 3]}, r"taps are \[0, 2, 1, 3\]"),
        ("dpt_base", {"taps": [0, 1, 1, 3]}, r"taps are \[0, 1, 1, 3\]"),
        ("dpt_base", {"taps": [0, 1, 2, 4]}, r"taps are \[0, 1, 2, 4\]"),
        ("dpt_base", {"taps": [-1, 1, 2, 3]}, r"taps are \[-1, 1, 2, 3\]"),
        ("dpt_base", {"taps": [False, True, 2, 3]}, r"taps are \[False, True, 2, 3\]"),
        ("dpt_base", {"taps": ["R0", "R1", 1, 3]}, "'R0' and 'R1' are stages of the resnet embedding, and dpt_base has none"),
        ("dpt_hybrid", {"taps": ["R1", "R0", 1, 3]}, r"taps are \['R1', 'R0', 1, 3\]: expected four"),
        ("dpt_hybrid", {"taps": ["R0", 1, 2, 3]}, r"taps are \['R0', 1, 2, 3\]: expected four"),
        ("dpt_hybrid", {"reassemble_widths": [32, 32, 8, 8]}, r"reassemble_widths are \[32, 32, 8, 8\]"),
        ("dpt_hybrid", {"weight_standardization": "none"}, "unknown weight_standardization 'none': expected one of variance"),
        ("dpt_hybrid", {"resnet_layers": [1, 1]}, r"resnet_layers \[1, 1\].* do not fit: expected three stages"),
        ("dpt_hybrid", {"resnet_widths": [32, 60, 96]}, r"resnet_widths \[32, 60, 96\]: expected multiples of 8"),
    ],
)
def test_a_configuration_that_makes_no_dpt_is_refused_in_words(name, changes, message):
    with pytest.raises(ValueError, match=message):
        DPT(small(name, **changes) if "task" not in changes else small(name) | changes)


def run(code: str) -> str:
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout


def test_importing_the_package_loads_no_library():
    code = "import sys, accelerated; accelerated.CONFIGS; accelerated.configuration('dpt_tiny'); print(*sys.modules)"
    assert not set(run(code).split()) & {"torch", "timm", "mitsuba", "transformers", "torchvision", "reference"}


@pytest.mark.parametrize("absent", ["torch", "timm"])
def test_a_missing_library_is_named_in_one_sentence(absent):
    code = f"""
import sys
sys.modules[{absent!r}] = None
import accelerated
try:
    accelerated.create_model
except ImportError as error:
    print(error)
"""
    assert run(code).startswith(f"accelerated.create_model needs PyTorch and timm, and {absent} is not installed: install")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'accelerated' has no attribute 'dpt_base'"):
        accelerated.dpt_base  # noqa: B018
    assert set(accelerated.__all__) <= set(dir(accelerated))


METRIC = {"metric_scale": 0.1, "metric_shift": 0.1, "metric_png_scale": 256}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": None}, "lacks image_mean"),
        ({"head_widths": None, "depth": None}, "lacks depth, head_widths"),
        ({"resize_method": "stretch"}, "unknown resize_method 'stretch'"),
        ({"resize_multiple": 24}, "resize_multiple is 24: expected a multiple of patch_size, 16"),
        ({"network_size": [480, 640, 3]}, r"network_size is \[480, 640, 3\]: expected a number of pixels, or two"),
        ({"network_size": 0}, "network_size is 0: expected a number of pixels"),
        ({"network_size": "384"}, "network_size is '384': expected a number of pixels"),
        ({"metric_scale": 1.0, "metric_shift": 0.1}, "lacks metric_png_scale"),
        (METRIC | {"metric_scale": 0}, "metric_scale is 0: expected a positive number"),
        (METRIC | {"metric_shift": -0.1}, "metric_shift is -0.1: expected a positive number"),
        (METRIC | {"metric_scale": float("inf")}, "metric_scale is inf: expected a positive number"),
        (METRIC | {"metric_png_scale": "256"}, "metric_png_scale is '256': expected a positive number"),
    ],
)
def test_a_configuration_that_prepares_no_image_is_refused(change, message):
    config = {key: value for key, value in (accelerated.configuration("dpt_tiny") | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        DPT(config)


def test_metres_belong_to_a_depth_model():
    config = accelerated.configuration("dpt_tiny", "segmentation") | METRIC
    with pytest.raises(
        ValueError, match="has metric_scale, metric_shift, metric_png_scale: expected them of a DPT for depth alone"
    ):
        DPT(config)
    with pytest.raises(ValueError, match="expected them of a DPT for depth alone"):
        accelerated.dpt.from_config(accelerated.configuration("midas_v21_small") | METRIC)


def test_a_metric_model_is_read_by_both_forms(tmp_path):
    config = small("dpt_hybrid") | METRIC | {"network_size": [32, 64]}
    path, image = tmp_path / "metric.safetensors", np.random.default_rng(0).standard_normal((1, 3, 32, 48)).astype(np.float32)
    accelerated.save(DPT(config).eval(), path)
    model, (params, read) = accelerated.load(path), reference.load(path)
    assert model.config == read == config
    with torch.inference_mode():
        expected = model(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(reference.forward(params, image, read), expected, rtol=1e-4)
    assert expected.max() <= 1 / METRIC["metric_shift"] * (1 + 1e-6)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_weight_file_is_readable_to_those_that_the_umask_lets(tmp_path, mask):
    before = os.umask(mask)
    try:
        accelerated.save(DPT(small("dpt_base")), tmp_path / "weights.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
