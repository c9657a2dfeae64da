"""A plain model whose middle is looped at inference, against one of the same parameters that was trained in loops.

python experiments/looped_at_inference.py [--setting small|full] [--seeds 0,1,2]
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from _intervals import Interval, t_interval
from _lab import Cell, Experiment, Page, Results, Table, run
from _plots import add_line, figure
from _small_lm import recipe, small_lm
from _text import Text, train_on_text
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from loopwise.models.accounting import count_parameters
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LMContext, LoopedLM
from loopwise.objectives.base import Objective
from loopwise.objectives.last_loop import LastLoop
from loopwise.objectives.random_depth import RandomDepth
from loopwise.train.batches import Batch
from loopwise.train.step import executed_flops

WAYS = ("naive", "damped", "anchored")
PLAIN, LOOPED, CHEAP, ANY = "plain", "looped", "looped, FLOPs of plain", "any loops"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes."""

    layers: tuple[int, int, int]
    """Before, inside and after the loop."""
    loops: int
    """Loops of those that are trained in loops, and the most for which windows are tried."""
    most: int
    """Loops that all are asked for."""
    width: int
    text: Text
    steps: int
    learning_rate: float
    held_out: int
    """Rows of held-out text; where and how to loop is chosen on one half, all losses are of the other."""


SETTINGS = {
    "small": Setting(
        layers=(1, 2, 1),
        loops=4,
        most=6,
        width=64,
        text=Text(corpus_bytes=4_000_000, vocabulary=512, context=64, rows=8),
        steps=500,
        learning_rate=3e-3,
        held_out=256,
    ),
    "full": Setting(
        layers=(4, 4, 4),
        loops=4,
        most=8,
        width=768,
        text=Text(corpus_bytes=10**12, vocabulary=32_768, context=1024, rows=64),
        steps=20_000,
        learning_rate=1e-3,
        held_out=512,
    ),
}


VARIANTS = (PLAIN, LOOPED, CHEAP, ANY)


def _config(setting: Setting, variant: str) -> LoopedLMConfig:
    before, inside, after = setting.layers
    config = small_lm(
        vocab_size=setting.text.vocabulary,
        width=setting.width,
        layers=inside,
        loops=1 if variant == PLAIN else setting.loops,
        length=setting.text.context,
        prelude=before,
    )
    return replace(config, coda_layers=after)


def _objective(setting: Setting, variant: str) -> Objective:
    if variant == ANY:
        return RandomDepth(loops=setting.loops, sampler="uniform", max_loops=setting.loops, backprop=None)
    return LastLoop(loops=1 if variant == PLAIN else setting.loops)


def _step_flops(setting: Setting, variant: str) -> float:
    """Operations of a training step; of a random depth, the mean."""
    objective, config = _objective(setting, variant), _config(setting, variant)
    depths = range(1, setting.loops + 1) if variant == ANY else [config.loops]
    plans = [LastLoop(loops=depth).plan(seed=0, step=0, micro=0) for depth in depths]
    tokens, context = setting.text.rows * setting.text.context, setting.text.context
    costs = [executed_flops(config, plan, tokens=tokens, context=context, trains=objective.trains) for plan in plans]
    return sum(costs) / len(costs)


def _steps(setting: Setting, variant: str) -> int:
    if variant != CHEAP:
        return setting.steps
    return round(setting.steps * _step_flops(setting, PLAIN) / _step_flops(setting, CHEAP))


def window(model: LoopedLM, first: int, layers: int) -> LoopedLM:
    """The same layers in the same order, of which `layers` from number `first` on are the core."""
    after = model.config.layers - first - layers
    config = replace(model.config, prelude_layers=first, core_layers=layers, coda_layers=after)
    moved = LoopedLM(config)
    sources = [f"{stack}.{i}" for stack in ("prelude", "core", "coda") for i in range(len(getattr(model, stack)))]
    targets = [f"{stack}.{i}" for stack in ("prelude", "core", "coda") for i in range(len(getattr(moved, stack)))]
    names = dict(zip(sources, targets, strict=True))
    weights = {}
    for name, tensor in model.state_dict().items():
        stack, _, rest = name.partition(".")
        layer, _, leaf = rest.partition(".")
        place = names.get(f"{stack}.{layer}")
        weights[name if place is None else f"{place}.{leaf}"] = tensor
    moved.load_state_dict(weights)
    return moved.eval()


def loop(model: LoopedLM, context: LMContext, loops: int, way: str) -> Float[Tensor, "batch tokens width"]:
    """The state after the core was applied `loops` times.

    naive: s <- g(s). damped: s <- s + (g(s) - s) / loops, so that all loops together go about as far as one.
    anchored: halfway between the damped state and g(s_0), what one loop gives (arXiv 2605.23872).
    """
    start = state = model.initial_state(context)
    for index in range(1, loops + 1):
        moved = model.step(state, context, index)
        state = moved if way == "naive" else state + (moved - state) / loops
    return state if way != "anchored" else (state + model.step(start, context, 1)) / 2


@torch.no_grad()
def ask(model: LoopedLM, batches: Sequence[Batch], loops: int, way: str = "naive") -> tuple[float, float]:
    """Mean loss in nats and the share that is right, over the places asked."""
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        context = model.encode(batch.tokens, documents=batch.documents)
        logits = model.readout(loop(model, context, loops, way), context)[batch.mask].float()
        wanted = batch.targets[batch.mask]
        loss += float(cross_entropy(logits, wanted, reduction="sum"))
        right += int((logits.argmax(-1) == wanted).sum())
        count += len(wanted)
    return loss / count, right / count


def _windows(layers: int) -> list[tuple[int, int]]:
    return [(first, count) for count in range(1, layers + 1) for first in range(layers - count + 1)]


def _training_free(
    model: LoopedLM, tries: Sequence[Batch], exam: Sequence[Batch], most: int
) -> dict[str, list[dict[str, Any]]]:
    """For each way and number of loops from 2 on the window that does best on `tries`, judged on `exam`."""
    windows = {place: window(model, *place) for place in _windows(model.config.layers)}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for way, loops in itertools.product(WAYS, range(2, most + 1)):
        tried = {place: ask(windows[place], tries, loops, way)[0] for place in windows}
        best = min(tried, key=lambda place: tried[place])
        loss, accuracy = ask(windows[best], exam, loops, way)
        chosen = {"loops": loops, "first": best[0], "layers": best[1], "tried": tried[best]}
        found[way].append({**chosen, "loss": loss, "accuracy": accuracy})
    return found


def measure(cell: Cell) -> dict[str, Any]:
    """Train one model, then ask it after each number of loops."""
    setting: Setting = cell.setting
    config = _config(setting, cell.variant)
    model = train_on_text(
        config,
        setting.text,
        _objective(setting, cell.variant),
        recipe(_steps(setting, cell.variant), setting.learning_rate),
        seed=cell.seed,
        device=cell.device,
        checkpoints=cell.checkpoints,
        log=cell.log,
    )
    held_out = setting.text.source(cell.seed).validation(setting.held_out)
    tries, exam = held_out[::2], held_out[1::2]
    by_loops = [ask(model, exam, loops) for loops in range(1, setting.most + 1)]
    record: dict[str, Any] = {
        "losses": [loss for loss, _ in by_loops],
        "accuracies": [accuracy for _, accuracy in by_loops],
        "loss": by_loops[config.loops - 1][0],
    }
    if cell.variant == PLAIN:
        record["chosen"] = _training_free(model, tries, exam, setting.loops)
    return record


def _losses(results: Results, variant: str, loops: int) -> list[float]:
    return [record["losses"][loops - 1] for record in results.records[variant].values()]


def _less(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of the differences, paired by seed."""
    return t_interval([a - b for a, b in zip(first, second, strict=True)])


def _best(record: dict[str, Any]) -> dict[str, Any]:
    """What was best where it was chosen: way, loops and window."""
    tries = [{"way": way, **each} for way, found in record["chosen"].items() for each in found]
    return min(tries, key=lambda each: each["tried"])


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Losses against the plain model run as it was trained, in nats, paired by seed."""

    again: dict[int, Interval]
    """The plain model's middle applied 2, 3, ... times."""
    chosen: Interval
    """The plain model looped where, how and as often as did best on other data."""
    trained: Interval
    """The model that was trained in loops, after as many."""
    shared: Interval
    """The same, with no more training than the plain model's operations paid for."""


def _compared(results: Results) -> Compared:
    setting: Setting = results.setting
    plain = _losses(results, PLAIN, 1)
    best = [_best(record)["loss"] for record in results.records[PLAIN].values()]
    return Compared(
        again={loops: _less(_losses(results, PLAIN, loops), plain) for loops in range(2, setting.loops + 1)},
        chosen=_less(best, plain),
        trained=_less(_losses(results, LOOPED, setting.loops), plain),
        shared=_less(_losses(results, CHEAP, setting.loops), plain),
    )


def _signed(interval: Interval) -> str:
    return interval.text(3, sign=True)


def _than(interval: Interval) -> str:
    """How one loss compares with another."""
    if interval.high < 0:
        less = Interval(mean=-interval.mean, low=-interval.high, high=-interval.low, count=interval.count)
        return f"better by {less.text(3)} nats"
    if interval.low > 0:
        return f"worse by {interval.text(3)} nats"
    return f"not surely different, {_signed(interval)} nats"


def _verdict(setting: Setting, found: Compared) -> str:
    worse = all(interval.low > 0 for interval in found.again.values())
    return (
        f"{'As published' if worse else 'Not as published'}, applying a plain model's middle again at inference "
        f"{'makes it worse' if worse else 'does not surely make it worse'}: "
        + ", ".join(f"{_signed(interval)} nats at {loops} loops" for loops, interval in found.again.items())
        + ". Looping where and how it did best on other text "
        + ("helps" if found.chosen.high < 0 else "does not help")
        + f": {_than(found.chosen)}. The same parameters trained with {setting.loops} loops, against the plain model: "
        f"{_than(found.trained)} on as many tokens, {_than(found.shared)} on as many operations."
    )


def report(results: Results) -> Page:
    """Losses by loops at inference."""
    setting: Setting = results.setting
    loops = range(1, setting.most + 1)
    found = _compared(results)
    made = figure(x="loops at inference", y="loss on held-out text, nats", width=820)
    for index, model in enumerate(VARIANTS):
        seeds = [record["losses"] for record in results.records[model].values()]
        add_line(made, list(loops), seeds, name=_named(setting, model), index=index)
    tried = range(2, setting.loops + 1)
    for index, way in enumerate(("damped", "anchored")):
        seeds = [[each["loss"] for each in record["chosen"][way]] for record in results.records[PLAIN].values()]
        add_line(made, list(tried), seeds, name=f"plain, {way}, window chosen", index=4 + index, dash="dot")
    return Page(
        verdict=_verdict(setting, found),
        paper=PAPER,
        tables=[_losses_table(results), _windows_table(results)],
        notes=NOTES,
        summary={
            "again": {loops: vars(interval) for loops, interval in found.again.items()},
            "chosen": vars(found.chosen),
            "trained": vars(found.trained),
            "same_operations": vars(found.shared),
        },
        figure=made,
    )


def _named(setting: Setting, variant: str) -> str:
    before, inside, after = setting.layers
    often = {PLAIN: "1", LOOPED: f"{setting.loops}", CHEAP: f"{setting.loops}", ANY: f"1..{setting.loops}"}[variant]
    few = f", {_steps(setting, variant)} steps" if variant == CHEAP else ""
    return f"trained as {before}+{inside}x{often}+{after}{few}"


def _losses_table(results: Results) -> Table:
    setting: Setting = results.setting
    rows = []
    for variant in VARIANTS:
        by_loops = [t_interval(_losses(results, variant, loops)) for loops in range(1, setting.most + 1)]
        rows.append(
            [
                _named(setting, variant),
                f"{count_parameters(_config(setting, variant)).stored:,}",
                f"{_steps(setting, variant)}",
                *(interval.text(3) for interval in by_loops),
            ]
        )
    head = ["model", "parameters", "steps", *(f"{loops}" for loops in range(1, setting.most + 1))]
    return Table(head=head, rows=rows, caption="Loss on held-out text in nats, by loops at inference.")


def _windows_table(results: Results) -> Table:
    """What training-free looping finds: the best window on other data, seed by seed."""
    plain = _losses(results, PLAIN, 1)
    records = list(results.records[PLAIN].values())
    rows = []
    for way in WAYS:
        for index, each in enumerate(records[0]["chosen"][way]):
            found = [record["chosen"][way][index] for record in records]
            rows.append(
                [
                    way,
                    f"{each['loops']}",
                    ", ".join(_layers(one) for one in found),
                    _signed(_less([one["loss"] for one in found], plain)),
                ]
            )
    return Table(
        head=["way", "loops", "window, by seed", "nats over the plain model"],
        rows=rows,
        caption="The plain model, the window of layers that did best on other text looped.",
    )


def _layers(chosen: dict[str, Any]) -> str:
    first, count = chosen["first"] + 1, chosen["layers"]
    return f"{first}" if count == 1 else f"{first}-{first + count - 1}"


PAPER = (
    "Training-Free Looped Transformers (arXiv 2605.23872; we know its abstract and notes of others): applying a middle "
    "block of a frozen model again usually degrades it; smaller, damped steps that together go about as far as one "
    "gain 2.64 points of MMLU-Pro on Qwen3-4B-Instruct. ETD (arXiv 2510.07358), which does train: OLMo-2-1B +28.4% "
    "relative on GSM8K. A model card of our shape (huggingface.co/brkdrd/simloop: 1+1x1+1, 10M parameters, 60M tokens "
    "of FineWeb, trained unlooped) gives 4.397, 4.600, 4.941 and 5.266 nats at 1, 2, 3 and 4 loops: +0.203, +0.545, "
    "+0.869."
)
NOTES = (
    "a+bxR+c is a layers, b layers in R loops, c layers; all have the same parameters and the same text in the same "
    "order. `1..R` draws the loops of each step, so every depth is trained. Ways to loop: naive s <- g(s), damped "
    "s <- s + (g(s) - s)/R, anchored the mean of the damped end and g(s) itself; every window of consecutive layers is "
    "tried on one half of the held-out text, and the losses are of the other half. "
    "One learning rate for all. Our models are far from where real ones are trained to, and a task of loss is not the "
    "multiple choice on which the paper gains."
)

EXPERIMENT = Experiment(
    title="A plain model looped at inference",
    question="A plain transformer is trained; then its middle block is applied 2, 3, ... times at inference. Does that "
    "help, and what does a model of the same parameters gain that was trained in loops, on as many tokens or on as "
    "many operations? Asked on real text.",
    settings=SETTINGS,
    variants=lambda setting: VARIANTS,
    measure=measure,
    report=report,
)

if __name__ == "__main__":
    run(EXPERIMENT, __file__)
