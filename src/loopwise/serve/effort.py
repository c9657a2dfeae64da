"""The knob: from a name of effort and the `loop` object to loops, rule and start.

Each field is taken from the first of these that says something: the request's `loop` object, its `reasoning_effort`
(through the checkpoint's ladder), the server's settings, the checkpoint.
"""

from dataclasses import dataclass
from typing import Any, Literal

from loopwise.engine.ladder import Ladder, read_ladder
from loopwise.errors import ConfigError
from loopwise.loops.exits import parse_rule
from loopwise.models.looped_lm import LoopedLM
from loopwise.serve.errors import ApiError
from loopwise.serve.schema import LoopOptions
from loopwise.serve.settings import ServeConfig

OFF = "off"
"""The rule that runs every loop."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """What one request spends on each token."""

    effort: str | None
    """The name that was given."""
    max_loops: int
    min_loops: int
    rule: str | None
    """None runs every loop."""
    start: int | Literal["zero"] | None


class Efforts:
    """What the names of effort mean for the served model.

    Args:
        planes: most loops that the engine has planes for.

    Raises:
        ConfigError: server settings that exceed the model.
        CheckpointError: the checkpoint's ladder is broken.
    """

    def __init__(self, model: LoopedLM, settings: ServeConfig, *, planes: int) -> None:
        self.ladder: Ladder = read_ladder(model)
        self.trained = model.facts.trained_loops
        self.planes = planes
        self.default_loops = settings.loops or min(model.config.loops, planes)
        self.default_rule = settings.exit
        self.signal = model.facts.signal
        if self.default_loops > self.trained[1] and settings.loops is not None:
            raise ConfigError(
                f"loops={settings.loops}: this model was trained with at most {self.trained[1]}; requests may go "
                f'beyond with max_loops={settings.loops} here and "beyond_trained" there'
            )
        if self.default_loops > planes:
            raise ConfigError(f"loops={settings.loops}: max_loops={planes} allows no more")
        if settings.exit is not None:
            parse_rule(settings.exit).bind(self.signal)

    def resolve(self, effort: str | None, options: LoopOptions | None) -> Knob:
        """What this request spends.

        Raises:
            ApiError: loops beyond what was trained without saying so, or beyond what the engine can hold.
        """
        options = options or LoopOptions()
        loops, rule = self.default_loops, self.default_rule
        if effort is not None:
            loops, rule = self.ladder.rung(effort).settings
            if loops > self.planes:
                raise ApiError(
                    f"effort {effort} asks for {loops} loops and this server allows {self.planes}; see /v1/models",
                    param="reasoning_effort",
                )
        if options.max is not None:
            loops = self._allowed(options.max, options)
        if options.rule is not None:
            rule = None if options.rule == OFF else options.rule
        if options.min is not None and options.min > loops:
            raise ApiError(f"loop.min is {options.min} and at most {loops} loops run", param="loop.min")
        return Knob(effort=effort, max_loops=loops, min_loops=options.min or 1, rule=rule, start=options.start)

    def _allowed(self, loops: int, options: LoopOptions) -> int:
        most = self.trained[1]
        if loops > most and not options.beyond_trained:
            raise ApiError(
                f"loop.max is {loops} and the model was trained with at most {most}; beyond that quality usually "
                "falls: set loop.beyond_trained to true if that is meant",
                param="loop.max",
            )
        if loops > self.planes:
            raise ApiError(f"loop.max is {loops} and this server allows at most {self.planes}", param="loop.max")
        return loops

    @property
    def facts(self) -> dict[str, Any]:
        """For the list of models."""
        return {
            "trained": list(self.trained),
            "allowed": self.planes,
            "default": {"max": self.default_loops, "rule": self.default_rule or OFF},
            "signal": self.signal,
            "ladder": self.ladder.facts(),
        }
