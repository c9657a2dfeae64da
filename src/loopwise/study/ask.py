"""Every question by its name: what it runs, what it answers, and how that is drawn.

answer = ask("depth", open_subject("shipped"), StudyConfig())
answer.results      dataclasses of arrays with named axes
answer.figures      Plotly figures, or none where plotly is not wanted
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from loopwise.errors import ConfigError, InputError
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.adaptivity import adaptivity
from loopwise.study.axes import as_data
from loopwise.study.calibration import calibration
from loopwise.study.convergence import convergence, convergence_map, perturb
from loopwise.study.depth import depth
from loopwise.study.examples import Examples, head
from loopwise.study.exit_curves import exits, saving
from loopwise.study.faithfulness import faithfulness
from loopwise.study.grid import grid
from loopwise.study.lens import lens
from loopwise.study.record import Record, record
from loopwise.study.rules import families
from loopwise.study.subject import StudyConfig, Subject, open_data, open_subject
from loopwise.study.trajectory import trajectory
from loopwise.tasks.problems import IGNORED

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_STATES = 1024
"""Units whose states are kept."""
_MAP = 48
"""Tokens of the convergence map and of the lens."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one question found."""

    question: str
    results: Mapping[str, Any]
    """Name to a dataclass of arrays."""
    lines: Sequence[str]
    """The finding in words."""
    figures: Mapping[str, "Figure"] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """All results as JSON can hold them."""
        return {"question": self.question, "lines": list(self.lines), "results": as_data(dict(self.results))}


class Studies:
    """Records of one subject, made when a question first needs them and shared by all questions.

    Args:
        draw: whether figures are wanted; without them plotly need not be there.
    """

    def __init__(self, subject: Subject, config: StudyConfig, *, draw: bool = True) -> None:
        self.subject, self.config, self.draws = subject, config, draw
        self.trained = subject.model.facts.trained_loops[1]
        self._data: list[Examples] | None = None
        self._records: dict[tuple[int, bool], Record] = {}

    @property
    def data(self) -> list[Examples]:
        """The batches that are asked."""
        if self._data is None:
            self._data = open_data(self.subject, self.config)
        return self._data

    def some(self) -> list[Examples]:
        """So many batches as fill the units whose states are kept, the last one cut short."""
        chosen: list[Examples] = []
        left = min(self.config.units, _STATES)
        by_sample = self.subject.model.facts.unit == "sample"
        for examples in self.data:
            per_row = 1 if by_sample else max(1, int((examples.targets != IGNORED).sum()) // len(examples))
            rows = min(len(examples), -(-left // per_row))
            chosen.append(head(examples, rows))
            left -= rows * per_row
            if left <= 0:
                break
        return chosen

    def record(self, loops: int, *, states: bool = False) -> Record:
        """The record of so many loops (or of `config.loops`, where that is given)."""
        loops = self.config.loops or loops
        key = loops, states
        if key not in self._records:
            self._records[key] = record(
                self.subject.model,
                self.some() if states else self.data,
                max_loops=loops,
                start=self.config.start,
                keep_states=states,
                name=self.subject.name,
            )
        return self._records[key]


def ask(question: str, subject: Subject, config: StudyConfig, *, draw: bool = True) -> Answer:
    """Answer one question.

    Raises:
        ConfigError: there is no such question.
        UserError: as the question says.
    """
    return answer(question, Studies(subject, config, draw=draw))


def answer(question: str, studies: Studies) -> Answer:
    """Answer one question from records that others may share. Raises as `ask` does."""
    if question not in QUESTIONS:
        near = difflib.get_close_matches(question, QUESTIONS, n=1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise ConfigError(f"there is no question {question!r}{hint}; allowed: {', '.join(QUESTIONS)}")
    return QUESTIONS[question](studies)


def _depth(studies: Studies) -> Answer:
    config = studies.config
    records = [studies.record(2 * studies.trained)]
    for name in config.others:
        other = open_subject(name, dtype=config.dtype, device=config.device)
        records.append(
            record(other.model, studies.data, max_loops=records[0].loops, start=config.start, name=other.name)
        )
    found = depth(records)
    last = studies.trained - 1 if len(found.loops) >= studies.trained else -1
    lines = [
        f"loss {found.loss[0]:.3f} at 1 loop, {found.loss[last]:.3f} at {found.loops[last]}, least at {found.best}; "
        f"accuracy {found.accuracy[0]:.3f} and {found.accuracy[last]:.3f}"
    ]
    if len(found.loops) > studies.trained:
        lines.append(f"beyond training: loss {found.loss[-1]:.3f} at {found.loops[-1]} loops")
    return _told("depth", studies, {"depth": found}, lines, lambda draw: {"depth": draw.depth_figure(found)})


def _exits(studies: Studies) -> Answer:
    taken = studies.record(studies.trained)
    found = exits(taken)
    lines = []
    for family in families(taken):
        kept = saving(taken, family)
        lines.append(
            f"{kept.rule}: {kept.mean_loops:.2f} of {found.loops[-1]} loops, accuracy {kept.accuracy:.3f} beside "
            f"{kept.full_accuracy:.3f} (drop {kept.drop}), {kept.flops_saved:.0%} of operations saved"
        )
    cost = studies.config.cost
    return _told(
        "exits",
        studies,
        {"exits": found},
        ["least compute within one point of full depth, by replay:", *lines],
        lambda draw: {"exits": draw.exits_figure(found, cost=cost)},
    )


def _adaptivity(studies: Studies) -> Answer:
    found = adaptivity(studies.record(studies.trained), rule=studies.config.rule, seed=studies.config.seed)
    lines = [
        f"{found.rule}: rank correlation of loops used with difficulty {found.correlation}; among those right "
        f"{found.correlation_right}; of loops needed {found.correlation_needed}"
    ]
    return _told(
        "adaptivity", studies, {"adaptivity": found}, lines, lambda draw: {"adaptivity": draw.adaptivity_figure(found)}
    )


def _calibration(studies: Studies) -> Answer:
    found = calibration(studies.record(studies.trained), rule=studies.config.rule)
    lines = [
        f"ECE {found.ece[-1]:.3f} at loop {found.loops[-1]}, {found.at_exit.ece:.3f} at the exit of {found.rule} "
        f"({found.mean_exit:.2f} loops)"
    ]
    if np.isnan(found.auroc_exit).all():
        lines.append("units at the exit are all right or all wrong, so nothing can foretell which is which")
    else:
        best = int(np.nanargmax(found.auroc_exit))
        lines.append(
            f"the best sign of a wrong answer at the exit: {found.signals[best]}, AUROC {found.auroc_exit[best]:.3f}"
        )
    return _told(
        "calibration",
        studies,
        {"calibration": found},
        lines,
        lambda draw: {"calibration": draw.calibration_figure(found)},
    )


def _convergence(studies: Studies) -> Answer:
    config, model = studies.config, studies.subject.model
    taken = studies.record(6 * studies.trained, states=True)
    found = convergence(taken, tolerance=config.tolerance)
    at = max(1, min(studies.trained, taken.loops - 1))
    pushed = perturb(
        model,
        studies.some(),
        at=at,
        size=config.push,
        max_loops=min(taken.loops, at + 2 * studies.trained),
        start=config.start,
        seed=config.seed,
    )
    results: dict[str, Any] = {"convergence": found, "recovery": pushed}
    if model.facts.unit == "token":
        results["map"] = convergence_map(taken, _texts(studies, taken), problem=config.number)
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in found.shares.items())
    lines = [
        f"after {taken.loops} loops: {shares}; steps change by a factor of {found.factor:.3f} per loop at the end",
        f"a push of {pushed.size:g} at loop {pushed.at} is {pushed.distance[1, -1]:.3f} at loop {pushed.loops[-1]}; "
        f"the answer is the same for {pushed.same_answer[-1]:.0%}",
    ]

    def draw_all(draw: Any) -> dict[str, Any]:
        figures = {"convergence": draw.convergence_figure(found, pushed)}
        if "map" in results:
            figures["map"] = draw.map_figure(results["map"], model=studies.subject.name)
        return figures

    return _told("convergence", studies, results, lines, draw_all)


def _texts(studies: Studies, taken: Record) -> list[str]:
    """Texts of the units of the problem that is shown."""
    left = studies.config.number
    for examples in studies.some():
        if left < len(examples):
            asked = (examples.targets[left] != IGNORED).nonzero()[:, 0]
            ids = examples.inputs[left][asked].tolist()
            model = studies.subject.model
            tokenizer = model.tokenizer if isinstance(model, LoopedLM) else None
            return [str(index) for index in ids] if tokenizer is None else list(tokenizer.pieces(ids))
        left -= len(examples)
    raise InputError(f"number={studies.config.number}: there are rows 0 to {int(taken.problem.max())}")


def _lens(studies: Studies) -> Answer:
    model, config = studies.subject.model, studies.config
    if not isinstance(model, LoopedLM):
        raise ConfigError("lens reads language models; this model answers in one piece: type grid instead")
    rows = [row for examples in studies.data for row in examples.inputs]
    if config.number >= len(rows):
        raise InputError(f"number={config.number}: there are rows 0 to {len(rows) - 1}")
    found = lens(
        model,
        rows[config.number][:_MAP].tolist(),
        max_loops=config.loops,
        start=config.start,
        name=studies.subject.name,
    )
    agree = (found.top[0, :, :, 0] == found.top[0, -1, :, 0]).mean(axis=1)
    lines = [f"lens: {', '.join(found.lenses)}; the last loop's choice is already made for {agree[0]:.0%} at loop 1"]
    if len(found.lenses) > 1:
        same = (found.top[0, :, :, 0] == found.top[1, :, :, 0]).mean(axis=1)
        lines.append(f"coda and logit lens choose alike for {same[0]:.0%} at loop 1, {same[-1]:.0%} at the last")
    return _told("lens", studies, {"lens": found}, lines, lambda draw: {"lens": draw.lens_figure(found)})


def _trajectory(studies: Studies) -> Answer:
    found = trajectory(studies.record(2 * studies.trained, states=True), seed=studies.config.seed)
    lines = [
        f"two components hold {found.explained[:2].sum():.0%} of the variance; units of the same {found.kind} are "
        f"alike by {found.within[-1]:.3f}, others by {found.between[-1]:.3f} (p = {found.chance:.3f} by shuffling)"
    ]
    return _told(
        "trajectory", studies, {"trajectory": found}, lines, lambda draw: {"trajectory": draw.trajectory_figure(found)}
    )


def _faithfulness(studies: Studies) -> Answer:
    found = faithfulness(studies.record(studies.trained, states=True), seed=studies.config.seed)
    lines = [
        f"the answer of loop 1 is that of loop {found.loops[-1]} for {found.agreement[0, -1]:.0%}",
        f"a linear probe reads the last answer off the start state for {found.probe[0, -1]:.0%}, off the last state "
        f"for {found.probe[-1, -1]:.0%}; the commonest answer alone for {found.baseline[-1]:.0%}",
    ]
    return _told(
        "faithfulness",
        studies,
        {"faithfulness": found},
        lines,
        lambda draw: {"faithfulness": draw.faithfulness_figure(found)},
    )


def _grid(studies: Studies) -> Answer:
    model, config = studies.subject.model, studies.config
    if isinstance(model, LoopedLM):
        raise ConfigError("grid shows boards (CTM, TRM); a language model writes a line: type lens instead")
    left = config.number
    for examples in studies.data:
        if left < len(examples):
            found = grid(model, examples, number=left, max_loops=config.loops, name=studies.subject.name)
            break
        left -= len(examples)
    else:
        raise InputError(f"number={config.number}: fewer problems were drawn; give units={config.number + 1}")
    right = [int(loop) for loop, good in zip(found.loops, found.right, strict=True) if good]
    lines = [
        f"problem {config.number}: "
        + (f"right at {len(right)} of {len(found.loops)} loops" if right else "never right")
    ]
    return _told("grid", studies, {"grid": found}, lines, lambda draw: {"grid": draw.grid_figure(found)})


QUESTIONS: dict[str, Callable[[Studies], Answer]] = {
    "depth": _depth,
    "exits": _exits,
    "adaptivity": _adaptivity,
    "calibration": _calibration,
    "convergence": _convergence,
    "lens": _lens,
    "trajectory": _trajectory,
    "faithfulness": _faithfulness,
    "grid": _grid,
}


class _Draw:
    """All figure functions, imported when one is drawn."""

    def __getattr__(self, name: str) -> Any:
        from loopwise.study import draw, draw_states

        return getattr(draw, name, None) or getattr(draw_states, name)


def _told(
    question: str,
    studies: Studies,
    results: Mapping[str, Any],
    lines: Sequence[str],
    draw: Callable[[Any], Mapping[str, Any]],
) -> Answer:
    figures = draw(_Draw()) if studies.draws else {}
    return Answer(question=question, results=results, lines=lines, figures=figures)
