"""Recipes and the command line: what is accepted, what is refused and with which sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from accelerated.recipe import RECIPES, CommandLine, Recipe, RecipeError, parse_command_line, read_recipe

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def refusal(*arguments: str) -> str:
    """The sentence with which a command line is refused."""
    with pytest.raises(RecipeError) as caught:
        parse_command_line(arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence, f"more than one line: {sentence!r}"
    return sentence


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_the_package_are_valid_and_parse_by_name(name: str) -> None:
    command = parse_command_line([name])
    assert command.name == name
    content = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert content.items() <= command.to_recipe().model_dump(mode="json").items()


def test_no_arguments_mean_demo() -> None:
    assert parse_command_line([]) == parse_command_line(["demo"])
    assert {"demo", "segment-demo"} <= set(NAMES)


def test_the_command_line_replaces_the_file_which_replaces_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps: 7\nweight_decay: 7e-3\nbaseline_bar: null\n")
    command = parse_command_line([str(path), "--steps", "9", "--flip", "false", "--runs", "elsewhere"])
    expected = Recipe().model_dump() | {"steps": 9, "weight_decay": 7e-3, "baseline_bar": None, "flip": False}
    assert command.to_recipe().model_dump() == expected
    assert (command.name, command.runs) == ("mine", Path("elsewhere"))
    assert parse_command_line([str(path)]).steps == 7


@given(
    steps=st.integers(1, 10**6),
    rate=st.floats(1e-9, 1e3),
    flip=st.booleans(),
    crops=st.lists(st.integers(1, 4096), min_size=2, max_size=2),
)
def test_values_survive_the_command_line(steps: int, rate: float, flip: bool, crops: list[int]) -> None:
    arguments = (
        f"--steps {steps} --backbone_learning_rate {rate!r} --flip {str(flip).lower()} --crops={','.join(map(str, crops))}"
    )
    command = parse_command_line(arguments.split())
    assert (command.steps, command.backbone_learning_rate, command.flip, command.crops) == (steps, rate, flip, crops)


def test_a_dumped_recipe_is_a_recipe(tmp_path: Path) -> None:
    """What a run leaves in its folder runs again."""
    recipe = parse_command_line(["segment-demo", "--steps", "3"]).to_recipe()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert parse_command_line([str(path)]).to_recipe() == recipe


@pytest.mark.parametrize("key", sorted(CommandLine.model_fields.keys() - {"recipe"}))
def test_a_misspelt_key_is_refused_with_the_nearest(key: str) -> None:
    for wrong in (key + "x", key[:-1]):
        if wrong in CommandLine.model_fields:
            continue
        for arguments in ([f"--{wrong}", "3"], [f"--{wrong}=3"]):
            sentence = refusal(*arguments)
            assert repr(wrong) in sentence
            assert repr(key) in sentence


def test_hyphens_point_to_the_underscored_key() -> None:
    assert "'backbone_learning_rate'" in refusal("--backbone-learning-rate", "1e-4")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "many"], ["steps", "'many'", "integer"]),
        (["--steps", "2.5"], ["steps", "'2.5'", "integer"]),
        (["--steps", "0"], ["steps", "'0'", "greater than 0"]),
        (["--flip", "perhaps"], ["flip", "'perhaps'", "boolean"]),
        (["--task", "dept"], ["task", "'dept'", "'depth' or 'segmentation'"]),
        (["--kept", "1.5"], ["kept", "'1.5'", "less than or equal to 1"]),
        (["--decoder_learning_rate", "nan"], ["decoder_learning_rate", "nan"]),
        (["--gradient_clip", "inf"], ["gradient_clip", "inf"]),
        (["--name", "a/b"], ["name", "'a/b'"]),
        (["--name", ".."], ["name", "'..'"]),
        (["--steps"], ["--steps", "expected one argument"]),
        (["demo", "more"], ["'more'", "--key value"]),
        (["-s", "3"], ["'-s'"]),
        (["demmo"], ["'demmo'", "'demo'"]),
        (["nothing-like-it.yaml"], ["nothing-like-it.yaml"]),
        (["--zzzzzz", "1"], ["'zzzzzz'", "steps", "--help"]),
    ],
)  # fmt: skip
def test_wrong_command_lines_are_refused_in_one_sentence(arguments: list[str], expected: list[str]) -> None:
    sentence = refusal(*arguments)
    for part in expected:
        assert part in sentence


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("stepz: 3", ["'stepz'", "'steps'"]),
        ("steps: many", ["steps", "'many'", "integer"]),
        ("runs: elsewhere", ["'runs'"]),  # where a run is kept is not part of what it is
        ("- steps", ["list"]),
        ("steps: [", ["YAML"]),
        ("\x00", ["YAML"]),
        (b"\xff\xfe\xfa", ["YAML"]),
    ],
)
def test_wrong_recipe_files_are_refused_in_one_sentence_that_names_them(
    tmp_path: Path, content: str | bytes, expected: list[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refusal(str(path))
    for part in [str(path), *expected]:
        assert part in sentence


def test_an_empty_recipe_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    assert read_recipe(str(tmp_path / "empty.yaml")) == {}


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = parse_command_line([])
    for key in CommandLine.model_fields:
        monkeypatch.setenv(key, "7")
        monkeypatch.setenv(key.upper(), "7")
    assert parse_command_line([]) == expected


def test_help_lists_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--help"])
    assert caught.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    for key, field in CommandLine.model_fields.items():
        assert field.description, f"{key} has no description"
        assert "".join(field.description.split()) in printed.replace(" ", "")
        assert key == "recipe" or f"--{key} " in printed


def test_a_wrong_key_ends_the_program_with_one_line_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "accelerated.train", "--stepz", "3"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "'steps'" in done.stderr
