"""From a rule's text to the rule, and the table of all rules."""

import difflib
from collections.abc import Callable, Mapping
from typing import TypeVar

from loopwise.errors import ConfigError
from loopwise.loops.exits._base import ExitRule

RULES: dict[str, type[ExitRule]] = {}
"""Every known rule by name. Add to it with the decorator `rule`."""

_Rule = TypeVar("_Rule", bound=type[ExitRule])


def rule(name: str) -> Callable[[_Rule], _Rule]:
    """Class decorator: make an exit rule known under `name`.

    Raises:
        ConfigError: the name is taken by another class, or has a colon or a space in it.
    """
    if not name or any(letter in ": \t\n" for letter in name):
        raise ConfigError(f"exit rule name {name!r}: allowed are letters, digits and '-'; type for example 'my-rule'")

    def register(cls: _Rule) -> _Rule:
        taken = RULES.get(name)
        # A notebook cell that runs twice defines the same class again.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"exit rule name {name!r} is taken by {taken.__qualname__}; type another name")
        cls.name = name
        RULES[name] = cls
        return cls

    return register


def parse_rule(rule: str | ExitRule) -> ExitRule:
    """A rule from its text, such as "hazard:0.6", "delta" (its default) or "patience:2:delta:0.03".

    Raises:
        ConfigError: no such rule, or a number it cannot take; one line with what to type instead.
    """
    if isinstance(rule, ExitRule):
        return rule
    if not isinstance(rule, str):
        raise ConfigError(f"exit rule {rule!r} is neither text nor an ExitRule; type for example 'hazard:0.6'")
    text = rule.strip()
    name, colon, argument = text.partition(":")
    cls = RULES.get(name)
    if cls is None:
        allowed = ", ".join(known.example for known in RULES.values())
        raise ConfigError(f"unknown exit rule {text!r}; allowed are {allowed}{_suggestion(text, name, argument)}")
    if colon:
        return cls.parse(argument)
    if cls.default is None:
        raise ConfigError(f"exit rule {text!r} needs a number ({cls.form}); type for example {cls.example}")
    return cls.parse(cls.default.partition(":")[2])


def _suggestion(text: str, name: str, argument: str) -> str:
    if text.isdigit():
        return f"; did you mean fixed:{text}?"
    close = difflib.get_close_matches(name.lower(), RULES, n=1)
    if not close:
        return ""
    return f"; did you mean {close[0]}:{argument}?" if argument else f"; did you mean {RULES[close[0]].example}?"


def table(rules: Mapping[str, type[ExitRule]] | None = None) -> str:
    """The rules as a Markdown table (all of `RULES` unless some are given), one line each, in order of definition."""
    lines = ["| text | stops after loop i when | needs | alone means | earliest loop | source |", "|---" * 6 + "|"]
    for cls in (RULES if rules is None else rules).values():
        needs = cls.needs_in_words or ", ".join(sorted(parse_rule(cls.example).needs)) or "nothing"
        default = f"`{cls.default}`" if cls.default else "nothing: the number must be given"
        formula = cls.formula.replace("|", "\\|")
        lines.append(f"| `{cls.form}` | `{formula}` | {needs} | {default} | {cls.earliest} | {cls.source} |")
    return "\n".join(lines) + "\n"
