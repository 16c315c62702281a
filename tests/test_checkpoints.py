"""Published weights: the authors' files give what their own code gives; damage and contradictions are named."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import accelerated
import reference
from accelerated.checkpoints import authors
from accelerated.checkpoints import published as published_files
from accelerated.weights import from_tensors
from tests.models import run_accelerated, run_reference, small
from tests.published import MODELS, compare, layout, published_state, sizes

AUTHORS = 1e-5  # relative 2-norm: what an equal computation in float32 shows
OTHER_STANDARDIZATION = 2e-4  # what timm's change of its weight standardisation does to the Hybrid's output


# The authors' files


@pytest.fixture(scope="module")
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The name of a fixture, and the model that load_checkpoint makes of that weight file."""
    path = tmp_path_factory.mktemp("authors") / MODELS[request.param]
    torch.save({key: torch.from_numpy(value) for key, value in published_state(request.param).items()}, path)
    model = accelerated.load_checkpoint(path)
    path.unlink()  # more than a gigabyte for the largest
    return request.param, model


def each(*names: str) -> Any:
    # One process builds each model, once: Large takes 6 GB.
    cases = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]
    return pytest.mark.parametrize("published", cases, indirect=True)


@each(*MODELS)
def test_authors_weights_in_accelerated_answer_as_the_authors_code(published):
    name, model = published
    compare(name, run_accelerated(model), AUTHORS)


@each(*MODELS)
def test_authors_weights_in_reference_answer_as_the_authors_code(published):
    name, model = published
    compare(name, run_reference(model), AUTHORS, sizes(name)[1:] if "large" in name else None)


@each("dpt-hybrid-depth")
@pytest.mark.parametrize("run", [run_accelerated, run_reference])
def test_hybrid_in_todays_weight_standardization_is_near_the_authors_and_not_theirs(published, run):
    name, model = published
    assert model.config["weight_standardization"] == "deviation"
    today = from_tensors(model.config | {"weight_standardization": "variance"}, model.state_dict(), name)
    compare(name, run(today), OTHER_STANDARDIZATION)
    with pytest.raises(AssertionError, match="relative error"):
        compare(name, run(today), AUTHORS, sizes(name)[:1])


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
    config = authors.recognise(hollow(name), Path("weights.pt"))
    assert {key for key in layout(name) if authors.DEAD.match(key)} == {key for key in layout(name) if is_dead(key)}
    places = {authors.rename(key, config): tuple(shape) for key, shape in layout(name).items() if not is_dead(key)}
    assert places == reference.parameter_shapes(config)
    assert len(places) == sum(not is_dead(key) for key in layout(name)), "two tensors have the same place"


def test_missing_and_foreign_tensors_are_named(tmp_path):
    path, state = tmp_path / "weights.pt", hollow("dpt-base-depth")
    key = "scratch.refinenet2.resConfUnit1.conv2.bias"
    for content, message in (
        ({k: v for k, v in state.items() if k != key}, r"tensors 1 missing \(fusion.1.rcu1.conv2.bias\)"),
        (state | {key: torch.ones(2, 5)}, r"1 of another shape \(fusion.1.rcu1.conv2.bias is \(2, 5\) instead of \(256,\)\)"),
        (state | {key: torch.ones(256, dtype=torch.int32)}, r"tensors 1 not floating point \(fusion.1.rcu1.conv2.bias\)"),
        (state | {"scratch.refinenet5.out_conv.weight": torch.ones(1)}, r"1 unexpected \(scratch.refinenet5.out_conv.weight\)"),
        (
            {k.replace("blocks.3.norm1.bias", "blocks.3.norm_1.bias"): v for k, v in state.items()},
            r"1 unexpected \(backbone.blocks.3.norm_1.bias; the nearest expected is backbone.blocks.3.norm1.bias\)",
        ),
        (
            {k.replace("refinenet2.resConfUnit1.conv2.bias", "refinenet2.resConfUnit2.conv2.bia"): v for k, v in state.items()},
            "the nearest expected is fusion.1.rcu1.conv2.bias",  # of those that are missing
        ),
        ({}, "holds no state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            accelerated.load_checkpoint(path)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
def test_a_training_runs_wrapper_and_missing_dead_tensors_are_no_obstacle(tmp_path, wrapper):
    path, state = tmp_path / "weights.pt", hollow("dpt-base-depth")
    live = {f"module.{key}": value for key, value in state.items() if not is_dead(key)}  # as DataParallel names them
    torch.save({wrapper: live, "optimizer": {"state": {}}, "epoch": 3}, path)
    model = accelerated.load_checkpoint(path)
    assert model.config["name"] == "dpt_base"
    assert len(model.state_dict()) == len(live)


# What a file is: its content, its hash, its name, the caller, in this order

RECOGNISED = {
    "dpt-base-depth": ("dpt_base", "depth", 384),
    "dpt-large-depth": ("dpt_large", "depth", 384),
    "dpt-hybrid-ade20k": ("dpt_hybrid", "segmentation", 480),
    "midas-v21": ("midas_v21", "depth", 384),
    "midas-v21_small": ("midas_v21_small", "depth", 256),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_content_alone_tells_what_most_files_hold(tmp_path, name):
    path = tmp_path / "weights.bin"
    torch.save(hollow(name), path)
    config = accelerated.load_checkpoint(path).config
    assert (config["name"], config["task"], config["network_size"]) == RECOGNISED[name]
    safe = tmp_path / "theirs.safetensors"  # as some have copied the file
    save_file({key: value.clone() for key, value in hollow(name).items()}, safe)
    assert accelerated.load_checkpoint(safe).config == config


def test_a_distilled_encoder_is_known_by_its_second_token(tmp_path):
    state = hollow("dpt-base-depth") | {"pretrained.model.dist_token": torch.ones(1, 1, 768)}
    state["pretrained.model.pos_embed"] = torch.ones(1, 578, 768)
    torch.save(state, tmp_path / "distilled.pt")
    config = accelerated.load_checkpoint(tmp_path / "distilled.pt").config
    assert (config["name"], config["prefix_tokens"]) == ("dpt_deit_base_distilled", 2)


def test_the_number_of_classes_is_read_off_the_file(tmp_path):
    state = hollow("dpt-hybrid-ade20k")
    for key in ("scratch.output_conv.4.weight", "scratch.output_conv.4.bias", "auxlayer.4.weight", "auxlayer.4.bias"):
        state[key] = state[key][:59]
    torch.save(state, tmp_path / "context.pt")
    assert accelerated.load_checkpoint(tmp_path / "context.pt").config["num_classes"] == 59


METRES = {
    "dpt_hybrid-midas": (None, None, None, 384),
    "dpt_hybrid_kitti": (0.00006016, 0.00579, 256, [352, 1216]),
    "dpt_hybrid_nyu": (0.000305, 0.1378, 1000, [480, 640]),
}


def settings_of(config: dict[str, Any]) -> tuple[Any, ...]:
    return *(config.get(f"metric_{key}") for key in ("scale", "shift", "png_scale")), config["network_size"]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hybrid for depth under a name that says nothing."""
    path = tmp_path_factory.mktemp("hybrid") / "weights.pt"
    torch.save(hollow("dpt-hybrid-depth"), path)
    return path


def named(path: Path, name: str) -> Path:
    return Path(shutil.copy(path, path.parent / name))


def test_hybrids_that_nothing_tells_apart_are_refused_with_the_candidates(hybrid):
    with pytest.raises(
        ValueError, match=r"weights.pt is one of dpt_hybrid-midas, dpt_hybrid_kitti, dpt_hybrid_nyu, and neither .* model="
    ):
        accelerated.load_checkpoint(hybrid)


@pytest.mark.parametrize("name", METRES)
def test_a_hybrids_hash_name_or_caller_tells_whether_it_gives_metres(hybrid, name, monkeypatch):
    assert settings_of(accelerated.load_checkpoint(hybrid, model=name).config) == METRES[name]
    assert settings_of(accelerated.load_checkpoint(named(hybrid, f"{name}.pt")).config) == METRES[name]
    own = f"{name}-{published_files.PUBLISHED[name].sha256}.pt"
    assert settings_of(accelerated.load_checkpoint(named(hybrid, own)).config) == METRES[name]
    digest = hashlib.sha256(hybrid.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(published_files.PUBLISHED, name, published_files.PUBLISHED[name]._replace(sha256=digest))
    for model in (None, name, "dpt_hybrid"):  # the network's own name contradicts none of them
        assert settings_of(accelerated.load_checkpoint(hybrid, model=model).config) == METRES[name]
    for other in METRES.keys() - {name}:  # the content outweighs the name of the file, and contradicts another of the caller
        assert settings_of(accelerated.load_checkpoint(named(hybrid, f"{other}.pt")).config) == METRES[name]
        with pytest.raises(ValueError, match=f"weights.pt is {name} by its SHA-256, not the {other} it was opened as"):
            accelerated.load_checkpoint(hybrid, model=other)


def test_a_hybrids_file_name_and_its_caller_have_to_agree(hybrid):
    path = named(hybrid, "dpt_hybrid_kitti-cb926ef4.pt")
    assert settings_of(accelerated.load_checkpoint(path, model="dpt_hybrid").config) == METRES["dpt_hybrid_kitti"]
    for other in ("dpt_hybrid_nyu", "dpt_hybrid-midas", "dpt_hybrid_384"):
        with pytest.raises(ValueError, match="is dpt_hybrid_kitti by its file name, not the dpt_hybrid"):
            accelerated.load_checkpoint(path, model=other)


def test_the_networks_own_name_means_the_relative_model(hybrid):
    for name in ("dpt_hybrid", "dpt_hybrid_384"):
        assert settings_of(accelerated.load_checkpoint(hybrid, model=name).config) == METRES["dpt_hybrid-midas"]
    assert settings_of(accelerated.load_checkpoint(named(hybrid, "dpt_hybrid_384.pt")).config) == METRES["dpt_hybrid-midas"]


def test_a_name_that_contradicts_the_content_is_refused(tmp_path, hybrid):
    path = tmp_path / "dpt_hybrid_nyu.pt"
    torch.save(hollow("dpt-base-depth"), path)
    assert accelerated.load_checkpoint(path).config["name"] == "dpt_base"  # content first
    for wrong in ("dpt_large", "dpt_hybrid", "dpt_hybrid_nyu", "midas_v21_384", "dpt_large-ade20k"):
        with pytest.raises(ValueError, match=rf"dpt_hybrid_nyu.pt holds a dpt_base \(depth\), not the {wrong} it was opened as"):
            accelerated.load_checkpoint(path, model=wrong)
    with pytest.raises(ValueError, match=r"holds a dpt_hybrid \(depth\), not the dpt_hybrid-ade20k it was opened as"):
        accelerated.load_checkpoint(hybrid, model="dpt_hybrid-ade20k")
    with pytest.raises(ValueError, match="unknown model 'dpt_huge': expected one of dpt_base.* dpt_hybrid_kitti.* midas_v21_384"):
        accelerated.load_checkpoint(path, model="dpt_huge")


def test_layouts_of_other_networks_are_refused_in_words(tmp_path):
    path = tmp_path / "weights.pt"
    beit = hollow("dpt-base-depth") | {"pretrained.model.blocks.0.gamma_1": torch.ones(768)}
    for state in ({"layer1.0.conv1.weight": torch.ones(2)}, {"a": torch.ones(1)}, beit):
        torch.save(state, path)
        with pytest.raises(
            ValueError, match="weights.pt has tensors of no known layout .* expected the authors' DPT or MiDaS v2.1"
        ):
            accelerated.load_checkpoint(path)
    torch.save({"pretrained.model.blocks.0.norm1.weight": torch.ones(384)}, path)
    with pytest.raises(ValueError, match="has an encoder of width 384: expected 768 or 1024"):
        accelerated.load_checkpoint(path)


# Fetching


def test_a_published_file_is_found_where_torch_hub_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("the file is there"))
    for name, file in (
        ("dpt_hybrid_kitti", "dpt_hybrid_kitti-cb926ef4.pt"),
        ("dpt_hybrid", "dpt_hybrid-midas-501f0c75.pt"),
        ("dpt_large_384", "dpt_large-midas-2f21e586.pt"),
        ("midas_v21", "midas_v21_384.pt"),
        ("midas_v21_small_256", "midas_v21_small_256.pt"),
    ):
        (folder / file).touch()
        assert accelerated.published_file(name) == folder / file


def test_a_fetched_file_is_compared_with_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source = tmp_path / "release"
    source.mkdir()
    entry = published_files.PUBLISHED["dpt_large-midas"]
    for content, right in ((b"weights", True), (b"other", False)):
        (source / "dpt_large-midas-2f21e586.pt").write_bytes(content)
        digest = hashlib.sha256(b"weights").hexdigest()[:8]
        replaced = entry._replace(url=f"file://{source}/dpt_large-midas-2f21e586.pt", sha256=digest)
        monkeypatch.setitem(published_files.PUBLISHED, "dpt_large-midas", replaced)
        if right:
            path = accelerated.published_file("dpt_large")
            assert path.read_bytes() == content
            path.unlink()
        else:
            with pytest.raises(ConnectionError, match="2f21e586.pt cannot be fetched .*invalid hash"):
                accelerated.published_file("dpt_large")
    assert not any((tmp_path / "hub" / "checkpoints").iterdir())
    (source / "dpt_large-midas-2f21e586.pt").unlink()
    with pytest.raises(
        ConnectionError, match="cannot be fetched .*: fetch it by other means into .*checkpoints, or give its path"
    ):
        accelerated.published_file("dpt_large")


def test_names_without_a_published_file_are_refused():
    with pytest.raises(ValueError, match="no weights of dpt_base were published: give a weight file, or one of dpt_hybrid-midas"):
        accelerated.published_file("dpt_base")
    with pytest.raises(ValueError, match="unknown model 'resnet'"):
        accelerated.published_file("resnet")


# Damage


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
        with pytest.raises(ValueError, match=r"weights.pt (is no PyTorch state dict|holds \S+, more).* which is never loaded$"):
            accelerated.load_checkpoint(path, model="dpt_base")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        torch.save({"weights": Armed(trap)}, path, pickle_protocol=protocol)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match="weights.pt .*more than tensors, which is never loaded$"):
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
    for model in (None, "dpt_base"):
        assert accelerated.load_checkpoint(path, model=model).config["name"] == "dpt_base"
    for wrong in ("dpt_large", "dpt_hybrid_nyu", "dpt_large-ade20k"):
        with pytest.raises(ValueError, match=rf"holds a dpt_base \(depth\), not the {wrong} it was opened as"):
            accelerated.load_checkpoint(path, model=wrong)
    with pytest.raises(ValueError, match="unknown model 'resnet'"):
        accelerated.load_checkpoint(path, model="resnet")


def test_metres_and_none_are_not_taken_for_each_other(tmp_path):
    path, config = tmp_path / "weights.safetensors", small("dpt_hybrid")
    for changes, right, wrong in (
        ({}, "dpt_hybrid-midas", "dpt_hybrid_nyu"),
        (published_files.PUBLISHED["dpt_hybrid_nyu"].settings, "dpt_hybrid_nyu", "dpt_hybrid_384"),
        (published_files.PUBLISHED["dpt_hybrid_kitti"].settings, "dpt_hybrid_kitti", "dpt_hybrid_nyu"),
    ):
        accelerated.save(accelerated.dpt.DPT(config | changes), path)
        for model in (None, right, "dpt_hybrid"):
            assert accelerated.load_checkpoint(path, model=model).config == config | changes
        with pytest.raises(ValueError, match=f"holds a dpt_hybrid .* not the {wrong} it was opened as"):
            accelerated.load_checkpoint(path, model=wrong)


def test_a_file_called_safetensors_is_read_as_one(tmp_path):
    path = tmp_path / "weights.safetensors"
    for content in (b"", b"12345678", b"hello, this is text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="weights.safetensors is no safetensors file, or is truncated"):
            accelerated.load_checkpoint(path)
