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
from loopwise.tasks.mano import Mano, ManoConfig
from loopwise.tasks.problems import numbers
from loopwise.train.batches import Batch
from loopwise.train.step import executed_flops
from loopwise.train.tasks import as_batch, train_on_problems

TEST_SEED = 1_000_003
WAYS = ("naive", "damped", "anchored")
PLAIN, LOOPED, CHEAP, ANY = "plain", "looped", "looped, FLOPs of plain", "any loops"
TASKS = ("text", "Mano")


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
    mano: ManoConfig
    mano_layers: tuple[int, int, int]
    mano_width: int
    mano_rows: int
    mano_steps: int
    mano_learning_rate: float
    mano_problems: int


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
        mano=ManoConfig(modulus=5, operations=3, asked="parts"),
        mano_layers=(1, 1, 1),
        mano_width=64,
        mano_rows=32,
        mano_steps=900,
        mano_learning_rate=3e-3,
        mano_problems=2000,
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
        mano=ManoConfig(modulus=23, operations=10, asked="answer"),
        mano_layers=(1, 1, 1),
        mano_width=512,
        mano_rows=128,
        mano_steps=80_000,
        mano_learning_rate=1e-3,
        mano_problems=2000,
    ),
}


def _split(variant: str) -> tuple[str, str]:
    task, _, model = variant.partition(" ")
    return task, model


def _variants(setting: Setting) -> tuple[str, ...]:
    return (*(f"text {model}" for model in (PLAIN, LOOPED, CHEAP, ANY)), f"Mano {PLAIN}", f"Mano {LOOPED}")


def _config(setting: Setting, variant: str) -> LoopedLMConfig:
    task, model = _split(variant)
    before, inside, after = setting.layers if task == "text" else setting.mano_layers
    exam = Mano(setting.mano)
    config = small_lm(
        vocab_size=setting.text.vocabulary if task == "text" else exam.vocab_size,
        width=setting.width if task == "text" else setting.mano_width,
        layers=inside,
        loops=1 if model == PLAIN else setting.loops,
        length=setting.text.context if task == "text" else exam.length,
        prelude=before,
    )
    return replace(config, coda_layers=after)


def _objective(setting: Setting, variant: str) -> Objective:
    model = _split(variant)[1]
    if model == ANY:
        return RandomDepth(loops=setting.loops, sampler="uniform", max_loops=setting.loops, backprop=None)
    return LastLoop(loops=1 if model == PLAIN else setting.loops)


def _step_flops(setting: Setting, variant: str) -> float:
    """Operations of a training step on text; of a random depth, the mean."""
    objective, config = _objective(setting, variant), _config(setting, variant)
    depths = range(1, setting.loops + 1) if _split(variant)[1] == ANY else [config.loops]
    plans = [LastLoop(loops=depth).plan(seed=0, step=0, micro=0) for depth in depths]
    tokens, context = setting.text.rows * setting.text.context, setting.text.context
    costs = [executed_flops(config, plan, tokens=tokens, context=context, trains=objective.trains) for plan in plans]
    return sum(costs) / len(costs)


def _steps(setting: Setting, variant: str) -> int:
    task, model = _split(variant)
    if task == "Mano":
        return setting.mano_steps
    if model != CHEAP:
        return setting.steps
    return round(setting.steps * _step_flops(setting, f"text {PLAIN}") / _step_flops(setting, variant))


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
    task, name = _split(cell.variant)
    config, objective = _config(setting, cell.variant), _objective(setting, cell.variant)
    rate = setting.learning_rate if task == "text" else setting.mano_learning_rate
    fit_config = recipe(_steps(setting, cell.variant), rate)
    if task == "text":
        model = train_on_text(
            config,
            setting.text,
            objective,
            fit_config,
            seed=cell.seed,
            device=cell.device,
            checkpoints=cell.checkpoints,
            log=cell.log,
        )
        held_out = setting.text.source(cell.seed).validation(setting.held_out)
        tries, exam = held_out[::2], held_out[1::2]
    else:
        model = train_on_problems(
            config,
            Mano(setting.mano),
            objective,
            fit_config,
            rows=setting.mano_rows,
            seed=cell.seed,
            device=cell.device,
            checkpoints=cell.checkpoints,
            log=cell.log,
        )
        model.to("cpu")
        longest = Mano(replace(setting.mano, asked="answer", shortest=setting.mano.operations))
        drawn = [numbers(part * setting.mano_problems, setting.mano_problems) for part in range(2)]
        tries, exam = ([as_batch(longest.draw(TEST_SEED, part))] for part in drawn)
    by_loops = [ask(model, exam, loops) for loops in range(1, setting.most + 1)]
    record: dict[str, Any] = {
        "losses": [loss for loss, _ in by_loops],
        "accuracies": [accuracy for _, accuracy in by_loops],
        "loss": by_loops[config.loops - 1][0],
    }
    if name == PLAIN:
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
    """Loss of one task against the plain model run as it was trained, in nats, paired by seed."""

    again: dict[int, Interval]
    """The plain model's middle applied 2, 3, ... times."""
    chosen: Interval
    """The plain model looped where, how and as often as did best on other data."""
    trained: Interval
    """The model that was trained in loops, after as many."""
    shared: Interval | None
    """The same, with no more training than the plain model's operations paid for."""


def _compared(results: Results, task: str) -> Compared:
    setting: Setting = results.setting
    plain = _losses(results, f"{task} {PLAIN}", 1)
    best = [_best(record)["loss"] for record in results.records[f"{task} {PLAIN}"].values()]
    cheap = f"{task} {CHEAP}"
    return Compared(
        again={
            loops: _less(_losses(results, f"{task} {PLAIN}", loops), plain) for loops in range(2, setting.loops + 1)
        },
        chosen=_less(best, plain),
        trained=_less(_losses(results, f"{task} {LOOPED}", setting.loops), plain),
        shared=_less(_losses(results, cheap, setting.loops), plain) if cheap in results.records else None,
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


def _verdict(setting: Setting, text: Compared, mano: Compared) -> str:
    worse = all(interval.low > 0 for interval in text.again.values())
    often = setting.loops
    return (
        f"{'As published' if worse else 'Not as published'}, applying a plain model's middle again at inference "
        f"{'makes it worse' if worse else 'does not surely make it worse'}: "
        + ", ".join(f"{_signed(interval)} nats at {loops} loops" for loops, interval in text.again.items())
        + ". Damped steps in the window that did best on other text "
        + ("help" if text.chosen.high < 0 else "do not help")
        + f": {_than(text.chosen)}. The same parameters trained with {often} loops, against the plain model: "
        f"{_than(text.trained)} on as many tokens"
        + (f", {_than(text.shared)} on as many operations" if text.shared else "")
        + f". Mano: looped at inference {_than(mano.again[often])} at {often} loops, trained in loops "
        f"{_than(mano.trained)}."
    )


def report(results: Results) -> Page:
    """Losses by loops at inference."""
    setting: Setting = results.setting
    loops = range(1, setting.most + 1)
    text, mano = (_compared(results, task) for task in TASKS)
    made = figure(x="loops at inference", y="loss on held-out text, nats", width=820)
    for index, model in enumerate((PLAIN, LOOPED, CHEAP, ANY)):
        seeds = [record["losses"] for record in results.records[f"text {model}"].values()]
        add_line(made, list(loops), seeds, name=_named(setting, f"text {model}"), index=index)
    tried = range(2, setting.loops + 1)
    for index, way in enumerate(("damped", "anchored")):
        seeds = [
            [each["loss"] for each in record["chosen"][way]] for record in results.records[f"text {PLAIN}"].values()
        ]
        add_line(made, list(tried), seeds, name=f"plain, {way}, window chosen", index=4 + index, dash="dot")
    return Page(
        verdict=_verdict(setting, text, mano),
        paper=PAPER,
        tables=[
            _losses_table(results, "text", "Loss on held-out text in nats, by loops at inference."),
            _windows_table(results, "text"),
            _losses_table(results, "Mano", "Loss of Mano's answers (exactly L operations) in nats, by loops."),
            _accuracy_table(results),
            _windows_table(results, "Mano"),
        ],
        notes=NOTES,
        summary={
            task: {
                "again": {loops: vars(interval) for loops, interval in found.again.items()},
                "chosen": vars(found.chosen),
                "trained": vars(found.trained),
                "same_operations": None if found.shared is None else vars(found.shared),
            }
            for task, found in (("text", text), ("Mano", mano))
        },
        figure=made,
    )


def _named(setting: Setting, variant: str) -> str:
    task, model = _split(variant)
    before, inside, after = setting.layers if task == "text" else setting.mano_layers
    often = {PLAIN: "1", LOOPED: f"{setting.loops}", CHEAP: f"{setting.loops}", ANY: f"1..{setting.loops}"}[model]
    few = f", {_steps(setting, variant)} steps" if model == CHEAP else ""
    return f"trained as {before}+{inside}x{often}+{after}{few}"


def _losses_table(results: Results, task: str, caption: str) -> Table:
    setting: Setting = results.setting
    rows = []
    for variant in (variant for variant in results.records if _split(variant)[0] == task):
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
    return Table(head=head, rows=rows, caption=caption)


def _accuracy_table(results: Results) -> Table:
    setting: Setting = results.setting
    rows = []
    for variant in (variant for variant in results.records if _split(variant)[0] == "Mano"):
        records = results.records[variant].values()
        by_loops = [t_interval([r["accuracies"][loops] for r in records]) for loops in range(setting.most)]
        rows.append([_named(setting, variant), *(interval.text(1, scale=100) for interval in by_loops)])
    head = ["model", *(f"{loops}" for loops in range(1, setting.most + 1))]
    return Table(head=head, rows=rows, caption="Mano's answers that are right, in percent.")


def _windows_table(results: Results, task: str) -> Table:
    """What training-free looping finds: the best window on other data, seed by seed."""
    variant = f"{task} {PLAIN}"
    plain = _losses(results, variant, 1)
    records = list(results.records[variant].values())
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
        caption=f"The plain model of {task}, the window of layers that did best on other data looped.",
    )


def _layers(chosen: dict[str, Any]) -> str:
    first, count = chosen["first"] + 1, chosen["layers"]
    return f"{first}" if count == 1 else f"{first}-{first + count - 1}"


PAPER = (
    "Training-Free Looped Transformers (arXiv 2605.23872, abstract): applying a middle block of a frozen model again "
    "usually degrades it; smaller, damped steps that together go about as far as one gain 2.64 points of MMLU-Pro on "
    "Qwen3-4B-Instruct. ETD (arXiv 2510.07358), which does train: OLMo-2-1B +28.4% (relative) on GSM8K. A model "
    "card of our shape (huggingface.co/brkdrd/simloop: 1+1x1+1, 10M parameters, 60M tokens of FineWeb, trained "
    "unlooped) gives 4.397, 4.600, 4.941 and 5.266 nats at 1, 2, 3 and 4 loops: +0.203, +0.545, +0.869."
)
NOTES = (
    "a+bxR+c is a layers, b layers in R loops, c layers; all have the same parameters and the same text in the same "
    "order. `1..R` draws the loops of each step, so every depth is trained. Ways to loop: naive s <- g(s), damped "
    "s <- s + (g(s) - s)/R, anchored the mean of the damped end and g(s) itself; every window of consecutive layers is "
    "tried on one half of the held-out text (for Mano on other problems), and the losses are of the other half. "
    "One learning rate for all. Our models are far from where real ones are trained to, and a task of loss is not the "
    "multiple choice on which the paper gains."
)

EXPERIMENT = Experiment(
    title="A plain model looped at inference",
    question="A plain transformer is trained; then its middle block is applied 2, 3, ... times at inference. Does that "
    "help, and what does a model of the same parameters gain that was trained in loops, on as many tokens or on as "
    "many operations? Asked on real text and on Mano (modular arithmetic in the head).",
    settings=SETTINGS,
    variants=_variants,
    measure=measure,
    report=report,
)

if __name__ == "__main__":
    run(EXPERIMENT, __file__)
