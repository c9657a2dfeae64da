"""Rules that read the prediction itself. They need a readout after every loop, which may cost as much as the loop."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.loops.exits._base import (
    CountRule,
    Device,
    ExitRule,
    InstantRule,
    Need,
    Observation,
    ThresholdRule,
    Tracker,
)
from loopwise.loops.exits._registry import rule
from loopwise.loops.hazard import widen


def _log_probabilities(observation: Observation) -> Float[Tensor, " units places vocab"]:
    """Log-softmax in float32 or wider; a unit without positions inside has one place."""
    logits = widen(observation.read("logits"))
    logits = logits.flatten(1, -2) if logits.dim() > 2 else logits.unsqueeze(1)
    return torch.log_softmax(logits, dim=-1)


def _entropy(log_probabilities: Float[Tensor, " units places vocab"]) -> Float[Tensor, " units places"]:
    terms: Tensor = torch.special.entr(log_probabilities.exp())
    return terms.sum(dim=-1)


@rule("kl")
class KL(ThresholdRule):
    """The prediction settled: KL(previous || current), in nats, starting from the uniform distribution.

    So a first prediction within x of uniform stops at loop 1. Averaged over positions inside a unit.
    """

    form = "kl:x"
    formula = "KL(p_{i-1} || p_i) < x, with p_0 uniform"
    source = "Huginn, arXiv 2502.05171, section 6.1 (5e-4; its code's own default is 1e-3)"
    default = example = "kl:0.0005"
    allowed = "a number above 0"
    needs = frozenset({"logits"})

    @staticmethod
    def permits(threshold: float) -> bool:
        return threshold > 0

    def track(self, units: int, device: Device = None) -> Tracker:
        return _KLTracker(self.threshold, units, device)


class _KLTracker(Tracker):
    def __init__(self, threshold: float, units: int, device: Device) -> None:
        super().__init__(units, device)
        self._threshold = threshold
        self._previous: Float[Tensor, " units places vocab"] | None = None

    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        current = _log_probabilities(observation)
        uniform = current.new_tensor(-math.log(current.shape[-1]))
        if self._previous is None:
            previous = uniform.expand_as(current)
        else:
            previous = torch.where((self.seen == 0)[:, None, None], uniform, self._previous)
        probability = previous.exp()
        # Where the earlier probability is 0 the term is 0 by its limit; -inf - -inf would say NaN.
        terms = torch.where(probability == 0, 0.0, probability * (previous - current))
        self._previous = current
        return terms.sum(dim=-1).mean(dim=-1) < self._threshold


@rule("entropy")
class Entropy(ThresholdRule):
    """The prediction's entropy settled. There is nothing to compare with at loop 1, so it stops at loop 2 at the
    earliest (Huginn's code starts from 100 nats, which comes to the same). Averaged over positions inside a unit.
    """

    form = "entropy:x"
    formula = "|H(p_i) - H(p_{i-1})| < x, in nats"
    source = "Huginn, arXiv 2502.05171, `entropy-diff` of its code"
    default = example = "entropy:0.001"
    allowed = "a number above 0"
    earliest = "2"
    needs = frozenset({"logits"})

    @staticmethod
    def permits(threshold: float) -> bool:
        return threshold > 0

    def track(self, units: int, device: Device = None) -> Tracker:
        return _EntropyTracker(self.threshold, units, device)


class _EntropyTracker(Tracker):
    def __init__(self, threshold: float, units: int, device: Device) -> None:
        super().__init__(units, device)
        self._threshold = threshold
        self._previous: Float[Tensor, " units places"] | None = None

    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        current = _entropy(_log_probabilities(observation))
        settled = torch.zeros_like(self.seen, dtype=torch.bool)
        if self._previous is not None:
            settled = (self.seen > 0) & ((current - self._previous).abs().mean(dim=-1) < self._threshold)
        self._previous = current
        return settled


@rule("stable")
class Stable(CountRule):
    """The most likely token has stayed the same N times in a row, hence the same in N + 1 successive readouts.

    In a unit with positions inside, all of them must stay. With N as patience this is PABEE for classification.
    """

    form = "stable:N"
    formula = "argmax p_k = argmax p_{k-1} for the last N loops k"
    source = "Huginn, arXiv 2502.05171, `argmax-stability` of its code; PABEE, arXiv 2006.04152"
    default = example = "stable:5"
    earliest = "N + 1"
    needs = frozenset({"logits"})

    def track(self, units: int, device: Device = None) -> Tracker:
        return _StableTracker(self.count, units, device)


class _StableTracker(Tracker):
    def __init__(self, count: int, units: int, device: Device) -> None:
        super().__init__(units, device)
        self._count = count
        self._best: Int[Tensor, " units places"] | None = None
        self._streak = torch.zeros(units, dtype=torch.long, device=device)

    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        log_probabilities = _log_probabilities(observation)
        # argmax would pick the NaN itself; -1 equals no token, and two NaN readouts are not the same answer.
        unknown = log_probabilities.isnan().any(dim=-1)
        best = torch.where(unknown, -1, log_probabilities.argmax(dim=-1))
        if self._best is not None:
            same = ((best == self._best) & ~unknown).all(dim=-1) & (self.seen > 0)
            self._streak = torch.where(same, self._streak + 1, 0)
        self._best = best
        return self._streak >= self._count


@rule("certainty")
@dataclass(frozen=True, kw_only=True)
class Certainty(InstantRule):
    """Certainty 1 - H(p) / log V, averaged over positions inside a unit, reaches x.

    It reads the model's own signal where that is a certainty (after `bind`), and logits everywhere else.
    """

    from_signal: bool = False
    """Set by `bind`: read the model's certainty instead of computing it."""

    form = "certainty:x"
    formula = "1 - H(p_i) / log V >= x"
    source = "CTM, arXiv 2505.05522, its certainty; the default is ours"
    default = example = "certainty:0.9"
    allowed = "a number from 0 to 1"
    needs_in_words = "signal if the model's is a certainty, else logits"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"signal"}) if self.from_signal else frozenset({"logits"})

    @property
    def signal_kind(self) -> str | None:
        return "certainty" if self.from_signal else None

    @staticmethod
    def permits(threshold: float) -> bool:
        return 0 <= threshold <= 1

    def bind(self, signal_kind: str | None) -> ExitRule:
        return replace(self, from_signal=signal_kind == "certainty")

    def fires(self, observation: Observation) -> Bool[Tensor, " units"]:
        if self.from_signal:
            return widen(observation.read("signal")) >= self.threshold
        log_probabilities = _log_probabilities(observation)
        certainty = 1 - _entropy(log_probabilities) / math.log(log_probabilities.shape[-1])
        # Rounding can leave a uniform prediction a hair below 0.
        return certainty.mean(dim=-1).clamp(0, 1) >= self.threshold
