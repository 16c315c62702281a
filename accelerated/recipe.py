"""What a training run is, as typed data: the keys of a recipe, their meaning, their defaults.

A recipe is a YAML file of keys and values, by path or by the name of one in `accelerated/recipes/`. On the command line
`--key value` replaces what the file says. Both are validated by the same types; a key that does not exist or a value that
does not fit is refused with one sentence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

RECIPES = Path(__file__).parent / "recipes"
PROGRAM = "python -m accelerated.train"


class RecipeError(ValueError):
    """A recipe or command line that cannot be used; the message is one sentence for the person who wrote it."""


class Recipe(BaseModel):
    """Everything that decides the weights a run ends with."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task: Literal["depth", "segmentation"] = Field("depth", description="what the model learns to predict")
    model: str = Field("dpt_tiny", description="configuration of the model: a name in accelerated.CONFIGS")
    seed: int = Field(0, ge=0, description="seeds the initial weights, the order of the scenes, crops and flips")

    size: PositiveInt = Field(64, description="side of the rendered scenes, in pixels")
    training_scenes: PositiveInt = Field(4000, description="scenes learnt from")
    validation_scenes: PositiveInt = Field(
        100, description="scenes of the same seed, never learnt from, that draw the learning curve"
    )
    held_out_scenes: int = Field(200, ge=2, description="scenes of another seed, looked at once, when training is over")

    smallest_window: float = Field(
        0.85, gt=0, le=1, description="side of the smallest random square window of a scene, as a share of the scene's"
    )
    crops: list[PositiveInt] = Field(
        [48, 64],
        min_length=1,
        description="pixels along the side to which a window is scaled, one number per stage of the training: small images "
        "come first, since they teach much in little time; multiples of the patch size",
    )
    crop_shares: list[PositiveFloat] = Field(
        [0.6, 0.4], min_length=1, description="share of the steps that each stage takes, relative to the others'"
    )
    flip: bool = Field(True, description="mirror every other crop, at random")
    color_jitter: float = Field(0.2, ge=0, lt=1, description="largest relative change of contrast and of each channel, at random")

    batch_size: PositiveInt = Field(16, description="scenes per step")
    accumulation: PositiveInt = Field(
        1, description="parts, one after another, in which each process takes its share of a batch: less memory, the same step"
    )
    steps: PositiveInt = Field(10200, description="optimiser steps")
    backbone_learning_rate: float = Field(1.5e-3, gt=0, description="AdamW's learning rate for the backbone, at its highest")
    decoder_learning_rate: float = Field(1.5e-3, gt=0, description="AdamW's learning rate for everything else, at its highest")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps over which both rates rise from 0")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's decoupled weight decay")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient; a longer one is scaled down to it")
    average_decay: float = Field(
        0.998, ge=0, lt=1, description="decay per step of the running average of the weights, which is what is kept"
    )

    kept: float = Field(
        0.8, gt=0, le=1, description="depth: share of the smallest residuals that the loss keeps (the paper trims the rest)"
    )
    correlation: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="depth: share of the steps that at first maximise the correlation; as many then blend into the paper's loss",
    )
    untrimmed: float = Field(
        0.95, ge=0, le=1, description="depth: share of the steps, at the start, during which nothing is trimmed"
    )
    anchor: float = Field(
        0.1,
        ge=0,
        description="depth: weight of what holds in place the scale and shift that the losses cannot see",
    )
    gradient_weight: float = Field(0.5, ge=0, description="depth: weight of the gradient-matching term")
    auxiliary_weight: float = Field(0.2, ge=0, description="segmentation: weight of the auxiliary head's cross-entropy")

    validations: PositiveInt = Field(20, description="how many times, evenly spread, the validation scenes are measured")
    baseline_bar: float | None = Field(
        0.6,
        gt=0,
        description="promised for the held-out scenes: depth, AbsRel at most this times that of the best image-independent "
        "predictor; segmentation, mIoU at least this times that of the commonest class everywhere",
    )
    permuted_bar: float | None = Field(
        0.75,
        gt=0,
        description="depth: held-out AbsRel promised to be at most this times that of the same model shown other scenes' images",
    )

    @model_validator(mode="after")
    def _whole_batches_for_the_anchor(self) -> Self:
        if self.task == "depth" and self.anchor and self.accumulation > 1:
            raise ValueError(
                f"accumulation = {self.accumulation} does not fit anchor = {self.anchor:g}, which is measured on all images of a "
                "step at once: expected accumulation = 1 or anchor = 0"
            )
        return self

    @model_validator(mode="after")
    def _one_share_per_crop(self) -> Self:
        if len(self.crops) != len(self.crop_shares):
            raise ValueError(f"crop_shares has {len(self.crop_shares)} numbers for {len(self.crops)} crops: expected one each")
        return self


class _RecipeFile(PydanticBaseSettingsSource):
    """The recipe's file, as a source of settings below the command line, which is what names the file."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("a recipe file is read as a whole, by __call__")

    def __call__(self) -> dict[str, Any]:
        recipe = self.current_state.get("recipe", "demo")
        return {"name": re.sub(r"[^\w.-]+", "-", Path(recipe).stem).lstrip(".-"), **read_recipe(recipe)}


class CommandLine(Recipe, BaseSettings):
    """Train a model as a recipe says.

    The keys below belong to the recipe; given here, they replace what its file says.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        cli_prog_name=PROGRAM,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    recipe: CliPositionalArg[str] = Field("demo", description="name of a recipe of this package, or path of a YAML file")
    name: str = Field("", pattern=r"^(\w[\w.-]*)?$", description="name of the run's folder; the recipe's own name unless given")
    runs: Path = Field(Path("runs"), description="folder that holds the runs")
    cache: Path = Field(Path("cache/scenes"), description="folder that keeps the rendered scenes")
    threads: int = Field(0, ge=0, description="CPU threads that train; 0: one per core this process may use")
    overwrite: bool = Field(False, description="train although the run's folder holds a finished run, or another recipe's")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: go on from the newest whole snapshot of an unfinished run of this recipe; never: begin anew"
    )
    snapshot_seconds: float = Field(120, ge=0, description="seconds between two snapshots; 0: one after every step")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The command line, then the recipe's file; not the environment: a variable called SEED must not change a run."""
        return init_settings, _RecipeFile(settings_cls)

    def to_recipe(self) -> Recipe:
        """Return the recipe alone, without where the run is kept."""
        return Recipe(**{key: getattr(self, key) for key in Recipe.model_fields})


def read_recipe(recipe: str) -> dict[str, Any]:
    """Return the keys and values of a recipe: the name of one in `accelerated/recipes/`, or the path of a YAML file.

    Raises RecipeError where there is no such file, where it is no YAML mapping, or where a key or value does not fit.
    """
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    path = RECIPES / f"{recipe}.yaml" if recipe in names else Path(recipe)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise RecipeError(
            f"no recipe {recipe!r} of this package and no readable file of that name: {_choices(recipe, names)}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path} is not readable as YAML: {reason}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds a {type(content).__name__}: expected keys and values, one 'key: value' a line")
    try:
        Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_sentence(error)}") from None
    return content


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Return the run that `[recipe] [--key value ...]` asks for; `--help` prints every key and leaves with status 0.

    Raises RecipeError with one sentence for an unknown recipe or key (naming the nearest) and a value that does not fit.
    """
    try:
        return CliApp.run(CommandLine, cli_args=list(arguments))
    except ValidationError as error:
        raise RecipeError(_sentence(error)) from None
    except SettingsError as error:
        message = str(error).removeprefix("error parsing CLI: ")
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:
            raise RecipeError(f"{message} ({PROGRAM} --help lists every key)") from None
        key = unknown.split()[0]
        if not key.startswith("--"):
            raise RecipeError(f"unexpected {key!r}: expected one recipe, then pairs of --key value") from None
        raise RecipeError(_unknown_key(key[2:].split("=")[0], CommandLine)) from None


def _sentence(error: ValidationError) -> str:
    """One sentence for the first thing that does not fit."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown_key(key, Recipe)
    if not key:  # about several keys at once, which the message names itself
        return first["msg"].removeprefix("Value error, ")
    expected = first["msg"][0].lower() + first["msg"][1:]
    return f"{key} = {first['input']!r} does not fit: {expected}"


def _unknown_key(key: str, model: type[BaseModel]) -> str:
    names = [name for name in model.model_fields if name != "recipe"]
    return f"unknown key {key!r}: {_choices(key.replace('-', '_'), names)} ({PROGRAM} --help lists every key)"


def _choices(wrong: str, names: Sequence[str]) -> str:
    """The nearest of `names` where one is near, else all of them."""
    nearest = difflib.get_close_matches(str(wrong), names, n=1, cutoff=0.5)
    return f"the nearest is {nearest[0]!r}" if nearest else f"expected one of {', '.join(names)}"
