"""`python -m accelerated.convert`, and our models in Hugging Face's layout: transformers computes the same function there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

import accelerated
import reference
from accelerated import convert
from accelerated.checkpoints import huggingface_export
from accelerated.checkpoints.huggingface_export import FILES, save_huggingface, to_huggingface
from accelerated.checkpoints.huggingface_export_config import describe, describe_preprocessing
from accelerated.dpt import from_config
from tests import midas
from tests.equality import LOGIC, MODEL, assert_same
from tests.models import model_parameters, run_accelerated, small

Config = dict[str, Any]


def expressible(name: str, task: str = "depth", **overrides: Any) -> Config:
    """A small configuration whose depth head is no wider than theirs."""
    return small(name, task, **({"head_widths": [4, 4]} if task == "depth" else {}) | overrides)


def random_model(config: Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> accelerated.DPT:
    """Our model in evaluation mode, no parameter zero or one, and the deviations of its standardised weights of many sizes."""
    parameters = {key: torch.from_numpy(value) for key, value in model_parameters(config, seed).items()}
    generator = torch.Generator().manual_seed(seed)
    for key, value in parameters.items():
        if key.startswith("backbone.patch_embed.backbone.") and value.ndim == 4:
            # From far below to far above the 1e-5 that "deviation" adds: what the two standardisations differ by.
            value *= 10.0 ** torch.empty(value.shape[0], 1, 1, 1).uniform_(-7, 1, generator=generator)
    model = from_config(config).to(dtype).eval()
    model.load_state_dict(parameters)
    return model


def opened_by_transformers(folder: str | os.PathLike[str], task: str, **arguments: Any) -> Any:
    """Their model of a folder, of which no key may be missing, left over, or of another shape."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind = transformers.AutoModelForDepthEstimation if task == "depth" else transformers.DPTForSemanticSegmentation
    model, info = kind.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(info.values()), info
    return model.eval()


def answer(model: Any, image: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        output = model(torch.from_numpy(image))
    return (output.predicted_depth if "predicted_depth" in output else output.logits).numpy()


@st.composite
def configurations(draw: st.DrawFn) -> Config:
    """What Hugging Face's classes can compute, at small sizes, most of them odd."""
    task = draw(st.sampled_from(["depth", "segmentation"]))
    hybrid = draw(st.booleans())
    config = small("dpt_hybrid" if hybrid else "dpt_base", task, grid=draw(st.sampled_from([2, 4] if hybrid else [2, 3, 4])))
    heads = draw(st.sampled_from([1, 2, 3]))
    config |= {
        "num_heads": heads,
        "embed_dim": 4 * heads,
        "mlp_dim": draw(st.sampled_from([13, 20])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6, 1e-2])),
        "depth": draw(st.sampled_from([4, 5])),
        "fusion_width": draw(st.sampled_from([6, 9])),
        "fusion_batch_norm": draw(st.booleans()),
    }
    widths = [draw(st.integers(1, 9)) for _ in range(4)]
    if task == "depth":
        config["head_widths"] = [draw(st.integers(1, config["fusion_width"] // 2)), draw(st.sampled_from([1, 5, 32]))]
    else:
        config |= {"num_classes": draw(st.sampled_from([1, 2, 7])), "dropout": draw(st.sampled_from([0.0, 0.1, 0.3]))}
    if hybrid:
        config["weight_standardization"] = draw(st.sampled_from(["variance", "deviation"]))
        config["taps"] = ["R0", "R1", *draw(st.sampled_from([(1, 3), (0, 2), (2, 3)]))]
        config["reassemble_widths"] = [*config["resnet_widths"][:2], *widths[2:]]
    else:
        config |= {"patch_size": draw(st.sampled_from([8, 16])), "reassemble_widths": widths}
        config |= {"image_size": config["patch_size"] * (config["image_size"] // 16), "taps": [0, 1, 2, 3]}
        config["readout"] = draw(st.sampled_from(["ignore", "add", "project"]))
    return config


@given(config=configurations(), side=st.sampled_from([2, 4]), seed=st.integers(0, 999))
def test_transformers_computes_the_same_function_and_so_does_the_folder_opened_again(config, side, seed):
    hybrid = config["embedding"] == "resnet"  # theirs takes images of image_size alone
    side = config["image_size"] if hybrid else side * config["patch_size"]
    model, image = random_model(config, seed), np.random.default_rng(seed).standard_normal((2, 3, side, side))
    expected = run_accelerated(model)(image)
    assert np.ptp(expected) > 1e-3, "the answer is flat: nothing would be compared"
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(model, folder)
        theirs = opened_by_transformers(folder, config["task"])
        again = accelerated.load_checkpoint(folder)
    assert {value.dtype for value in theirs.state_dict().values()} <= {torch.float64, torch.int64}
    assert_same(answer(theirs, image), expected, LOGIC)
    # Ours opened again also takes what theirs does not: sides that differ, an odd number of patches.
    wide = np.random.default_rng(seed).standard_normal((1, 3, config["patch_size"], 3 * config["patch_size"]))
    assert_same(run_accelerated(again)(wide), run_accelerated(model)(wide), LOGIC)


@given(config=configurations())
def test_the_configuration_is_complete_and_says_what_transformers_would(config):
    """Built from ours, their configuration is what ours says, key by key, and says nothing that ours does not."""
    import transformers

    described = describe(config)
    theirs = json.loads(json.dumps(transformers.DPTConfig(**json.loads(json.dumps(described))).to_diff_dict()))
    whole = json.loads(json.dumps(transformers.DPTConfig(**json.loads(json.dumps(described))).to_dict()))
    assert set(theirs) - {"transformers_version"} <= set(described)
    for key, value in described.items():
        if key == "backbone_config" and value is not None:
            assert {k: whole[key][k] for k in value} == value
        elif key in ("id2label", "label2id"):
            assert {str(k): v for k, v in whole[key].items()} == value
        else:
            assert whole[key] == value, key
    if config["task"] == "segmentation":
        assert transformers.DPTConfig(**described).num_labels == config["num_classes"]
        assert described["semantic_classifier_dropout"] == config["dropout"]
    if config["embedding"] == "resnet":
        assert described["backbone_featmap_shape"] == [1, config["resnet_widths"][2], *2 * [config["image_size"] // 16]]


PAPER = [("dpt_base", "depth"), ("dpt_large", "depth"), ("dpt_large", "segmentation"), ("dpt_hybrid", "depth")]


@pytest.mark.parametrize(("name", "task"), [*PAPER, ("dpt_hybrid", "segmentation"), ("dpt_deit_base", "depth")])
def test_the_papers_models_have_the_keys_and_shapes_of_transformers(name, task):
    import transformers

    config = accelerated.configuration(name, task)
    with torch.device("meta"):
        ours = to_huggingface(from_config(config).state_dict(), config)
        kind = getattr(transformers, describe(config)["architectures"][0])
        theirs = kind(transformers.DPTConfig(**describe(config))).state_dict()
    assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
        key: (value.shape, value.dtype) for key, value in theirs.items()
    }


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_the_tiny_model_is_the_same_in_transformers(tmp_path, task):
    """The demonstration's own widths: a narrower head than theirs, and float32."""
    config = accelerated.configuration("dpt_tiny", task, num_classes=3 if task == "segmentation" else None)
    model = random_model(config, dtype=torch.float32)
    save_huggingface(model, tmp_path / "tiny")
    theirs = opened_by_transformers(tmp_path / "tiny", task)
    image = np.random.default_rng(0).standard_normal((1, 3, 96, 96))
    assert next(theirs.parameters()).dtype == torch.float32
    assert_same(answer(theirs.double(), image), run_accelerated(model.double())(image), LOGIC)
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["dtype"] == "float32"


def standardised(weight: torch.Tensor, kind: str) -> torch.Tensor:
    deviation, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
    return (weight - mean) / (deviation + 1e-5 if kind == "deviation" else (deviation**2 + 1e-8).sqrt())


@given(exponent=st.floats(-9, 6), seed=st.integers(0, 999))
def test_standardised_weights_are_the_same_whatever_their_size(exponent, seed):
    weight = 10.0**exponent * (torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 5, 2, 3))) + 3)
    expected = standardised(weight, "deviation")
    written = huggingface_export._restandardised(weight)
    assert_same(standardised(written, "variance"), expected, LOGIC)
    # Rounded to float32: each weight by half an eps of itself, and so, at most, their mean and their deviation.
    assert_same(standardised(written.float().double(), "variance"), expected, 1.5 * 2.0**-23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_standardised_weights_are_scaled_in_float64(dtype):
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 5, 2, 3))).to(dtype)
    written = huggingface_export._restandardised(weight)
    assert_same(standardised(written, "variance"), standardised(weight.double(), "deviation"), LOGIC)


def test_a_constant_standardised_weight_is_zero_and_a_huge_one_finite():
    for value in (0.0, 0.5, -(2.0**40)):
        written = huggingface_export._restandardised(torch.full((2, 4, 1, 1), value, dtype=torch.float64))
        assert torch.equal(written, torch.zeros_like(written))
    huge = huggingface_export._restandardised(torch.tensor([1e30, -1e30], dtype=torch.float64).reshape(1, 2, 1, 1))
    assert_same(standardised(huge, "variance"), np.array([1.0, -1.0]).reshape(1, 2, 1, 1), LOGIC)


def test_the_file_says_that_it_is_pytorchs_and_what_is_unused_is_identity(tmp_path):
    config = expressible("dpt_base", "segmentation")
    save_huggingface(random_model(config), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    unit = "neck.fusion_stage.layers.0.residual_layer1."
    for prefix, ones in (("dpt.layernorm.", ["weight"]), (unit, ["batch_norm1.weight", "batch_norm1.running_var"])):
        assert all(torch.equal(tensors[prefix + key], torch.ones_like(tensors[prefix + key])) for key in ones)
    assert not tensors["dpt.layernorm.bias"].any() and not tensors[unit + "convolution2.weight"].any()
    assert not tensors[unit + "batch_norm2.running_mean"].any() and not tensors[unit + "batch_norm2.bias"].any()
    counts = [value for key, value in tensors.items() if key.endswith("num_batches_tracked")]
    assert len(counts) == 18 and all(count.dtype == torch.int64 and count == 0 for count in counts)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
def test_half_precision_is_kept(tmp_path, dtype, name):
    model = random_model(expressible("dpt_hybrid", weight_standardization="deviation")).to(dtype)
    save_huggingface(model, tmp_path / "out")
    theirs = opened_by_transformers(tmp_path / "out", "depth")
    assert next(theirs.parameters()).dtype == dtype and theirs.config.dtype == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name


def test_of_two_precisions_the_wider_is_written(tmp_path):
    model = random_model(expressible("dpt_base"))
    model.backbone.to(torch.float32)
    save_huggingface(model, tmp_path / "out")
    assert {v.dtype for v in opened_by_transformers(tmp_path / "out", "depth").state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("kind", ["variance", "deviation"])
def test_a_model_of_another_memory_format_is_written(tmp_path, kind):
    model = random_model(expressible("dpt_hybrid", weight_standardization=kind))
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32))
    expected = run_accelerated(model)(image)
    save_huggingface(model.to(memory_format=torch.channels_last), tmp_path / "out")
    assert_same(answer(opened_by_transformers(tmp_path / "out", "depth"), image), expected, LOGIC)


def test_writing_leaves_the_model_as_it_is(tmp_path):
    model = random_model(expressible("dpt_hybrid", weight_standardization="deviation")).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = json.dumps(model.config)
    save_huggingface(model, tmp_path / "out")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and json.dumps(model.config) == config


@pytest.mark.parametrize(
    ("config", "side", "multiple"),
    [
        (expressible("dpt_base", network_size=64), 64, 32),
        (expressible("dpt_base", network_size=70), 64, 32),
        (
            expressible("dpt_base", network_size=48, resize_multiple=16),
            64,
            32,
        ),  # three patches a side are not halved as theirs are
        (expressible("dpt_base", network_size=[96, 96], resize_multiple=48), 96, 96),
        (expressible("dpt_base", network_size=8), 32, 32),
        (expressible("dpt_hybrid", network_size=480, grid=4), 64, 32),
    ],
)
def test_their_image_processor_makes_what_their_model_takes(tmp_path, config, side, multiple):
    import transformers
    from PIL import Image

    config |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    save_huggingface(random_model(config), tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__.startswith("DPTImageProcessor")
    picture = Image.new("RGB", (90, 50), (255, 51, 0))
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, side, side)
    assert describe_preprocessing(config)["ensure_multiple_of"] == multiple
    color = (torch.tensor([1.0, 0.2, 0.0]) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.5, 0.6])
    assert_same(pixels, color.reshape(1, 3, 1, 1).expand(pixels.shape), 1e-6)
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert written["resample"] == 3 and written["rescale_factor"] == 1 / 255
    assert set(written) == set(json.loads(transformers.DPTImageProcessor().to_json_string()))
    depth = opened_by_transformers(tmp_path / "out", "depth")(pixels.double()).predicted_depth
    assert depth.shape == (1, side, side)
    again = accelerated.load_checkpoint(tmp_path / "out").config
    assert (again["image_mean"], again["image_std"]) == (config["image_mean"], config["image_std"])


METRIC = {"metric_scale": 0.000305, "metric_shift": 0.1378, "metric_png_scale": 1000}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            accelerated.configuration("midas_v21_small"),
            "^encoder is 'efficientnet', which Hugging Face's DPT cannot compute: .*MiDaS",
        ),
        (expressible("dpt_hybrid") | METRIC, "^metric_scale is 0.000305, which .* metres"),
        (expressible("dpt_base") | {"sharpness": 3}, "^sharpness is 3, which .*: expected no such key$"),
        (expressible("dpt_deit_base_distilled"), "^prefix_tokens is 2, which .*: expected 1, the readout token alone$"),
        (expressible("dpt_base", head_widths=[5, 4]), r"^head_widths is \[5, 4\], which .*: expected at most \[4, 32\]$"),
        (expressible("dpt_base", head_widths=[4, 33]), r"^head_widths is \[4, 33\], which .*: expected at most \[4, 32\]$"),
        (expressible("dpt_hybrid", taps=[0, 1, 2, 3]), r"^taps is \[0, 1, 2, 3\], which .*: expected 'R0', 'R1' and two blocks"),
        (expressible("dpt_hybrid", readout="add"), "^readout is 'add', which .*: expected 'project', of a Hybrid$"),
        (expressible("dpt_hybrid", grid=3), "^image_size is 48, which .*: expected a multiple of 32, of a Hybrid"),
        (expressible("dpt_base", network_size=[64, 96]), r"^network_size is \[64, 96\], and Hugging Face's DPT takes square"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[1:13],
)
def test_what_their_classes_cannot_compute_is_refused_in_words(tmp_path, config, message):
    with torch.device("meta"):
        model = from_config(config)
    with pytest.raises(ValueError, match=message):
        save_huggingface(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_their_depth_head_can_compute_at_most_is_written(tmp_path):
    config = expressible("dpt_base", head_widths=[4, 32])
    model, image = random_model(config), np.random.default_rng(0).standard_normal((1, 3, 32, 32))
    save_huggingface(model, tmp_path / "out")
    assert_same(answer(opened_by_transformers(tmp_path / "out", "depth"), image), run_accelerated(model)(image), LOGIC)


# Where it is written.

SOURCE = expressible("dpt_hybrid", weight_standardization="deviation")


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    accelerated.save(random_model(SOURCE), path)
    return path


@pytest.fixture
def source(tmp_path: Path, weight_file: Path) -> Path:
    return Path(shutil.copy(weight_file, tmp_path / "source.safetensors"))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, by its path: the bytes of a file, None for a folder."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def assert_holds(path: Path, model: torch.nn.Module) -> None:
    """Assert that a weight file of ours holds the model, tensor by tensor, and its configuration."""
    found, expected = accelerated.load(path), model.state_dict()
    assert found.config == model.config
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 1) -> str:
    assert convert.main([*map(str, arguments)]) == status
    output, error = capsys.readouterr()
    assert output == "" and error.startswith("error: ") and error.count("\n") == 1, error
    return error.removeprefix("error: ").removesuffix("\n")


def test_there_and_back_again(tmp_path, source, capsys):
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert convert.main([str(source), str(folder)]) == 0
    count = sum(parameter.numel() for parameter in accelerated.load(source).parameters())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"dpt_hybrid (depth), {count:,} parameters"
    assert [line.split("  ")[0] for line in lines[1:]] == [str(folder / name) for name in FILES]
    assert lines[2].endswith(f"  {(folder / 'model.safetensors').stat().st_size / 1e6:,.1f} MB")
    assert lines[1].endswith(f"  {(folder / 'config.json').stat().st_size / 1e3:.1f} kB")
    assert sorted(os.listdir(folder)) == sorted(FILES)

    assert convert.main([str(folder), str(back)]) == 0
    assert capsys.readouterr().out.startswith("dpt_custom (depth), ")
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 64))
    expected = run_accelerated(accelerated.load(source))(image)
    assert_same(run_accelerated(accelerated.load(back))(image), expected, LOGIC)
    parameters, config = reference.load(back)
    assert_same(reference.forward(parameters, image, config), expected, MODEL)
    assert sorted(os.listdir(tmp_path)) == ["back.safetensors", "folder", "source.safetensors"]


def test_the_files_are_readable_to_those_that_the_umask_lets(tmp_path, source):
    previous = os.umask(0o022)
    try:
        assert convert.main([str(source), str(tmp_path / "folder")]) == 0
    finally:
        os.umask(previous)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    for path in (tmp_path / "folder").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path


def test_a_midas_becomes_a_weight_file_of_ours(tmp_path, capsys):
    model = from_config(midas.small("midas_v21_small"))
    accelerated.save(model, tmp_path / "midas.safetensors")
    assert convert.main([str(tmp_path / "midas.safetensors"), str(tmp_path / "again.safetensors")]) == 0
    assert capsys.readouterr().out.startswith("midas_v21_small (depth), ")
    assert_holds(tmp_path / "again.safetensors", model)
    message = fails(capsys, tmp_path / "midas.safetensors", tmp_path / "folder")
    assert message.startswith("encoder is 'efficientnet', which Hugging Face's DPT cannot compute")
    assert not (tmp_path / "folder").exists()


def test_what_exists_is_replaced_only_when_forced(tmp_path, source, capsys):
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    folder.mkdir()
    assert convert.main([str(source), str(folder)]) == 0  # an empty folder is free
    assert convert.main([str(source), str(file)]) == 0
    capsys.readouterr()
    (folder / "config.json").write_text("kept")
    (folder / "README.md").write_text("mine")
    file.write_bytes(b"kept")
    before = contents(tmp_path)
    assert fails(capsys, source, folder) == f"{folder} has files in it: expected a new or an empty folder, or --force"
    assert fails(capsys, source, file) == f"{file} exists: expected a new name, or --force"
    with pytest.raises(FileExistsError, match=r"has files in it: expected a new or an empty folder, or overwrite=True$"):
        accelerated.save_huggingface(random_model(SOURCE), folder)
    assert contents(tmp_path) == before
    assert convert.main([str(source), str(folder), "--force"]) == 0
    assert convert.main([str(source), str(file), "--force"]) == 0
    assert sorted(os.listdir(folder)) == sorted([*FILES, "README.md"])
    assert (folder / "README.md").read_text() == "mine"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "dpt"
    assert_holds(file, accelerated.load(source))


def test_what_appears_while_the_source_is_read_is_kept(tmp_path, source, capsys, monkeypatch):
    folder = tmp_path / "folder"
    model = accelerated.load(source)

    def load(*_: Any) -> accelerated.DPT:
        folder.mkdir()
        (folder / "config.json").write_text("mine")
        return model

    monkeypatch.setattr(accelerated, "load_checkpoint", load, raising=False)
    assert fails(capsys, source, folder).startswith(f"{folder} has files in it: expected a new or an empty folder")
    assert contents(folder) == {"config.json": b"mine"}


def test_a_folder_that_exists_may_have_any_name(tmp_path, source):
    for name in ("dpt-v2.1", "folder.safetensors"):
        (tmp_path / name).mkdir()
        assert convert.main([str(source), str(tmp_path / name)]) == 0
        assert sorted(os.listdir(tmp_path / name)) == sorted(FILES)


def test_a_place_without_a_folder_is_refused_before_the_source_is_read(tmp_path, capsys):
    for name in ("out", "out.safetensors"):
        target = tmp_path / "missing" / name
        assert fails(capsys, tmp_path / "nothing", target) == f"{target} cannot be written: there is no folder {target.parent}"


def test_the_source_is_never_replaced(tmp_path, source, capsys):
    folder = tmp_path / "folder"
    save_huggingface(random_model(SOURCE), folder)
    inside = folder / "model.safetensors"
    link, name = tmp_path / "link.safetensors", tmp_path / "name"
    link.symlink_to(source)
    name.symlink_to(folder)
    beside = tmp_path / "beside"
    beside.mkdir()
    os.link(source, beside / "model.safetensors")
    before = contents(tmp_path)
    for one, other in ((source, source), (folder, folder), (source, link), (folder, name), (folder, inside), (source, beside)):
        for options in ([], ["--force"]):
            message = fails(capsys, one, other, *options)
            assert message == f"{other} would replace {one}, which is to be converted: expected another place"
    assert contents(tmp_path) == before


def test_bad_places_are_refused_in_one_sentence(tmp_path, source, capsys):
    plain = tmp_path / "plain"
    plain.write_text("mine")
    before = contents(tmp_path)
    for target in (tmp_path / "missing" / "out", tmp_path / "missing" / "out.safetensors", plain / "out"):
        assert fails(capsys, source, target) == f"{target} cannot be written: there is no folder {target.parent}"
    for target in (tmp_path / "out.bin", tmp_path / "out.pt", tmp_path / "dpt-v2.1", tmp_path / "out.SAFETENSORS"):
        assert fails(capsys, source, target).startswith(f"{target} has the suffix '{target.suffix}': expected .safetensors")
    for options in ([], ["--force"]):
        assert fails(capsys, source, plain, *options).startswith(f"{plain} is a file: expected a folder, or a name ending")
    for target in ("/proc/out", "/proc/out.safetensors"):
        assert "/proc" in fails(capsys, source, target)
    assert contents(tmp_path) == before
    with pytest.raises(FileExistsError, match="plain is no folder: expected a new or an empty one"):
        save_huggingface(random_model(SOURCE), plain, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"missing/out cannot be written: there is no folder"):
        save_huggingface(random_model(SOURCE), tmp_path / "missing" / "out")


def test_a_folder_in_the_place_of_a_file_is_not_removed(tmp_path, source, capsys):
    inner = tmp_path / "folder" / "config.json"
    inner.mkdir(parents=True)
    (inner / "mine").write_text("kept")
    before = contents(tmp_path)
    message = fails(capsys, source, tmp_path / "folder", "--force")
    assert message == f"{inner} is a folder, where a file is to be written"
    assert contents(tmp_path) == before


def test_bad_sources_are_refused_in_one_sentence(tmp_path, source, capsys):
    target = tmp_path / "out"
    assert fails(capsys, tmp_path / "missing.pt", target) == f"there is no file or folder at {tmp_path / 'missing.pt'}"
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(source.read_bytes()[:-9])
    assert f"{damaged} is no safetensors file, or is truncated" in fails(capsys, damaged, target)
    text = tmp_path / "weights.pt"
    text.write_text("no weights")
    assert str(text) in fails(capsys, text, target)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in fails(capsys, tmp_path / "empty", target)
    assert fails(capsys, source, target, "--model", "dpt_huge").startswith("unknown model 'dpt_huge': expected one of dpt_base")
    assert "holds a dpt_hybrid (depth), not the dpt_large" in fails(capsys, source, target, "--model", "dpt_large")
    assert not target.exists()


def test_the_model_option_names_what_the_source_is(tmp_path, source):
    assert convert.main([str(source), str(tmp_path / "out"), "--model", "dpt_hybrid"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [[], ["a"], ["a", "b", "c"], ["a", "b", "--quick"], ["a", "b", "--model"], ["a", "b", "--forc"], ["a", "b", "--force=yes"]],
)
def test_command_lines_without_sense_have_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        convert.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def failing(function: Any, error: BaseException, at: int = 1) -> Any:
    """`function`, except that its call number `at` raises `error`: a full disk, or an interruption, that comes then."""

    def call(*arguments: Any, **options: Any) -> Any:
        call.count += 1
        if call.count == at:
            raise error
        return function(*arguments, **options)

    call.count = 0
    return call


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
TROUBLE = [
    ("tensors", huggingface_export, "save_file", 1, SafetensorError("I/O error: No space left on device (os error 28)")),
    ("text", Path, "write_text", 1, NO_SPACE),
    ("second text", Path, "write_text", 2, NO_SPACE),
    ("temporary folder", tempfile, "mkdtemp", 1, NO_SPACE),
    ("rename", Path, "rename", 1, NO_SPACE),
    ("interruption", Path, "write_text", 2, KeyboardInterrupt()),
    ("late interruption", Path, "rename", 1, KeyboardInterrupt()),
]
REPLACING = [(f"move {n}", os, "replace", n, error) for n in range(1, 7) for error in (NO_SPACE, KeyboardInterrupt())]


@pytest.mark.parametrize(("home", "name", "at", "error"), [case[1:] for case in TROUBLE], ids=[case[0] for case in TROUBLE])
def test_trouble_while_a_folder_is_written_leaves_nothing(tmp_path, source, capsys, monkeypatch, home, name, at, error):
    target, before = tmp_path / "out", contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(home, name, failing(getattr(home, name), error, at))
        message = fails(capsys, source, target, status=130 if isinstance(error, KeyboardInterrupt) else 1)
    if isinstance(error, KeyboardInterrupt):
        assert message == f"interrupted: {target} was not written"
    else:
        assert message.startswith(f"{target} cannot be written: ") and "No space left on device" in message
    assert contents(tmp_path) == before
    assert convert.main([str(source), str(target)]) == 0


@pytest.mark.parametrize("present", [FILES, FILES[1:2], ("mine",)], ids=["all", "weights", "another"])
@pytest.mark.parametrize(("home", "name", "at", "error"), [case[1:] for case in [*TROUBLE[:4], *REPLACING]])
def test_trouble_while_a_folder_is_replaced_leaves_it_as_it_was(tmp_path, source, monkeypatch, present, home, name, at, error):
    target = tmp_path / "out"
    target.mkdir()
    for file in present:
        (target / file).write_text(f"old {file}")
    model, before = accelerated.load(source), contents(tmp_path)
    with monkeypatch.context() as patch:
        trouble = failing(getattr(home, name), error, at)
        patch.setattr(home, name, trouble)
        if name == "replace" and at > 3 + len(set(present) & set(FILES)):
            save_huggingface(model, target, overwrite=True)  # fewer moves than that
            assert trouble.count < at and set(os.listdir(target)) == {*FILES, *present}
            return
        with pytest.raises(type(error) if isinstance(error, KeyboardInterrupt) else OSError):
            save_huggingface(model, target, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device (os error 28)"), KeyboardInterrupt()])
@pytest.mark.parametrize("options", [[], ["--force"]])
def test_trouble_while_a_file_is_written_leaves_what_was_there(tmp_path, source, capsys, monkeypatch, error, options):
    target = tmp_path / "out.safetensors"
    if options:
        target.write_bytes(b"old")
    before = contents(tmp_path)
    monkeypatch.setattr("accelerated.weights.save_file", failing(safetensors.torch.save_file, error))
    message = fails(capsys, source, target, *options, status=130 if isinstance(error, KeyboardInterrupt) else 1)
    assert str(target) in message
    assert contents(tmp_path) == before


def test_what_the_operating_system_says_is_a_sentence_with_the_path(tmp_path, source, capsys, monkeypatch):
    denied = PermissionError(errno.EACCES, "Permission denied", str(source))
    monkeypatch.setattr(accelerated, "load_checkpoint", failing(None, denied), raising=False)
    assert fails(capsys, source, tmp_path / "out") == f"{source}: Permission denied"


def test_the_command_runs_from_any_folder(tmp_path, source):
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "accelerated.convert"]
    run = subprocess.run(
        [*command, source.name, "out"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("dpt_hybrid (depth), ") and "out/model.safetensors  " in run.stdout
    assert opened_by_transformers(tmp_path / "out", "depth").config.is_hybrid
