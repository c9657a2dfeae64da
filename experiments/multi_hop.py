"""Multi-hop questions: do loops make a model learn to string facts together from fewer examples?

python experiments/multi_hop.py [--setting small|full] [--seeds 0,1,2]
"""

from dataclasses import dataclass
from typing import Any

from _lab import Cell, Experiment, Page, Results, Table, run
from _plots import add_line, figure
from _small_lm import layers_and_loops, recipe, small_lm

from loopwise.models.accounting import count_parameters
from loopwise.objectives.last_loop import LastLoop
from loopwise.tasks.multi_hop import MultiHop, MultiHopConfig
from loopwise.tasks.problems import numbers
from loopwise.train.tasks import answer, train_on_problems


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes."""

    people: int
    relations: int
    hops: int
    width: int
    models: tuple[str, ...]
    """k layers x loops: the base, the same parameters looped, and the unrolled one of as many FLOPs."""
    shares: tuple[float, ...]
    """Shares of all questions that are trained on."""
    rows: int
    steps: int
    learning_rate: float
    test_questions: int


SETTINGS = {
    "small": Setting(
        people=10,
        relations=20,
        hops=2,
        width=64,
        models=("2x1", "2x4", "8x1"),
        shares=(0.3, 0.5, 0.7),
        rows=128,
        steps=1500,
        learning_rate=3e-3,
        test_questions=600,
    ),
    "full": Setting(
        people=100,
        relations=20,
        hops=3,
        width=512,
        models=("6x1", "6x2", "6x4", "24x1"),
        shares=(0.025, 0.05, 0.1, 0.15, 0.25),
        rows=2048,
        steps=20_000,
        learning_rate=5e-4,
        test_questions=3000,
    ),
}


def _task(setting: Setting, share: float, part: str) -> MultiHop:
    return MultiHop(
        MultiHopConfig(
            people=setting.people,
            relations=setting.relations,
            hops=setting.hops,
            part=part,
            train_share=share,
            test_questions=setting.test_questions,
        )
    )


def _config(setting: Setting, model: str) -> Any:
    task = _task(setting, setting.shares[0], "train")
    layers, loops = layers_and_loops(model)
    return small_lm(vocab_size=task.vocab_size, width=setting.width, layers=layers, loops=loops, length=task.length)


def measure(cell: Cell) -> dict[str, Any]:
    """Train one model on a share of all questions, then ask the held-out ones."""
    setting: Setting = cell.setting
    name, share = cell.variant.split(" at ")
    config, task = _config(setting, name), _task(setting, float(share), "train")
    model = train_on_problems(
        config,
        task,
        LastLoop(loops=config.loops),
        recipe(setting.steps, setting.learning_rate),
        rows=setting.rows,
        seed=cell.seed,
        device=cell.device,
        checkpoints=cell.checkpoints,
        log=cell.log,
    )
    model.to("cpu")
    held_out = _task(setting, float(share), "test")
    test = held_out.draw(0, numbers(0, setting.test_questions))
    seen = task.draw(cell.seed + 1, numbers(0, 1000))
    return {
        "accuracy": float(answer(model, test, loops=config.loops).right[-1].float().mean()),
        "trained": float(answer(model, seen, loops=config.loops).right[-1].float().mean()),
    }


def report(results: Results) -> Page:
    """Held-out accuracy by the share of questions that was seen."""
    setting: Setting = results.setting
    base, looped, *_ = setting.models
    unrolled = setting.models[-1]
    gains = {
        share: results.difference(f"{looped} at {share}", f"{base} at {share}", "accuracy") for share in setting.shares
    }
    against = {
        share: results.difference(f"{looped} at {share}", f"{unrolled} at {share}", "accuracy")
        for share in setting.shares
    }
    best = max(results.interval(variant, "accuracy").mean for variant in results.records)
    most = max(setting.shares, key=lambda share: abs(gains[share].mean))
    if best < 0.5:
        word = "Too small a setting to tell, since no model answers half of the held-out questions"
    elif all(gain.low > 0 for gain in gains.values()):
        word = "Reproduces"
    elif any(gain.low > 0 for gain in gains.values()):
        word = "Reproduces at some shares"
    else:
        word = "Does not reproduce at this size"
    verdict = (
        f"{word}: at equal parameters {layers_and_loops(looped)[1]} loops in place of one are worth "
        + ", ".join(f"{gains[share].text(scale=100, sign=True)} points at {share:.0%}" for share in setting.shares)
        + f" of the questions; the unrolled {unrolled} of equal FLOPs is "
        + f"{'behind' if against[most].mean > 0 else 'ahead'} by {abs(100 * against[most].mean):.0f} points "
        + f"at {most:.0%}."
    )
    rows = [
        [
            model.replace("x", " x "),
            f"{count_parameters(_config(setting, model)).stored:,}",
            *(results.interval(f"{model} at {share}", "accuracy").text(scale=100) for share in setting.shares),
            results.interval(f"{model} at {setting.shares[-1]}", "trained").text(scale=100),
        ]
        for model in setting.models
    ]
    made = figure(x="share of all questions that is trained on, %", y="held-out questions right, %")
    for index, model in enumerate(setting.models):
        columns = [results.values(f"{model} at {share}", "accuracy") for share in setting.shares]
        seeds = [[100 * value for value in row] for row in zip(*columns, strict=True)]
        add_line(made, [100 * share for share in setting.shares], seeds, name=model.replace("x", " x "), index=index)
    return Page(
        verdict=verdict,
        paper="Ouro (arXiv 2510.25741, section 6), 500 people, 20 relations, 3 hops: the more loops, the fewer "
        "questions are needed to answer held-out ones; a model with one loop needs several times as many.",
        tables=[
            Table(
                head=[
                    "layers x loops",
                    "parameters",
                    *(f"{share:.0%} trained" for share in setting.shares),
                    "of the trained, right",
                ],
                rows=rows,
                caption="Held-out questions answered rightly, in percent.",
            )
        ],
        notes="All models take as many steps of as many questions, with one learning rate; the world of facts is one, "
        "and seeds draw weights and order.",
        summary={
            "gain": {str(share): vars(gain) for share, gain in gains.items()},
            "against_unrolled": {str(share): vars(gain) for share, gain in against.items()},
        },
        figure=made,
    )


EXPERIMENT = Experiment(
    title="Multi-hop questions: loops and examples",
    question="Facts that stand in no prompt must be learned from questions alone and then be strung together for other "
    "questions. Models of k layers in R loops are compared with the same layers run once and with kR layers, by the "
    "share of all questions that they have seen.",
    settings=SETTINGS,
    variants=lambda setting: tuple(f"{model} at {share}" for model in setting.models for share in setting.shares),
    measure=measure,
    report=report,
)

if __name__ == "__main__":
    run(EXPERIMENT, __file__)
