"""Folders saved by Hugging Face's transformers: opened here they are the same function; what DPT cannot compute is refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import accelerated
import reference
from tests.equality import LOGIC, assert_same
from tests.models import run_accelerated, run_reference


@st.composite
def described(draw: st.DrawFn) -> dict[str, Any]:
    """A configuration of Hugging Face's DPT, all sizes small and most of them odd, with every switch that DPT allows."""
    heads, depth = draw(st.sampled_from([1, 2, 3])), draw(st.integers(4, 6))
    taps = draw(st.lists(st.integers(0, depth - 1), min_size=4, max_size=4, unique=True))
    return {
        "hidden_size": 6 * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": depth,
        "backbone_out_indices": taps,
        "intermediate_size": draw(st.sampled_from([20, 33])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6, 1e-2])),
        "image_size": draw(st.sampled_from([32, 64, 96])),
        "readout_type": draw(st.sampled_from(["ignore", "add", "project"])),
        "neck_hidden_sizes": draw(st.lists(st.integers(3, 9), min_size=4, max_size=4)),
        "fusion_hidden_size": draw(st.sampled_from([6, 9])),
        "qkv_bias": draw(st.booleans()),
        "use_batch_norm_in_fusion_residual": draw(st.booleans()),
        "use_bias_in_fusion_residual": draw(st.sampled_from([None, True, False])),
        "use_auxiliary_head": draw(st.booleans()),
        "num_labels": draw(st.sampled_from([2, 7])),
    }


@st.composite
def described_hybrid(draw: st.DrawFn) -> dict[str, Any]:
    plain = draw(described())
    groups = draw(st.sampled_from([2, 4]))
    widths = [8 * groups * draw(st.integers(1, 2)) for _ in range(3)]
    blocks = sorted(plain["backbone_out_indices"][:2])
    return plain | {
        "is_hybrid": True,
        "readout_type": "project",
        "backbone_out_indices": [0, 1, *blocks],
        "neck_hidden_sizes": [*widths[:2], *plain["neck_hidden_sizes"][2:]],
        "backbone_featmap_shape": [1, widths[2], plain["image_size"] // 16, plain["image_size"] // 16],
        "backbone_config": {
            "model_type": "bit",
            "global_padding": "same",
            "layer_type": "bottleneck",
            "depths": draw(st.lists(st.integers(1, 2), min_size=3, max_size=3)),
            "hidden_sizes": [*widths, 2048],
            "embedding_size": 8 * groups,
            "num_groups": groups,
            "out_features": ["stage1", "stage2", "stage3"],
            "embedding_dynamic_padding": True,
        },
    }


def their_model(kind: str, arguments: dict[str, Any], image: np.ndarray, seed: int) -> Any:
    """Their model in evaluation mode, every tensor random; half the pixels of `image` have depth zero."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, kind)(transformers.DPTConfig(**arguments)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            # Whole multiples of 2^-12: opening a folder may subtract a bias from a mean, and float32 does that exactly here.
            noise = torch.randint(-4096, 4097, value.shape, generator=generator) / 4096
            norm = value.ndim == 1 and key.endswith(("weight", "running_var"))
            value.copy_(noise * (3 / value[0].numel()) ** 0.5 if value.ndim > 1 else noise / 4 + norm)
        if kind == "DPTForDepthEstimation":
            last = model.head.head[4]
            last.weight.abs_()
            last.bias.fill_(1000)
            last.bias.sub_(model(torch.from_numpy(image).float()).predicted_depth.median())
    return model


def assert_opens_as_the_same_function(kind: str, arguments: dict[str, Any], side: int, seed: int) -> Any:
    image = np.random.default_rng(seed).standard_normal((2, 3, side, side))
    theirs = their_model(kind, arguments, image, seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = accelerated.load_checkpoint(folder)
    with torch.inference_mode():
        answer = theirs.double()(torch.from_numpy(image))
    expected = (answer.predicted_depth if kind == "DPTForDepthEstimation" else answer.logits).numpy()
    assert np.ptp(expected) > 1e-3, "the answer is flat: nothing would be compared"
    ours = ours.double()
    assert_same(run_accelerated(ours)(image), expected, LOGIC, what="accelerated")
    assert_same(run_reference(ours)(image), expected, LOGIC, what="reference")
    return ours


KINDS = st.sampled_from(["DPTForDepthEstimation", "DPTForSemanticSegmentation"])


@given(
    kind=KINDS, arguments=described(), patch=st.sampled_from([8, 16]), side=st.sampled_from([2, 4, 6]), seed=st.integers(0, 999)
)
def test_hugging_face_folder_is_the_same_function(kind, arguments, patch, side, seed):
    assert_opens_as_the_same_function(kind, arguments | {"patch_size": patch}, side * patch, seed)


@settings(max_examples=15)
@given(kind=KINDS, arguments=described_hybrid(), seed=st.integers(0, 999))
def test_hugging_face_hybrid_folder_is_the_same_function(kind, arguments, seed):
    # Theirs accepts only the size it is configured for.
    ours = assert_opens_as_the_same_function(kind, arguments, arguments["image_size"], seed)
    assert ours.config["weight_standardization"] == "variance"


SMALL = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 12,
    "backbone_out_indices": [0, 1, 2, 3],
    "image_size": 32,
    "neck_hidden_sizes": [4, 5, 6, 7],
    "fusion_hidden_size": 6,
    "layer_norm_eps": 1e-3,
}


HYBRID = {"is_hybrid": True, "neck_ignore_stages": [0, 1]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    their_model("DPTForDepthEstimation", SMALL, np.ones((1, 3, 32, 32)), 0).save_pretrained(tmp_path)
    return tmp_path


def describe(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_older_weight_file_of_hugging_face_opens_too(folder):
    expected = accelerated.load_checkpoint(folder).state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    actual = accelerated.load_checkpoint(folder).state_dict()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_the_configuration_of_a_folder_is_carried(folder):
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    config = accelerated.load_checkpoint(folder).config
    expected = {
        "name": "dpt_custom",
        "task": "depth",
        "layer_norm_eps": 1e-3,
        "image_size": 32,
        "network_size": 32,
        "fusion_width": 6,
        "head_widths": [3, 32],
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    assert {key: config[key] for key in expected} == expected


def test_the_paper_model_in_a_folder_has_the_papers_name(tmp_path):
    """DPT-Large as published there: its configuration alone tells, and only a name that agrees opens it."""
    import transformers

    from accelerated.checkpoints.huggingface_config import translate

    arguments = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "backbone_out_indices": [5, 11, 17, 23],
        "neck_hidden_sizes": [256, 512, 1024, 1024],
    }
    for changes, name in (
        ({}, "dpt_base"),
        (arguments, "dpt_large"),
        ({"is_hybrid": True, "neck_hidden_sizes": [256, 512, 768, 768]}, "dpt_hybrid"),
    ):
        theirs = json.loads(transformers.DPTConfig(**changes).to_json_string())
        config = translate(theirs | {"architectures": ["DPTForDepthEstimation"]}, tmp_path)
        ours = reference.configuration(name)
        differing = {key for key in ours.keys() | config.keys() if ours.get(key) != config.get(key)}
        assert differing == {"layer_norm_eps"}
        assert config["layer_norm_eps"] == 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "model_type is 'vit', expected 'dpt'"),
        ({"architectures": ["DPTModel"]}, r"architectures is \['DPTModel'\], expected DPTForDepthEstimation or"),
        ({"architectures": None}, "architectures is "),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected 'gelu'"),
        ({"add_projection": True}, "add_projection is True, expected False"),
        ({"head_in_index": 0}, "head_in_index is 0, expected -1"),
        ({"reassemble_factors": [2, 1, 1, 0.5]}, r"reassemble_factors is \[2, 1, 1, 0.5\], expected"),
        ({"num_channels": 4}, "num_channels is 4, expected 3"),
        ({"backbone_config": {"model_type": "swinv2"}}, "its backbone is another network"),
        ({"backbone": "resnet50"}, "its backbone is another network"),
        ({"backbone_out_indices": [1, 1, 2, 3]}, r"taps are \[1, 1, 2, 3\]: expected four increasing block indices"),
        ({"readout_type": "mean"}, "unknown readout 'mean'"),
        ({"image_size": [32, 64]}, r"image_size is \[32, 64\], expected one whole number or a square"),
        ({"num_attention_heads": 3}, "embed_dim is 8: expected a multiple of num_heads, 3"),
        ({"hidden_size": "wide"}, "describes a model that is no DPT"),
        (HYBRID | {"backbone_config": {"model_type": "resnet"}}, "backbone_config: model_type is 'resnet'"),
        (HYBRID | {"backbone_config": {"model_type": "bit"}}, "backbone_config: layer_type is 'preactivation'"),
        (HYBRID | {"neck_ignore_stages": [0]}, r"neck_ignore_stages is \[0\], expected \[0, 1\]"),
    ],
)
def test_what_dpt_cannot_compute_is_refused_in_words(folder, changes, message):
    describe(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        accelerated.load_checkpoint(folder)
    assert "config.json" in str(caught.value)


def test_a_damaged_folder_is_refused_in_words(folder):
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors, whole, text = load_file(weights), weights.read_bytes(), config.read_text()
    save_file({key: value for key, value in tensors.items() if key != "neck.convs.2.weight"}, weights)
    with pytest.raises(
        ValueError, match=r"does not hold the dpt_custom \(depth\) it should: tensors 1 missing \(reassemble.2.out.w"
    ):
        accelerated.load_checkpoint(folder)
    save_file(tensors | {"neck.convs.4.weight": torch.ones(1)}, weights)
    with pytest.raises(
        ValueError, match=r"1 unexpected \(reassemble.4.out.weight; the nearest expected is reassemble.\d.out.weight\)"
    ):
        accelerated.load_checkpoint(folder)
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors is no safetensors file, or is truncated"):
        accelerated.load_checkpoint(folder)
    weights.write_bytes(whole)
    with pytest.raises(ValueError, match=r"holds a dpt_custom \(depth\), not the dpt_large it was opened as"):
        accelerated.load_checkpoint(folder, model="dpt_large")
    describe(folder, architectures=["DPTForSemanticSegmentation"])
    with pytest.raises(ValueError, match=r"does not hold the dpt_custom \(segmentation\) it should: tensors \d+ missing"):
        accelerated.load_checkpoint(folder)
    config.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="config.json is no JSON, or is truncated"):
        accelerated.load_checkpoint(folder)
    config.write_text("[]")
    with pytest.raises(ValueError, match="config.json holds a list: expected a JSON object"):
        accelerated.load_checkpoint(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        accelerated.load_checkpoint(folder)
    config.write_text(text)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors or pytorch_model.bin"):
        accelerated.load_checkpoint(folder)
