"""The demo from top to bottom: see looping, watch it being learned, open a page of what happened."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loopwise.demo.hops import Staircase, chance, measure_staircase
from loopwise.demo.language import LanguageReport, measure_language, measure_writing
from loopwise.engine.record import record_trace
from loopwise.engine.sampling import Sampling
from loopwise.engine.write import generate
from loopwise.errors import ConfigError
from loopwise.hub.checkpoints import load
from loopwise.hub.locate import SHIPPED
from loopwise.models.looped_lm import LoopedLM
from loopwise.studio import page
from loopwise.studio.terminal import print_tinted
from loopwise.study import report as study_report
from loopwise.study.speed import SpeedUp
from loopwise.study.subject import StudyConfig, open_subject
from loopwise.tasks.corpus import Corpus
from loopwise.tasks.pointer_chasing import PointerChasing
from loopwise.trace import LoopTrace
from loopwise.train.batches import Batch
from loopwise.train.config import TrainConfig
from loopwise.train.presets import PointerDials, TextDials, ouro_tiny, pointer_chasing
from loopwise.train.progress import Progress
from loopwise.train.run import train
from loopwise.train.setup import build_data

PASSAGE = 160
"""Tokens of held-out text that are shown."""
HOP_RULE = "hazard:0.5"
"""The exit rule of pointer chasing."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the demo does."""

    corpus: str = "python"
    """What the language model learns from."""
    folder: Path = Path("runs/demo")
    """Where its two runs go; emptied first."""
    page: Path = Path("loopwise-demo.html")
    """The page that it ends with."""
    seed: int = 0
    hop_steps: int = 2800
    """Steps of pointer chasing."""
    text_steps: int = 500
    """Steps of the language model."""


def tell(options: DemoOptions, console: Console) -> None:
    """Run the whole demo.

    Raises:
        UserError: when the text is missing, or the disk refuses.
    """
    _clear(options.folder)
    traces = [_show_shipped(console)]
    staircase, hop_trace = _learn_hops(options, console)
    report, speed, text_traces = _learn_text(options, console)
    traces += [hop_trace, *text_traces]
    written = page.write_page(
        options.page,
        traces,
        title="What looping is",
        intro=(
            "A looped model applies one block of layers again and again before it answers, and spends more loops "
            "where they help. Each token below is tinted by the loops it took; drag the threshold to see what "
            "another one would have done."
        ),
        tables=[_staircase_table(staircase), _loops_table(report), _threshold_table(report, speed)],
        next_commands=_next_commands(options),
    )
    told = _write_report(options)
    _heading(
        console,
        "4",
        "Look around",
        f"open {written} in a browser: drag the threshold, hover over a token. {told} tells what the new language "
        "model does with its loops: what each is worth, whether it knows when to stop, where its states go.",
    )
    for line in _next_commands(options):
        console.print(f"   [bold]{line}[/bold]", highlight=False)
    console.print()


def _show_shipped(console: Console) -> LoopTrace:
    # A CPU multiplies bfloat16, in which it is stored, slowly.
    model = load(SHIPPED, dtype="float32")
    count = sum(parameter.numel() for parameter in model.parameters())
    _heading(
        console,
        "1",
        "A model that thinks in loops",
        f"it ships with the package: {count / 1e6:.1f} million parameters, {model.config.core_layers} layers run up to "
        f"{model.config.loops} times, trained on the sources of Python's library. Below, a file it has not seen; each "
        "token is tinted by the loops its gate spent on it.",
    )
    assert model.tokenizer is not None
    passage = next(_passages(model, "python"))
    trace = _traced(model, passage, title="Reading: a file the shipped model has not seen", name="shipped model")
    print_tinted(console, trace.texts, trace.loops.tolist(), trace.max_loops, policy=trace.policy)
    console.print()
    losses = [float(loss) for loss in trace.loss_by_loop()]
    console.print(Padding(_bars("loss by loops (nats per token)", losses), (0, 3)))
    curve = trace.exit_curve(np.array([0.3, 0.5, 0.7, 0.9, 1.0]))
    table = _grid("exit at hazard", "mean loops", "loss")
    assert curve.mean_loss is not None
    for threshold, mean, loss in zip(curve.thresholds, curve.mean_loops, curve.mean_loss, strict=True):
        table.add_row(f"{threshold:.1f}" if threshold < 1 else "never early", f"{mean:.2f}", f"{loss:.3f}")
    console.print(Padding(table, (0, 3)))
    return trace


def _learn_hops(options: DemoOptions, console: Console) -> tuple[Staircase, LoopTrace]:
    config = hop_config(options)
    task = PointerChasing(config.pointer_chasing)
    _heading(
        console,
        "2",
        "Learning to follow pointers",
        f"a table of {task.config.nodes} successors, a start, a number of hops: where do you end? With a loss at loop "
        "r asked only of questions of at most r hops, one layer learns one hop per loop. Training now.",
    )
    result = train(config, progress=Progress(console=console, every=15.0))
    batches = build_data(config, cache=options.folder).source(len(config.stages) - 1).validation(256)
    staircase = measure_staircase(result.model, batches, rule=HOP_RULE)
    table = _grid("", *(f"{k} hop{'s' if k > 1 else ''}" for k in range(1, staircase.accuracy.shape[1] + 1)))
    for loop, row in enumerate(staircase.accuracy, 1):
        table.add_row(f"{loop} loop{'s' if loop > 1 else ''}", *(_shaded(share) for share in row))
    table.add_row("[bold]loops the gate spends", *(f"[bold]{mean:.2f}" for mean in staircase.loops_used))
    console.print(Padding(table, (0, 3)))
    _say(
        console,
        f"accuracy on new questions, chance is {chance(task):.2f}. With the gate: {staircase.exit_accuracy:.3f} at "
        f"{staircase.point.mean_loops:.2f} of {config.pointer_chasing.max_hops} loops; rank correlation of loops with "
        f"hops {staircase.correlation:.2f}.",
    )
    return staircase, _hop_trace(result.model, task, batches[0], HOP_RULE)


def _hop_trace(model: LoopedLM, task: PointerChasing, batch: Batch, rule: str) -> LoopTrace:
    """One table with its questions; the row that read a question's end is shown on the answer."""
    tokens: list[int] = []
    texts: list[str] = []
    row_tokens = batch.tokens[0].tolist()
    recorded = record_trace(model, [*row_tokens, 0], prompt_length=1, rule=rule, name="pointer chasing")
    index: list[int] = []
    for place, token in enumerate(row_tokens):
        tokens.append(token)
        texts.append(f" {task.pieces([token])[0]}")
        index.append(-1)
        if bool(batch.mask[0, place]):
            answer = int(batch.targets[0, place])
            tokens.append(answer)
            texts.append(f" = {answer}\n")
            index.append(place + 1)
        elif place + 1 == task.table_length:
            texts[-1] += "\n"
    return _reindexed(recorded, tokens, texts, index, title="Pointer chasing: loops spent on each answer", task=task)


def _reindexed(
    trace: LoopTrace, tokens: list[int], texts: list[str], index: list[int], *, title: str, task: PointerChasing
) -> LoopTrace:
    """Rows of a trace in another order; -1 is a token that no row emitted."""
    order = np.array(index)
    given = order < 0

    def pick(values: np.ndarray | None) -> np.ndarray | None:
        if values is None:
            return None
        picked = values[np.where(given, 0, order)].astype(np.float32, copy=True)
        picked[given] = np.nan
        return picked

    assert trace.top_ids is not None
    return replace(
        trace,
        title=title,
        tokens=np.array(tokens),
        texts=texts,
        loops=np.where(given, 0, trace.loops[np.where(given, 0, order)]),
        signals=pick(trace.signals),
        losses=None,
        entropy=pick(trace.entropy),
        kl=pick(trace.kl),
        top_ids=trace.top_ids[np.where(given, 0, order)],
        top_probs=pick(trace.top_probs),
        vocabulary={i: task.pieces([i])[0] for i in range(task.vocab_size)},
    )


def _learn_text(options: DemoOptions, console: Console) -> tuple[LanguageReport, SpeedUp, list[LoopTrace]]:
    config = text_config(options)
    _heading(
        console,
        "3",
        "Learning to write",
        f"a language model on {options.corpus!r}: first every loop learns to predict and the gate learns beside it "
        "(stage I), then the gate alone learns what another loop is worth (stage II). Training now.",
    )
    result = train(config, progress=Progress(console=console, every=15.0))
    model = result.model
    batches = build_data(config, cache=options.folder / "text" / "data").source(0).validation(32)
    report, speed = measure_language(model, batches), measure_writing(model, batches)
    console.print(
        Padding(_bars("loops -> loss on held-out text (nats per token)", report.depths.mean_losses.tolist()), (0, 3))
    )
    table = _grid("exit rule", "mean loops", "loss", "random mixing", "loss if planes are filled")
    for row in report.rows:
        skip, fill = row.skip, row.fill
        table.add_row(
            skip.rule, f"{skip.mean_loops:.2f}", f"{skip.loss:.4f}", f"{skip.mixed_loss:.4f}", f"{fill.loss:.4f}"
        )
    console.print(Padding(table, (0, 3)))
    _say(console, verdict(report, speed))
    console.print()
    passage = next(_passages(model, options.corpus))
    rule = report.middle.skip.rule
    reading = _traced(model, passage, title="Reading: held-out text, a model trained just now", name="demo")
    prompt = passage[:16]
    done = generate(model, [prompt], Sampling(max_tokens=80, temperature=0.7, exit=rule, ignore_eos=True))[0]
    writing = record_trace(
        model,
        [*done.prompt, *done.tokens],
        prompt_length=len(done.prompt),
        loops=done.loops,
        rule=rule,
        policy="last_exited",
        title="Writing: what it says itself",
        name="demo",
    )
    print_tinted(console, writing.texts, writing.loops.tolist(), writing.max_loops, policy="last_exited")
    return report, speed, [reading, writing]


def verdict(report: LanguageReport, speed: SpeedUp) -> str:
    """What stopping early is worth in the middle of the range, whichever way it went."""
    point = report.middle.skip
    side = "below" if point.gain > 0 else "ABOVE"
    return (
        f"At {point.mean_loops:.2f} loops the loss is {abs(point.gain):.4f} nats {side} random mixing of fixed depths; "
        f"writing at a mean of {speed.exit.mean_loops:.2f} makes "
        f"{speed.exit.tokens_per_second:.0f} tokens/s, at full depth {speed.full.tokens_per_second:.0f}: "
        f"{speed.ratio:.2f} times as fast."
    )


def hop_config(options: DemoOptions) -> TrainConfig:
    """The run of the second part."""
    recipe = pointer_chasing(PointerDials(steps=options.hop_steps, seed=options.seed, run=str(options.folder / "hops")))
    return replace(recipe.config, log_every=25, validate_every=10**6, checkpoint_every=10**6, validation_rows=64)


def text_config(options: DemoOptions) -> TrainConfig:
    """The run of the third part."""
    recipe = ouro_tiny(
        TextDials(
            corpus=options.corpus,
            width=128,
            layers=2,
            context=128,
            rows=16,
            steps=options.text_steps,
            tokenizer="bpe:1024",
            seed=options.seed,
            run=str(options.folder / "text"),
        )
    )
    return replace(
        recipe.config,
        log_every=5,
        validate_every=10**6,
        checkpoint_every=10**6,
        corpus_bytes=8 * 10**6,
        validation_rows=64,
    )


def _passages(model: LoopedLM, corpus: str) -> Iterator[list[int]]:
    """The beginnings of held-out documents that are long enough to show."""
    assert model.tokenizer is not None
    found = False
    for text in Corpus(corpus, limit=8 * 10**6).part("validation"):
        ids = model.tokenizer.encode(text[: 12 * PASSAGE])[:PASSAGE]
        if len(ids) == PASSAGE:
            found = True
            yield ids
    if not found:
        raise ConfigError(f"the held-out part of {corpus!r} has no passage of {PASSAGE} tokens; give a longer text")


def _traced(model: LoopedLM, tokens: list[int], *, title: str, name: str) -> LoopTrace:
    """A finished text, tinted by what the gate would spend at a threshold of 0.5 (replay)."""
    return record_trace(model, tokens, rule="hazard:0.5", policy="per_loop", title=title, name=name)


def _heading(console: Console, number: str, title: str, text: str) -> None:
    console.print()
    console.print(Text.assemble((f" {number} ", "bold reverse"), (f"  {title}", "bold")))
    console.print(Padding(Text(text, style="dim"), (0, 3)))
    console.print()


def _say(console: Console, text: str) -> None:
    console.print()
    console.print(Padding(Text(text), (0, 3)))


def _grid(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _bars(title: str, values: list[float]) -> Table:
    """Numbers with bars; the bars start just below the smallest, so that differences show."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), title=title, title_justify="left", title_style="dim")
    table.add_column("loops", justify="right", header_style="dim")
    table.add_column("", justify="right")
    table.add_column("")
    low, high = min(values), max(values)
    span = max(high - low, 1e-9)
    for index, value in enumerate(values, 1):
        table.add_row(str(index), f"{value:.3f}", "█" * (2 + round(28 * (value - low) / span)))
    return table


def _shaded(share: float) -> str:
    style = "bold green" if share >= 0.95 else "dim" if share < 0.5 else "yellow"
    return f"[{style}]{share:.2f}[/{style}]"


def _staircase_table(staircase: Staircase) -> page.Table:
    columns = ["", *(f"{k} hops" for k in range(1, staircase.accuracy.shape[1] + 1))]
    rows: list[list[str | int | float]] = [
        [f"{loop} loops", *(float(share) for share in row)] for loop, row in enumerate(staircase.accuracy, 1)
    ]
    return page.Table(
        title="The staircase: accuracy by loops and hops",
        columns=columns,
        rows=rows,
        heat=True,
        note=(
            f"With the gate deciding: {staircase.exit_accuracy:.3f} right at {staircase.point.mean_loops:.2f} loops on "
            f"average; rank correlation of loops used with hops asked {staircase.correlation:.2f}."
        ),
    )


def _loops_table(report: LanguageReport) -> page.Table:
    rows: list[list[str | int | float]] = [
        [str(loop), float(loss)] for loop, loss in enumerate(report.depths.mean_losses, 1)
    ]
    return page.Table(title="What each loop is worth on held-out text", columns=["loops", "loss (nats)"], rows=rows)


def _threshold_table(report: LanguageReport, speed: SpeedUp) -> page.Table:
    rows: list[list[str | int | float]] = [
        [row.skip.rule, row.skip.mean_loops, row.skip.loss, row.skip.mixed_loss, row.fill.loss] for row in report.rows
    ]
    return page.Table(
        title="What stopping early costs",
        columns=["exit rule", "mean loops", "loss", "random mixing", "loss if planes are filled"],
        rows=rows,
        note=verdict(report, speed),
    )


def _write_report(options: DemoOptions) -> Path:
    """The study of the language model that was just trained, one page."""
    model = options.folder / "text"
    config, subject = StudyConfig(), open_subject(str(model))
    answers = study_report.report(subject, config)
    return study_report.write_page(options.folder / "report.html", answers, subject, config)


def _next_commands(options: DemoOptions) -> list[str]:
    model = options.folder / "text"
    return [
        f"loopwise studio {model}",
        f'loopwise generate {model} "def " temperature=0.7 exit=hazard:0.5 --show-loops',
        f"loopwise info {model}",
        "loopwise train --preset ouro-tiny corpus=PATH_TO_YOUR_TEXT loops=4 width=256",
    ]


def _clear(folder: Path) -> None:
    """Empty the demo's own folder; refuse to touch anything else."""
    if not folder.exists():
        return
    strangers = [path.name for path in folder.iterdir() if path.name not in ("hops", "text", "report.html")]
    if strangers:
        raise ConfigError(f"{folder} holds {strangers[0]}, which is not the demo's; give another folder=...")
    shutil.rmtree(folder)
