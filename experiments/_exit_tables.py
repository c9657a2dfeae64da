"""Tables and figure of exit_rules.py: what each rule gains on random mixing, and what the prior over loops does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from _intervals import Interval, t_interval
from _lab import Results, Table
from _plots import add_line, figure

UNIFORM = "uniform"
LOOPS = 4
GRID = tuple(1 + step / 8 for step in range(8 * (LOOPS - 1) + 1))
"""Mean loops at which curves are read."""
MEANS = (2.0, 2.5, 3.0)
MIDDLE = GRID.index(2.5)
FIRST, SECOND, WRITTEN, ORACLE = "gate, stage I", "gate, stage II", "gate, stage II as written", "oracle"
UNTRAINED = {
    "delta": "state change",
    "second-difference": "second difference",
    "kl": "KL of predictions",
    "entropy": "entropy change",
    "stable": "same answer",
    "certainty": "certainty",
}
"""Rules that need no training, and what the tables call them."""
PAPER_GATES = {FIRST: 64.0, SECOND: 66.0}
"""MMLU of Ouro-1.4B at 2.5 mean loops, read off figure 5."""
PAPER_FIXED = (60.43, 66.71)
"""MMLU of Ouro-1.4B after two and after three loops, table 10."""


@dataclass(frozen=True)
class Told:
    """Figures of all seeds by variant and rule."""

    results: Results

    def gains(self, variant: str, rule: str, index: int) -> list[float | None]:
        """Of each seed, at one mean of the grid."""
        return [record["rules"][rule]["gain"][index] for record in self.results.records[variant].values()]

    def gain(self, variant: str, rule: str, index: int) -> Interval | None:
        """Nats below random mixing; None where a seed's rule cannot stop so early."""
        return _interval(self.gains(variant, rule, index))

    def more(self, variant: str, rule: str, other: str, index: int = MIDDLE) -> Interval | None:
        """By how much one rule gains more than another, paired by seed."""
        pairs = zip(self.gains(variant, rule, index), self.gains(variant, other, index), strict=True)
        return _interval([None if a is None or b is None else a - b for a, b in pairs])

    def of_rule(self, variant: str, rule: str, key: str) -> Interval | None:
        """A single figure of a rule."""
        return _interval([record["rules"][rule][key] for record in self.results.records[variant].values()])

    def column(self, variant: str, key: str, index: int) -> Interval:
        """One loop's figure of a list with one entry per loop."""
        return t_interval([record[key][index] for record in self.results.records[variant].values()])


def _interval(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return t_interval(known) if len(known) == len(values) else None


def shown(interval: Interval | None, *, digits: int = 4, scale: float = 1.0) -> str:
    """An interval with its sign; `cannot` where there is none."""
    return "cannot" if interval is None else interval.text(digits, scale, sign=True)


def named(rule: str) -> str:
    """What a table calls a rule."""
    return f"{UNTRAINED[rule]} (`{rule}`)" if rule in UNTRAINED else rule


def rules_table(told: Told) -> Table:
    """Every rule on the models of the uniform prior, and the paper's points beside ours."""
    mixed = sum(PAPER_FIXED) / 2
    papers = {rule: f"{right - mixed:+.1f}" for rule, right in PAPER_GATES.items()}
    papers["delta"] = "{:+.1f} to {:+.1f}".format(*(PAPER_GATES[SECOND] - less - mixed for less in (2, 1)))
    oracle = told.gain(UNIFORM, ORACLE, MIDDLE)
    rows = []
    for rule in (FIRST, SECOND, WRITTEN, *UNTRAINED, ORACLE):
        middle = told.gain(UNIFORM, rule, MIDDLE)
        share = "" if middle is None or oracle is None else f"{100 * middle.mean / oracle.mean:.0f}%"
        right = "" if rule == ORACLE else shown(told.of_rule(UNIFORM, rule, "accuracy_gain"), digits=2, scale=100)
        rows.append(
            [
                named(rule),
                *(shown(told.gain(UNIFORM, rule, GRID.index(mean))) for mean in MEANS),
                shown(told.of_rule(UNIFORM, rule, "area")),
                share,
                right,
                papers.get(rule, ""),
            ]
        )
    return Table(
        head=[
            "rule",
            *(f"at {mean:g} loops" for mean in MEANS),
            "mean over 1 to 4",
            "of the oracle's, at 2.5",
            "accuracy at 2.5, points",
            "Ouro, MMLU at 2.5, points",
        ],
        rows=rows,
        caption="Uniform prior. Nats per token below random mixing of the two neighbouring fixed depths at the same "
        "mean loops, on held-out text; more is better, below 0 is worse than knowing nothing. `cannot`: it does not "
        "stop so early. Accuracy is that of the likeliest next token, again less random mixing's.",
    )


def priors_table(told: Told) -> Table:
    """What each prior leaves of the language model, and where its gate would leave."""
    results = told.results
    rows = []
    for variant in results.records:
        against = "" if variant == UNIFORM else results.difference(variant, UNIFORM, "last_loss").text(3, sign=True)
        rows.append(
            [
                variant,
                *(told.column(variant, "loss", loop).text(3) for loop in range(LOOPS)),
                against,
                results.interval(variant, "expected_loss").text(3),
                " ".join(f"{told.column(variant, 'leaving', loop).mean:.3f}" for loop in range(LOOPS)),
                "{:.2f} to {:.2f}".format(*_range([row["leaving"][0] for row in results.records[variant].values()])),
            ]
        )
    return Table(
        head=[
            "stage I",
            *(f"after {loop} loop{'s' if loop > 1 else ''}" for loop in range(1, LOOPS + 1)),
            "after 4, less uniform",
            "expected under its gate",
            "p(1) to p(4)",
            "p(1), seeds",
        ],
        rows=rows,
        caption="Held-out loss, nats per token, by fixed loops and as the gate would leave if one drew from it; the "
        "mean exit distribution p over loops.",
    )


def stages_table(told: Told) -> Table:
    """The gate of both stages on the models of every prior."""
    rows = []
    for variant, records in told.results.records.items():
        best = best_untrained(told, variant)
        skipped = {
            gate: t_interval([record["skipping"][gate]["gain"] for record in records.values()])
            for gate in (FIRST, SECOND)
        }
        rows.append(
            [
                variant,
                *(shown(told.gain(variant, gate, MIDDLE)) for gate in (FIRST, SECOND, WRITTEN)),
                shown(told.more(variant, SECOND, FIRST)),
                f"{shown(told.gain(variant, best, MIDDLE))}, `{best}`",
                *(shown(skipped[gate]) for gate in (FIRST, SECOND)),
            ]
        )
    return Table(
        head=[
            "stage I",
            FIRST,
            SECOND,
            WRITTEN,
            "stage II less stage I",
            "best rule without training",
            "stage I, skipping",
            "stage II, skipping",
        ],
        rows=rows,
        caption="Nats below random mixing at 2.5 mean loops. `skipping`: tokens that stop do no more work and later "
        "ones read the plane of their exit (`last_exited`); elsewhere they fill their planes (`per_loop`), as in "
        "training.",
    )


def best_untrained(told: Told, variant: str) -> str:
    """The rule without training that gains most at 2.5 loops."""
    found = {rule: told.gain(variant, rule, MIDDLE) for rule in UNTRAINED}
    gains = {rule: interval.mean for rule, interval in found.items() if interval is not None}
    return max(gains, key=gains.__getitem__)


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def drawn(told: Told) -> Any:
    """Left: what rules gain by mean loops. Right: loss by loops under each prior."""
    made = figure(x="mean loops", y="below random mixing, thousandths of a nat", width=1040)
    for index, rule in enumerate((SECOND, FIRST, *UNTRAINED)):
        seeds = [record["rules"][rule]["gain"] for record in told.results.records[UNIFORM].values()]
        here = [at for at in range(len(GRID)) if all(seed[at] is not None for seed in seeds)]
        lines = [[1000 * seed[at] for at in here] for seed in seeds]
        add_line(made, [GRID[at] for at in here], lines, name=UNTRAINED.get(rule, rule), index=index)
    made.update_traces(marker={"size": 4})
    before = len(made.data)
    for index, (variant, records) in enumerate(told.results.records.items()):
        losses = [record["loss"] for record in records.values()]
        add_line(made, list(range(1, LOOPS + 1)), losses, name=variant, index=index, dash="dot")
    for trace in made.data[before:]:
        trace.update(xaxis="x2", yaxis="y2", legend="legend2")
    made.add_hline(y=0, line={"dash": "dash", "color": "#888"})
    made.update_layout(
        xaxis={"domain": [0, 0.55]},
        xaxis2={"domain": [0.67, 1], "title": "loops, all tokens", "dtick": 1, "anchor": "y2"},
        yaxis2={"title": "loss, nats per token", "anchor": "x2"},
        height=500,
        margin={"t": 70},
        legend={"orientation": "h", "x": 0, "y": 1.17, "font": {"size": 11}},
        legend2={"x": 0.99, "y": 0.99, "xanchor": "right", "bgcolor": "rgba(255,255,255,0.7)", "font": {"size": 11}},
    )
    return made
