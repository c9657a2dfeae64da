"""What a model did at every loop, unit by unit: the one record that every question is asked of.

Any `LoopModel` gives it: a language model with a unit per token that is asked, and models of whole samples (CTM, TRM,
Deep Thinking, PonderNet) with a unit per problem. Axes: R loops, N units.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.errors import InputError, LoopRangeWarning
from loopwise.loops.drivers import check_loops
from loopwise.loops.hazard import widen
from loopwise.loops.protocol import LoopModel, first_tensor, flat_state
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.costs import Costs, count_costs
from loopwise.study.examples import Examples
from loopwise.tasks.problems import IGNORED

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Record:
    """Every unit at every loop. Sums over places are over those that are asked; means are over all, as rules see them.

    Statistics of change compare a loop with the one before it; at loop 1 with the start state.
    """

    model: str
    """What figures call the model."""
    unit: str
    """token, position or sample."""
    trained_loops: tuple[int, int]
    """Fewest and most loops seen in training; deeper ones are beyond it."""
    signal_kind: str | None
    """hazard, halt_logit, certainty or delta; None without a signal."""
    classes: int
    """Answers to choose from at each place, V."""
    costs: Costs
    """Of one unit."""
    seconds: Float[np.ndarray, " loops"]
    """Measured time to run all units to this depth and read them out once: encoding and steps so far, one readout."""
    readout_seconds: float
    """Measured time of one readout of all units, the mean over loops."""
    problem: Int[np.ndarray, " units"]
    """Which problem or row of text the unit belongs to; units of one problem are not independent."""
    difficulty: Float[np.ndarray, " units"] | None
    """How hard the unit is by construction; None where nobody knows."""
    losses: Float[np.ndarray, "loops units"]
    """Nats, the mean over the places asked."""
    right: Bool[np.ndarray, "loops units"]
    """Whether the answer is right as a whole."""
    share: Float[np.ndarray, "loops units"]
    """Share of the places asked that are right."""
    answers: Int[np.ndarray, "loops units"]
    """The answer: a class, or with several places a digest; equal numbers mean equal answers."""
    confidence: Float[np.ndarray, "loops units"]
    """Probability the model gives to its answer: the product of its likeliest classes over the places asked."""
    certainty: Float[np.ndarray, "loops units"]
    """1 - entropy / log V, the mean over places (CTM, arXiv 2505.05522)."""
    entropy_change: Float[np.ndarray, "loops units"]
    """|H_i - H_{i-1}| in nats, the mean over places; NaN at loop 1."""
    kl: Float[np.ndarray, "loops units"]
    """KL(p_{i-1} || p_i) in nats, the mean over places, from uniform at loop 1."""
    streak: Int[np.ndarray, "loops units"]
    """For how many loops the likeliest classes have stayed the same, at all places."""
    signals: Float[np.ndarray, "loops units"] | None
    """The model's own signal; None without one."""
    norms: Float[np.ndarray, "loops units"]
    """Norm of the state."""
    change: Float[np.ndarray, "loops units"]
    """||s_i - s_{i-1}|| / ||s_i||."""
    turn: Float[np.ndarray, "loops units"]
    """||d_i - d_{i-1}|| with d_i = s_i - s_{i-1}; NaN at loop 1."""
    cosine: Float[np.ndarray, "loops units"]
    """Cosine between the steps d_i and d_{i-1}; NaN at loop 1 and where nothing moved."""
    states: Float[np.ndarray, "depths units features"] | None = None
    """States from the start state (depth 0) to loop R; None unless kept."""
    targets: Int[np.ndarray, " units"] | None = None
    """The right class of units with one place; None for others."""

    @property
    def loops(self) -> int:
        """R."""
        return len(self.losses)

    @property
    def units(self) -> int:
        """N."""
        return int(self.losses.shape[1])

    @property
    def depths(self) -> Int[np.ndarray, " loops"]:
        """1 to R."""
        return np.arange(1, self.loops + 1)

    def need_states(self) -> Float[np.ndarray, "depths units features"]:
        """The states. Raises InputError when they were not kept."""
        if self.states is None:
            raise InputError("this record kept no states; record it with keep_states=True")
        return self.states

    def need_difficulty(self) -> Float[np.ndarray, " units"]:
        """The difficulty. Raises InputError when nobody knows it."""
        if self.difficulty is None:
            raise InputError(
                "nobody knows how hard these units are (text states no difficulty); use a task that does, such as "
                "data=pointer-chasing"
            )
        return self.difficulty


@torch.no_grad()
def record(
    model: LoopModel,
    data: Sequence[Examples],
    *,
    max_loops: int | None = None,
    start: Any = None,
    keep_states: bool = False,
    name: str = "",
) -> Record:
    """Run every problem for every loop, read it out each time, and note what can be measured.

    Args:
        max_loops: R; None means the most loops seen in training. More are fine: that is a question too.
        start: start state of random-start models, a seed or "zero".
        keep_states: keep all states, (R + 1) x N x features: large.
        name: what figures call the model.

    Raises:
        ConfigError: for a loop count below 1.
        InputError: without data, or when predictions do not fit the targets.
    """
    if not data:
        raise InputError("there is nothing to study; give at least one batch of problems")
    most = model.facts.trained_loops[1] if max_loops is None else max_loops
    was_training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoopRangeWarning)
            check_loops(model, most)
            watched = [_Batch(model, examples, most, start, keep_states) for examples in data]
    finally:
        model.train(was_training)
    columns: dict[str, Any] = {}
    for key in watched[0].columns:
        parts = [batch.columns[key] for batch in watched]
        columns[key] = None if any(part is None for part in parts) else np.concatenate(parts, axis=-1)
    kept = [batch.states for batch in watched if batch.states is not None]
    problems, shift = [], 0
    for batch, examples in zip(watched, data, strict=True):
        problems.append(batch.problem + shift)
        shift += len(examples)
    encode = sum(batch.encode_seconds for batch in watched)
    steps = np.sum([batch.step_seconds for batch in watched], axis=0)
    reads = np.sum([batch.readout_seconds for batch in watched], axis=0)
    return Record(
        model=name or _name(model),
        unit=model.facts.unit,
        trained_loops=model.facts.trained_loops,
        signal_kind=model.facts.signal,
        classes=watched[0].classes,
        costs=count_costs(model, data[0]),
        seconds=encode + np.cumsum(steps) + reads.mean(),
        readout_seconds=float(reads.mean()),
        problem=np.concatenate(problems),
        states=np.concatenate(kept, axis=1) if kept else None,
        **columns,
    )


def pick(taken: Record, units: Int[np.ndarray, " kept"]) -> Record:
    """Some units of a record, in this order. Measured seconds stay those of all units."""
    changes: dict[str, Any] = {}
    for field in fields(Record):
        value = getattr(taken, field.name)
        if field.name == "states":
            changes[field.name] = None if value is None else value[:, units]
        elif isinstance(value, np.ndarray) and field.name != "seconds":
            changes[field.name] = value[..., units]
        else:
            changes[field.name] = value
    return Record(**changes)


class _Batch:
    """One batch, run to the last loop."""

    def __init__(self, model: LoopModel, examples: Examples, loops: int, start: Any, keep_states: bool) -> None:
        self.model, self.examples = model, examples
        self.columns: dict[str, Any] = {}
        self.step_seconds, self.readout_seconds = np.zeros(loops), np.zeros(loops)
        self.by_sample = model.facts.unit == "sample"
        asked = examples.targets != IGNORED
        self.asked = asked
        self.problem: Int[np.ndarray, " units"] = (
            np.arange(len(examples)) if self.by_sample else asked.nonzero()[:, 0].cpu().numpy()
        )
        self.encode_seconds = 0.0
        context, self.encode_seconds = _timed(lambda: model.encode(examples.inputs, **examples.options))
        state = model.initial_state(context, start)
        motion = _Motion(self._features(state, context), keep=keep_states)
        said = _Said(loops)
        for loop in range(1, loops + 1):
            state, self.step_seconds[loop - 1] = _timed(partial(model.step, state, context, loop))
            raw, self.readout_seconds[loop - 1] = _timed(partial(model.readout, state, context))
            signal = model.signal(state, raw)
            motion.add(self._features(state, context))
            self._judge(raw, said)
            if signal is not None:
                said.note("signals", signal if self.by_sample else signal[self._places(signal)])
        self.classes = said.classes
        self.columns = {key: torch.stack(rows).cpu().numpy() for key, rows in (said.rows | motion.rows).items()}
        self.columns.setdefault("signals", None)
        self.states = torch.stack(motion.kept).cpu().numpy() if keep_states else None
        self.columns["difficulty"] = self._difficulty()
        single = not self.by_sample or examples.targets[0].numel() == 1
        targets = examples.targets[asked] if not self.by_sample else examples.targets.flatten()
        self.columns["targets"] = targets.cpu().numpy() if single else None

    def _features(self, state: Any, context: Any) -> Float[Tensor, "units features"]:
        """One row per unit that is asked, in float32 or wider."""
        if self.by_sample:
            return widen(flat_state(state))
        if isinstance(self.model, LoopedLM):
            return widen(state[self._places(state)])
        rows = self.model.open_rows(state, context)[0]
        return widen(flat_state(rows)[self.asked.flatten().to(first_tensor(rows).device)])

    def _places(self, like: Tensor) -> Bool[Tensor, "problems *places"]:
        return self.asked.to(like.device)

    def _difficulty(self) -> Float[np.ndarray, " units"] | None:
        given = self.examples.difficulty
        if given is None:
            return None
        wide = given.double().cpu()
        if self.by_sample:
            if wide.dim() != 1:
                raise InputError(f"difficulty has shape {tuple(wide.shape)}; a model of samples needs one per problem")
            return wide.numpy()
        whole = wide if wide.dim() > 1 else wide[:, None].expand(self.asked.shape)
        return whole[self.asked.cpu()].numpy()

    def _judge(self, raw: Tensor, said: "_Said") -> None:
        examples = self.examples
        prediction = raw if examples.read is None else examples.read(raw)
        targets, asked = examples.targets.to(prediction.device), self._places(prediction)
        if prediction.shape[:-1] != targets.shape:
            raise InputError(
                f"the prediction has shape {tuple(prediction.shape)}; with targets {tuple(targets.shape)} it must be "
                f"{(*targets.shape, 'classes')}; pass Examples(read=...) to rearrange it"
            )
        if self.by_sample:
            rows = len(targets)
            logits = prediction.reshape(rows, -1, prediction.shape[-1])
            wanted, counts = targets.reshape(rows, -1), asked.reshape(rows, -1)
        else:
            logits, wanted = prediction[asked][:, None], targets[asked][:, None]
            counts = torch.ones_like(wanted, dtype=torch.bool)
        chances = torch.log_softmax(widen(logits), dim=-1)
        best = chances.max(dim=-1)
        said.add(chances, best.indices)
        number = counts.sum(1).clamp(min=1)
        cost = -chances.gather(-1, torch.where(counts, wanted, 0)[..., None])[..., 0]
        hit = (best.indices == wanted) & counts
        right = hit.sum(1) == counts.sum(1)
        if self.by_sample and examples.verify is not None:
            right = examples.verify(best.indices.view(targets.shape).to(examples.targets.device)).to(right.device)
        said.note("losses", torch.where(counts, cost, 0.0).double().sum(1) / number)
        said.note("right", right)
        said.note("share", hit.sum(1).double() / number)
        said.note("confidence", torch.where(counts, best.values, 0.0).double().sum(1).exp())
        said.note("answers", _digest(torch.where(counts, best.indices, -1)))


class _Said:
    """What predictions were, loop after loop; statistics that compare one with the one before."""

    def __init__(self, loops: int) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        self.classes = 0
        self._chances: Tensor | None = None
        self._entropy: Tensor | None = None
        self._best: Tensor | None = None
        self._streak: Tensor | None = None

    def note(self, name: str, values: Tensor) -> None:
        wide = values if values.dtype in (torch.bool, torch.long) else widen(values).double()
        self.rows.setdefault(name, []).append(wide)

    def add(self, chances: Float[Tensor, "units places classes"], best: Int[Tensor, "units places"]) -> None:
        self.classes = chances.shape[-1]
        width = float(np.log(max(self.classes, 2)))
        entropy = torch.special.entr(chances.exp()).sum(-1)
        self.note("certainty", (1 - entropy / width).mean(1).clamp(0, 1))
        moved = entropy.new_full((len(entropy),), torch.nan)
        if self._entropy is not None:
            moved = (entropy - self._entropy).abs().mean(1)
        self.note("entropy_change", moved)
        before = torch.full_like(chances, -width) if self._chances is None else self._chances
        share = before.exp()
        # Where the earlier probability is 0 the term is 0 by its limit; -inf - -inf would say NaN.
        self.note("kl", torch.where(share == 0, 0.0, share * (before - chances)).sum(-1).mean(1))
        streak = torch.zeros_like(best[:, 0])
        if self._best is not None and self._streak is not None:
            streak = torch.where((best == self._best).all(1), self._streak + 1, 0)
        self.note("streak", streak)
        self._chances, self._entropy, self._best, self._streak = chances, entropy, best, streak


class _Motion:
    """How the state moved, loop after loop."""

    def __init__(self, start: Float[Tensor, "units features"], *, keep: bool) -> None:
        self.rows: dict[str, list[Tensor]] = {name: [] for name in ("norms", "change", "turn", "cosine")}
        self.kept = [start] if keep else []
        self._keep = keep
        self._state = start
        self._step: Tensor | None = None

    def add(self, state: Float[Tensor, "units features"]) -> None:
        step = state - self._state
        norm, size = state.norm(dim=1), step.norm(dim=1)
        unknown = torch.full_like(norm, torch.nan)
        turn, cosine = unknown, unknown
        if self._step is not None:
            turn = (step - self._step).norm(dim=1)
            cosine = (step * self._step).sum(1) / (size * self._step.norm(dim=1))
        found = {"norms": norm, "change": torch.where(size == 0, 0.0, size / norm), "turn": turn, "cosine": cosine}
        for name, values in found.items():
            self.rows[name].append(values.double())
        self._state, self._step = state, step
        if self._keep:
            self.kept.append(state)


def _digest(answers: Int[Tensor, "units places"]) -> Int[Tensor, " units"]:
    """The answer itself where there is one place, else a linear hash modulo 2^64 with odd random factors."""
    if answers.shape[1] == 1:
        return answers[:, 0]
    drawn = np.random.Generator(np.random.Philox(0)).integers(-(2**63), 2**63, size=answers.shape[1]) | 1
    factors = torch.from_numpy(drawn).to(answers.device)
    return (answers * factors).sum(1)


def _timed(run: Callable[[], Result]) -> tuple[Result, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def _name(model: LoopModel) -> str:
    origin = getattr(model, "origin", None)
    if origin is None:
        return type(model).__name__
    return str(origin.folder.name if origin.folder is not None else origin.family)
