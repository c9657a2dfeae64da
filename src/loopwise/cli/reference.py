"""Write the reference pages of the commands from the program itself: python -m loopwise.cli.reference docs/commands

One Markdown page per verb: its docstring, arguments and options, then a table per configuration class. A verb that
takes `key=value` words names its class in its module: CONFIG = "loopwise.train.config:TrainConfig". What is said
of a field is the docstring under it.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

from loopwise.cli.app import VERBS, load_verb
from loopwise.configuration import describe, to_plain

NOTE = "<!-- Written by `make docs` from the program itself; change the program, not this page. -->\n"


def pages() -> dict[str, str]:
    """File name to text, of every page."""
    rows = [[f"[`{verb}`]({verb}.md)", line] for verb, line in VERBS.items()]
    index = f"{NOTE}\n# Commands\n\n{table(['command', 'what it does'], rows)}"
    return {"README.md": index} | {f"{verb}.md": page(verb) for verb in VERBS}


def page(verb: str) -> str:
    """The page of one verb."""
    module = importlib.import_module(f"loopwise.cli.{verb}")
    hints = typing.get_type_hints(module.command)
    command = load_verb(verb)
    given: list[list[str]] = []
    options: list[list[str]] = []
    usage = [f"loopwise {verb}"]
    for parameter in command.params:
        said = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
        default = "required" if parameter.required else show(said)
        rest = [takes(hints[parameter.name]), default, parameter.help or ""]
        if parameter.param_type_name == "argument":
            name = (parameter.metavar or parameter.name).upper()
            usage.append(name if parameter.required else f"[{name}]")
            given.append([f"`{name}`", *rest])
        elif not parameter.hidden:
            options.append([", ".join(f"`{word}`" for word in (*parameter.opts, *parameter.secondary_opts)), *rest])
    usage += ["[OPTIONS]"] if options else []
    text = f"{NOTE}\n# loopwise {verb}\n\n{inspect.cleandoc(command.help or '')}\n\n```\n{' '.join(usage)}\n```\n"
    for title, rows in (("Arguments", given), ("Options", options)):
        if rows:
            text += f"\n## {title}\n\n{table([title.lower()[:-1], 'takes', 'default', 'meaning'], rows)}"
    if reference := getattr(module, "CONFIG", None):
        home, _, name = reference.partition(":")
        for cls in family(getattr(importlib.import_module(home), name)):
            text += f"\n{configuration(cls)}"
    return text


def family(cls: Any) -> list[Any]:
    """A configuration class and, in the order of their mention, those that its fields hold."""
    found = [cls]
    waiting = list(typing.get_type_hints(cls).values())
    while waiting:
        annotation = waiting.pop(0)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            if annotation not in found:
                found.append(annotation)
                waiting += typing.get_type_hints(annotation).values()
        else:
            waiting[:0] = typing.get_args(annotation)
    return found


def configuration(cls: Any) -> str:
    """The table of one configuration class."""
    hints, said = typing.get_type_hints(cls), docstrings(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            default = show(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = show(field.default_factory())
        else:
            default = "required"
        rows.append([f"`{field.name}`", describe(hints[field.name]), default, said.get(field.name, "")])
    return f"## {cls.__name__}\n\n{inspect.getdoc(cls)}\n\n{table(['key', 'takes', 'default', 'meaning'], rows)}"


def docstrings(cls: Any) -> dict[str, str]:
    """Field name to the docstring under the field, parents' fields included."""
    found: dict[str, str] = {}
    owners: list[Any] = [owner for owner in reversed(cls.__mro__) if dataclasses.is_dataclass(owner)]
    for owner in owners:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                found[field.target.id] = str(ast.literal_eval(below.value))
    return found


def takes(annotation: Any) -> str:
    """What an argument or option takes, in words; a flag takes nothing."""
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    if typing.get_origin(annotation) is not list and len(members) == 1:
        annotation = members[0]
    return "" if annotation is bool else describe(annotation)


def show(value: Any) -> str:
    """A default as it would be typed."""
    if value is None or value is False or callable(value):
        return ""
    if dataclasses.is_dataclass(value):
        return f"see {type(value).__name__}"
    return f"`{value if isinstance(value, str | Path) else json.dumps(to_plain(value))}`"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(folder: Path) -> None:
    """Write the pages into `folder` and remove those of verbs that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")
    for old in folder.glob("*.md"):
        if old.name not in wanted:
            old.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
