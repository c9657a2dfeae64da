"""The command: exit codes, one-line errors, and verbs that are imported only when typed."""

import errno
import json
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Annotated

import pytest
import typer

import loopwise.cli
from loopwise.cli import main
from loopwise.cli.app import VERBS
from loopwise.errors import ConfigError, LoopRangeWarning, NotFoundError, StorageError


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A verb `demo` that raises what the test puts into `.error`."""
    box = types.SimpleNamespace(error=None)

    def command(
        model: Annotated[str, typer.Argument()],
        loops: Annotated[int, typer.Option()] = 4,
        as_json: Annotated[bool, typer.Option("--json")] = False,
    ) -> None:
        """Do it."""
        if box.error is not None:
            raise box.error

    module = types.ModuleType("loopwise.cli.demo")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "loopwise.cli.demo", module)
    return box


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_of_the_table_has_its_module(verb: str) -> None:
    assert (Path(loopwise.cli.__file__).parent / f"{verb}.py").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dmo"], f"there is no verb 'dmo'; did you mean demo; allowed: {', '.join(VERBS)}"),
        (["--vrsion"], "no such option: --vrsion; did you mean --version; type: loopwise --help"),
        (["demo"], "missing argument 'model'; type: loopwise demo --help"),
        (["demo", "m", "--lloops=3"], "no such option: --lloops; did you mean --loops; type: loopwise demo --help"),
        (["demo", "m", "more"], "got unexpected extra argument(s) (more); type: loopwise demo --help"),
        (["demo", "m", "--loops=four"], "invalid value for '--loops': Input should be a valid integer"),
    ],
)
def test_usage_mistakes_are_one_line(
    words: list[str], line: str, raising: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("loops=0: one or more"), "loops=0: one or more"),
        (NotFoundError("there is no\nfile x"), "there is no file x"),
        (StorageError("the disk is full"), "the disk is full"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "no space left on device: a/b; mend that"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "permission denied: a; mend that"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    error: Exception, line: str, raising: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    raising.error = error
    assert main(["demo", "m"]) == 2
    plain = capsys.readouterr().err
    assert plain.startswith(f"error: {line}")
    assert plain.count("\n") == 1
    assert main(["demo", "m", "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"].startswith(line)


def test_a_bug_keeps_its_traceback(raising: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    raising.error = ZeroDivisionError("oops")
    assert main(["demo", "m"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: oops\n")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (typer.Abort(), 130), (typer.Exit(3), 3)])
def test_interrupts_and_exits(error: BaseException, code: int, raising: types.SimpleNamespace) -> None:
    raising.error = error
    assert main(["demo", "m"]) == code


def test_a_fine_command_is_silent(raising: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "m"]) == 0
    assert capsys.readouterr() == ("", "")


def test_help_of_a_verb(raising: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Do it." in out
    assert "--loops" in out


def test_our_warnings_are_one_line(
    raising: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> None:
        """Warn."""
        warnings.warn("8 loops asked, 4 trained", LoopRangeWarning, stacklevel=2)

    monkeypatch.setattr(sys.modules["loopwise.cli.demo"], "command", command)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["demo"]) == 0
    assert capsys.readouterr().err == "warning: 8 loops asked, 4 trained\n"


@pytest.mark.parametrize("words", ["--help", "--version"])
def test_a_reader_that_went_away_is_no_error(words: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"input(); import sys; from loopwise.cli import main; sys.exit(main(['{words}']))"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.wait() == 141
    assert process.stderr.read() == ""
    process.stderr.close()
