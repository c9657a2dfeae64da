import io
from typing import Any

import pytest
from rich.console import Console

from loopwise.errors import InputError
from loopwise.studio.terminal import TINTS, TokenPrinter, print_tinted


def console(**options: Any) -> Console:
    settings: dict[str, Any] = {
        "file": io.StringIO(),
        "width": 80,
        "force_terminal": True,
        "color_system": "256",
        "no_color": False,
        "legacy_windows": False,
        "_environ": {},
    }
    return Console(**(settings | options))


def written(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_each_token_carries_the_tint_of_its_loops() -> None:
    target = console()
    print_tinted(target, ["given", " easy", " hard"], [0, 1, 4], 4)
    text = written(target)
    assert "\x1b[2mgiven\x1b[0m" in text
    assert "\x1b[38;5;16;48;5;230m easy\x1b[0m" in text
    assert "\x1b[38;5;231;48;5;54m hard\x1b[0m" in text


@pytest.mark.parametrize("max_loops", [1, 2, 3, 4, 8, 9, 32, 100])
def test_tints_go_from_light_to_dark_and_are_distinct_up_to_eight(max_loops: int) -> None:
    printer = TokenPrinter(console(), max_loops)
    places = [TINTS.index(printer._style(loops)) for loops in range(1, max_loops + 1)]
    assert places == sorted(places)
    assert places[0] == 0
    if max_loops > 1:
        assert places[-1] == len(TINTS) - 1
    if max_loops <= 8:
        assert len(set(places)) == max_loops


@pytest.mark.parametrize("options", [{"no_color": True}, {"color_system": None}, {"color_system": "standard"}])
def test_without_colours_loops_are_superscripts(options: dict[str, Any]) -> None:
    target = console(**options)
    print_tinted(target, ["a", " b", "\n", "c"], [0, 12, 3, 1], 12)
    assert "48;5;" not in written(target)
    assert " b¹²↵³\nc¹\n" in written(target)


def test_the_variable_no_color_is_respected() -> None:
    target = console(no_color=None, _environ={"NO_COLOR": "1"})
    print_tinted(target, [" b"], [2], 4)
    assert " b²" in written(target)


def test_where_superscripts_cannot_be_written_only_the_legend_speaks() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    target = Console(file=file, color_system=None, width=80)
    print_tinted(target, ["a", " b\n"], [1, 2], 2)
    file.flush()
    assert file.buffer.getvalue().decode("ascii").startswith("a b\n\ntokens by loops   1: 1   2: 1")  # type: ignore[attr-defined]


def test_the_legend_counts_and_measures() -> None:
    target = console(no_color=True)
    print_tinted(target, list("abcdefg"), [0, 1, 1, 1, 2, 4, 4], 4, policy="last_exited")
    assert "tokens by loops   1: 3   2: 1   3: 0   4: 2   given 1" in written(target).replace("\x1b[2m", "").replace(
        "\x1b[0m", ""
    )
    assert "mean 2.17 of 4 loops over 6 tokens: 46% of the core's work saved" in written(target)


def test_many_loops_share_eight_entries() -> None:
    printer = TokenPrinter(console(color_system=None), 32)
    printer.push("a", 7)
    assert printer._legend().plain.split("   ")[1:] == [
        "1-4: 0",
        "5-8: 1",
        "9-12: 0",
        "13-16: 0",
        "17-20: 0",
        "21-24: 0",
        "25-28: 0",
        "29-32: 0",
    ]


@pytest.mark.parametrize(
    ("policy", "claim"),
    [
        ("last_exited", "50% of the core's work saved"),
        ("per_loop", "no core work is saved"),
        (None, "50% fewer than full depth"),
    ],
)
def test_the_summary_claims_only_what_the_policy_gives(policy: str | None, claim: str) -> None:
    printer = TokenPrinter(console(), 4, policy=policy)
    printer.push("a", 2)
    assert claim in printer.summary()


def test_nothing_generated() -> None:
    printer = TokenPrinter(console(), 4)
    printer.push("a", 0)
    assert printer.summary() == "no token was generated"


def test_streaming_prints_at_once_and_the_same() -> None:
    whole, stream = console(), console()
    print_tinted(whole, ["a", "b"], [1, 2], 2)
    printer = TokenPrinter(stream, 2)
    printer.push("a", 1)
    assert "a" in written(stream)
    assert "b" not in written(stream)
    printer.push("b", 2)
    printer.finish()
    assert written(stream) == written(whole)


def test_model_text_cannot_drive_the_terminal() -> None:
    target = console(color_system=None)
    print_tinted(target, ["\x1b]0;owned\x07", "[bold]x[/bold]", "\x9b2J"], [1, 1, 1], 2)
    assert "\x1b]" not in written(target)
    assert "\x9b" not in written(target)
    assert "[bold]x[/bold]" in written(target)


def test_long_text_is_left_to_the_terminal_to_wrap() -> None:
    target = console(color_system=None, width=20)
    print_tinted(target, ["x" * 50, "y" * 50], [1, 1], 1)
    assert "x" * 50 + "¹" + "y" * 50 in written(target)


def test_bad_counts() -> None:
    with pytest.raises(InputError, match="between 0 and 4"):
        TokenPrinter(console(), 4).push("a", 5)
    with pytest.raises(InputError, match="at least 1"):
        TokenPrinter(console(), 0)
    with pytest.raises(InputError, match="one for each token"):
        print_tinted(console(), ["a"], [1, 2], 4)
