"""The command line: one file per verb, imported when that verb is typed."""

from loopwise.cli.app import main

__all__ = ["main"]
