"""One self-contained page of answers: plotly.js stands in it once, taken from plotly's own wheel; it opens offline."""

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from loopwise.errors import ConfigError, InputError, MissingExtraError, StorageError
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.ask import QUESTIONS, Answer, Studies, answer
from loopwise.study.figures import DASHES, dress, line, panels, place
from loopwise.study.subject import StudyConfig, Subject, facts
from loopwise.train.metrics import read_metrics

ASKED = {
    "run": "How did training go?",
    "depth": "Does thinking longer help?",
    "exits": "What is an exit rule worth?",
    "adaptivity": "Are loops spent on what is hard?",
    "calibration": "Does it know when it is right?",
    "convergence": "Where do the states go?",
    "lens": "What would it say after each loop?",
    "trajectory": "How do states travel?",
    "faithfulness": "Do later loops decide anything?",
    "grid": "What does it see and say?",
}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: light-dark(#1c1c1e, #e8e8ea); --page: light-dark(#fff, #16171a);
  --soft: light-dark(#6b6b70, #9a9aa0); --line: light-dark(#e3e3e6, #303237); }}
body {{ margin: 0 auto; max-width: 1180px; padding: 2rem 1.2rem 5rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }}
h1 {{ font-size: 1.7rem; margin: 0 0 .3rem; }} h2 {{ font-size: 1.2rem; margin: 3rem 0 .4rem; }}
.facts, footer {{ color: var(--soft); font-size: .87rem; }}
nav {{ margin: 1rem 0; display: flex; gap: .4rem 1rem; flex-wrap: wrap; }} a {{ color: light-dark(#0b5cad, #7db7f0); }}
section {{ border-top: 1px solid var(--line); }} ul {{ margin: .4rem 0 .8rem; padding-left: 1.2rem; }}
.figure {{ width: 100%; overflow-x: auto; }} code {{ font-size: .9em; }}
</style></head><body>
<h1>{title}</h1>
<p class="facts">{facts}</p>
<nav aria-label="questions">{links}</nav>
{sections}
<footer><p>{footer}</p></footer>
<script>{library}</script>
<script type="application/json" id="figures">{figures}</script>
<script>
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const [name, figure] of Object.entries(figures)) {{
  const box = document.getElementById(name);
  Plotly.newPlot(box, figure.data, figure.layout, {{ responsive: true, displaylogo: false }})
    .then(() => figure.frames && figure.frames.length && Plotly.addFrames(box, figure.frames));
}}
</script>
</body></html>
"""


def report(subject: Subject, config: StudyConfig) -> list[Answer]:
    """Every question that suits this subject, answered; and of a run how its training went.

    A question that does not suit (adaptivity of text, whose difficulty nobody knows; a lens of what is no language
    model) is left out; any other mistake is raised.
    """
    studies = Studies(subject, config)
    names = [name for name in QUESTIONS if name != ("grid" if isinstance(subject.model, LoopedLM) else "lens")]
    found = [] if subject.run is None else [training(subject.run)]
    knows_difficulty = all(examples.difficulty is not None for examples in studies.data)
    for name in names:
        if name != "adaptivity" or knows_difficulty:
            found.append(answer(name, studies))
    return found


def page(answers: Sequence[Answer], *, title: str, facts: str = "", footer: str = "") -> str:
    """The page as text; everything that was not written here is escaped.

    Raises:
        InputError: nothing to show.
        MissingExtraError: plotly is not installed.
    """
    if not answers:
        raise InputError("a page needs at least one answer")
    figures: dict[str, Any] = {}
    sections, links = [], []
    for found in answers:
        heading = ASKED[found.question]
        boxes = []
        for name, figure in found.figures.items():
            box = f"figure-{found.question}-{name}"
            figures[box] = json.loads(str(figure.to_json()))
            boxes.append(f'<div class="figure" id="{box}" role="img" aria-label="{html.escape(heading)}"></div>')
        told = "".join(f"<li>{html.escape(line)}</li>" for line in found.lines)
        sections.append(
            f'<section id="{found.question}"><h2>{html.escape(heading)}</h2><ul>{told}</ul>{"".join(boxes)}</section>'
        )
        links.append(f'<a href="#{found.question}">{html.escape(found.question)}</a>')
    return _PAGE.format(
        title=html.escape(title),
        facts=html.escape(facts),
        links="".join(links) if len(links) > 1 else "",
        sections="\n".join(sections),
        footer=html.escape(footer),
        library=plotly_js(),
        figures=json.dumps(figures, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\!--"),
    )


def write_page(path: Path, answers: Sequence[Answer], subject: Subject, config: StudyConfig) -> Path:
    """Write the page. Raises StorageError when the disk refuses."""
    asked = ", ".join(f"{name}={value}" for name, value in facts(config).items() if not isinstance(value, dict))
    text = page(
        answers,
        title=f"{subject.name}: what its loops do" if len(answers) > 1 else f"{subject.name}: {answers[0].question}",
        facts=f"trained on {subject.model.facts.trained_loops[0]} to {subject.model.facts.trained_loops[1]} loops",
        footer=f"made by loopwise study with {asked}",
    )
    return write_text(path, text)


def write_text(path: Path, text: str) -> Path:
    """Write a file, its folder made. Raises StorageError when the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another path") from error
    return path


def plotly_js() -> str:
    """The library from plotly's wheel. Raises MissingExtraError when it is not installed."""
    try:
        source = resources.files("plotly").joinpath("package_data", "plotly.min.js")
    except ModuleNotFoundError:
        raise MissingExtraError("plotly", "study") from None
    return source.read_text(encoding="utf-8").replace("</script", "<\\/script")


def training(run: Path) -> Answer:
    """Loss while training and at every validation, from the run's metrics.jsonl.

    Raises:
        ConfigError: the file holds no steps.
    """
    rows = read_metrics(run / "metrics.jsonl")
    if not rows:
        raise ConfigError(f"{run}/metrics.jsonl holds no steps yet; let the run go on")
    figure = panels(["Training loss", "Validation loss by loops"], height=380)
    lines = [f"{rows[-1]['step']:,} steps"]
    # What a stage makes small differs from stage to stage (stage II trains the gate alone); what the deepest loop
    # predicts is one thing throughout.
    deepest = max(_loops(rows, "loss_loop_"), default=None)
    key = "loss_total" if deepest is None else f"loss_loop_{deepest}"
    trained = [row for row in rows if isinstance(row.get(key), int | float)]
    if trained:
        x, y = _columns(trained, key)
        name = "training loss" + ("" if deepest is None else f" at {deepest} loop{'s' if deepest > 1 else ''}")
        line(figure, x, y, name=name, index=0, at=place(0, 2), mode="lines")
        lines.append(f"{name} {y[0]:.3f} at first, {y[-1]:.3f} at the end")
    prefix = "validation_loss_loop_"
    loops = _loops(rows, prefix)
    for index, loop in enumerate(loops):
        x, y = _columns([row for row in rows if isinstance(row.get(f"{prefix}{loop}"), int | float)], f"{prefix}{loop}")
        line(
            figure,
            x,
            y,
            name=f"{loop} loop{'s' if loop > 1 else ''}",
            index=index,
            at=place(1, 2),
            dash=DASHES[index // 8 % 4],
            size=4,
        )
        if index == len(loops) - 1:
            lines.append(f"validation loss {y[-1]:.3f} at {loop} loops")
    figure.update_xaxes(title="steps")
    figure.update_yaxes(title="nats per token")
    dress(figure, f"How did training go? {run.name}")
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"}, height=540, margin={"b": 110})
    return Answer(question="run", results={}, lines=lines, figures={"run": figure})


def _loops(rows: Sequence[dict[str, Any]], prefix: str) -> list[int]:
    """Loops that a figure is named for, in rising order."""
    return sorted({int(key.removeprefix(prefix)) for row in rows for key in row if key.startswith(prefix)})


def _columns(rows: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row["step"] for row in rows]), np.array([float(row[key]) for row in rows])
