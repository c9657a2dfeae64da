"""`loopwise train`: from a preset and a few dials, or from a whole configuration."""

import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopwise.configuration import build, to_dict
from loopwise.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from loopwise.train.config import TrainConfig

CONFIG = "loopwise.train.config:TrainConfig"


def command(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dials of the preset, or settings of the run.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="ouro-tiny, huginn-tiny, pointer-chasing or calibrate.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A JSON or TOML file of settings.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with the run in this folder.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Show what would run, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Train a looped model, or go on training one.

    A preset turns a few dials into a whole run and says why it chose what it chose:

        loopwise train --preset ouro-tiny corpus=python loops=4 width=256
        loopwise train --preset calibrate init=runs/ouro-tiny corpus=notes/

    Words that are no dial of the preset are settings of the run (`optimizer.name=muon`, `device=cuda`). The same
    command, typed again, goes on from the newest checkpoint; so does `--resume FOLDER`. docs/training.md has the rest.
    """
    # Read once, when torch is loaded: how threads wait for each other, see docs/training.md.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")

    from loopwise.train.config import TrainConfig
    from loopwise.train.run import train

    words = list(overrides or [])
    if resume is not None:
        if preset or config or words:
            raise ConfigError("--resume goes on with a run as it is; leave out everything else")
        if not (resume / "config.json").is_file():
            raise NotFoundError(f"there is no run in {resume}; give a folder that `loopwise train` has written")
        chosen = dataclasses.replace(build(TrainConfig, resume / "config.json", []), run=str(resume))
    elif preset is not None:
        chosen = _from_preset(preset, config, words, quiet=as_json)
    elif config is not None:
        chosen = build(TrainConfig, config, words)
    else:
        raise ConfigError("nothing says what to train; type for example: loopwise train --preset ouro-tiny")
    if dry:
        typer.echo(json.dumps(to_dict(chosen), indent=2))
        return
    result = train(chosen)
    model = result.folder / "model"
    if as_json:
        losses = {str(loop): loss for loop, loss in result.validation.losses.items()}
        typer.echo(json.dumps({"model": str(model), "validation_loss": losses}))
    elif result.model.tokenizer is not None:
        typer.echo(f"try it: loopwise generate {model} 'Once' --show-loops")


def _from_preset(name: str, file: Path | None, words: list[str], *, quiet: bool) -> "TrainConfig":
    """The preset's configuration, with settings that are no dials applied on top."""
    from loopwise.train.config import TrainConfig
    from loopwise.train.presets import find_preset

    found = find_preset(name)
    dials = [field.name for field in dataclasses.fields(found.dials)]
    settings = [field.name for field in dataclasses.fields(TrainConfig)]
    for word in words:
        key = word.partition("=")[0].partition(".")[0]
        if key not in (*dials, *settings):
            near = difflib.get_close_matches(key, [*dials, *settings], n=1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise ConfigError(
                f"{name} has no dial and a run no setting {key}{hint}; dials: {', '.join(dials)}; "
                f"settings: {', '.join(setting for setting in settings if setting not in dials)}"
            )
    recipe = found.build(build(found.dials, None, [word for word in words if word.partition("=")[0] in dials]))
    others = [word for word in words if word.partition("=")[0] not in dials]
    if not quiet:
        for choice in recipe.choices:
            typer.echo(f"{choice.name} = {choice.value}  ({choice.reason})", err=True)
        if file is not None or others:
            typer.echo("settings given beside the dials win over these choices", err=True)
    return build(TrainConfig, file, others, base=recipe.config)
