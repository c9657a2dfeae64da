"""Reachability: how many loops does it take to see how far a chain of edges leads, as the chain gets longer?

python experiments/reachability.py [--setting small|full] [--seeds 0,1,2]
"""

from dataclasses import dataclass
from typing import Any

import torch
from _lab import Cell, Experiment, Page, Results, Table, run
from _plots import add_line, figure
from _small_lm import recipe, small_lm
from torch import Tensor

from loopwise.objectives.base import Objective
from loopwise.objectives.every_loop import EveryLoop
from loopwise.objectives.last_loop import LastLoop
from loopwise.tasks.problems import Problems, numbers
from loopwise.tasks.reachability import Reachability, ReachabilityConfig
from loopwise.train.tasks import answer, train_on_problems, whole_sequence

TEST_SEED = 1_000_003
TAUGHT = "1x3 taught"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes."""

    nodes: int
    longest: int
    width: int
    variants: tuple[str, ...]
    """One layer x loops; `taught`: the loss at loop r is asked of distances up to 2^r."""
    rows: int
    steps: int
    learning_rate: float
    test_problems: int


SETTINGS = {
    "small": Setting(
        nodes=18,
        longest=8,
        width=64,
        variants=("1x1", "1x2", "1x3", TAUGHT),
        rows=32,
        steps=4000,
        learning_rate=3e-3,
        test_problems=1024,
    ),
    "full": Setting(
        nodes=66,
        longest=32,
        width=256,
        variants=("1x1", "1x2", "1x3", "1x4", "1x5", "1x5 taught"),
        rows=256,
        steps=40_000,
        learning_rate=1e-3,
        test_problems=4096,
    ),
}


def _loops(variant: str) -> int:
    return int(variant.split()[0].split("x")[1])


def measure(cell: Cell) -> dict[str, Any]:
    """Train one model, then ask every distance after every loop."""
    setting: Setting = cell.setting
    loops, taught = _loops(cell.variant), cell.variant.endswith("taught")
    task = Reachability(ReachabilityConfig(nodes=setting.nodes, longest=setting.longest, layout="edges", asked="end"))
    config = small_lm(vocab_size=task.vocab_size, width=setting.width, layers=1, loops=loops, length=task.length)
    objective: Objective = EveryLoop(loops=loops) if taught else LastLoop(loops=loops)

    def doubling(problems: Problems) -> Tensor:
        reach = task.distances(problems.inputs).clamp(min=1).double()
        return reach.log2().ceil().long().clamp(min=1, max=loops)

    model = train_on_problems(
        config,
        task,
        objective,
        recipe(setting.steps, setting.learning_rate),
        rows=setting.rows,
        seed=cell.seed,
        device=cell.device,
        memory=whole_sequence,
        first_loop=doubling if taught else None,
        checkpoints=cell.checkpoints,
        log=cell.log,
    )
    model.to("cpu")
    test = task.draw(TEST_SEED, numbers(0, setting.test_problems))
    found = answer(model, test, loops=loops, memory=whole_sequence)
    right, distance = found.answers == test.targets, task.distances(test.inputs)
    by_distance = [
        [float(after[distance == hops].float().mean()) for hops in range(1, setting.longest + 1)] for after in right
    ]
    reach = [max((hop for hop, share in enumerate(after, 1) if share >= 0.95), default=0) for after in by_distance]
    last = torch.tensor(by_distance[-1])
    return {"by_distance": by_distance, "reach": reach, "accuracy": float(last.mean())}


def report(results: Results) -> Page:
    """The largest distance that is right after each number of loops, beside 2 to that power."""
    setting: Setting = results.setting
    taught = next(variant for variant in setting.variants if variant.endswith("taught"))
    alone = [variant for variant in setting.variants if variant != taught]
    records = {variant: list(results.records[variant].values()) for variant in setting.variants}
    reach = {loop: [record["reach"][loop - 1] for record in records[taught]] for loop in range(1, _loops(taught) + 1)}
    doubles = all(min(found) >= min(2**loop, setting.longest) for loop, found in reach.items())
    own = {variant: [record["reach"][-1] for record in records[variant]] for variant in alone}
    said = ", ".join(f"{max(found)} after {loop}" for loop, found in reach.items())
    themselves = ", ".join(f"{min(found)} to {max(found)} with {variant}" for variant, found in own.items())
    verdict = (
        f"{'Loops double the distance' if doubles else 'Loops do not double the distance'} where each is asked for "
        f"what doubling reaches: distances up to {said} loops (95% right or more). Asked after the last loop alone, "
        f"models reach {themselves} (range over seeds)."
    )
    rows = []
    for variant in setting.variants:
        for loop in range(1, _loops(variant) + 1):
            if variant != taught and loop != _loops(variant):
                continue  # trained to be read after its last loop
            shares = [record["by_distance"][loop - 1] for record in records[variant]]
            rows.append([variant, str(loop), *(f"{100 * sum(s) / len(s):.0f}" for s in zip(*shares, strict=True))])
    made = figure(x="distance, edges", y="right, %")
    hops = list(range(1, setting.longest + 1))
    for loop in range(1, _loops(taught) + 1):
        seeds = [[100 * share for share in record["by_distance"][loop - 1]] for record in records[taught]]
        add_line(made, hops, seeds, name=f"{taught}, after {loop}", index=loop - 1)
    for index, variant in enumerate(alone):
        seeds = [[100 * share for share in record["by_distance"][-1]] for record in records[variant]]
        add_line(made, hops, seeds, name=variant, index=index, dash="dot")
    return Page(
        verdict=verdict,
        paper="Ouro (arXiv 2510.25741, section 6): a looped transformer needs loops that grow with log2 of a graph's "
        "diameter, a theorem for one layer applied log2(D) times; pointer doubling is the construction.",
        tables=[
            Table(
                head=["layers x loops", "read after loop", *(f"d = {hop}" for hop in hops)],
                rows=rows,
                caption="Ends of walks that are right, in percent, by their distance; mean over seeds.",
            )
        ],
        notes="`taught` asks the loss at loop r only of distances up to 2^r. That a model can learn it shows that one "
        "layer can double at every loop; it does not show that a model finds doubling by itself, which is what the "
        "other rows ask.",
        summary={"reach_taught": reach, "reach_alone": own},
        figure=made,
    )


EXPERIMENT = Experiment(
    title="Reachability: loops against log2 of the distance",
    question="A directed graph is a set of chains; at every node the model must say where the walk from it ends. One "
    "layer is applied 1 to R times. How far does it see after each loop?",
    settings=SETTINGS,
    variants=lambda setting: setting.variants,
    measure=measure,
    report=report,
)

if __name__ == "__main__":
    run(EXPERIMENT, __file__)
