"""`loopwise generate`: what it prints, saves and refuses, on a small golden model with a byte tokenizer."""

import functools
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loopwise
from loopwise.cli import main
from loopwise.engine.answer import Completion
from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.engine.write import Writing
from loopwise.trace import LoopTrace

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PROMPT = "Once upon a time"
Talk = Callable[..., tuple[int, str, str]]
Say = Callable[[Callable[[int], int]], None]
Written = list[tuple[Writing, Sampling]]


@pytest.fixture
def talk(base_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Run `loopwise generate` on the base model: exit code, stdout, stderr."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object, model: Path = base_model) -> tuple[int, str, str]:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            code = main(["generate", str(model), *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


def told(base_model: Path, prompt: str | tuple[int, ...] = PROMPT, **sampling: Any) -> Completion:
    """The same answer from the library."""
    return generate(cached(base_model), [prompt], Sampling(**sampling))[0]


cached = functools.cache(loopwise.load)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"exit": "hazard:0.6"},
        *({"temperature": 1.5, "seed": seed, "ignore_eos": True} for seed in (2, 7, 11)),
        {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "min_p": 0.02, "max_loops": 3, "min_loops": 2, "exit": "kl:0.1"},
    ],
)
def test_what_streams_is_the_answer(talk: Talk, base_model: Path, settings: dict[str, Any]) -> None:
    words = [f"{key}={value}" for key, value in settings.items()]
    done = told(base_model, max_tokens=20, **settings)
    assert talk(PROMPT, "max_tokens=20", *words) == (0, f"{done.text}\n".replace("\n\n", "\n"), "")


def test_the_answers_are_hard_to_stream(base_model: Path) -> None:
    text = told(base_model, max_tokens=20, temperature=1.5, seed=2, ignore_eos=True).text
    assert text is not None
    assert "\ufffd" in text
    assert any(0x80 <= ord(character) < 0xFFFD for character in text)


def test_each_token_is_written_as_it_comes(talk: Talk, base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Chunks(io.StringIO):
        def write(self, text: str) -> int:
            seen.append(text)
            return super().write(text)

    expected = told(base_model, max_tokens=12).text
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Chunks())
        assert talk(PROMPT, "max_tokens=12")[0] == 0
    texts = [chunk for chunk in seen if chunk]
    assert "".join(texts) == f"{expected}\n"
    assert len(texts) > 6


def test_seeds(talk: Talk) -> None:
    answers = [talk(PROMPT, "temperature=1", f"seed={seed}", "max_tokens=8")[1] for seed in (7, 7, 8)]
    assert answers[0] == answers[1] != answers[2]


SCHEMA = {
    "model": str,
    "text": str,
    "tokens": list,
    "loops": list,
    "prompt_loops": list,
    "logprobs": list,
    "mean_loops": float,
    "max_loops": int,
    "rule": str,
    "policy": str,
    "finish_reason": str,
    "prompt_tokens": list,
    "sample": int,
    "seconds": float,
    "prompt_seconds": float,
    "tokens_per_second": float,
    "kv_bytes": int,
}


def test_json(talk: Talk, base_model: Path) -> None:
    code, out, err = talk(PROMPT, "max_tokens=10", "exit=hazard:0.6", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert {key: type(value) for key, value in found.items()} == SCHEMA
    done = told(base_model, max_tokens=10, exit="hazard:0.6")
    for name in ("tokens", "loops"):
        assert found[name] == list(getattr(done, name))
    assert found["logprobs"] == pytest.approx(done.logprobs, abs=1e-4)
    assert found["prompt_tokens"] == list(PROMPT.encode())
    assert (found["text"], found["mean_loops"]) == (done.text, done.mean_loops)
    assert (found["rule"], found["policy"], found["max_loops"]) == ("hazard:0.6", "last_exited", 4)
    assert found["finish_reason"] == "length"
    assert found["seconds"] > found["prompt_seconds"] > 0


def test_json_without_a_tokenizer(talk: Talk) -> None:
    found = json.loads(talk("ids=1,2,3", "max_tokens=1", "--json", model=GOLDEN / "ouro-tiny")[1])
    assert (found["text"], found["prompt_tokens"], found["tokens_per_second"]) == (None, [1, 2, 3], None)


def test_samples(talk: Talk) -> None:
    words = (PROMPT, "max_tokens=4", "temperature=1", "n=3")
    found = json.loads(talk(*words, "--json")[1])
    texts = [sample["text"] for sample in found["samples"]]
    assert [sample["sample"] for sample in found["samples"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    alone = json.loads(talk(PROMPT, "max_tokens=4", "temperature=1", "--json")[1])
    assert alone["text"] == texts[0]
    out = talk(*words)[1]
    assert out == "".join(f"{'' if i == 0 else chr(10)}== {i + 1} of 3\n{text}\n" for i, text in enumerate(texts))


class TestStops:
    def test_a_stop_text_is_cut_off_wherever_tokens_end(self, talk: Talk, base_model: Path) -> None:
        whole = str(told(base_model, max_tokens=20, exit="hazard:0.6").text)
        for begin, end in ((3, 5), (10, 16)):
            stop = whole[begin:end]
            expected = whole[: whole.index(stop)]
            words = (PROMPT, "max_tokens=20", "exit=hazard:0.6", f"stop={json.dumps([stop, '~~~'])}")
            assert talk(*words)[1] == f"{expected}\n".replace("\n\n", "\n")
            found = json.loads(talk(*words, "--json")[1])
            assert (found["text"], found["finish_reason"]) == (expected, "stop")
            shown = talk(*words, "--show-loops")[1]
            assert f"over {len(found['tokens'])} tokens" in shown

    def test_a_bare_word_is_one_stop_text(self, talk: Talk, base_model: Path) -> None:
        tokens = told(base_model, max_tokens=40, temperature=1.0, seed=1).tokens
        letter = next(chr(token) for token in tokens if chr(token).isascii() and chr(token).isalnum())
        found = json.loads(talk(PROMPT, "max_tokens=40", "temperature=1", "seed=1", f"stop={letter}", "--json")[1])
        assert found["finish_reason"] == "stop"
        assert letter not in found["text"]

    def test_end_of_text(self, talk: Talk, base_model: Path, tmp_path: Path) -> None:
        token = told(base_model, max_tokens=12).tokens[6]
        folder = tmp_path / "ending"
        shutil.copytree(base_model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": token}))
        found = json.loads(talk(PROMPT, "max_tokens=12", "--json", model=folder)[1])
        assert found["finish_reason"] == "stop"
        assert found["tokens"][-1] == token
        assert len(found["tokens"]) <= 7
        found = json.loads(talk(PROMPT, "max_tokens=12", "ignore_eos=true", "--json", model=folder)[1])
        assert len(found["tokens"]) == 12


class TestPrompts:
    def test_stdin(self, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
        found = json.loads(talk("-", "max_tokens=1", "--json")[1])
        assert bytes(found["prompt_tokens"]) == b"two\nlines"

    def test_file(self, talk: Talk, tmp_path: Path) -> None:
        (tmp_path / "prompt.txt").write_bytes("a=1 é\r\n".encode())
        found = json.loads(talk("max_tokens=1", "--file", tmp_path / "prompt.txt", "--json")[1])
        assert bytes(found["prompt_tokens"]) == "a=1 é".encode()

    @pytest.mark.parametrize("ids", ["ids=1,2,3", "ids=[1, 2, 3]"])
    def test_ids_are_answered_with_ids(self, talk: Talk, ids: str) -> None:
        done = told(GOLDEN / "ouro-tiny", (1, 2, 3), max_tokens=4)
        expected = " ".join(map(str, done.tokens))
        assert talk(ids, "max_tokens=4", model=GOLDEN / "ouro-tiny") == (0, f"{expected} \n", "")

    def test_a_run_stands_for_its_model(self, talk: Talk, base_model: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        (run / "config.json").write_text('{"run": "run", "stages": []}')
        code, _, err = talk(PROMPT, model=run)
        assert code == 2
        assert err.startswith(f"error: the run {run} has not written its model yet")
        shutil.copytree(base_model, run / "model")
        expected = talk(PROMPT, "max_tokens=5")
        assert expected[0] == 0
        assert talk(PROMPT, "max_tokens=5", model=run) == expected
        (run / "config.json").unlink()
        assert talk(PROMPT, "max_tokens=5", model=run) == expected


class TestShowLoops:
    def test_without_colours_loops_are_superscripts(self, talk: Talk, base_model: Path) -> None:
        code, out, err = talk(PROMPT, "max_tokens=20", "exit=hazard:0.6", "--show-loops")
        done = told(base_model, max_tokens=20, exit="hazard:0.6")
        assert (code, err) == (0, "")
        assert "\x1b" not in out
        marks = ["¹²³⁴".index(mark) + 1 for mark in re.findall("[¹²³⁴]", out)]
        assert marks == list(done.loops)
        counts = "   ".join(f"{loops}: {done.loops.count(loops)}" for loops in range(1, 5))
        assert f"tokens by loops   {counts}   given {len(PROMPT)}\n" in out
        assert f"mean {done.mean_loops:.2f} of 4 loops over 20 tokens: " in out
        assert f"{1 - done.mean_loops / 4:.0%} of the core's work saved\n" in out
        assert re.search(r"\n[\d.e+]+ tokens/s\n$", out)
        assert out.startswith(f"{PROMPT}")

    def test_tints(self, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLORTERM", "truecolor")
        out = talk(PROMPT, "max_tokens=20", "exit=hazard:0.6", "--show-loops")[1]
        assert "\x1b[38;5;16;48;5;230m" in out

    def test_filling_planes_saves_no_work_and_is_said_to(self, talk: Talk) -> None:
        words = (PROMPT, "max_tokens=5", "exit=hazard:0.6", "policy=per_loop", "--show-loops")
        assert "no core work is saved" in talk(*words)[1]

    def test_a_long_prompt_is_shown_by_its_end(self, talk: Talk) -> None:
        out = talk("a" * 40 + "b" * 60, "max_tokens=2", "--show-loops")[1]
        assert out.startswith("… aaaabbbb")
        assert "given 100" in out

    def test_without_a_tokenizer_ids_are_tinted(self, talk: Talk) -> None:
        out = talk("ids=1,2,3", "max_tokens=2", "--show-loops", model=GOLDEN / "ouro-tiny")[1]
        assert out.startswith("1 2 3 ")


class TestCompare:
    def test_json(self, talk: Talk) -> None:
        compared = json.loads(talk(PROMPT, "max_tokens=6", "exit=hazard:0.6", "--compare", "--json")[1])["compare"]
        assert list(compared) == ["rounds", "tokens", "tokens_per_second", "full_depth_tokens_per_second", "speedup"]
        assert (compared["rounds"], compared["tokens"]) == (3, 6)
        ratio = compared["tokens_per_second"] / compared["full_depth_tokens_per_second"]
        assert compared["speedup"] == pytest.approx(ratio)

    def test_the_sides_take_turns_and_differ_in_depth(self, talk: Talk, written: Written) -> None:
        _, out, err = talk(PROMPT, "max_tokens=6", "exit=hazard:0.6", "--compare")
        runs = [(f"{writing.rule} {writing.policy}", sampling.max_tokens) for writing, sampling in written]
        assert runs == [("hazard:0.6 last_exited", 6)] + [("hazard:0.6 last_exited", 6), ("fixed:4 per_loop", 6)] * 3
        assert "tokens/s" not in out
        assert re.fullmatch(
            r"[\d.]+x the speed of full depth: \S+ against \S+ tokens/s over 6 tokens, medians of 3 rounds that took "
            r"turns\n",
            err,
        )

    def test_one_token_cannot_be_compared(self, talk: Talk) -> None:
        words = (PROMPT, "max_tokens=1", "exit=hazard:0.6", "--compare")
        assert talk(*words)[2].startswith("nothing to compare")
        assert json.loads(talk(*words, "--json")[1])["compare"] is None


class TestTraces:
    def test_trace_and_page(self, talk: Talk, base_model: Path, tmp_path: Path) -> None:
        saved, page = tmp_path / "new" / "a.trace", tmp_path / "a.html"
        code, _, err = talk(PROMPT, "max_tokens=6", "exit=hazard:0.6", "--trace", saved, "--page", page)
        assert (code, err) == (0, f"wrote {saved}\nwrote {page}\n")
        done = told(base_model, max_tokens=6, exit="hazard:0.6")
        trace = LoopTrace.load(saved)
        assert trace.tokens.tolist() == [*PROMPT.encode(), *done.tokens]
        assert trace.loops.tolist() == [0] * len(PROMPT) + list(done.loops)
        assert (trace.rule, trace.policy, trace.prompt_length) == ("hazard:0.6", "last_exited", len(PROMPT))
        assert trace.model == str(base_model)
        assert "exit=hazard:0.6 --show-loops" in page.read_text()

    def test_a_page_of_several_samples(self, talk: Talk, tmp_path: Path) -> None:
        page = tmp_path / "a.html"
        assert talk("Hi", "max_tokens=3", "temperature=1", "n=2", "--page", page, "--json")[2] == ""
        text = page.read_text()
        assert "sample 1" in text
        assert "sample 2" in text


class TestLimits:
    def test_a_full_context_ends_the_answer(self, talk: Talk) -> None:
        code, _, err = talk("x" * 505, "max_tokens=64", "max_loops=1")
        assert (code, err) == (0, "warning: the answer ends here because the context of 512 tokens is full\n")
        assert json.loads(talk("x" * 510, "max_loops=1", "--json")[1])["finish_reason"] == "context"

    def test_more_loops_than_were_trained(self, talk: Talk, tmp_path: Path) -> None:
        words = ("Hi", "max_tokens=2", "max_loops=6", "exit=fixed:5", "--compare", "--page", tmp_path / "a.html")
        code, _, err = talk(*words)
        assert code == 0
        assert err.count("warning: loops=6 is beyond the 4 loops seen in training") == 1
        assert err.count("warning") == 1

    def test_characters_that_the_terminal_lacks(self, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
        for words in (("--show-loops",), ()):
            out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", out)
                assert talk("é", "max_tokens=20", "temperature=1.5", *words)[0] == 0
            assert b"?" in out.buffer.getvalue()  # type: ignore[attr-defined]

    def test_a_terminal_does_not_obey_the_model(self, talk: Talk, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        say(lambda place: b"[2J\x1b"[place % 4])
        assert talk("a", "max_tokens=8")[1] == "[2J\x1b[2J\x1b\n"
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        assert talk("a", "max_tokens=8")[0] == 0
        assert screen.getvalue() == "[2J␛[2J␛\n"


class TestInterrupt:
    @pytest.fixture
    def interrupted(self, say: Say, base_model: Path) -> None:
        """Ctrl-C while the sixth token is chosen; the others are the model's own."""
        tokens = told(base_model, max_tokens=6).tokens
        say(lambda place: tokens[place] if place < 5 else self.stop())

    @pytest.mark.usefixtures("interrupted")
    def test_what_there_is_stays(self, talk: Talk, base_model: Path) -> None:
        code, out, err = talk(PROMPT, "stop=qqq")
        assert (code, err) == (130, "interrupted\n")
        done = told(base_model, max_tokens=5)
        assert f"{done.text}\n".startswith(out.removesuffix("\n"))
        assert out.endswith("\n")
        assert len(out) > 3

    @pytest.mark.usefixtures("interrupted")
    def test_json_and_trace(self, talk: Talk, tmp_path: Path) -> None:
        words = ("exit=hazard:0.6", "--trace", tmp_path / "a.trace", "--compare", "--json")
        code, out, err = talk(PROMPT, *words)
        assert (code, err) == (130, "interrupted\n")
        found = json.loads(out)
        assert found["finish_reason"] == "abort"
        assert len(found["tokens"]) == 5
        assert "compare" not in found
        assert len(LoopTrace.load(tmp_path / "a.trace")) == len(PROMPT) + 5

    @pytest.mark.usefixtures("interrupted")
    def test_legend_of_what_there_is(self, talk: Talk) -> None:
        code, out, _ = talk(PROMPT, "exit=hazard:0.6", "--show-loops")
        assert code == 130
        assert "over 5 tokens" in out

    def test_held_back_text_is_shown(self, talk: Talk, say: Say) -> None:
        say(lambda place: b"abSTO"[place] if place < 5 else self.stop())
        assert talk(PROMPT, "stop=STOP")[:2] == (130, "abSTO\n")

    @staticmethod
    def stop() -> int:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "give one prompt: a text in quotes, - for stdin, --file PATH or ids=1,2,3"),
        (("a", "b"), "'a' and 'b' are two prompts; put one prompt into quotes"),
        (("a", "ids=1"), "give one prompt"),
        (("",), "the prompt is empty; give at least one token"),
        (("a", "max_toke=3"), "unknown key max_toke; did you mean max_tokens; allowed: max_tokens, temperature"),
        (("a", "max_tokens=0"), "max_tokens=0: allowed is 1 or more"),
        (("a", "temperature=warm"), 'temperature: expected number, got "warm"'),
        (("a", "policy=single"), 'policy: expected "per_loop" or "last_exited" or none, got "single"'),
        (("a", "dtype=int8"), "dtype: expected"),
        (("a", "device=gpu"), "device=gpu: allowed are cpu, cuda, cuda:1, mps"),
        (("a", "device=cpu:7"), "device=cpu:7: there is no such device here (found "),
        (("a", "exit=hazrd:0.6"), "unknown exit rule 'hazrd:0.6'; allowed are"),
        (("a", "exit=halt:0"), "exit rule 'halt:0.0' reads a halt_logit; this model's signal is hazard"),
        (("a", "min_loops=5"), "min_loops=5: allowed is 1 to max_loops=4"),
        (("a", "start=3"), "start=3: this model starts from embeddings"),
        (("a", "n=2"), "n=2 would be equal at temperature=0"),
        (("a", "temperature=1", "n=0"), "n=0: allowed is 1 or more"),
        (("ids=1,x",), "ids: expected a list of integer or none"),
        (("ids=1,320",), "token id 320 is not in the model's vocabulary; ids run from 0 to 319"),
        (("x" * 512,), "the prompt has 512 tokens; the context holds 512"),
        (("a", "--compare"), "--compare needs an exit rule"),
        (("a", "--trace", "t", "temperature=1", "n=2"), "--trace saves one answer"),
        (("--file", "/nowhere/to/be/found"), "there is no file /nowhere/to/be/found"),
        (("--file", "/"), "/ is a folder"),
        (("a", "--show-loop"), "no such option: --show-loop; did you mean --show-loops"),
    ],
)
def test_mistakes_are_one_line(talk: Talk, words: tuple[str, ...], line: str) -> None:
    code, out, err = talk(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


def test_mistakes_as_json(talk: Talk) -> None:
    found = json.loads(talk("a", "exit=halt:0", "--json")[2])
    assert found["error"].startswith("exit rule 'halt:0.0' reads a halt_logit")


def test_mistakes_about_the_model(talk: Talk, tmp_path: Path) -> None:
    code, _, err = talk("a", model=tmp_path / "none")
    assert (code, err.count("\n")) == (2, 1)
    assert "no such folder" in err
    for words, line in {
        ("a",): "error: the prompt is text, but this checkpoint has no tokenizer.json",
        ("ids=1", "stop=x"): "error: stop=('x',) is text, but this checkpoint has no tokenizer.json",
        ("ids=1", "exit=hazard:0.6"): "error: exit rule 'hazard:0.6' reads a hazard; this model's signal is none",
    }.items():
        code, out, err = talk(*words, model=GOLDEN / "huginn-tiny")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(line)


def test_contradictions_and_bytes_that_are_no_text(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk("a", "--json", "--show-loops")[0] == 2
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    assert talk("--file", tmp_path / "bad.txt")[2].endswith("bad.txt is not UTF-8 text (byte 2); convert it\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert talk("-")[2] == "error: stdin is not UTF-8 text (byte 0); convert it\n"


def test_a_disk_that_refuses_costs_no_text(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    code, out, err = talk(PROMPT, "max_tokens=4", "--trace", tmp_path / "a" / "b")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: cannot write")
    assert out != ""


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_help_needs_no_torch(verb: str) -> None:
    script = (
        f"import sys; from loopwise.cli import main; assert main(['{verb}', '--help']) == 0; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
