"""Do networks that learn when to stop carry a procedure on: PonderNet against ACT on parity with more ones than seen.

python experiments/ponder_against_act.py [--setting small|full] [--seeds 0,1,2]
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _intervals import bootstrap
from _lab import Cell, Experiment, Page, Results, Table, run
from _plots import add_line, figure
from torch import Tensor

from loopwise.loops.drivers import run_until, unroll
from loopwise.loops.exits import ExitRule
from loopwise.loops.sampled import Sampled
from loopwise.models.pondering import ACT, PonderNet
from loopwise.models.recurrent_cell import RecurrentCell, RecurrentCellConfig
from loopwise.objectives.pondering import Ponder, act_loss, ponder_loss
from loopwise.tasks.nonzero_parity import NonzeroParity, NonzeroParityConfig
from loopwise.tasks.problems import Problems, numbers
from loopwise.train.fit import FitConfig, fit
from loopwise.train.schedule import ScheduleConfig

TEST_SEED = 1_000_003
PONDER, ACT_ = "PonderNet", "ACT"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One setting."""

    entries: int
    """Length of the vectors."""
    trained: int
    """Most non-zeros in training; the test asks beyond it."""
    cell: str
    """The step function: tanh or gru."""
    width: int
    """Its width."""
    loops: int
    """Most loops, N."""
    prior: float
    """PonderNet's prior hazard."""
    beta: float
    """PonderNet's weight of the KL."""
    tau: float
    """ACT's price of a loop."""
    batch: int
    """Vectors per step."""
    steps: int
    """Optimiser steps."""
    learning_rate: float
    """AdamW's peak, with a short warm-up and a cosine to 0."""
    test_count: int
    """Vectors of the test, for each number of non-zeros."""


SMALL = Sizes(
    entries=12,
    trained=6,
    cell="tanh",
    width=128,
    loops=8,
    prior=0.2,
    beta=0.1,
    tau=0.01,
    batch=128,
    steps=5000,
    learning_rate=2e-3,
    test_count=400,
)
FULL = Sizes(
    entries=96,
    trained=48,
    cell="tanh",
    width=128,
    loops=20,
    prior=0.2,
    beta=0.01,
    tau=0.001,
    batch=128,
    steps=500_000,
    learning_rate=3e-4,
    test_count=200,
)


def build(cell: Cell) -> PonderNet | ACT:
    """The variant's network, untrained."""
    sizes: Sizes = cell.setting
    torch.manual_seed(cell.seed)
    config = RecurrentCellConfig(
        inputs=sizes.entries, width=sizes.width, cell=sizes.cell, trained_loops=(1, sizes.loops)
    )
    wrap = PonderNet if cell.variant == PONDER else ACT
    return wrap(RecurrentCell(config), features=sizes.width, bias=-1.0).to(cell.device)


def own_rule(sizes: Sizes, variant: str) -> ExitRule | str:
    """How the paper stops it: PonderNet by drawing, ACT where its gate's numbers add up to 0.99."""
    return Sampled(seed=0) if variant == PONDER else "hazard:0.99"


def train(cell: Cell) -> PonderNet | ACT:
    """The network, trained; at once where the cell's folder holds the end of its training."""
    sizes: Sizes = cell.setting
    model = build(cell)
    task = NonzeroParity(NonzeroParityConfig(entries=sizes.entries, most=sizes.trained))
    ponder = Ponder(prior=sizes.prior, beta=sizes.beta)

    def batches(step: int) -> Problems:
        return task.draw(cell.seed, numbers(step * sizes.batch, sizes.batch))

    def loss(batch: Problems, step: int) -> Tensor:
        context, answers = model.encode(batch.inputs.to(cell.device)), batch.targets[:, 0].to(cell.device)
        if isinstance(model, PonderNet):
            out = unroll(model, context, loops=sizes.loops, collect=("logits", "signals"))
            losses = F.cross_entropy(out.logits.flatten(0, 1), answers.repeat(sizes.loops), reduction="none")
            return ponder_loss(losses.view(sizes.loops, -1), out.signals, ponder)
        state = unroll(model, context, loops=sizes.loops).state
        return act_loss(F.cross_entropy(model.readout(state, context), answers, reduction="none"), state, sizes.tau)

    schedule = ScheduleConfig(kind="cosine", warmup=max(1, sizes.steps // 50))
    config = FitConfig(
        steps=sizes.steps,
        learning_rate=sizes.learning_rate,
        schedule=schedule,
        checkpoint_every=max(1, sizes.steps // 4),
        log_every=max(1, sizes.steps // 10),
    )
    fit(model, loss, batches, config, checkpoints=cell.checkpoints, log=cell.log)
    return model


def tested(sizes: Sizes, count: int) -> Problems:
    """Vectors of the test with `count` non-zeros."""
    task = NonzeroParity(NonzeroParityConfig(entries=sizes.entries, fewest=count, most=count))
    return task.draw(TEST_SEED, numbers(0, sizes.test_count))


def measure(cell: Cell) -> dict[str, Any]:
    """Train, then test every number of non-zeros with the variant's own way of stopping."""
    sizes: Sizes = cell.setting
    model = train(cell)
    right: list[Tensor] = []
    loops: list[Tensor] = []
    for count in range(1, sizes.entries + 1):
        problems = tested(sizes, count)
        context = model.encode(problems.inputs.to(cell.device))
        outcome = run_until(model, context, own_rule(sizes, cell.variant), max_loops=sizes.loops)
        right.append(outcome.prediction.argmax(-1).cpu() == problems.targets[:, 0])
        loops.append(outcome.loops.cpu())
    solved, used = torch.stack(right).float(), torch.stack(loops).float()
    within, beyond = solved[: sizes.trained], solved[sizes.trained :]
    asked = torch.arange(1, sizes.trained + 1)[:, None].expand(-1, sizes.test_count)
    link = bootstrap(rank_correlation, used[: sizes.trained].flatten().numpy(), asked.flatten().numpy(), draws=300)
    return {
        "within": within.mean().item(),
        "beyond": beyond.mean().item(),
        "next": solved[sizes.trained : sizes.trained + 2].mean().item(),
        "loops_within": used[: sizes.trained].mean().item(),
        "loops_beyond": used[sizes.trained :].mean().item(),
        "accuracy_by_count": solved.mean(1).tolist(),
        "loops_by_count": used.mean(1).tolist(),
        "correlation": [link.mean, link.low, link.high],
    }


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, ties sharing theirs."""
    ranks = [_ranks(values) for values in (first, second)]
    if any(values.std() == 0 for values in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def report(results: Results) -> Page:
    """The page."""
    sizes: Sizes = results.setting
    within = {variant: results.interval(variant, "within") for variant in results.records}
    beyond = {variant: results.interval(variant, "beyond") for variant in results.records}
    gap = results.difference(PONDER, ACT_, "beyond")
    far = f"{sizes.trained + 1} to {sizes.entries} non-zeros"
    shown = (
        f"{far} after training on 1 to {sizes.trained}: PonderNet {beyond[PONDER].text(1, 100, '%')}, "
        f"ACT {beyond[ACT_].text(1, 100, '%')}, {gap.text(1, 100, sign=True)} points apart; chance is 50%"
    )
    known = (
        f" Within the trained range PonderNet has {within[PONDER].text(1, 100, '%')}, ACT "
        f"{within[ACT_].text(1, 100, '%')}."
    )
    if max(interval.mean for interval in within.values()) < 0.75:
        verdict = f"Too small a setting: the trained range is not learned.{known}"
    elif beyond[PONDER].mean < 0.6:
        verdict = f"Not reproduced at this size, neither carries on. {shown}.{known}"
    elif gap.low > 0:
        verdict = f"Reproduced: {shown}.{known}"
    else:
        verdict = f"Not beyond the seeds' spread: {shown}.{known}"
    table = Table(
        head=[
            "variant",
            "trained range",
            "next two counts",
            far,
            "loops, trained range",
            f"loops, {far}",
            "seeds, " + far,
        ],
        rows=[
            [
                variant,
                within[variant].text(1, 100),
                results.interval(variant, "next").text(1, 100),
                beyond[variant].text(1, 100),
                results.interval(variant, "loops_within").text(2),
                results.interval(variant, "loops_beyond").text(2),
                ", ".join(f"{100 * value:.1f}" for value in results.values(variant, "beyond")),
            ]
            for variant in results.records
        ],
        caption="Vectors right, %, and loops used, each variant stopping in its own way.",
    )
    links = Table(
        head=["variant", *(f"seed {seed}" for seed in results.records[PONDER])],
        rows=[
            [variant, *("{:.2f} ({:.2f} to {:.2f})".format(*record["correlation"]) for record in rows.values())]
            for variant, rows in results.records.items()
        ],
        caption="Does it think longer about more non-zeros? Rank correlation of loops used and non-zeros within the "
        "trained range, with its bootstrap interval over vectors.",
    )
    drawn = figure(x="non-zero entries", y="vectors right, %")
    for index, (variant, rows) in enumerate(results.records.items()):
        curves = [[100 * value for value in record["accuracy_by_count"]] for record in rows.values()]
        add_line(drawn, list(range(1, sizes.entries + 1)), curves, name=variant, index=index)
    drawn.add_vline(x=sizes.trained + 0.5, line={"dash": "dash", "color": "#888"})
    return Page(
        verdict=verdict,
        paper="Trained on 1 to 48 non-zeros of 96 and tested on 49 to 96, PonderNet is near perfect and ACT at chance "
        "(Banino et al. 2021, arXiv 2107.05407, figure 1b; ten seeds, no table).",
        tables=[table, links],
        notes="PonderNet stops by a draw from its hazards, ACT where its gate's numbers reach 0.99; both may run "
        f"{sizes.loops} loops, in training and in the test. The dashed line is the end of the trained range.",
        summary={
            "beyond": {variant: [i.mean, i.low, i.high] for variant, i in beyond.items()},
            "within": {variant: [i.mean, i.low, i.high] for variant, i in within.items()},
            "gap": [gap.mean, gap.low, gap.high],
        },
        figure=drawn,
    )


EXPERIMENT = Experiment(
    title="PonderNet against ACT on parity",
    question="A recurrent cell looks at a vector of 0, 1 and -1 again and again and says whether the ones are odd in "
    "number. It learns with few non-zeros and is tested with more. PonderNet averages losses over loops, ACT states.",
    settings={"small": SMALL, "full": FULL},
    variants=lambda setting: (PONDER, ACT_),
    measure=measure,
    report=report,
)

if __name__ == "__main__":
    run(EXPERIMENT, __file__)
