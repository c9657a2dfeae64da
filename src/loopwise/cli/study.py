"""`loopwise study`: ask a model what its loops do, write the report, or calibrate its ladder of effort."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopwise.errors import ConfigError

if TYPE_CHECKING:
    from loopwise.engine.ladder import Ladder
    from loopwise.study.ask import Answer
    from loopwise.study.subject import StudyConfig, Subject

CONFIG = "loopwise.study.subject:StudyConfig"
FURTHER = ("report", "ladder")
"""What is asked of `loopwise study` beside the questions."""


def command(
    question: Annotated[
        str,
        typer.Argument(
            metavar="QUESTION",
            help="depth, exits, adaptivity, calibration, convergence, lens, trajectory, faithfulness or grid; "
            "report: all that suit; ladder: names of effort.",
        ),
    ],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint or a run, or a hub id.")
    ] = "shipped",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="With what to ask.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write figures (HTML) and arrays (JSON) into this folder.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="With ladder: write it into the checkpoint's generation_config.json.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the arrays, with named axes, as one JSON object.")
    ] = False,
) -> None:
    """Ask a model what its loops do: does thinking longer help, on what, does it know when to stop, what does it cost?

    - `loopwise study exits runs/mine data=notes/ cost=flops --out study/` asks one question

    - `loopwise study report runs/mine --out study/` writes one page of all that suit

    - `loopwise study ladder runs/mine --keep` measures what names of effort mean, and keeps it in the checkpoint

    Without a MODEL it is the small one that ships with Loopwise. `--out` writes pages that open offline.
    docs/study.md says what each question answers and how.
    """
    from loopwise.cli.models import is_setting, read_settings
    from loopwise.study.ask import QUESTIONS
    from loopwise.study.subject import StudyConfig, check_settings, open_subject

    words = list(overrides or [])
    if is_setting(model):
        model, words = "shipped", [model, *words]
    if question not in (*QUESTIONS, *FURTHER):
        _refuse(question, [*QUESTIONS, *FURTHER])
    if keep and question != "ladder":
        raise ConfigError("--keep writes down a ladder; type: loopwise study ladder MODEL --keep")
    if question == "report" and as_json:
        raise ConfigError("report writes a page; for numbers ask one question with --json")
    check_settings(question, [word.partition("=")[0] for word in words])
    config = read_settings(StudyConfig, [_with_brackets(word) for word in words])
    _check_device(config.device)
    subject = open_subject(model, dtype=config.dtype, device=config.device)
    if question == "ladder":
        _ladder(subject, config, keep=keep, out=out, as_json=as_json)
    elif question == "report":
        _report(subject, config, out or Path())
    else:
        _ask(question, subject, config, out=out, as_json=as_json)


def _with_brackets(word: str) -> str:
    """`others=a,b` as the list that it means."""
    key, _, text = word.partition("=")
    return f"others={json.dumps(text.split(','))}" if key == "others" and not text.startswith("[") else word


def _refuse(question: str, allowed: list[str]) -> None:
    import difflib

    near = difflib.get_close_matches(question, allowed, n=1)
    hint = f"; did you mean {near[0]}" if near else ""
    raise ConfigError(f"there is no question {question!r}{hint}; allowed: {', '.join(allowed)}")


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"device={device}: allowed are cpu, cuda, cuda:1, mps") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device}: there is no such device here; type: device=cpu")


def _ask(question: str, subject: "Subject", config: "StudyConfig", *, out: Path | None, as_json: bool) -> None:
    from loopwise.study.ask import ask

    found = ask(question, subject, config, draw=out is not None)
    written = [] if out is None else _write(found, subject, config, out)
    if as_json:
        typer.echo(json.dumps({"model": subject.name} | found.data()))
        return
    for text in found.lines:
        typer.echo(text)
    for path in written:
        typer.echo(f"wrote {path}")


def _write(found: "Answer", subject: "Subject", config: "StudyConfig", out: Path) -> list[Path]:
    from loopwise.study.grid import board_file
    from loopwise.study.report import write_page, write_text

    data: dict[str, Any] = {"model": subject.name} | found.data()
    if found.question == "grid":
        # The studio's grid view opens this file too.
        data |= board_file(found.results["grid"], title=f"{subject.name}, problem {config.number}")
    return [
        write_page(out / f"{found.question}.html", [found], subject, config),
        write_text(out / f"{found.question}.json", json.dumps(data) + "\n"),
    ]


def _report(subject: "Subject", config: "StudyConfig", out: Path) -> None:
    from loopwise.study.report import report, write_page

    answers = report(subject, config)
    path = write_page(out / "report.html", answers, subject, config)
    for found in answers:
        typer.echo(f"{found.question}: {found.lines[0]}")
    typer.echo(f"wrote {path}")


def _ladder(subject: "Subject", config: "StudyConfig", *, keep: bool, out: Path | None, as_json: bool) -> None:
    from loopwise.engine.ladder import write_ladder
    from loopwise.models.looped_lm import LoopedLM
    from loopwise.study.ladder import calibrate_ladder
    from loopwise.study.report import write_text
    from loopwise.study.subject import open_data

    model = subject.model
    if not isinstance(model, LoopedLM):
        raise ConfigError(f"{subject.name} is no language model; only those carry a ladder of effort")
    if config.loops is not None:
        raise ConfigError("loops= has no effect on a ladder, which is made of the trained range: leave it out")
    found = calibrate_ladder(model, open_data(subject, config), start=config.start)
    told = {"model": subject.name, "loop_ladder": found.facts()}
    written = [] if out is None else [write_text(out / "ladder.json", json.dumps(told, indent=2) + "\n")]
    if keep:
        written.append(write_ladder(model, found))
    if as_json:
        typer.echo(json.dumps(told))
        return
    _show(found)
    for path in written:
        typer.echo(f"wrote {path}")
    if not keep:
        typer.echo("not kept; add --keep to write it into the checkpoint's generation_config.json")


def _show(ladder: "Ladder") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    for index, name in enumerate(("effort", "max", "exit", "loops", "loss", "right", "us/token", "")):
        table.add_column(name, justify="left" if index in (0, 2, 7) else "right", no_wrap=True)
    for rung in ladder.rungs:
        facts = dataclasses.asdict(rung)
        same = ladder.same_as(rung.effort)
        table.add_row(
            rung.effort,
            str(rung.max_loops),
            rung.exit or "never",
            f"{facts['mean_loops']:.2f}",
            f"{facts['loss']:.4f}",
            f"{facts['accuracy']:.3f}",
            "" if facts["seconds_per_token"] is None else f"{1e6 * facts['seconds_per_token']:.0f}",
            f"= {same}" if same else "",
        )
    Console(highlight=False).print(table)
