"""`loopwise chat` through a pipe: what it says, remembers, forgets and refuses."""

import io
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import loopwise
from loopwise.cli import chat, main
from loopwise.cli.models import ChatConfig
from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.engine.write import Writing

Talk = Callable[..., tuple[int, list[str], list[str]]]
Say = Callable[[Callable[[int], int]], None]
Written = list[tuple[Writing, Sampling]]
GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture
def talk(chat_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Run `loopwise chat` on piped lines: exit code, lines of stdout, lines of stderr."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")

    def run(said: list[str], *words: str, model: Path = chat_model) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in said)))
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            code = main(["chat", str(model), *words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.split("\n")[:-1], err.split("\n")[:-1]

    return run


@pytest.fixture
def letters(say: Say, written: Written) -> Written:
    """Every reply is `ok.`, ended by the model itself; what was written."""
    say(okay)
    return written


def okay(place: int) -> int:
    return [*b"ok.", 256][min(place, 3)]


def stop() -> int:
    raise KeyboardInterrupt


def texts(written: Written) -> list[str]:
    """The prompts."""
    return [bytes(writing.prompt).decode() for writing, _ in written]


def test_a_reply_is_the_models_answer_to_the_laid_out_conversation(talk: Talk, chat_model: Path) -> None:
    code, out, err = talk(["Hi"], "max_tokens=12", "exit=hazard:0.6", "temperature=0.7", "seed=3")
    model = loopwise.load(chat_model)
    sampling = Sampling(max_tokens=12, exit="hazard:0.6", temperature=0.7, seed=3)
    expected = generate(model, [list(b"<user>Hi\n<assistant>")], sampling)[0].text
    assert (code, "\n".join(out)) == (0, str(expected).removesuffix("\n"))
    assert err == ["(cut at max_tokens=12)"]


def test_the_conversation_is_remembered(talk: Talk, letters: Written) -> None:
    assert talk(["Hi", "", "  Who? "], "--system", "Be kind.") == (0, ["ok.", "ok."], [])
    first = "<system>Be kind.\n<user>Hi\n<assistant>"
    assert texts(letters) == [first, f"{first}ok.\n<user>Who?\n<assistant>"]


def test_reset_and_exit(talk: Talk, letters: Written) -> None:
    assert talk(["a", "/reset", "b", "/exit", "c"]) == (0, ["ok.", "ok."], [])
    assert texts(letters) == ["<user>a\n<assistant>", "<user>b\n<assistant>"]


class TestPlain:
    def test_a_base_model_is_refused(self, talk: Talk, base_model: Path) -> None:
        code, out, err = talk(["Hi"], model=base_model)
        assert (code, out, len(err)) == (2, [], 1)
        assert err[0].startswith(f"error: {base_model} has no chat template: it is a base model that continues text")
        assert err[0].endswith("--plain")

    def test_lines_of_user_and_assistant(self, talk: Talk, base_model: Path, say: Say, written: Written) -> None:
        reply = list(b" Yes!\nUser: and then?")
        say(lambda place: reply[place])
        assert talk(["Hi", "So?"], "--plain", "--system", "Be kind.", model=base_model) == (0, [" Yes!", " Yes!"], [])
        first = "System: Be kind.\nUser: Hi\nAssistant:"
        assert texts(written) == [first, f"{first} Yes!\nUser: So?\nAssistant:"]

    def test_a_template_may_be_left_aside(self, talk: Talk, letters: Written) -> None:
        assert talk(["Hi"], "--plain")[1] == ["ok."]
        assert texts(letters) == ["User: Hi\nAssistant:"]


class TestContext:
    def test_the_oldest_turns_are_forgotten_and_it_is_said(self, talk: Talk, letters: Written) -> None:
        code, out, err = talk([letter * 150 for letter in "abcde"], "max_tokens=8", "--system", "S")
        assert (code, out) == (0, ["ok."] * 5)
        assert err == ["the context of 512 tokens is full: forgot the oldest turn"] * 3
        said = texts(letters)
        assert all(text.startswith("<system>S\n<user>") for text in said)
        assert [sorted(set(re.findall("[abcde]{150}", text))) for text in said] == [
            [letter * 150 for letter in kept] for kept in ("a", "ab", "bc", "cd", "de")
        ]

    def test_several_turns_at_once(self, talk: Talk, letters: Written) -> None:
        err = talk(["a" * 80, "b" * 80, "c" * 80, "d" * 400], "max_tokens=8")[2]
        assert err == ["the context of 512 tokens is full: forgot the oldest 3 turns"]
        assert texts(letters)[-1] == f"<user>{'d' * 400}\n<assistant>"

    def test_a_message_that_is_too_long_is_refused_and_nothing_else_forgotten(
        self, talk: Talk, letters: Written
    ) -> None:
        code, out, err = talk(["a", "b" * 600, "c"])
        assert (code, out) == (0, ["ok.", "ok."])
        assert len(err) == 1
        assert err[0].startswith("error: the prompt has 618 tokens; the context holds 512")
        assert texts(letters)[-1] == "<user>a\n<assistant>ok.\n<user>c\n<assistant>"

    def test_a_reply_that_fills_the_context_is_cut(self, talk: Talk, say: Say) -> None:
        say(lambda place: ord("a"))
        code, out, err = talk(["x" * 490], "max_loops=1")
        assert (code, out) == (0, ["aaaa"])
        assert err == ["(cut: the context of 512 tokens is full; /reset begins anew)"]


class TestCommands:
    def test_loops_and_rules(self, talk: Talk, written: Written) -> None:
        said = ["/rule hazard:0.6", "a", "/loops 3", "a", "/rule off", "a", "/loops", "/rule"]
        code, _, err = talk(said, "max_tokens=1")
        assert code == 0
        seen = [(str(writing.rule), writing.max_loops, writing.policy) for writing, _ in written]
        assert seen == [("hazard:0.6", 4, "last_exited"), ("hazard:0.6", 3, "last_exited"), ("fixed:3", 3, "per_loop")]
        assert [line for line in err if not line.startswith("(cut")] == [
            "4 loops, leaving early by hazard:0.6",
            "3 loops, leaving early by hazard:0.6",
            *["3 loops, every token runs them all"] * 3,
        ]

    def test_beyond_training_is_said_once(self, talk: Talk) -> None:
        err = talk(["/loops 6", "a", "b"], "max_tokens=1")[2]
        assert sum("warning: loops=6 is beyond the 4 loops" in line for line in err) == 1

    def test_show(self, talk: Talk) -> None:
        out = talk(["a", "/show on", "a", "/show off", "a"], "max_tokens=6", "exit=hazard:0.6")[1]
        assert sum(line.startswith("tokens by loops   1: ") for line in out) == 1
        assert sum("of 4 loops over 6 tokens: " in line for line in out) == 1
        out = talk(["a"], "max_tokens=6", "exit=hazard:0.6", "--show-loops")[1]
        assert "⁴" in out[0]
        assert out[-1].endswith(" tokens/s")

    def test_help(self, talk: Talk) -> None:
        out = talk(["/help"])[1]
        assert [line.split("  ")[0].strip() for line in out] == list(chat._COMMANDS)

    @pytest.mark.parametrize(
        ("command", "line"),
        [
            ("/lops 3", "there is no command /lops; did you mean /loops; allowed: /help, /loops N, /rule RULE"),
            ("/loops three", "/loops three: give a whole number, for example /loops 3"),
            ("/loops 0", "max_loops=0: allowed is 1 or more"),
            ("/loops 1", "min_loops=2: allowed is 1 to max_loops=1"),
            ("/rule hazrd:1", "unknown exit rule 'hazrd:1'"),
            ("/rule halt:0", "exit rule 'halt:0.0' reads a halt_logit; this model's signal is hazard"),
            ("/show", "/show : allowed are /show on and /show off"),
        ],
    )
    def test_mistakes_change_nothing_and_end_nothing(
        self, talk: Talk, letters: Written, command: str, line: str
    ) -> None:
        code, out, err = talk([command, "/rule", "a"], "min_loops=2")
        assert (code, out, len(err)) == (0, ["ok."], 2)
        assert err[0].startswith(f"error: {line}")
        assert err[1] == "4 loops, every token runs them all"


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (["max_toke=3"], "unknown key max_toke; did you mean max_tokens"),
            (["ids=1,2"], "unknown key ids"),
            (["Hello"], "'Hello' gives no value; type: key=value"),
            (["exit=halt:0"], "exit rule 'halt:0.0' reads a halt_logit"),
            (["min_loops=5"], "min_loops=5: allowed is 1 to max_loops=4"),
        ],
    )
    def test_mistakes_are_one_line(self, talk: Talk, words: list[str], line: str) -> None:
        code, out, err = talk(["Hi"], *words)
        assert (code, out, len(err)) == (2, [], 1)
        assert err[0].startswith(f"error: {line}")

    def test_without_a_tokenizer(self, talk: Talk) -> None:
        code, _, err = talk(["Hi"], model=GOLDEN / "huginn-tiny")
        assert code == 2
        assert "has no tokenizer.json, so it cannot read text; type: loopwise generate" in err[0]

    def test_a_pipe_that_is_no_text(self, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
        bad = io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8")
        monkeypatch.setattr(io, "StringIO", lambda _: bad)
        code, _, err = talk([])
        assert (code, err) == (2, ["error: stdin is not UTF-8 text (byte 1); convert it"])


class TestInterrupts:
    def test_a_reply_is_stopped_and_the_session_goes_on(self, talk: Talk, letters: Written, say: Say) -> None:
        say(lambda place: stop() if (len(letters), place) == (1, 2) else okay(place))
        assert talk(["a", "b"]) == (0, ["ok", "ok."], ["(stopped)"])
        assert texts(letters)[1] == "<user>a\n<assistant>ok\n<user>b\n<assistant>"

    def test_a_reply_that_had_not_begun_is_taken_back(self, talk: Talk, letters: Written, say: Say) -> None:
        say(lambda place: stop() if len(letters) == 1 else okay(place))
        assert talk(["a", "b"]) == (0, ["", "ok."], ["(stopped)"])
        assert texts(letters)[1] == "<user>b\n<assistant>"

    def test_at_the_prompt_it_only_drops_the_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        typed = iter([KeyboardInterrupt(), "hello", EOFError()])

        def read(_: str) -> str:
            event = next(typed)
            if isinstance(event, str):
                return event
            raise event

        monkeypatch.setattr("builtins.input", read)
        assert list(chat.lines(interactive=True)) == ["hello"]
        assert "(Ctrl-D or /exit leaves)" in capsys.readouterr().out

    def test_in_a_pipe_it_ends_the_command(self, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
        def read(_: str) -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr("builtins.input", read)
        assert talk([]) == (130, [], ["interrupted"])


def test_at_a_terminal_it_greets_and_asks(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    asked: list[str] = []

    def read(prompt: str) -> str:
        asked.append(prompt)
        if len(asked) > 1:
            raise EOFError
        return "/loops"

    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", str(chat_model)]) == 0
    assert screen.getvalue().startswith(f"{chat_model} · 4 loops, every token runs them all · /help lists")
    assert asked == ["\n> ", "\n> "]


def test_replies_may_be_longer_than_continuations() -> None:
    assert ChatConfig().max_tokens > Sampling().max_tokens
