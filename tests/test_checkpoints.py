"""Published weights: the authors' files give what their own code gives; damage and contradictions are named."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import accelerated
import reference
from accelerated.checkpoints import authors
from accelerated.weights import from_tensors
from tests.models import run_accelerated, run_reference, small
from tests.published import MODELS, SIZES, compare, layout, published_state

AUTHORS = 1e-5  # relative 2-norm: what an equal computation in float32 shows
OTHER_STANDARDIZATION = 2e-4  # what timm's change of its weight standardisation does to the Hybrid's output


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
