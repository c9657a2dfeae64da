"""Exit rules: policies, outside the model, that turn states, signals or predictions into "stop now".

A rule is written as text ("hazard:0.6"), asked for what it `needs`, and followed by a `Tracker`:

    rule = parse_rule("hazard:0.6")
    tracker = rule.track(units)
    stop = tracker.update(Observation(loop=1, signal=hazards))   # (units,) bool: stop after this loop
    tracker.keep((~stop).nonzero().flatten())

A NaN never stops a unit at its loop, and a change measured from or to a NaN is NaN too.
"""

from loopwise.loops.exits._base import CountRule, ExitRule, InstantRule, Observation, ThresholdRule, Tracker
from loopwise.loops.exits._registry import RULES, parse_rule, rule, table

# Rules are listed everywhere in the order in which these modules define them.
# isort: split
from loopwise.loops.exits._signals import Fixed, Halt, Hazard

# isort: split
from loopwise.loops.exits._states import Delta, SecondDifference

# isort: split
from loopwise.loops.exits._predictions import KL, Certainty, Entropy, Stable

# isort: split
from loopwise.loops.exits._nested import Budget, NestedRule, Patience
from loopwise.loops.exits._replay import replay

__all__ = [
    "KL",
    "RULES",
    "Budget",
    "Certainty",
    "CountRule",
    "Delta",
    "Entropy",
    "ExitRule",
    "Fixed",
    "Halt",
    "Hazard",
    "InstantRule",
    "NestedRule",
    "Observation",
    "Patience",
    "SecondDifference",
    "Stable",
    "ThresholdRule",
    "Tracker",
    "parse_rule",
    "replay",
    "rule",
    "table",
]
