"""The pages in docs/commands: what they say, and that they are up to date."""

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer

from loopwise.cli import reference
from loopwise.cli.app import VERBS

PAGES = Path(__file__).resolve().parents[2] / "docs/commands"


@dataclass(frozen=True, kw_only=True)
class Inner:
    """The inner part."""

    rate: float = 0.5
    """Learning rate | per step."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    """The whole."""

    path: str
    """Where it
    lies."""
    inner: tuple[Inner, ...] = field(default_factory=tuple)
    bare: int = 3


def command(
    model: Annotated[str, typer.Argument(help="A folder.")],
    words: Annotated[list[str] | None, typer.Argument(help="Overrides.", metavar="KEY=VALUE")] = None,
    loops: Annotated[int | None, typer.Option(help="How many.", show_default="all")] = None,
    rule: Annotated[str, typer.Option(help="When to stop.")] = "fixed:4",
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Do it.

    And do it well.
    """


def test_a_page_says_what_the_program_says(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("loopwise.cli.demo")
    module.command = command  # type: ignore[attr-defined]
    module.CONFIG = f"{__name__}:Outer"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "loopwise.cli.demo", module)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    assert (
        reference.page("demo")
        == f"""{reference.NOTE}
# loopwise demo

Do it.

And do it well.

```
loopwise demo MODEL [KEY=VALUE] [OPTIONS]
```

## Arguments

| argument | takes | default | meaning |
| --- | --- | --- | --- |
| `MODEL` | text | required | A folder. |
| `KEY=VALUE` | a list of text |  | Overrides. |

## Options

| option | takes | default | meaning |
| --- | --- | --- | --- |
| `--loops` | integer | `all` | How many. |
| `--rule` | text | `fixed:4` | When to stop. |
| `--json` |  |  | For scripts. |

## Outer

The whole.

| key | takes | default | meaning |
| --- | --- | --- | --- |
| `path` | text | required | Where it lies. |
| `inner` | a list of Inner | `[]` |  |
| `bare` | integer | `3` |  |

## Inner

The inner part.

| key | takes | default | meaning |
| --- | --- | --- | --- |
| `rate` | number | `0.5` | Learning rate \\| per step. |
"""
    )


@pytest.mark.parametrize("verb", VERBS)
def test_the_page_of_a_verb_is_up_to_date(verb: str) -> None:
    assert (PAGES / f"{verb}.md").read_text(encoding="utf-8") == reference.page(verb), "type: make docs"


def test_there_are_no_other_pages() -> None:
    assert {path.name for path in PAGES.iterdir()} == {"README.md", *(f"{verb}.md" for verb in VERBS)}, (
        "type: make docs"
    )


def test_main_writes_all_pages_and_removes_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "pages", lambda: {"README.md": "new"})
    (tmp_path / "gone.md").write_text("old")
    reference.main(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"README.md": "new"}
