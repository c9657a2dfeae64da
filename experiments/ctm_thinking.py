"""How a Continuous Thought Machine thinks on mazes: does it know how sure to be, and which moves come first?

python experiments/ctm_thinking.py [--setting small|full] [--seeds 0,1,2]

The machines are those of `ctm_ablation.py` that start louder, with a training of their own.
"""

from dataclasses import dataclass, replace
from typing import Any

import ctm_ablation as ablation
import numpy as np
import torch
from _intervals import t_interval
from _lab import Cell, Experiment, Page, Results, Table, run
from _plots import add_line, legends_below, panels
from jaxtyping import Bool, Float, Int

from loopwise.loops.drivers import unroll
from loopwise.models.ctm import CTM, certainty
from loopwise.study.statistics import reliability
from loopwise.tasks.mazes import WAIT
from loopwise.tasks.problems import numbers

SINGLE, AVERAGED, SUREST = "last tick", "averaged over all ticks", "most certain tick"
THIRDS = ("first", "middle", "last")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One setting."""

    machine: str = ablation.LOUD
    """Which of the ablation's machines is trained and asked."""
    steps: int = 450
    """Optimiser steps."""
    learning_rate: float = 2e-3
    """AdamW's peak, with a short warm-up and a cosine to 0."""
    scarce: int = 3
    """Ticks of the machines that are trained with few."""
    mazes: int = 2000
    """New mazes that are asked."""
    bins: int = 10
    """Bins of confidence, of equal width."""
    full: bool = False
    """Whether mazes and machines have the sizes of the ablation's full setting."""


def trained(sizes: Sizes) -> ablation.Sizes:
    """The ablation's setting, with the training of this one."""
    base = ablation.FULL if sizes.full else ablation.SMALL
    return replace(base, steps=sizes.steps, learning_rate=sizes.learning_rate)


def variants(sizes: Sizes) -> tuple[str, str]:
    """Ticks that a machine is trained and asked with: as many as in the ablation, and few."""
    return f"{trained(sizes).ticks} ticks", f"{sizes.scarce} ticks"


def machine(cell: Cell) -> CTM:
    """The variant's machine, trained."""
    sizes: Sizes = cell.setting
    setting = trained(sizes)
    if cell.variant != variants(sizes)[0]:
        setting = replace(setting, ticks=sizes.scarce)
    return ablation.train(replace(cell, setting=setting, variant=sizes.machine)).cpu()


@torch.no_grad()
def ask(model: CTM, pictures: torch.Tensor, rows: int = 250) -> Float[np.ndarray, "ticks mazes moves classes"]:
    """Probability of each class of each move after each tick."""
    found = []
    for part in pictures.split(rows):
        logits = unroll(model, model.encode(part), loops=model.config.ticks, collect=("logits",)).logits
        assert logits is not None
        found.append(logits.softmax(-1))
    chances: Float[np.ndarray, "ticks mazes moves classes"] = torch.cat(found, dim=1).numpy()
    return chances


def running_mean(chances: Float[np.ndarray, "ticks ..."]) -> Float[np.ndarray, "ticks ..."]:
    """The mean over all ticks so far, at every tick."""
    ticks = np.arange(1, len(chances) + 1).reshape(-1, *[1] * (chances.ndim - 1))
    mean: Float[np.ndarray, "ticks ..."] = np.cumsum(chances, axis=0, dtype=np.float64) / ticks
    return mean


def settled(right: Bool[np.ndarray, "ticks mazes moves"]) -> Int[np.ndarray, "mazes moves"]:
    """The tick, from 1, from which on a move is right to the last tick; one more than there are where it never is."""
    late = np.cumprod(right[::-1], axis=0, dtype=np.int64).sum(0)
    ticks: Int[np.ndarray, "mazes moves"] = len(right) - late + 1
    return ticks


def earlier_first(ticks: Int[np.ndarray, "mazes moves"], asked: Bool[np.ndarray, "mazes moves"]) -> float:
    """Of all pairs of moves of one maze that settle at different ticks, the share whose earlier move settles first.

    1: from start to goal; 0: from goal to start; one half: in no order. NaN where no pair differs.
    """
    first, second = np.triu_indices(ticks.shape[1], 1)
    pairs = asked[:, first] & asked[:, second]
    sooner = int((pairs & (ticks[:, first] < ticks[:, second])).sum())
    later = int((pairs & (ticks[:, first] > ticks[:, second])).sum())
    return sooner / (sooner + later) if sooner + later else float("nan")


def beyond(
    right: Bool[np.ndarray, "mazes moves"], asked: Bool[np.ndarray, "mazes moves"]
) -> tuple[float, Bool[np.ndarray, "mazes moves"]]:
    """The share of a route that is right from the start without a mistake, and the moves beyond the first mistake."""
    begun = np.cumprod(right | ~asked, axis=1).astype(bool) & asked
    after = np.cumsum(asked & ~right, axis=1) - (asked & ~right) > 0
    return float((begun.sum(1) / asked.sum(1)).mean()), after & asked


def thirds(
    right: Bool[np.ndarray, "ticks mazes moves"], asked: Bool[np.ndarray, "mazes moves"]
) -> Float[np.ndarray, "ticks thirds"]:
    """Share of moves that are right in the first, middle and last third of the routes."""
    places = np.arange(asked.shape[1])
    third = np.minimum(3 * places // asked.sum(1, keepdims=True), 2)
    shares = [right[:, asked & (third == part)].mean(1) for part in range(3)]
    found: Float[np.ndarray, "ticks thirds"] = np.stack(shares, axis=1)
    return found


def measure(cell: Cell) -> dict[str, Any]:
    """Ask one machine new mazes and look at every tick."""
    sizes: Sizes = cell.setting
    model = machine(cell)
    problems = ablation.mazes(trained(sizes)).draw(ablation.TEST_SEED, numbers(0, sizes.mazes))
    targets = problems.targets.numpy()
    asked = targets != WAIT
    chances = ask(model, problems.inputs)
    mean = running_mean(chances)
    sure = np.stack([certainty(torch.from_numpy(tick).log()).numpy() for tick in chances])
    surest = chances[sure.argmax(0), np.arange(len(targets))]
    found: dict[str, Any] = {"tick": float(sure.argmax(0).mean() + 1)}
    for name, answers in ((SINGLE, chances[-1]), (AVERAGED, mean[-1]), (SUREST, surest)):
        confidence, right = answers.max(-1)[asked].astype(np.float64), (answers.argmax(-1) == targets)[asked]
        told = reliability(confidence, right, bins=sizes.bins)
        found |= {
            f"{name} ece": told.ece,
            f"{name} right": float(right.mean()),
            f"{name} over": float(confidence.mean() - right.mean()),
            f"{name} bins": [
                float(hit) if count else None for count, hit in zip(told.count, told.accuracy, strict=True)
            ],
        }
    for name, said in (("single", chances), ("averaged", mean)):
        found[f"{name} ece by tick"] = [
            reliability(
                answers.max(-1)[asked].astype(np.float64), (answers.argmax(-1) == targets)[asked], bins=sizes.bins
            ).ece
            for answers in said
        ]
    right = chances.argmax(-1) == targets
    found["earlier first"] = earlier_first(settled(right), asked)
    found["thirds"] = thirds(right, asked).tolist()
    begun, after_share, guessed = [], [], []
    for tick in right:
        share, after = beyond(tick, asked)
        begun.append(share)
        after_share.append(float(tick[after].mean()) if after.any() else None)
        # What the answer to the next maze gets right at the same places knows the task and not the maze.
        other = np.roll(chances[len(begun) - 1].argmax(-1), 1, axis=0) == targets
        guessed.append(float(other[after].mean()) if after.any() else None)
    return found | {"begun": begun, "beyond": after_share, "guessed": guessed}


def report(results: Results) -> Page:
    """The page."""
    sizes: Sizes = results.setting
    many, few = variants(sizes)
    gain = results.difference_of(many, f"{AVERAGED} ece", f"{SINGLE} ece")
    if gain.high < 0:
        averaging = "Averaging over ticks calibrates, as in the paper"
    elif gain.low > 0:
        averaging = "Not the paper's picture: averaging over ticks makes calibration worse"
    else:
        averaging = "Averaging over ticks changes calibration by no more than the seeds' spread"
    eces = {name: results.interval(many, f"{name} ece") for name in (SINGLE, AVERAGED, SUREST)}
    orders = {variant: results.interval(variant, "earlier first") for variant in (many, few)}
    order = orders[many]
    if order.low > 0.5:
        sequence = "The beginning of the route comes first"
    elif order.high < 0.5:
        sequence = "The end of the route comes first"
    else:
        sequence = "No order of moves beyond the seeds' spread"
    told = ", ".join(f"{interval.text(1, 100)} points {_where(name)}" for name, interval in eces.items())
    shares = ", ".join(f"{orders[variant].text(0, 100, '%')} with {variant}" for variant in (many, few))
    verdict = (
        f"{averaging}: the calibration error of moves is {told}. {sequence}: of two moves that settle at different "
        f"ticks the one nearer to the start is first in {shares} (50% is no order)."
    )
    return Page(
        verdict=verdict,
        paper="Darlow et al. 2025 (arXiv 2505.05522): on ImageNet the calibration curve lies close to the diagonal "
        "when probabilities are averaged over all ticks up to the present one; no number is given. In an interview the "
        "authors tell of maze machines with scarce ticks that leap ahead and fill the route in backwards.",
        tables=[_calibration(results), _order(results), _limits(results)],
        notes="The machines are [the ablation's](ctm_ablation.md) whole ones that start louder, trained for fewer "
        "steps so that they still make mistakes. Moves before the goal are asked; waiting at the goal is not counted. "
        "Probabilities averaged over ticks give the answer that they make likeliest. A move settles at the tick from "
        "which on it stays right. Beyond the first mistake, a move is guessed as often as the answer to another maze "
        "gets it right at the same place.",
        summary={
            "ece": {name: [found.mean, found.low, found.high] for name, found in eces.items()},
            "averaged less single": [gain.mean, gain.low, gain.high],
            "earlier first": {name: [found.mean, found.low, found.high] for name, found in orders.items()},
        },
        figure=_draw(results),
    )


def _where(name: str) -> str:
    return name if name == AVERAGED else f"at the {name}"


def _calibration(results: Results) -> Table:
    rows = [
        [
            variant,
            _where(name),
            *(results.interval(variant, f"{name} {key}").text(1, 100) for key in ("right", "ece", "over")),
        ]
        for variant in results.records
        for name in (SINGLE, AVERAGED, SUREST)
    ]
    head = ["trained and asked with", "probabilities", "moves right, %", "ECE, points", "too sure by, points"]
    return Table(head=head, rows=rows, caption="How well a move's probability says how often it is right.")


def _order(results: Results) -> Table:
    rows = []
    for variant, by_seed in results.records.items():
        last = [record["thirds"][-1] for record in by_seed.values()]
        rows.append(
            [
                variant,
                results.interval(variant, "earlier first").text(1, 100),
                *(t_interval([100 * seed[part] for seed in last]).text(1) for part in range(3)),
            ]
        )
    head = [
        "trained and asked with",
        "earlier move first, % of pairs",
        *(f"{third} third right, %" for third in THIRDS),
    ]
    return Table(head=head, rows=rows, caption="Which moves settle first, and what is right at the last tick.")


def _limits(results: Results) -> Table:
    rows = []
    for variant, by_seed in results.records.items():
        ticks = len(next(iter(by_seed.values()))["begun"])
        for tick in sorted({1, 2, 3, 4, 6, 8, ticks}):
            if tick <= ticks:
                cells = [
                    t_interval([100 * record[key][tick - 1] for record in by_seed.values()]).text(1)
                    if all(record[key][tick - 1] is not None for record in by_seed.values())
                    else "no mistakes"
                    for key in ("begun", "beyond", "guessed")
                ]
                rows.append([variant, str(tick), *cells])
    head = [
        "trained with",
        "ticks allowed",
        "of the route right from the start, %",
        "right beyond the first mistake, %",
    ]
    return Table(head=[*head, "guessed there, %"], rows=rows, caption="The route under a limit of ticks.")


def _draw(results: Results) -> Any:
    sizes: Sizes = results.setting
    many, few = variants(sizes)
    axes = [("probability of a move, %", "moves right, %"), ("tick", "calibration error, points")]
    drawn = panels([*axes, ("tick", "moves right, %")])
    records = list(results.records[many].values())
    drawn.add_scatter(x=[0, 100], y=[0, 100], mode="lines", line={"color": "#999", "dash": "dot"}, showlegend=False)
    for index, name in enumerate((SINGLE, AVERAGED, SUREST)):
        bins = [record[f"{name} bins"] for record in records]
        filled = [place for place in range(sizes.bins) if all(seed[place] is not None for seed in bins)]
        centres = [100 * (place + 0.5) / sizes.bins for place in filled]
        values = [[100 * seed[place] for place in filled] for seed in bins]
        add_line(drawn, centres, values, name=_where(name), index=index)
    ticks = list(range(1, trained(sizes).ticks + 1))
    for index, name in enumerate(("single", "averaged")):
        curves = [[100 * value for value in record[f"{name} ece by tick"]] for record in records]
        add_line(drawn, ticks, curves, name=f"{name}, {many}", index=index, panel=2)
    for variant, dash in ((many, "solid"), (few, "dot")):
        of_variant = list(results.records[variant].values())
        for part, third in enumerate(THIRDS):
            curves = [[100 * tick[part] for tick in record["thirds"]] for record in of_variant]
            name = f"{third} third, {variant}"
            add_line(drawn, range(1, len(curves[0]) + 1), curves, name=name, index=part, dash=dash, panel=3)
    legends_below(drawn)
    return drawn


EXPERIMENT = Experiment(
    title="CTM on mazes: how sure, and in which order",
    question="A Continuous Thought Machine says after every tick which moves lead through a maze, with a probability "
    "for each. How often is a move of 80% right, at single ticks and averaged over ticks? Which moves get right "
    "first, and what does a machine that has few ticks do?",
    settings={"small": Sizes(), "full": Sizes(full=True, steps=100_000, learning_rate=1e-4, scarce=12)},
    variants=variants,
    measure=measure,
    report=report,
)

if __name__ == "__main__":
    run(EXPERIMENT, __file__)
