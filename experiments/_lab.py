"""What experiments share: settings and seeds, work that goes on where it stopped, the page of evidence.

    python experiments/NAME.py [--setting small|full] [--seeds 0,1,2] [--variants A,B] [--report]

An experiment measures *cells*: one variant (a model, a rule) with one seed. Each finished cell is kept in
runs/experiments/NAME/SETTING-DIGEST/VARIANT/SEED.json, beside the checkpoints of a cell that is under way, so that a
stopped experiment goes on; the digest is of the setting, so that a changed setting begins anew. When all cells are
there, the experiment's `report` turns them into docs/evidence/NAME.json, NAME.md and NAME.svg (NAME-full for the full
setting), and the index docs/evidence/README.md is written from all of these files.
"""

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _intervals import Interval, t_interval

from loopwise.errors import ConfigError, LoopwiseError, MissingExtraError, NotFoundError
from loopwise.train.machine import environment

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "experiments"
EVIDENCE = ROOT / "docs" / "evidence"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work: a variant with a seed."""

    setting: Any
    """The experiment's own dataclass of sizes."""
    variant: str
    """What differs from cell to cell."""
    seed: int
    """Everything random in the cell is a function of it."""
    device: str
    """Where to compute."""
    checkpoints: Path
    """A folder of the cell's own, for `loopwise.train.fit.fit(..., checkpoints=...)`: a cell that was stopped goes on
    from there."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """A line of progress; fits the `log` of `fit`."""
        text = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        print(f"{self.variant} seed {self.seed}  step {step}  {text}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All cells of a setting."""

    setting: Any
    """The experiment's own dataclass of sizes."""
    records: Mapping[str, Mapping[int, Mapping[str, Any]]]
    """Variant, then seed, then what `measure` returned; `seconds` is added."""

    def values(self, variant: str, key: str) -> list[float]:
        """One number of each seed, in the order of the seeds."""
        return [float(record[key]) for record in self.records[variant].values()]

    def interval(self, variant: str, key: str) -> Interval:
        """Mean over seeds with its 95% interval."""
        return t_interval(self.values(variant, key))

    def difference(self, variant: str, other: str, key: str) -> Interval:
        """Mean over seeds of `variant` less `other`, paired by seed, with its 95% interval."""
        pairs = zip(self.values(variant, key), self.values(other, key), strict=True)
        return t_interval([first - second for first, second in pairs])

    def difference_of(self, variant: str, key: str, other: str) -> Interval:
        """Mean over seeds of one number of a variant less another of its numbers, with its 95% interval."""
        pairs = zip(self.values(variant, key), self.values(variant, other), strict=True)
        return t_interval([first - second for first, second in pairs])


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __str__(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{self.caption}\n\n{body}" if self.caption else body


@dataclass(frozen=True, kw_only=True)
class Page:
    """What an experiment found."""

    verdict: str
    """One or two sentences that name the decisive figure with its interval. Computed from the results, so that other
    results say something else; that a claim does not reproduce, or that a setting is too small, is a verdict too."""
    paper: str
    """What the source claims, with its own number and where it stands."""
    tables: Sequence[Table]
    """Our numbers, intervals over seeds."""
    notes: str = ""
    """What a reader must know to judge: what differs from the paper, what was tried."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """The figures behind the verdict, as JSON."""
    figure: Any = None
    """A Plotly figure, see `_plots`."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One question put to several variants and seeds."""

    title: str
    """The page's headline."""
    question: str
    """What is asked and how, in a paragraph."""
    settings: Mapping[str, Any]
    """`small` (one core, minutes) and `full` (one GPU): instances of the experiment's own dataclass."""
    variants: Callable[[Any], Sequence[str]]
    """The variants of a setting; a name is part of a path, so letters, digits and `.,=+-_ ` only."""
    measure: Callable[[Cell], Mapping[str, Any]]
    """Does the work of a cell and returns what is kept of it, as JSON."""
    report: Callable[[Results], Page]
    """Turns results into the page."""


def run(experiment: Experiment, file: str, arguments: Sequence[str] | None = None) -> None:
    """The command line of an experiment: `run(EXPERIMENT, __file__)`. Mistakes end it with one line and status 2."""
    try:
        _run(experiment, Path(file).stem, sys.argv[1:] if arguments is None else arguments)
    except LoopwiseError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def _run(experiment: Experiment, name: str, arguments: Sequence[str]) -> None:
    options = _options(experiment, arguments)
    torch.set_num_threads(options.threads)
    setting = experiment.settings[options.setting]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    variants = list(experiment.variants(setting))
    chosen = options.variants.split(";") if options.variants else variants
    for variant in chosen:
        if variant not in variants:
            raise ConfigError(f"there is no variant {variant!r}; allowed: {'; '.join(variants)}")
    folder = RUNS / name / f"{options.setting}-{_digest(setting)}"
    if not options.report:
        # Seeds first: after one round every variant has been seen once.
        for seed in seeds:
            for variant in chosen:
                _measure(experiment, setting, variant, seed, folder, options.device)
    records = {variant: {seed: _read(folder, variant, seed) for seed in seeds} for variant in variants}
    missing = [f"{variant} seed {seed}" for variant in variants for seed in seeds if records[variant][seed] is None]
    if missing:
        raise NotFoundError(f"no page yet, these are still to be measured: {', '.join(missing)}")
    results = Results(
        setting=setting,
        records={
            variant: {seed: record for seed, record in by_seed.items() if record is not None}
            for variant, by_seed in records.items()
        },
    )
    write(experiment, name, options.setting, results, experiment.report(results))


def _options(experiment: Experiment, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=experiment.question)
    parser.add_argument("--setting", choices=list(experiment.settings), default="small", help="sizes")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas between")
    parser.add_argument(
        "--variants", help="only these, with semicolons between; all: write no page before all are done"
    )
    parser.add_argument("--device", default="cpu", help="where to compute, such as cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page from what is there")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"\d+(,\d+)*", options.seeds):
        raise ConfigError(f"--seeds {options.seeds!r}: give numbers with commas between, such as --seeds 0,1,2")
    return options


def _digest(setting: Any) -> str:
    return hashlib.sha256(json.dumps(asdict(setting), sort_keys=True).encode()).hexdigest()[:8]


def _path(folder: Path, variant: str, seed: int) -> Path:
    if not re.fullmatch(r"[\w.,=+\- ]+", variant):
        raise ConfigError(f"variant {variant!r} cannot be a folder; use letters, digits and .,=+-_ and spaces")
    return folder / variant / f"{seed}.json"


def _read(folder: Path, variant: str, seed: int) -> dict[str, Any] | None:
    path = _path(folder, variant, seed)
    return dict(json.loads(path.read_text())) if path.is_file() else None


def _measure(experiment: Experiment, setting: Any, variant: str, seed: int, folder: Path, device: str) -> None:
    path = _path(folder, variant, seed)
    if path.is_file():
        return
    checkpoints = path.with_suffix("")
    checkpoints.mkdir(parents=True, exist_ok=True)
    # Of the processor, not of the clock: what else runs on the machine is none of the cell's.
    began = time.process_time()
    cell = Cell(setting=setting, variant=variant, seed=seed, device=device, checkpoints=checkpoints)
    record = {**experiment.measure(cell), "seconds": round(time.process_time() - began, 1)}
    put(path, json.dumps({**record, "machine": environment(device)}, indent=1) + "\n")
    shown = {key: value for key, value in record.items() if isinstance(value, int | float)}
    cell.log(0, {"done": 1, **shown})


def put(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    draft.replace(path)


def write(experiment: Experiment, name: str, setting_name: str, results: Results, page: Page) -> None:
    """The evidence of one setting, and the index of all evidence."""
    stem = name if setting_name == "small" else f"{name}-{setting_name}"
    seeds = list(next(iter(results.records.values())))
    command = f"python experiments/{name}.py --setting {setting_name} --seeds {','.join(map(str, seeds))}"
    records = {
        variant: {str(seed): {k: v for k, v in record.items() if k != "machine"} for seed, record in by_seed.items()}
        for variant, by_seed in results.records.items()
    }
    machines = _unique(record.get("machine", {}) for rows in results.records.values() for record in rows.values())
    seconds = sum(record["seconds"] for rows in records.values() for record in rows.values())
    evidence = {
        "title": experiment.title,
        "verdict": page.verdict,
        "command": command,
        "setting": asdict(results.setting),
        "seeds": seeds,
        "seconds": round(seconds),
        "summary": page.summary,
        "machines": machines,
        "results": records,
    }
    put(EVIDENCE / f"{stem}.json", json.dumps(evidence, indent=1) + "\n")
    picture = ""
    if page.figure is not None:
        _draw(page.figure, EVIDENCE / f"{stem}.svg")
        picture = f"![{experiment.title}]({stem}.svg)"
    sizes = ", ".join(f"{key} {value}" for key, value in asdict(results.setting).items())
    machine = "; ".join(
        dict.fromkeys(
            f"{m.get('cpu', '')}, {m.get('threads')} thread, torch {m['packages']['torch']}" for m in machines
        )
    )
    parts = [
        f"# {experiment.title}",
        f"**{page.verdict}**",
        experiment.question,
        f"**The source.** {page.paper}",
        picture,
        *map(str, page.tables),
        page.notes,
        f"**Repeat it.** `{command}`; {seconds / 60:.0f} minutes of one core in all. "
        f"Seeds {', '.join(map(str, seeds))}; intervals are 95%, over seeds (Student's t) where nothing else is said. "
        f"Numbers of every seed: [{stem}.json]({stem}.json).",
        f"**Setting.** {sizes}.",
        f"**Machine.** {machine}.",
    ]
    put(EVIDENCE / f"{stem}.md", "\n\n".join(part for part in parts if part) + "\n")
    write_index()
    print(f"{stem}: {page.verdict}\nwritten: docs/evidence/{stem}.md")


def _unique(machines: Any) -> list[dict[str, Any]]:
    """What the cells ran on, each kind once; which revision, and how many threads a machine has free, differ."""
    kept: dict[str, dict[str, Any]] = {}
    for machine in machines:
        if machine:
            known = {key: value for key, value in machine.items() if key != "revision"}
            kept.setdefault(json.dumps(known, sort_keys=True), machine)
    return list(kept.values())


def write_index() -> None:
    """docs/evidence/README.md, from all the evidence that there is."""
    lines = [
        "# Evidence",
        "",
        "One page for each experiment: the question, the source's number beside ours with its interval, the setting,",
        "and the command that repeats it. That a claim does not reproduce at our size is a result like any other.",
        "This index is written by `experiments/_lab.py`.",
        "",
        "| experiment | verdict |",
        "|---|---|",
    ]
    for path in sorted(EVIDENCE.glob("*.json")):
        evidence = json.loads(path.read_text())
        lines.append(f"| [{evidence['title']}]({path.stem}.md) | {evidence['verdict']} |")
    put(EVIDENCE / "README.md", "\n".join(lines) + "\n")


def _draw(figure: Any, path: Path) -> None:
    try:
        figure.write_image(path)
    except (RuntimeError, ValueError) as error:  # Which of the two depends on plotly's version.
        if "kaleido" not in str(error).lower():
            raise
        raise MissingExtraError("kaleido", "browser") from None
