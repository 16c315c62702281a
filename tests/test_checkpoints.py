"""Published weights: the authors' files and Hugging Face's folders give what their own code gives; damage is named."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Callable
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
from accelerated.checkpoints import authors
from accelerated.weights import from_tensors
from tests.equality import LOGIC, assert_same
from tests.models import small
from tests.published import MODELS, SIZES, compare, layout, published_state

AUTHORS = 1e-5  # relative 2-norm: what an equal computation in float32 shows
OTHER_STANDARDIZATION = 2e-4  # what timm's change of its weight standardisation does to the Hybrid's output


def run_accelerated(model: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    def function(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            output = model(torch.from_numpy(image))
        return (output if isinstance(output, torch.Tensor) else output.logits).numpy()

    return function


def run_reference(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    params = accelerated.to_numpy(model)

    def function(image: np.ndarray) -> np.ndarray:
        output = reference.apply(params, image, model.config)[0]
        return output if isinstance(output, np.ndarray) else output.logits

    return function


# The authors' files


@pytest.fixture(scope="module")
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The name of a fixture, and the model that load_checkpoint makes of that weight file."""
    path = tmp_path_factory.mktemp("authors") / f"{request.param}.pt"
    torch.save({key: torch.from_numpy(value) for key, value in published_state(request.param).items()}, path)
    model = accelerated.load_checkpoint(path, model=MODELS[request.param])
    path.unlink()  # more than a gigabyte for the largest
    return request.param, model


def each(*names: str) -> Any:
    # One process builds each model, once: Large takes 6 GB.
    cases = [pytest.param(name, marks=pytest.mark.xdist_group(name.split("-")[1])) for name in names]
    return pytest.mark.parametrize("published", cases, indirect=True)


@each(*MODELS)
def test_authors_weights_in_accelerated_answer_as_the_authors_code(published):
    name, model = published
    compare(name, run_accelerated(model), AUTHORS)


@each(*MODELS)
def test_authors_weights_in_reference_answer_as_the_authors_code(published):
    name, model = published
    compare(name, run_reference(model), AUTHORS, sizes=SIZES[1:] if "large" in name else SIZES)


@each("dpt-hybrid-depth")
@pytest.mark.parametrize("run", [run_accelerated, run_reference])
def test_hybrid_in_todays_weight_standardization_is_near_the_authors_and_not_theirs(published, run):
    name, model = published
    assert model.config["weight_standardization"] == "deviation"
    today = from_tensors(model.config | {"weight_standardization": "variance"}, model.state_dict(), name)
    compare(name, run(today), OTHER_STANDARDIZATION)
    with pytest.raises(AssertionError, match="relative error"):
        compare(name, run(today), AUTHORS, sizes=SIZES[:1])


def hollow(name: str) -> dict[str, torch.Tensor]:
    """The published file's keys and shapes, every tensor one repeated number, so that the file is small."""
    integer = torch.zeros(1, dtype=torch.int64)
    return {
        key: (integer if key.endswith("tracked") else torch.ones(1)).expand(shape) if shape else integer[0]
        for key, shape in layout(name).items()
    }


def is_dead(key: str) -> bool:
    unread = ("pretrained.model.norm.", "pretrained.model.head.", "scratch.refinenet4.resConfUnit1.")
    return key.startswith(unread) or key.endswith("num_batches_tracked")


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_an_authors_file_has_one_place_or_is_known_to_be_dead(name):
    config = authors.authors_configuration(*authors.MODELS[MODELS[name]])
    assert {key for key in layout(name) if authors.DEAD.match(key)} == {key for key in layout(name) if is_dead(key)}
    places = {authors.rename(key, config["task"]): tuple(shape) for key, shape in layout(name).items() if not is_dead(key)}
    assert places == reference.parameter_shapes(config)
    assert len(places) == sum(not is_dead(key) for key in layout(name)), "two tensors have the same place"


def test_missing_and_foreign_tensors_are_named(tmp_path):
    path, state = tmp_path / "weights.pt", hollow("dpt-base-depth")
    torch.save({"model": {key: value for key, value in state.items() if not is_dead(key)}, "optimizer": {}}, path)
    model = accelerated.load_checkpoint(path, model="dpt_base")  # dead tensors need not be there, a training run's wrapper may
    assert len(model.state_dict()) == sum(not is_dead(key) for key in state)
    key = "scratch.refinenet2.resConfUnit1.conv2.bias"
    for content, message in (
        ({k: v for k, v in state.items() if k != key}, r"tensors 1 missing \(fusion.1.rcu1.conv2.bias\)"),
        (state | {key: torch.ones(2, 5)}, r"1 of another shape \(fusion.1.rcu1.conv2.bias is \(2, 5\) instead of \(256,\)\)"),
        (state | {key: torch.ones(256, dtype=torch.int32)}, r"tensors 1 not floating point \(fusion.1.rcu1.conv2.bias\)"),
        (state | {"scratch.refinenet5.out_conv.weight": torch.ones(1)}, r"1 unexpected \(scratch.refinenet5.out_conv.weight\)"),
        ({}, "holds no state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            accelerated.load_checkpoint(path, model="dpt_base")


def test_a_name_that_contradicts_an_authors_file_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(hollow("dpt-base-depth"), path)
    for wrong in ("dpt_large", "dpt_hybrid", "dpt_large-ade20k"):
        with pytest.raises(ValueError, match=rf"weights.pt does not hold the {wrong.split('-')[0]} .* and \d+ more"):
            accelerated.load_checkpoint(path, model=wrong)
    with pytest.raises(ValueError, match="give model= one of dpt_base, dpt_hybrid"):
        accelerated.load_checkpoint(path)
    with pytest.raises(ValueError, match="unknown model 'dpt_huge': expected one of dpt_base"):
        accelerated.load_checkpoint(path, model="dpt_huge")


class Armed:
    """What a hostile file would hold: unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_damaged_and_foreign_files_are_refused_in_words(tmp_path):
    path, trap = tmp_path / "weights.pt", tmp_path / "sprung"
    with pytest.raises(FileNotFoundError, match="no file or folder at .*weights.pt"):
        accelerated.load_checkpoint(path, model="dpt_base")
    torch.save(hollow("dpt-base-depth"), path)
    whole = path.read_bytes()
    for content in (
        whole[: len(whole) // 2],
        whole[:100],
        b"",
        b"hello",
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        pickle.dumps(Armed(trap), 2),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights.pt is no PyTorch state dict, is truncated, or holds more than tensors"):
            accelerated.load_checkpoint(path, model="dpt_base")
    torch.save({"weights": Armed(trap)}, path)
    with pytest.raises(ValueError, match="holds more than tensors, which is never loaded"):
        accelerated.load_checkpoint(path, model="dpt_base")
    assert not trap.exists()
    for content in ([1, 2], {}, {"a": 1}, torch.ones(3)):
        torch.save(content, path)
        with pytest.raises(ValueError, match="weights.pt holds no state dict"):
            accelerated.load_checkpoint(path, model="dpt_base")


def test_half_precision_weights_become_float32(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({key: value.half() for key, value in hollow("dpt-base-depth").items()}, path)
    model = accelerated.load_checkpoint(path, model="dpt_base")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


# Our own files, through the same door


def test_our_file_says_what_it_is_and_a_contradicting_name_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    accelerated.save(accelerated.dpt.DPT(small("dpt_base")), path)
    for model in (None, "dpt_base", "dpt_base-midas"):
        assert accelerated.load_checkpoint(path, model=model).config["name"] == "dpt_base"
    for wrong in ("dpt_large", "dpt_base-ade20k"):
        with pytest.raises(ValueError, match=rf"holds a dpt_base \(depth\), not the {wrong} it was opened as"):
            accelerated.load_checkpoint(path, model=wrong)
    with pytest.raises(ValueError, match="unknown model 'resnet'"):
        accelerated.load_checkpoint(path, model="resnet")


# Hugging Face


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
    with pytest.raises(ValueError, match=r"1 unexpected \(neck.convs.4.weight\)|1 unexpected \(reassemble.4.out.weight\)"):
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
