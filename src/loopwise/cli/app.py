"""The `loopwise` command: the table of verbs, and what its exit codes mean.

Exit codes: 0 fine, 1 a bug of ours (with its traceback), 2 something the user can mend (one line), 130
interrupted, 141 whoever read our output went away.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from loopwise import __version__
from loopwise.cli.errors import exit_code, plain_warnings
from loopwise.errors import ConfigError

VERBS = {
    "demo": "See what looping is, then watch a model learn it",
    "train": "Train a looped model, or go on training one",
    "generate": "Continue a prompt, spending loops where they are needed",
    "chat": "Talk with a model",
    "serve": "Serve a model behind OpenAI's API, with a knob for loops",
    "info": "Say what a checkpoint is: parameters, loops, memory and work per loop",
    "studio": "Look between the loops in the browser: text, lens, trajectories, exits, runs",
    "study": "Ask a model what its loops do",
    "bench": "Measure the engine on this machine",
    "convert": "Change a checkpoint's format, number type or depth",
}
"""Verb to its line in `loopwise --help`. Its function `command` lives in the module of that name beside this one."""


def load_verb(verb: str) -> Any:
    """Import the module of `verb` and return its typer command."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(verb)(importlib.import_module(f"loopwise.cli.{verb}").command)
    return get_command(app)


class LazyVerb(TyperCommand):
    """A line of `loopwise --help` whose module is imported only when the verb itself is typed."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Hand over to the real command."""
        return load_verb(str(self.name)).make_context(info_name, args, parent=parent, **extra)


class Verbs(TyperGroup):
    """The `loopwise` command itself; a wrong verb lists the right ones."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb that `args` begins with."""
        if args[0] not in self.commands:
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise ConfigError(f"there is no verb {args[0]!r}{hint}; allowed: {', '.join(self.commands)}")
        return super().resolve_command(ctx, args)


def build_app() -> TyperGroup:
    """The whole command, with every verb in its place and none imported."""
    app = typer.Typer(cls=Verbs, add_completion=False, rich_markup_mode="markdown", subcommand_metavar="VERB ...")

    @app.callback()
    def loopwise(
        version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True)] = False,
    ) -> None:
        """Train, run and study models that think in loops.

        `loopwise VERB --help` says what a verb takes. With `--json` a verb prints one JSON object for scripts.
        """

    group = get_command(app)
    assert isinstance(group, TyperGroup)
    for verb, line in VERBS.items():
        group.add_command(LazyVerb(name=verb, help=line))
    return group


def show_version(wanted: bool) -> bool:
    """Print the version and stop, if it was asked for."""
    if wanted:
        typer.echo(f"loopwise {__version__}")
        raise typer.Exit
    return wanted


def run(arguments: list[str]) -> int:
    """Run one command line; errors pass through."""
    try:
        with build_app().make_context("loopwise", arguments or ["--help"]) as context:
            context.command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `arguments` (default: those of the process) and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with plain_warnings():
            code = run(given)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return exit_code(error, as_json="--json" in given)
    return code
