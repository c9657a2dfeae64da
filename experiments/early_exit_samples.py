"""What it saves when samples leave as soon as they are done, on the networks that the sibling experiments trained.

    python experiments/early_exit_samples.py [--setting small|full] [--seeds 0,1,2]

Nothing else should run beside it: it measures time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import _deep_thinking as deep
import deep_thinking_mazes as mazes
import ponder_against_act as parity
import torch
from _intervals import Interval, bootstrap, t_interval
from _lab import RUNS, Cell, Experiment, Page, Results, Table, _digest, run
from _plots import add_bars, figure
from torch import Tensor

from loopwise.loops.drivers import run_until, unroll
from loopwise.loops.exits import Observation, parse_rule
from loopwise.loops.protocol import LoopModel, flat_state
from loopwise.tasks.mazes import Mazes, MazesConfig, detours
from loopwise.tasks.nonzero_parity import NonzeroParity, NonzeroParityConfig
from loopwise.tasks.problems import IGNORED, Problems, Task, numbers

MAZES, PARITY = "Deep Thinking, mazes", "PonderNet, parity"
RULES = {
    MAZES: (
        *(f"certainty:{x}" for x in (0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)),
        *(f"stable:{n}" for n in (1, 2, 3, 4, 6)),
        *(f"delta:{x}" for x in (0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005)),
    ),
    PARITY: tuple(f"hazard:{q}" for q in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One setting."""

    maze_size: int = 13
    """Size of the mazes that are timed; the networks learned smaller ones."""
    chosen_on: int = 500
    """Problems on which rule and depth are chosen."""
    timed_on: int = 2000
    """Other problems, on which time and accuracy are measured."""
    batch: int = 100
    """Problems that begin together."""
    pairs: int = 3
    """Measurements of each side, in turns."""
    slack: float = 0.01
    """Accuracy that the fixed depth and the rule may lack to the best depth when they are chosen, both alike."""
    full: bool = False
    """Whether the networks are those of the siblings' full setting."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained network with the problems it is asked."""

    model: LoopModel
    task: Task
    loops: int
    """Most loops to consider."""
    encode: Callable[[Problems], Any]
    """Problems to context."""


def subject(cell: Cell) -> Subject:
    """The variant's network, trained by its own experiment, or now."""
    sizes: Sizes = cell.setting
    name, setting, variant = (
        ("deep_thinking_mazes", mazes.FULL if sizes.full else mazes.SMALL, mazes.RECALL)
        if cell.variant == MAZES
        else ("ponder_against_act", parity.FULL if sizes.full else parity.SMALL, parity.PONDER)
    )
    folder = RUNS / name / f"{'full' if sizes.full else 'small'}-{_digest(setting)}" / variant / str(cell.seed)
    source = Cell(setting=setting, variant=variant, seed=cell.seed, device=cell.device, checkpoints=folder)
    if cell.variant == PARITY:
        entries, trained = setting.entries, setting.trained
        pondering = parity.train(source)
        return Subject(
            model=pondering,
            task=NonzeroParity(NonzeroParityConfig(entries=entries, most=trained)),
            loops=setting.loops,
            encode=lambda problems: pondering.encode(problems.inputs.to(cell.device)),
        )
    network = deep.train(source, mazes.task, recall=True, alpha=setting.alpha)

    def encode(problems: Problems) -> Any:
        pictures = deep.layout(problems.inputs, setting).to(cell.device)
        return network.encode(pictures, asked=(problems.targets != IGNORED).to(cell.device))

    return Subject(
        model=network, task=Mazes(MazesConfig(size=sizes.maze_size)), loops=setting.test_loops, encode=encode
    )


def right(task: Task, problems: Problems, prediction: Tensor) -> Tensor:
    """Which problems are answered right."""
    return task.verify(problems, prediction.argmax(-1).view(problems.targets.shape).cpu())


@torch.no_grad()
def choose(asked: Subject, sizes: Sizes, rules: tuple[str, ...]) -> tuple[int, str]:
    """The least depth that is about as good as any, and the rule that costs least of those about as good."""
    problems = asked.task.draw(deep.TEST_SEED + 1, numbers(0, sizes.chosen_on))
    model, context = asked.model, asked.encode(problems)
    bound = {text: parse_rule(text).bind(model.facts.signal) for text in rules}
    trackers = {text: rule.track(sizes.chosen_on) for text, rule in bound.items()}
    exits = {text: torch.full((sizes.chosen_on,), asked.loops) for text in rules}
    solved: list[Tensor] = []
    spent = {"step": 0.0, "readout": 0.0}
    state = model.initial_state(context)
    for loop in range(1, asked.loops + 1):
        previous, began = state, time.perf_counter()
        state = model.step(state, context, loop)
        stepped = time.perf_counter()
        prediction = model.readout(state, context)
        signal = model.signal(state, prediction)
        spent["step"] += stepped - began
        spent["readout"] += time.perf_counter() - stepped
        seen = Observation(
            loop=loop, state=flat_state(state), previous=flat_state(previous), signal=signal, logits=prediction
        )
        for text, tracker in trackers.items():
            fired = tracker.update(seen).cpu() & (exits[text] == asked.loops)
            exits[text][fired] = loop
        solved.append(right(asked.task, problems, prediction))
    by_loop = torch.stack(solved)
    shares = by_loop.float().mean(1)
    depth = int((shares >= shares.max() - sizes.slack).nonzero()[0]) + 1

    def cost(text: str) -> float:
        needs = bound[text].needs
        reads = "logits" in needs or ("signal" in needs and model.facts.signal_reads == "prediction")
        return float(exits[text].clamp(max=depth).float().mean()) * (spent["step"] + (spent["readout"] if reads else 0))

    def accuracy(text: str) -> float:
        return float(by_loop.gather(0, exits[text].clamp(max=depth)[None] - 1).float().mean())

    good = [text for text in rules if accuracy(text) >= float(shares.max()) - sizes.slack]
    return depth, min(good, key=cost) if good else f"fixed:{depth}"


def difficulties(variant: str, problems: Problems) -> dict[str, Tensor]:
    """What may make a problem hard, each with its name."""
    if variant == PARITY:
        return {"non-zeros": problems.difficulty}
    return {
        "length of the route": problems.difficulty,
        "deepest dead end": detours(problems.inputs, problems.targets == 1),
    }


def measure(cell: Cell) -> dict[str, Any]:
    """Choose on some problems, measure on others: all samples run the fixed depth, or each leaves by the rule."""
    sizes: Sizes = cell.setting
    asked = subject(cell)
    depth, rule = choose(asked, sizes, RULES[cell.variant])
    problems = asked.task.draw(deep.TEST_SEED, numbers(0, sizes.timed_on))
    parts = [
        Problems(
            inputs=problems.inputs[start : start + sizes.batch],
            targets=problems.targets[start : start + sizes.batch],
            difficulty=problems.difficulty[start : start + sizes.batch],
        )
        for start in range(0, sizes.timed_on, sizes.batch)
    ]

    @torch.no_grad()
    def fixed(part: Problems) -> Tensor:
        context = asked.encode(part)
        return asked.model.readout(unroll(asked.model, context, loops=depth).state, context)

    def leaving(part: Problems) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            context = asked.encode(part)
        outcome = run_until(asked.model, context, rule, max_loops=depth)
        return outcome.prediction, outcome.loops

    plain: list[float] = []
    early: list[float] = []
    fixed(parts[0])
    leaving(parts[0])
    for _ in range(sizes.pairs):
        for times, how in ((plain, fixed), (early, leaving)):
            began = time.perf_counter()
            for part in parts:
                how(part)
            times.append(time.perf_counter() - began)
    found = [leaving(part) for part in parts]
    loops = torch.cat([used for _, used in found]).cpu()
    answers = torch.cat([right(asked.task, part, answer) for part, (answer, _) in zip(parts, found, strict=True)])
    whole = torch.cat([right(asked.task, part, fixed(part)) for part in parts])
    lost = whole.double() - answers.double()
    links = {}
    for name, difficulty in difficulties(cell.variant, problems).items():
        link = bootstrap(parity.rank_correlation, loops.numpy(), difficulty.numpy(), draws=300)
        links[name] = [link.mean, link.low, link.high]
    gap = bootstrap(lambda values: float(values.mean()), lost.numpy())
    return {
        "rule": rule,
        "depth": depth,
        "mean_loops": loops.double().mean().item(),
        "accuracy_fixed": whole.double().mean().item(),
        "accuracy_early": answers.double().mean().item(),
        "lost": [gap.mean, gap.low, gap.high],
        "seconds_fixed": plain,
        "seconds_early": early,
        "saved": 1 - median(first / second for first, second in zip(early, plain, strict=True)),
        "loops_saved": 1 - loops.double().mean().item() / depth,
        "correlation": links,
    }


def report(results: Results) -> Page:
    """The page."""
    sizes: Sizes = results.setting
    saved = {variant: results.interval(variant, "saved") for variant in results.records}
    lost = {
        variant: t_interval([record["lost"][0] for record in rows.values()])
        for variant, rows in results.records.items()
    }
    first = {variant: next(iter(rows.values())) for variant, rows in results.records.items()}
    link = {
        variant: {
            name: t_interval([record["correlation"][name][0] for record in rows.values()])
            for name in first[variant]["correlation"]
        }
        for variant, rows in results.records.items()
    }

    def told(variant: str) -> str:
        met = saved[variant].mean >= 0.25 and lost[variant].mean <= 0.01
        return (
            f"{variant}: {saved[variant].text(0, 100, '%')} of the time saved, accuracy "
            f"{-100 * lost[variant].mean:+.2f} points, {'meets' if met else 'short of'} the aim of 25% within 1 point"
        )

    verdict = "; ".join(told(variant) for variant in results.records) + "."
    table = Table(
        head=[
            "variant",
            "seed",
            "rule",
            "fixed depth",
            "mean loops",
            "accuracy, fixed",
            "accuracy, early",
            "time saved",
        ],
        rows=[
            [
                variant,
                str(seed),
                f"`{record['rule']}`",
                str(record["depth"]),
                f"{record['mean_loops']:.2f}",
                f"{100 * record['accuracy_fixed']:.2f}",
                f"{100 * record['accuracy_early']:.2f}",
                f"{100 * record['saved']:.0f}%",
            ]
            for variant, rows in results.records.items()
            for seed, record in rows.items()
        ],
        caption=f"{sizes.timed_on} problems in batches of {sizes.batch}; accuracies in %. Time is the median of "
        f"{sizes.pairs} measurements in turns, reading the answer of every loop included where the rule needs it.",
    )
    links = Table(
        head=["variant", "difficulty", *(f"seed {seed}" for seed in next(iter(results.records.values())))],
        rows=[
            [variant, name, *("{:.2f} ({:.2f} to {:.2f})".format(*r["correlation"][name]) for r in rows.values())]
            for variant, rows in results.records.items()
            for name in first[variant]["correlation"]
        ],
        caption="Rank correlation of the loops used with the problem's difficulty, with its bootstrap interval over "
        "problems.",
    )
    drawn = figure(x="", y="saved, %")
    for index, (key, name) in enumerate((("saved", "measured time"), ("loops_saved", "loops"))):
        groups = {variant: [100 * value for value in results.values(variant, key)] for variant in results.records}
        add_bars(drawn, groups, name=name, index=index)
    drawn.add_hline(y=25, line={"dash": "dash", "color": "#888"})
    return Page(
        verdict=verdict,
        paper="None of these papers measured a saving: Deep-Thinking networks run all loops and then choose the most "
        "confident one, PonderNet counts steps.",
        tables=[table, links],
        notes=f"The fixed depth is the least one within {100 * sizes.slack:.0f} point of the best depth, so it wastes "
        "nothing by itself; the rule is the cheapest one within the same point, and may run no deeper. Both are chosen "
        f"on {sizes.chosen_on} other problems. The mazes are {sizes.maze_size}x{sizes.maze_size}, larger than those of "
        "training; parity stays within the trained range, since beyond it nothing is right. Mazes with long routes "
        "take *fewer* loops: the network rules out dead ends, and the deepest of them decides.",
        summary={
            "saved": {variant: _plain(interval) for variant, interval in saved.items()},
            "lost": {variant: _plain(interval) for variant, interval in lost.items()},
            "correlation": {
                variant: {name: _plain(interval) for name, interval in by_name.items()}
                for variant, by_name in link.items()
            },
        },
        figure=drawn,
    )


def _plain(interval: Interval) -> list[float]:
    return [interval.mean, interval.low, interval.high]


EXPERIMENT = Experiment(
    title="What leaving early saves: Deep Thinking and PonderNet",
    question="Each sample leaves the batch when an exit rule says so, against all samples running the depth that "
    "accuracy needs: how much time does that save, at what loss, and do harder problems take more loops?",
    settings={"small": Sizes(), "full": Sizes(maze_size=33, full=True)},
    variants=lambda setting: (MAZES, PARITY),
    measure=measure,
    report=report,
)

if __name__ == "__main__":
    run(EXPERIMENT, __file__)
