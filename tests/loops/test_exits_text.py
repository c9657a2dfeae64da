"""Exit rules as text: parsing, messages, the documentation page, and rules of one's own."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.loops.exits import (
    RULES,
    Budget,
    ExitRule,
    Fixed,
    Hazard,
    InstantRule,
    Observation,
    Patience,
    ThresholdRule,
    parse_rule,
    replay,
    rule,
    table,
)

PAGE = Path(__file__).parents[2] / "docs" / "exit-rules.md"


def one_unit(values: list[float] | list[list[float]]) -> Tensor:
    """A trace of a single unit: (R, 1) or (R, 1, D)."""
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


class TestText:
    @pytest.mark.parametrize("name", RULES)
    def test_examples_and_defaults(self, name: str) -> None:
        cls = RULES[name]
        assert str(parse_rule(cls.example)) == cls.example
        if cls.default is None:
            with pytest.raises(ConfigError, match=cls.example):
                parse_rule(name)
        else:
            assert parse_rule(name) == parse_rule(cls.default)

    def test_every_rule_of_the_design_is_there(self) -> None:
        names = "fixed hazard halt delta second-difference kl entropy stable certainty patience budget"
        assert list(RULES) == names.split()

    def test_nesting(self) -> None:
        parsed = parse_rule("budget:2.5:patience:2:delta:0.03")
        assert isinstance(parsed, Budget)
        assert parsed.mean == 2.5
        assert isinstance(parsed.inner, Patience)
        assert parsed.inner.count == 2
        assert str(parsed.inner.inner) == "delta:0.03"
        assert parsed.needs == {"allowance", "state"}
        assert parse_rule("patience:3:hazard") == Patience(count=3, inner=Hazard(threshold=0.6))

    def test_a_rule_passes_through(self) -> None:
        given_rule = Fixed(count=2)
        assert parse_rule(given_rule) is given_rule

    def test_surrounding_space_is_no_matter(self) -> None:
        assert parse_rule(" fixed:2\n") == Fixed(count=2)

    @pytest.mark.parametrize(
        ("text", "hint"),
        [
            ("hazrd:0.7", "did you mean hazard:0.7?"),
            ("Delta", "did you mean delta:0.03?"),
            ("second_difference:1e-3", "did you mean second-difference:1e-3?"),
            ("4", "did you mean fixed:4?"),
            ("", "unknown exit rule ''"),
            ("nonsense", "allowed are fixed:4, hazard:0.6, halt:0.0, delta:0.03, second-difference:0.001, kl:0.0005, "),
            ("fixed", "type for example fixed:4"),
            ("fixed:0", "allowed is a whole number, 1 or more; type for example fixed:4"),
            ("fixed:2.5", "'2.5'; allowed is a whole number, 1 or more"),
            ("stable:-1", "allowed is a whole number, 1 or more"),
            ("hazard:-0.1", "'-0.1'; allowed is 0 or more (from 1 on: never early)"),
            ("hazard:nan", "'nan'; allowed is 0 or more"),
            ("hazard:inf", "'inf'; allowed is 0 or more"),
            ("hazard:", "''; allowed is 0 or more"),
            ("hazard:0.6:2", "'0.6:2'; allowed is 0 or more"),
            ("delta:0", "allowed is a number above 0; type for example delta:0.03"),
            ("second-difference:-1", "allowed is a number above 0"),
            ("kl:0", "allowed is a number above 0"),
            ("entropy:none", "'none'; allowed is a number above 0"),
            ("certainty:1.1", "allowed is a number from 0 to 1"),
            ("halt:inf", "allowed is any finite number"),
            ("patience:2", "lacks its inner rule (patience:K:RULE); type for example patience:2:delta:0.03"),
            ("patience:0:delta", "allowed is a whole number, 1 or more"),
            ("patience:x:delta", "allowed is a whole number, 1 or more"),
            ("patience:2:delat:1", "did you mean delta:1?"),
            ("budget:0.5:delta", "allowed is a finite number, 1 or more"),
            ("budget:inf:delta", "allowed is a finite number, 1 or more"),
            ("patience:2:budget:2:delta", "a budget goes outermost"),
            ("budget:2:budget:2:delta", "a budget goes outermost"),
        ],
    )
    def test_wrong_text_says_what_to_type(self, text: str, hint: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_rule(text)
        message = str(caught.value)
        assert hint in message
        assert "\n" not in message
        if "unknown" in message:
            assert all(cls.example in message for cls in RULES.values())

    def test_what_is_no_text(self) -> None:
        with pytest.raises(ConfigError, match="neither text nor an ExitRule"):
            inspect.unwrap(parse_rule)(4)  # a config file may hold any value, type checks or not

    def test_a_bool_is_no_count(self) -> None:
        with pytest.raises(ConfigError, match="whole number"):
            Fixed(count=True)


class TestOwnRules:
    @pytest.fixture(autouse=True)
    def _forget(self) -> Iterator[None]:
        known = dict(RULES)
        yield
        RULES.clear()
        RULES.update(known)

    def test_the_page_runs(self) -> None:
        blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert len(blocks) >= 2
        namespace: dict[str, object] = {}
        for block in blocks:
            exec(block, namespace)
        assert "cosine" in RULES
        assert "falling" in RULES

    def test_a_name_is_taken_once(self) -> None:
        class Other(Fixed):
            pass

        with pytest.raises(ConfigError, match="'fixed' is taken by Fixed"):
            rule("fixed")(Other)
        for name in ("", "a:b", "a b"):
            with pytest.raises(ConfigError, match="exit rule name"):
                rule(name)

    def test_defining_a_rule_again_replaces_it(self) -> None:
        def define() -> type[ExitRule]:
            @rule("again")
            class Again(InstantRule):
                form = "again:x"
                formula = "signal > x"
                source = "test"
                example = "again:1.0"
                needs = frozenset({"signal"})

                def fires(self, observation: Observation) -> Tensor:
                    return observation.read("signal") > self.threshold

            return Again

        first, second = define(), define()
        assert first is not second
        assert RULES["again"] is second
        assert replay("again:0.5", signals=one_unit([0.0, 1.0, 2.0])).tolist() == [2]

    def test_replay_refuses_a_foreign_allowance(self) -> None:
        @rule("tired")
        class Tired(ThresholdRule):
            form = "tired:x"
            formula = "allowance < x"
            source = "test"
            example = "tired:1.0"
            needs = frozenset({"allowance"})
            track = Hazard.track

        with pytest.raises(ConfigError, match="only for budget:MEAN:RULE"):
            replay("tired:1", signals=torch.zeros(2, 2))


def test_the_page_shows_the_current_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


def test_table_has_one_line_per_rule_and_escapes_bars() -> None:
    lines = table().splitlines()
    assert len(lines) == 2 + len(RULES)
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert columns == {7}
