"""Does a network that learned small mazes solve larger ones by looping longer, and does it need to see them again?

python experiments/deep_thinking_mazes.py [--setting small|full] [--seeds 0,1,2]
"""

from typing import Any

from _deep_thinking import Sizes, measure
from _lab import Cell, Experiment, Page, Results, Table, run
from _plots import add_line, figure

from loopwise.tasks.mazes import Mazes, MazesConfig

SMALL = Sizes(
    train_size=9,
    test_sizes=(9, 13, 17, 21),
    test_counts=(400, 400, 200, 100),
    dimensions=2,
    width=32,
    loops=10,
    alpha=0.01,
    test_loops=50,
    batch=24,
    steps=600,
    learning_rate=2e-3,
)
FULL = Sizes(
    train_size=9,
    test_sizes=(9, 13, 33, 59),
    test_counts=(2000, 2000, 1000, 1000),
    dimensions=2,
    width=128,
    loops=30,
    alpha=0.01,
    test_loops=1000,
    batch=50,
    steps=50_000,
    learning_rate=1e-3,
)
RECALL, WITHOUT = "recall", "no recall"


def task(size: int) -> Mazes:
    """Mazes of a size."""
    return Mazes(MazesConfig(size=size))


def of(cell: Cell) -> dict[str, Any]:
    """Train and test one variant."""
    return measure(cell, task, recall=cell.variant == RECALL, alpha=cell.setting.alpha)


def report(results: Results) -> Page:
    """The page."""
    sizes: Sizes = results.setting
    trained, larger, largest = sizes.test_sizes[0], sizes.test_sizes[1], sizes.test_sizes[-1]
    learned = results.interval(RECALL, f"accuracy_{trained}")
    far = results.interval(RECALL, f"accuracy_{larger}")
    gap = results.difference(RECALL, WITHOUT, f"accuracy_{larger}")
    best = [max(record[f"curve_{larger}"]) for record in results.records[RECALL].values()]
    before = [record[f"curve_{larger}"][sizes.loops - 1] for record in results.records[RECALL].values()]
    gain = [after - now for after, now in zip(best, before, strict=True)]
    shown = (
        f"{larger}x{larger} mazes: {far.text(1, 100, '%')} with recall, {gap.text(1, 100, sign=True)} points over none"
    )
    if learned.mean < 0.5:
        verdict = (
            f"Too small a setting: only {learned.text(1, 100, '%')} of the trained {trained}x{trained} are solved."
        )
    elif gap.low > 0:
        verdict = f"Reproduced in kind: {shown}."
    elif gap.mean > 0:
        verdict = f"In the paper's direction, not beyond the seeds' spread: {shown}."
    else:
        verdict = f"Not reproduced at this size: {shown}."
    plain = results.interval(WITHOUT, f"accuracy_{trained}")
    if plain.mean < 0.5 <= learned.mean:
        verdict += (
            f" In as many steps the network without recall has learned {plain.text(1, 100, '%')} of the trained size "
            "only, so most of the gap is one of learning, which the paper's long training hides."
        )
    verdict += (
        f" Looping beyond the {sizes.loops} loops of training adds {100 * min(gain):.0f} to "
        f"{100 * max(gain):.0f} points there."
    )
    rows = [
        [variant]
        + [results.interval(variant, f"accuracy_{size}").text(1, 100) for size in sizes.test_sizes]
        + [", ".join(f"{100 * value:.0f}" for value in results.values(variant, f"accuracy_{larger}"))]
        for variant in results.records
    ]
    table = Table(
        head=["variant", *(f"{size}x{size}" for size in sizes.test_sizes), f"seeds at {larger}x{larger}"],
        rows=rows,
        caption=f"Mazes solved whole, %, at each maze's most confident of {sizes.test_loops} loops, as in the paper.",
    )
    later = Table(
        head=["variant", "size", f"{sizes.loops} loops", "20", "30", f"{sizes.test_loops}"],
        rows=[
            [variant, f"{size}x{size}"]
            + [
                f"{100 * sum(r[f'curve_{size}'][loops - 1] for r in rows_.values()) / len(rows_):.1f}"
                for loops in (sizes.loops, 20, 30, sizes.test_loops)
            ]
            for variant, rows_ in results.records.items()
            for size in sizes.test_sizes
        ],
        caption="The same without choosing: %, mean over seeds, after so many loops.",
    )
    drawn = figure(x="loops", y="mazes solved whole, %")
    loops = list(range(1, sizes.test_loops + 1))
    for index, (variant, dash) in enumerate(((RECALL, "solid"), (WITHOUT, "dot"))):
        for offset, size in enumerate((trained, larger, largest)):
            curves = [[100 * v for v in r[f"curve_{size}"]] for r in results.records[variant].values()]
            add_line(drawn, loops, curves, name=f"{variant}, {size}x{size}", index=3 * index + offset, dash=dash)
    drawn.update_traces(marker={"size": 3})
    drawn.add_vline(x=sizes.loops, line={"dash": "dash", "color": "#888"})
    return Page(
        verdict=verdict,
        paper="Trained on 9x9, tested on 59x59 (Bansal et al. 2022, arXiv 2202.05826): 97.3% with recall and "
        "progressive loss, 82.7% with recall alone, 0% without recall; on 13x13 99.9% with recall and 86% without.",
        tables=[table, later],
        notes="Our pictures have one pixel a square, theirs two, so that our layers see twice as far into a maze; "
        "width, batch and steps are a small part of theirs (128, 50, 50,000). Both variants have the progressive term. "
        "The dashed line marks the loops of training; bands run from the least to the most seed.",
        summary={
            "recall_trained": learned.mean,
            "recall_larger": [far.mean, far.low, far.high],
            "gap_larger": [gap.mean, gap.low, gap.high],
            "gain_of_longer": gain,
        },
        figure=drawn,
    )


EXPERIMENT = Experiment(
    title="Deep Thinking on mazes",
    question="A convolutional network with one block in a loop marks the route through 9x9 mazes. Tested on larger "
    "ones with more loops, with the maze shown again at each loop (recall) and without.",
    settings={"small": SMALL, "full": FULL},
    variants=lambda setting: (RECALL, WITHOUT),
    measure=of,
    report=report,
)

if __name__ == "__main__":
    run(EXPERIMENT, __file__)
