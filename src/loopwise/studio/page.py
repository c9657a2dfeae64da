"""One self-contained HTML page made from loop traces: no server, no network, no library; it opens from a file.

The text stands in the page as plain HTML, so it can be read, searched and printed without the script; the script
adds the threshold, the charts and what each token saw. Numbers are computed here, by `LoopTrace`, never twice.
"""

import html
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from loopwise.errors import ConfigError, InputError, StorageError
from loopwise.studio.glyphs import label, visible
from loopwise.studio.wire import wire
from loopwise.trace import LoopTrace


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of results for the page."""

    title: str
    """One line above it."""
    columns: Sequence[str]
    """Column heads; the first column names the row."""
    rows: Sequence[Sequence[str | int | float]]
    """Cells; floats are shown with three decimals, strings as they are."""
    note: str = ""
    """What to read from it, below."""
    heat: bool = False
    """Shade float cells, which must lie between 0 and 1 (accuracies)."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ConfigError(f"a row of table {self.title!r} has {len(row)} cells; give {len(self.columns)}")
            if self.heat and any(isinstance(cell, float) and not 0 <= cell <= 1 for cell in row):
                raise ConfigError(f"table {self.title!r} is a heat table; its float cells must lie between 0 and 1")


def render_page(
    traces: Sequence[LoopTrace],
    *,
    title: str,
    intro: str = "",
    tables: Sequence[Table] = (),
    next_commands: Sequence[str] = (),
) -> str:
    """The page as text. `intro` is plain text, its paragraphs separated by blank lines; all text is escaped.

    Raises InputError without traces.
    """
    if not traces:
        raise InputError("a page needs at least one trace; record one with LoopTrace(...)")
    template = resources.files("loopwise.studio").joinpath("page.html").read_text(encoding="utf-8")
    before, card, after = re.split(r"<!--card-->\n|<!--/card-->\n", template)
    head = {"title": _text(title), "intro": _paragraphs(intro)}
    tail = {
        "tables": "".join(map(_table, tables)),
        "next": _commands(next_commands),
        "data": _json([wire(trace) for trace in traces]),
    }
    cards = (_fill(card, _card(trace, index)) for index, trace in enumerate(traces))
    return _fill(before, head) + "".join(cards) + _fill(after, tail)


def write_page(
    path: str | os.PathLike[str],
    traces: Sequence[LoopTrace],
    *,
    title: str,
    intro: str = "",
    tables: Sequence[Table] = (),
    next_commands: Sequence[str] = (),
) -> Path:
    """Write `render_page` to `path` and return it. Raises StorageError if the disk refuses."""
    page = render_page(traces, title=title, intro=intro, tables=tables, next_commands=next_commands)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}; choose another path") from error
    return target


def _fill(template: str, values: dict[str, str]) -> str:
    """One pass, so that a value that looks like a placeholder stays as it is."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _text(text: str) -> str:
    return html.escape(visible(text))


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_text(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip())


def _json(value: object) -> str:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _card(trace: LoopTrace, index: int) -> dict[str, str]:
    return {
        "index": str(index),
        "name": _text(trace.title or trace.model),
        "facts": _facts(trace),
        "reason": _text(_reason(trace)),
        "tokens": "".join(_token(trace, row) for row in range(len(trace))),
    }


def _facts(trace: LoopTrace) -> str:
    facts = [("model", trace.model), ("exit rule", trace.rule), ("planes", trace.policy)]
    facts.append(("tokens", f"{len(trace)}" + (f", {trace.prompt_length} given" if trace.prompt_length else "")))
    if (trace.loops > 0).any():
        fewer = 1 - trace.mean_loops / trace.max_loops
        # Under `per_loop` an exited row runs on to fill its planes: the answer comes early, no work is saved.
        saved = f", {fewer:.0%} fewer than full depth" if fewer >= 0.005 and trace.policy != "per_loop" else ""
        facts.append(("mean loops", f"{trace.mean_loops:.2f} of {trace.max_loops}{saved}"))
    return "".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)


def _reason(trace: LoopTrace) -> str:
    if trace.replayable:
        return ""
    if trace.signal_kind == "hazard":
        return "No threshold to drag: no token of this trace has a recorded hazard."
    carries = f"carries {trace.signal_kind}, not hazards" if trace.signal_kind else "was recorded without hazards"
    return f"No threshold to drag: this trace {carries}, so other exits cannot be replayed. Tints show what ran."


def _token(trace: LoopTrace, row: int) -> str:
    loops = int(trace.loops[row])
    said = f"{loops} of {trace.max_loops} loops" if loops else "given"
    shown = _text(trace.texts[row]).replace("\n", '<i class="nl"></i>\n').replace("\t", '<i class="tab"></i>\t')
    shade = f"{(loops - 1) / max(trace.max_loops - 1, 1):.3g}" if loops else "0"
    name = html.escape(f"{label(trace.texts[row])}, {said}")
    kind = "t" if loops else "t given"
    return (
        f'<span class="{kind}" role="option" tabindex="-1" data-n="{loops or ""}" style="--n:{shade}" '
        f'aria-label="{name}">{shown or "∅"}</span>'
    )


def _table(table: Table) -> str:
    def cell(value: str | int | float, column: int) -> str:
        shown = f"{value:.3f}" if isinstance(value, float) else _text(str(value))
        if column == 0:
            return f'<th scope="row">{shown}</th>'
        heat = f' class="heat" style="--n:{value:.3f}"' if table.heat and isinstance(value, float) else ""
        return f"<td{heat}>{shown}</td>"

    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.columns)
    rows = "".join(f"<tr>{''.join(cell(value, at) for at, value in enumerate(row))}</tr>" for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return (
        f'<section class="card results"><h2>{_text(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>{note}</section>\n"
    )


def _commands(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    lines = "".join(f"<li><code>{_text(command)}</code></li>" for command in commands)
    return f'<section class="next"><h2>Try next</h2><ul>{lines}</ul></section>\n'
