"""The ladder: what each name of effort means for one checkpoint, as (most loops, exit rule).

A ladder stands in the checkpoint's generation_config.json, beside what was measured when it was made
(`loopwise study ladder`):

    "loop_ladder": {"measured": true, "rungs": [{"effort": "low", "max_loops": 2, "exit": "hazard:0.5", ...}, ...]}

A checkpoint without one gets a ladder from its trained range alone, and it says so: `measured` is false.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loopwise.errors import CheckpointError, ConfigError, StorageError
from loopwise.hub.tokenizer_files import read_json
from loopwise.loops.exits import parse_rule
from loopwise.models.looped_lm import LoopedLM

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""From the least thinking to the most."""
KEY = "loop_ladder"
"""Of generation_config.json."""
_FIGURES = ("mean_loops", "loss", "accuracy", "seconds_per_token")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One name of effort. The figures are None unless measured."""

    effort: str
    """One of `EFFORTS`."""
    max_loops: int
    """Loops per token at most."""
    exit: str | None = None
    """Exit rule; None runs all of `max_loops`."""
    mean_loops: float | None = None
    """Loops per token on the validation set."""
    loss: float | None = None
    """Nats per token on the validation set."""
    accuracy: float | None = None
    """Share of validation tokens that were the likeliest."""
    seconds_per_token: float | None = None
    """Measured time of one token, all of them run together, on the machine that made the ladder."""

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise ConfigError(f"effort={self.effort!r}: allowed are {', '.join(EFFORTS)}")
        if self.max_loops < 1:
            raise ConfigError(f"max_loops={self.max_loops!r} of effort {self.effort}: allowed is 1 or more")
        if self.exit is not None:
            object.__setattr__(self, "exit", str(parse_rule(self.exit)))
        for name in _FIGURES:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value!r} of effort {self.effort}: allowed is a number from 0 on, or none")
        if self.mean_loops is not None and not 1 <= self.mean_loops <= self.max_loops:
            raise ConfigError(
                f"mean_loops={self.mean_loops} of effort {self.effort}: allowed is 1 to max_loops={self.max_loops}"
            )

    @property
    def settings(self) -> tuple[int, str | None]:
        """What the name stands for; rungs with equal settings coincide."""
        return self.max_loops, self.exit


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """A rung for every name of effort, from the least to the most.

    Raises ConfigError for a rung that is missing or twice there, or loops that fall as effort rises.
    """

    rungs: tuple[Rung, ...]
    measured: bool
    """Whether a validation set was run; False means derived from the trained range alone."""

    def __post_init__(self) -> None:
        names = tuple(rung.effort for rung in self.rungs)
        if names != EFFORTS:
            raise ConfigError(
                f"a ladder has the rungs {', '.join(EFFORTS)}, in this order; given are {', '.join(names)}"
            )
        for lower, upper in zip(self.rungs, self.rungs[1:], strict=False):
            falls = upper.max_loops < lower.max_loops
            if lower.mean_loops is not None and upper.mean_loops is not None:
                falls = upper.mean_loops < lower.mean_loops
            if falls:
                raise ConfigError(
                    f"effort {upper.effort} runs fewer loops than {lower.effort}; order the rungs by loops"
                )

    def rung(self, effort: str) -> Rung:
        """What a name stands for.

        Raises:
            ConfigError: there is no such name.
        """
        for rung in self.rungs:
            if rung.effort == effort:
                return rung
        raise ConfigError(f"effort={effort!r}: allowed are {', '.join(EFFORTS)}")

    def same_as(self, effort: str) -> str | None:
        """The lowest rung below `effort` with the same settings; None when it is the first of its kind."""
        wanted = self.rung(effort)
        first = next(rung for rung in self.rungs if rung.settings == wanted.settings)
        return None if first is wanted else first.effort

    def facts(self) -> dict[str, Any]:
        """The ladder as data: unknown figures are left out, and a rung that coincides with a lower one names it."""
        rungs = []
        for rung in self.rungs:
            fields = asdict(rung)
            told = {name: value for name, value in fields.items() if name not in _FIGURES or value is not None}
            same = self.same_as(rung.effort)
            rungs.append(told if same is None else told | {"same_as": same})
        return {"measured": self.measured, "rungs": rungs}


def default_ladder(trained_loops: tuple[int, int]) -> Ladder:
    """A ladder without a measurement: fixed depths, equal steps of log2(loops) from the fewest to the most trained."""
    least, most = trained_loops
    steps = len(EFFORTS) - 1
    return Ladder(
        measured=False,
        rungs=tuple(
            Rung(effort=effort, max_loops=round(least * (most / least) ** (step / steps)))
            for step, effort in enumerate(EFFORTS)
        ),
    )


def parse_ladder(facts: object) -> Ladder:
    """A ladder from `Ladder.facts`.

    Raises:
        ConfigError: when it is none; the message says what is wrong.
    """
    if not isinstance(facts, Mapping) or not isinstance(facts.get("measured"), bool):
        raise ConfigError('a ladder is an object with "measured" (true or false) and "rungs"')
    rungs = facts.get("rungs")
    if (
        not isinstance(rungs, Sequence)
        or isinstance(rungs, str)
        or not all(isinstance(each, Mapping) for each in rungs)
    ):
        raise ConfigError('"rungs" of a ladder is a list of objects with "effort" and "max_loops"')
    return Ladder(measured=facts["measured"], rungs=tuple(_rung(each) for each in rungs))


def _rung(facts: Mapping[str, Any]) -> Rung:
    allowed = {"effort", "max_loops", "exit", "same_as", *_FIGURES}
    for name in facts:
        if name not in allowed:
            raise ConfigError(f"a rung has no {name!r}; allowed are {', '.join(sorted(allowed))}")
    missing = {"effort", "max_loops"} - set(facts)
    if missing:
        raise ConfigError(f"a rung lacks {min(missing)!r}")
    effort, most, exit_rule = facts["effort"], facts["max_loops"], facts.get("exit")
    if not isinstance(effort, str) or not isinstance(exit_rule, str | None):
        raise ConfigError(
            f'"effort" is a name and "exit" the text of an exit rule or null; given are {effort!r}, {exit_rule!r}'
        )
    if not isinstance(most, int) or isinstance(most, bool):
        raise ConfigError(f"max_loops={most!r} of effort {effort}: allowed is a whole number, 1 or more")
    figures = {name: facts[name] for name in _FIGURES if facts.get(name) is not None}
    for name, value in figures.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} of effort {effort}: allowed is a number, or none")
    return Rung(
        effort=effort,
        max_loops=most,
        exit=exit_rule,
        **{name: float(value) for name, value in figures.items()},
    )


def check_ladder(ladder: Ladder, model: LoopedLM) -> Ladder:
    """The same ladder, if this model can serve every rung of it.

    Raises:
        ConfigError: a rung goes beyond the trained range, or reads a signal that the model has not.
    """
    most = model.facts.trained_loops[1]
    for rung in ladder.rungs:
        if rung.max_loops > most:
            raise ConfigError(
                f"effort {rung.effort} asks for {rung.max_loops} loops; this model was trained with at most {most}"
            )
        if rung.exit is not None:
            parse_rule(rung.exit).bind(model.facts.signal)
    return ladder


def read_ladder(model: LoopedLM) -> Ladder:
    """The ladder of a checkpoint; the default one when it carries none.

    Raises:
        CheckpointError: its generation_config.json holds a ladder that is broken or that the model cannot serve.
    """
    folder = _folder(model)
    saved = {} if folder is None else read_json(folder / "generation_config.json")
    if KEY not in saved:
        return default_ladder(model.facts.trained_loops)
    try:
        return check_ladder(parse_ladder(saved[KEY]), model)
    except ConfigError as error:
        raise CheckpointError(
            f"{KEY} in {folder}/generation_config.json: {error}; make it anew with: loopwise study ladder {folder}"
        ) from None


def write_ladder(model: LoopedLM, ladder: Ladder, folder: Path | None = None) -> Path:
    """Write a ladder into generation_config.json, which keeps its other keys; returns its path.

    Args:
        folder: of the checkpoint; by default the one that the model was loaded from.

    Raises:
        ConfigError: when this model cannot serve it.
        StorageError: the model has no folder, or it cannot be written to.
    """
    check_ladder(ladder, model)
    folder = folder or _folder(model)
    if folder is None:
        raise StorageError("this model has no folder to keep a ladder in; save it first")
    path = folder / "generation_config.json"
    content = read_json(path) | {KEY: ladder.facts()}
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror}; convert the model to a folder of yours"
        ) from None
    return path


def _folder(model: LoopedLM) -> Path | None:
    return None if model.origin is None else model.origin.folder
