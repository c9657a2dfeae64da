"""A small random-depth model: what it answers after each number of loops, and exits that nobody trained.

python experiments/depth_curve.py [--setting small|full] [--seeds 0,1,2]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from _intervals import Interval, t_interval
from _lab import Cell, Experiment, Page, Results, Table, run
from _plots import add_line, panels
from _small_lm import recipe
from _text import Text, train_on_text

from loopwise.loops.exits import parse_rule
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM
from loopwise.objectives.random_depth import RandomDepth
from loopwise.study.depth import depth
from loopwise.study.examples import Examples, of_text
from loopwise.study.exit_curves import ExitCurves, exits
from loopwise.study.exits import measure_depths, measure_exit
from loopwise.study.record import Record, record
from loopwise.study.rules import family_of
from loopwise.train.batches import Batch
from loopwise.train.presets import TextDials, huginn_tiny

RANDOM, FIXED, ONCE = "random depth", "fixed depth", "one loop"
PUBLISHED = (
    "kl:0.0005",
    "delta:0.03",
    "second-difference:0.01",
    "second-difference:0.00001",
    "entropy:0.001",
    "stable:5",
)
"""Rules with the thresholds of their papers; of the second difference both ends of its range."""
ROWS = 8
"""Rows of one held-out document, at most."""
HEAD = 16
"""Features of an attention head."""
ORACLE = "oracle"
SHOWN = (1, 2, 4, 8, 16, 32, 64, 128)
MEANS = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24)
TOLERANCE = 0.01
"""Nats that count as no harm."""
POLICIES = ("per_loop", "last_exited")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes."""

    layers: tuple[int, int, int]
    """Prelude, core and coda."""
    loops: int
    """What random depths aim at: they are drawn around one more, and at most four times as deep."""
    backprop: int
    """The last so many loops carry gradient."""
    width: int
    text: Text
    steps: int
    learning_rate: float
    most: int
    """Loops of the depth curve."""
    exit_loops: int
    """R: where every token stops at the latest."""
    units: int
    """Held-out tokens."""
    run_units: int
    """Held-out tokens on which exits are carried out; on all others they are replayed."""
    starts: int
    """Random starts to compare."""


SETTINGS = {
    "small": Setting(
        layers=(1, 2, 1),
        loops=8,
        backprop=4,
        width=64,
        text=Text(corpus_bytes=4_000_000, vocabulary=512, context=64, rows=8),
        steps=350,
        learning_rate=3e-3,
        most=32,
        exit_loops=8,
        units=4096,
        run_units=2048,
        starts=4,
    ),
    "full": Setting(
        layers=(2, 4, 2),
        loops=32,
        backprop=8,
        width=768,
        text=Text(corpus_bytes=10**12, vocabulary=32_768, context=1024, rows=64),
        steps=20_000,
        learning_rate=1e-3,
        most=128,
        exit_loops=32,
        units=65_536,
        run_units=16_384,
        starts=4,
    ),
}


def _config(setting: Setting, variant: str) -> LoopedLMConfig:
    """A small Huginn, as the preset makes it."""
    before, inside, after = setting.layers
    made = huginn_tiny(TextDials(width=setting.width, layers=inside, loops=setting.loops)).config.model
    assert made is not None
    objective = _objective(setting, variant)
    return replace(
        made,
        vocab_size=setting.text.vocabulary,
        heads=setting.width // HEAD,
        kv_heads=setting.width // HEAD,
        head_width=HEAD,
        prelude_layers=before,
        coda_layers=after,
        loops=objective.loops,
        trained_loops=(1 if variant == RANDOM else objective.loops, objective.deepest),
    )


def _objective(setting: Setting, variant: str) -> RandomDepth:
    if variant == RANDOM:
        return RandomDepth(loops=setting.loops, backprop=setting.backprop)
    # The mean of the drawn depths.
    loops = setting.loops + 1 if variant == FIXED else 1
    return RandomDepth(loops=loops, sampler="fixed", backprop=min(setting.backprop, loops))


def measure(cell: Cell) -> dict[str, Any]:
    """Train one model, read it after every loop, and replay and run its exits."""
    setting: Setting = cell.setting
    model = train_on_text(
        _config(setting, cell.variant),
        setting.text,
        _objective(setting, cell.variant),
        recipe(setting.steps, setting.learning_rate),
        seed=cell.seed,
        device=cell.device,
        checkpoints=cell.checkpoints,
        log=cell.log,
    )
    data = of_text(
        setting.text.read(),
        setting.text.tokenizer(),
        units=setting.units,
        length=setting.text.context,
        most_documents=ROWS,
    )
    taken = record(model, data, max_loops=setting.most)
    curve = depth(taken)
    found: dict[str, Any] = {
        "losses": curve.loss.tolist(),
        "accuracies": curve.accuracy.tolist(),
        "changes": taken.change.mean(1).tolist(),
        "kl": taken.kl.mean(1).tolist(),
    }
    if cell.variant == RANDOM:
        found["starts"] = _starts(model, data, setting)
        found["exits"] = _curves(exits(taken, max_loops=setting.exit_loops))
        found["published"] = {rule: _replayed(taken, rule, setting.exit_loops) for rule in PUBLISHED}
        found["run"] = _carried_out(model, data, setting)
    return found


def _starts(model: LoopedLM, data: list[Examples], setting: Setting) -> list[list[float]]:
    """Losses by loops, for each of some random starts."""
    rows = -(-setting.run_units // len(data[0].targets.flatten()))
    taken = [record(model, data[:rows], max_loops=setting.loops + 1, start=seed) for seed in range(setting.starts)]
    return [each.losses.mean(1).tolist() for each in taken]


def _curves(found: ExitCurves) -> dict[str, Any]:
    curves = {
        curve.name: {
            "mean_loops": curve.mean_loops.tolist(),
            "loss": curve.loss.tolist(),
            "gain": curve.gain.tolist(),
            "flops": curve.flops.tolist(),
        }
        for curve in found.curves
    }
    oracle = {"mean_loops": found.oracle_loss_loops.tolist(), "loss": found.oracle_loss.tolist()}
    return {"rules": curves, "oracle": oracle, "fixed_flops": found.fixed_flops.tolist()}


def _replayed(taken: Record, rule: str, most: int) -> dict[str, float]:
    """One rule with its own threshold, by replay."""
    family, threshold = family_of(taken, rule)
    used = np.minimum(family.exits(threshold), most)
    by_loop = taken.losses[:most].mean(1)
    loss, mean = float(taken.losses[used - 1, np.arange(taken.units)].mean()), float(used.mean())
    mixed = float(np.interp(mean, taken.depths[:most], by_loop))
    whole = float(taken.costs.flops(most))
    return {
        "mean_loops": mean,
        "loss": loss,
        "over_full": loss - float(by_loop[-1]),
        "gain": mixed - loss,
        "flops_saved": 1 - float(taken.costs.flops(mean, reads=family.reads)) / whole,
    }


def _carried_out(model: LoopedLM, data: list[Examples], setting: Setting) -> dict[str, dict[str, float]]:
    """Rules of states run, once so that tokens that stopped fill their planes and once so that they do not.

    Rules of predictions cannot be run on a whole text: the coda reads earlier tokens, which may not have stopped yet.
    """
    rows = -(-setting.run_units // len(data[0].targets.flatten()))
    batches = [
        Batch(
            tokens=each.inputs,
            targets=each.targets,
            documents=torch.zeros_like(each.inputs),
            mask=torch.ones_like(each.targets, dtype=torch.bool),
        )
        for each in data[:rows]
    ]
    depths = measure_depths(model, batches, max_loops=setting.exit_loops)
    full = float(depths.mean_losses[-1])
    found = {}
    for rule in PUBLISHED:
        if "logits" in parse_rule(rule).needs:
            continue
        filled, skipped = (measure_exit(model, batches, rule, depths, policy=policy) for policy in POLICIES)
        found[rule] = {
            "mean_loops": skipped.mean_loops,
            "mean_loops_filled": filled.mean_loops,
            "over_full": skipped.loss - full,
            "over_full_filled": filled.loss - full,
        }
    return found


def _at(results: Results, variant: str, loops: int) -> list[float]:
    return [record["losses"][loops - 1] for record in results.records[variant].values()]


def _less(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of the differences, paired by seed."""
    return t_interval([a - b for a, b in zip(first, second, strict=True)])


def _rules(results: Results) -> list[str]:
    return list(next(iter(results.records[RANDOM].values()))["exits"]["rules"])


def _gain(record: Mapping[str, Any], name: str, mean: float) -> float:
    """Nats below random mixing at a mean, between two thresholds their chord; NaN where no threshold goes so low."""
    found = record["exits"]["oracle"] if name == ORACLE else record["exits"]["rules"][name]
    mixed = np.interp(mean, np.arange(1, len(record["losses"]) + 1), record["losses"])
    return float(mixed - np.interp(mean, found["mean_loops"], found["loss"], left=math.nan))


def _gains(results: Results, name: str, mean: float) -> list[float]:
    return [_gain(record, name, mean) for record in results.records[RANDOM].values()]


def _published(results: Results, rule: str, key: str, part: str = "published") -> Interval:
    return t_interval([record[part][rule][key] for record in results.records[RANDOM].values()])


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that was published, with what we found."""

    name: str
    claim: str
    source: str
    ours: str
    holds: bool


def _claims(results: Results) -> list[Claim]:
    setting: Setting = results.setting
    mean, most, stop = setting.loops + 1, setting.most, setting.exit_loops
    whole = _at(results, RANDOM, mean)
    falls = _less(whole, _at(results, RANDOM, 1))
    beyond = _less(_at(results, RANDOM, most), whole)
    better = _less(_at(results, FIXED, mean), whole)
    early = _less(_at(results, FIXED, mean // 2), _at(results, RANDOM, mean // 2))
    late = _less(_at(results, FIXED, most), _at(results, RANDOM, most))
    once = _less(whole, _at(results, ONCE, 1))
    kl = [_published(results, "kl:0.0005", key) for key in ("mean_loops", "over_full")]
    delta = [_published(results, "delta:0.03", key) for key in ("mean_loops", "over_full")]
    point = _point(setting)
    second, first, of_kl = (_gains(results, name, point) for name in ("second-difference", "delta", "kl"))
    than = {name: _less(second, other) for name, other in (("delta", first), ("kl", of_kl))}
    ends = [[losses[mean - 1] for losses in record["starts"]] for record in results.records[RANDOM].values()]
    apart = max(max(losses) - min(losses) for losses in ends)
    return [
        Claim(
            name="more loops help up to the mean",
            claim="loss falls with loops up to the trained mean",
            source="Huginn at 1, 4, 8, 16, 32 loops: HellaSwag 29.3, 43.5, 58.5, 64.7, 65.2%",
            ours=f"loss at {mean} less that at 1: {_signed(falls)}",
            holds=falls.high < 0,
        ),
        Claim(
            name="loops beyond it do no harm",
            claim="many more loops than the mean neither help nor harm",
            source="Huginn at 32 and 64 loops: GSM8K 41.8, 42.2%; MATH500 17.6, 18.6%",
            ours=f"loss at {most} less that at {mean}: {_signed(beyond)}",
            holds=beyond.high < TOLERANCE,
        ),
        Claim(
            name="a fixed depth is good at its own depth alone",
            claim="trained at a fixed depth a model is a little better there and collapses elsewhere",
            source="Huginn's author (issue 15 of its repository); a model card, "
            "huggingface.co/ahiok/looped-fineweb-10m, trained at 16 loops: 7.41, 4.13, 3.79, 3.99, 4.62 nats at 1, "
            "8, 16, 32, 128",
            ours=f"fixed less random depth: {_signed(better)} at {mean}, {_signed(early)} at {mean // 2}, "
            f"{_signed(late)} at {most}",
            holds=better.high < 0 and early.low > 0 and late.low > 0,
        ),
        Claim(
            name="loops are worth having",
            claim="the same shape trained with one loop is worse",
            source="Huginn's controls of 180B tokens: HellaSwag 48.8% against 37.3%",
            ours=f"random depth at {mean} less one loop at 1: {_signed(once)}",
            holds=once.high < 0,
        ),
        Claim(
            name="the start does not matter",
            claim="paths from different random starts end alike",
            source="Huginn, section 7: pictures",
            ours=f"losses of {setting.starts} starts at {mean} loops lie within {apart:.4f} nats in every seed",
            holds=apart < TOLERANCE,
        ),
        Claim(
            name="the KL rule halves the loops",
            claim="KL below 5e-4 stops early at no sure loss",
            source="Huginn, section 6.1: 12.7 to 16.2 of 32 loops on MMLU's categories; MT-Bench 5.56 against 5.66 "
            "(standard error 0.39)",
            ours=f"{kl[0].text(2)} of {stop} loops, {_signed(kl[1])} nats over all of them",
            holds=kl[0].high < 0.6 * stop and kl[1].high < TOLERANCE,
        ),
        Claim(
            name="so does the latent difference",
            claim="a relative change below 0.03 stops early at no sure loss",
            source="arXiv 2510.14961: 1.85 times as fast as 32 loops, GSM8K 42.2 against 41.8%",
            ours=f"{delta[0].text(2)} of {stop} loops, {_signed(delta[1])} nats over all of them",
            holds=delta[0].high < 0.6 * stop and delta[1].high < TOLERANCE,
        ),
        Claim(
            name="the second difference is the better rule",
            claim="the second difference of the state stops better than its norm or KL at equal loops",
            source="Pappone et al. (arXiv 2509.23314): 580 to 360 ms a token over thresholds 1e-5 to 1e-2 at a flat "
            "perplexity, where the first difference degrades past 1e-3",
            ours=f"nats gained at a mean of {point} loops over delta {_signed(than['delta'])}, over KL "
            f"{_signed(than['kl'])}",
            holds=all(interval.low > 0 for interval in than.values()),
        ),
    ]


def _signed(interval: Interval) -> str:
    return interval.text(3, sign=True)


def _point(setting: Setting) -> int:
    """The mean at which rules are compared; the second difference needs 3 loops at least."""
    return max(4, setting.exit_loops // 8)


def _verdict(results: Results) -> str:
    claims, point = _claims(results), _point(results.setting)
    kept = [claim.name for claim in claims if claim.holds]
    lost = [claim.name for claim in claims if not claim.holds]
    gains = {name: _gains(results, name, point) for name in (*_rules(results), ORACLE)}
    worth = {name: t_interval(values) for name, values in gains.items() if not any(map(math.isnan, values))}
    best = max((name for name in worth if name != ORACLE), key=lambda name: worth[name].mean)
    better = f"{worth[best].text(4, sign=True)} nats"
    settled = max(_settled(record, results.setting.exit_loops) for record in results.records[RANDOM].values())
    return (
        f"Reproduced: {'; '.join(kept) or 'nothing'}. Not reproduced: {'; '.join(lost) or 'nothing'}. "
        f"At a mean of {point} of {results.setting.exit_loops} loops "
        + (f"{best} beats" if worth[best].low > 0 else f"no rule surely beats (the best is {best})")
        + f" mixing fixed depths at random: {better}; the oracle: {worth[ORACLE].text(3, sign=True)}."
        + (
            f" Too small to tell rules apart: after loop {settled} the loss moves by less than {TOLERANCE} nats."
            if settled <= results.setting.exit_loops / 2
            else ""
        )
    )


def _settled(record: Mapping[str, Any], most: int) -> int:
    """The loop from which on losses stay within the tolerance of that at `most`."""
    losses = record["losses"][:most]
    return 1 + max((loop for loop, loss in enumerate(losses, 1) if abs(loss - losses[-1]) > TOLERANCE), default=0)


def _summary(results: Results) -> dict[str, Any]:
    return {claim.name: {"holds": claim.holds, "ours": claim.ours} for claim in _claims(results)}


def _depth_table(results: Results, shown: Sequence[int]) -> Table:
    rows = [
        [variant, *(t_interval(_at(results, variant, loops)).text(3) for loops in shown)]
        for variant in (RANDOM, FIXED, ONCE)
    ]
    moved = [
        t_interval([record["changes"][loops - 1] for record in results.records[RANDOM].values()]) for loops in shown
    ]
    rows.append(["relative change of the state, random depth", *(interval.text(3) for interval in moved)])
    return Table(head=["trained with", *map(str, shown)], rows=rows, caption="Loss on held-out text in nats, by loops.")


def _claims_table(results: Results) -> Table:
    rows = [[each.claim, each.source, each.ours, "yes" if each.holds else "no"] for each in _claims(results)]
    return Table(head=["claim", "published", "ours, nats", "holds here"], rows=rows, caption="Claims, one by one.")


def _published_table(results: Results) -> Table:
    keys = ("mean_loops", "flops_saved", "over_full", "gain")
    rows = []
    for rule in PUBLISHED:
        loops, saved, over, gain = (_published(results, rule, key) for key in keys)
        rows.append([f"`{rule}`", loops.text(2), saved.text(0, scale=100), over.text(4, sign=True), gain.text(4)])
    stop = results.setting.exit_loops
    return Table(
        head=["rule", f"mean loops of {stop}", "operations saved, %", f"nats over {stop} loops", "nats below mixing"],
        rows=rows,
        caption="Rules at the thresholds of their papers, replayed; operations include the readouts that a rule needs.",
    )


def _gain_table(results: Results, means: Sequence[float]) -> Table:
    def entry(name: str, mean: float) -> str:
        values = _gains(results, name, mean)
        return "never so early" if any(map(math.isnan, values)) else t_interval(values).text(4)

    rows = [[name, *(entry(name, mean) for mean in means)] for name in (*_rules(results), ORACLE)]
    return Table(
        head=["rule", *(f"mean {mean:g}" for mean in means)],
        rows=rows,
        caption="Nats below mixing the two neighbouring fixed depths at random, every rule at the threshold of this "
        "mean.",
    )


def _run_table(results: Results) -> Table:
    rows = []
    for rule in next(iter(results.records[RANDOM].values()))["run"]:
        keys = ("mean_loops_filled", "over_full_filled", "mean_loops", "over_full")
        found = [_published(results, rule, key, "run") for key in keys]
        rows.append([f"`{rule}`", *(f.text(2 if i % 2 == 0 else 4, sign=i % 2 == 1) for i, f in enumerate(found))])
    return Table(
        head=["rule", "mean loops, filled", "nats over full depth", "mean loops, skipped", "nats over full depth"],
        rows=rows,
        caption="Rules of states run on fewer tokens: filled, a token that stopped still writes the planes of later "
        "loops; skipped, later tokens read the plane of its exit, which is what saves work.",
    )


def report(results: Results) -> Page:
    """The depth curves, and what exits are worth beside random mixing and the oracle."""
    setting: Setting = results.setting
    mean, stop = setting.loops + 1, setting.exit_loops
    shown = sorted({loops for loops in (*SHOWN, mean) if loops <= setting.most})
    return Page(
        verdict=_verdict(results),
        paper=PAPER,
        tables=[
            _depth_table(results, shown),
            _claims_table(results),
            _published_table(results),
            _gain_table(results, [m for m in MEANS if m < stop]),
            _run_table(results),
        ],
        notes=NOTES.format(mean=mean, deepest=4 * setting.loops),
        summary=_summary(results),
        figure=_figure(results, [loops for loops in shown if loops != mean]),
    )


def _figure(results: Results, ticks: Sequence[int]) -> Any:
    """Loss by loops; loss of exits by mean loops; and how far that is below random mixing."""
    setting: Setting = results.setting
    records = list(results.records[RANDOM].values())
    made = panels(
        [("loops", "loss, nats"), ("mean loops", "loss with exits, nats"), ("mean loops", "nats below random mixing")]
    )
    for index, variant in enumerate((RANDOM, FIXED, ONCE)):
        seeds = [record["losses"] for record in results.records[variant].values()]
        add_line(made, range(1, setting.most + 1), seeds, name=f"trained: {variant}", index=index, mode="lines")
    depths = range(1, setting.exit_loops + 1)
    mixed = [record["losses"][: setting.exit_loops] for record in records]
    add_line(made, depths, mixed, name="random mixing", index=0, dash="dot", panel=2, mode="lines")
    grid = np.linspace(1, setting.exit_loops, 57)
    for index, name in enumerate((*_rules(results), ORACLE), 3):
        columns = [(point, _gains(results, name, point)) for point in grid]
        kept = [(point, gains) for point, gains in columns if not any(map(math.isnan, gains))]
        points = [point for point, _ in kept]
        gains = [list(row) for row in zip(*(gains for _, gains in kept), strict=True)]
        losses = [
            [float(np.interp(point, depths, mixed[seed])) - gain for point, gain in zip(points, row, strict=True)]
            for seed, row in enumerate(gains)
        ]
        add_line(made, points, losses, name=f"exit: {name}", index=index, panel=2, mode="lines")
        if name != ORACLE:
            add_line(made, points, gains, name="", index=index, panel=3, mode="lines", legend=False)
    made.update_layout(xaxis={"type": "log", "tickvals": ticks}, yaxis={"range": _span(results)})
    return made


def _span(results: Results) -> list[float]:
    """Losses that the picture shows: all of the random depth's, others as far as they are like them."""
    losses = [loss for record in results.records[RANDOM].values() for loss in record["losses"]]
    low, high = min(losses), max(losses)
    return [low - 0.1 * (high - low), high + 0.6 * (high - low)]


PAPER = (
    "Huginn (arXiv 2502.05171), 3.5B parameters, 795B tokens, depths drawn around 33, the last 8 loops with gradient; "
    "its exits are in section 6.1 and in its code. The second difference is Pappone et al.'s (arXiv 2509.23314), on a "
    "looped model of 124M. Numbers stand in the table of claims."
)
NOTES = (
    "Random depth draws the loops of each step from Huginn's log-normal Poisson (mean {mean}, at most {deepest}); "
    "fixed depth always runs {mean}. Weights, text, width and steps are the same for all, and so is the learning "
    "rate. `No harm` and `no loss` hold when the interval ends below 0.01 nats, `halves` when it ends "
    "below 0.6 of all loops. Replayed exits stand for "
    "tokens that fill their planes; the coda of a replay reads other tokens at the same loop, as in training. Rules "
    "that read predictions cannot be run on a whole text with a coda, so they are replayed alone. The second "
    "difference is absolute and our states are of another size than the paper's, so its thresholds need not mean "
    "the same here; the gains by mean loops do not depend on that. The oracle sees the losses themselves, noise "
    "included, so no rule can reach it."
)

EXPERIMENT = Experiment(
    title="Depth curve and exits that nobody trained",
    question="A small Huginn (prelude, core, coda, random start) learns text with a new depth at every step and "
    "truncated backpropagation. How does its loss go with loops, within and beyond what was trained, and what are "
    "exits worth that nobody trained: against mixing fixed depths at random, and against an oracle that knows every "
    "loss?",
    settings=SETTINGS,
    variants=lambda setting: (RANDOM, FIXED, ONCE),
    measure=measure,
    report=report,
)

if __name__ == "__main__":
    run(EXPERIMENT, __file__)
