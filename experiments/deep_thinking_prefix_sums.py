"""Does a network that learned short prefix sums do longer ones by looping longer? What recall and progressive loss add.

python experiments/deep_thinking_prefix_sums.py [--setting small|full] [--seeds 0,1,2]
"""

from typing import Any

from _deep_thinking import Sizes, measure
from _lab import Cell, Experiment, Page, Results, Table, run
from _plots import add_line, figure

from loopwise.tasks.prefix_sums import PrefixSums, PrefixSumsConfig

SMALL = Sizes(
    train_size=24,
    test_sizes=(24, 48, 96, 192),
    test_counts=(500, 500, 500, 200),
    dimensions=1,
    width=32,
    loops=16,
    alpha=1.0,
    test_loops=120,
    batch=64,
    steps=400,
    learning_rate=2e-3,
)
FULL = Sizes(
    train_size=32,
    test_sizes=(32, 64, 128, 512),
    test_counts=(2000, 2000, 2000, 2000),
    dimensions=1,
    width=400,
    loops=30,
    alpha=1.0,
    test_loops=500,
    batch=100,
    steps=15_000,
    learning_rate=1e-3,
)
BOTH, RECALL, WITHOUT = "recall + progressive", "recall", "no recall + progressive"


def task(size: int) -> PrefixSums:
    """Strings of a length."""
    return PrefixSums(PrefixSumsConfig(bits=size))


def of(cell: Cell) -> dict[str, Any]:
    """Train and test one variant."""
    alpha = 0.0 if cell.variant == RECALL else cell.setting.alpha
    return measure(cell, task, recall=cell.variant != WITHOUT, alpha=alpha)


def report(results: Results) -> Page:
    """The page."""
    sizes: Sizes = results.setting
    trained, far = sizes.test_sizes[0], sizes.test_sizes[2]
    learned = results.interval(BOTH, f"accuracy_{trained}")
    reached = results.interval(BOTH, f"accuracy_{far}")
    recall = results.difference(BOTH, WITHOUT, f"accuracy_{far}")
    progressive = results.difference(BOTH, RECALL, f"accuracy_{far}")
    shown = (
        f"{far} bits after training on {trained}: {reached.text(1, 100, '%')}; recall adds "
        f"{recall.text(1, 100, sign=True)} points, the progressive loss {progressive.text(1, 100, sign=True)}"
    )
    if learned.mean < 0.5:
        verdict = f"Too small a setting: only {learned.text(1, 100, '%')} of the trained {trained} bits are right."
    elif recall.low > 0 and progressive.low > 0:
        verdict = f"Reproduced: {shown}."
    elif recall.low > 0 or progressive.low > 0:
        verdict = f"Reproduced in part: {shown}."
    else:
        verdict = f"Not beyond the seeds' spread at this size: {shown}."
    table = Table(
        head=["variant", *(f"{size} bits" for size in sizes.test_sizes), f"seeds at {far} bits"],
        rows=[
            [variant]
            + [results.interval(variant, f"accuracy_{size}").text(1, 100) for size in sizes.test_sizes]
            + [", ".join(f"{100 * value:.0f}" for value in results.values(variant, f"accuracy_{far}"))]
            for variant in results.records
        ],
        caption=f"Strings with every bit right, %, at each string's most confident of {sizes.test_loops} loops.",
    )
    drawn = figure(x="loops", y=f"strings of {far} bits right, %")
    for index, (variant, rows) in enumerate(results.records.items()):
        curves = [[100 * value for value in record[f"curve_{far}"]] for record in rows.values()]
        add_line(drawn, list(range(1, sizes.test_loops + 1)), curves, name=variant, index=index)
    drawn.update_traces(marker={"size": 3})
    drawn.add_vline(x=sizes.loops, line={"dash": "dash", "color": "#888"})
    return Page(
        verdict=verdict,
        paper="Trained on 32 bits, tested on 512 (Bansal et al. 2022, arXiv 2202.05826): 97.1% with recall and "
        "progressive loss, 90.3% where the progressive loss always begins at loop 0; networks without recall fail.",
        tables=[table],
        notes="The dashed line marks the loops of training; bands run from the least to the most seed. `recall` alone "
        f"is trained by its answer after {sizes.loops} loops.",
        summary={
            "trained": learned.mean,
            "reached": [reached.mean, reached.low, reached.high],
            "recall": [recall.mean, recall.low, recall.high],
            "progressive": [progressive.mean, progressive.low, progressive.high],
        },
        figure=drawn,
    )


EXPERIMENT = Experiment(
    title="Deep Thinking on prefix sums",
    question="A convolutional network with one block in a loop says for each bit whether the ones up to it are odd in "
    "number. Tested on longer strings with more loops, with and without recall and progressive loss.",
    settings={"small": SMALL, "full": FULL},
    variants=lambda setting: (BOTH, RECALL, WITHOUT),
    measure=of,
    report=report,
)

if __name__ == "__main__":
    run(EXPERIMENT, __file__)
