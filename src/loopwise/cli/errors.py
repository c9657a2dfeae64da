"""What the person at the keyboard reads when a command cannot go on."""

import errno
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import typer

from loopwise.errors import UserError

MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
"""Refusals of the operating system that are the user's to mend, wherever they strike."""


def exit_code(error: BaseException, *, as_json: bool) -> int:
    """Say on stderr what went wrong and return the exit code that stands for it.

    A mistake of the user is one line, `error: ...`, or with `as_json` one object, `{"error": ...}`. A bug keeps
    its traceback. A SystemExit passes, but for the one that rich makes of a closed pipe.
    """
    if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
        raise error
    if isinstance(error, BrokenPipeError | SystemExit):
        _silence_stdout()
        return 141
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    message = _message(error)
    if message is None:
        traceback.print_exception(error)
        return 1
    if isinstance(error, OSError):
        _silence_stdout()
    print(json.dumps({"error": message}) if as_json else f"error: {message}", file=sys.stderr)
    return 2


def _message(error: BaseException) -> str | None:
    """One line for a mistake that the user can mend, None for a bug."""
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, typer.TyperException):
        text = error.format_message().rstrip(".")
        text = re.sub(r" \(Possible options: (.*)\)$", r"; did you mean \1", text[:1].lower() + text[1:])
        context = getattr(error, "ctx", None)
        if context is not None:
            text += f"; type: {context.command_path} --help"
    elif isinstance(error, OSError) and error.errno in MENDABLE:
        where = f": {error.filename}" if error.filename else ""
        text = f"{(error.strerror or type(error).__name__).lower()}{where}; mend that and type the same again"
    else:
        return None
    return " ".join(text.split())


def _silence_stdout() -> None:
    """Let what is still buffered for a closed or full stdout vanish, or Python complains when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show Loopwise's own warnings as one line each, without the place in our code that raised them."""
    with warnings.catch_warnings():
        ordinary = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category.__module__.startswith("loopwise."):
                print(f"warning: {message}", file=sys.stderr)
            else:
                ordinary(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield
