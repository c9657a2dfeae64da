"""Learning when to stop, for any looped model: PonderNet's hazard, and adaptive computation time (ACT).

Both look at the state after each loop through one linear gate, h = sigmoid(w.f(s) + b) in float32.

    PonderNet   Banino et al. 2021, arXiv 2107.05407. h is a hazard: the chance of stopping here, given that one
                got here. Each loop's answer must be good by itself: *losses* are averaged (`objectives/pondering.py`).
    ACT         Graves 2016, arXiv 1603.08983. One runs until the h of all loops sum to 1 - eps. *States* are averaged,
                so that loops may make up for each other:
                    N = first n with h_1 + ... + h_n >= 1 - eps,   R = 1 - (h_1 + ... + h_{N-1})
                    s = h_1 s_1 + ... + h_{N-1} s_{N-1} + R s_N
                The state is read once, as in the Universal Transformer; with a linear readout this is also the mean of
                the answers.

Each is itself a `LoopModel`, with a hazard as its signal, so all drivers and exit rules apply. `hazard:q` stops where
the chance of having stopped reaches q; for ACT, hazard:(1 - eps) is its own rule. `loops.sampled.Sampled` draws, as
PonderNet does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from loopwise.errors import ConfigError
from loopwise.loops.hazard import widen
from loopwise.loops.protocol import LoopFacts, LoopModel, first_tensor, flat_state, leaves, tree_map

Features = Callable[[Any], Tensor]
"""From a model's state to the numbers that a gate looks at, (units..., F)."""


def channel_means(state: Float[Tensor, "samples channels *places"]) -> Float[Tensor, "samples channels"]:
    """The mean of each channel over all places: features of a state of convolutions."""
    return state.flatten(2).mean(2) if state.dim() > 2 else state


class Gated(LoopModel):
    """A looped model with a gate beside it; everything but stopping is the model's own."""

    def __init__(self, model: LoopModel, *, features: int, look: Features | None = None, bias: float = 0.0) -> None:
        """
        Args:
            model: any looped model; it becomes part of this one.
            features: how many numbers `look` gives, F.
            look: what the gate sees of a state; None: all of it, for a model whose units are samples.
            bias: where the gate's bias starts; sigmoid(bias) is about the first hazard.

        Raises:
            ConfigError: for units finer than samples without `look`.
        """
        super().__init__()
        if look is None and model.facts.unit != "sample":
            raise ConfigError(
                f"the units of {type(model).__name__} are {model.facts.unit}s; say what the gate sees of each, "
                "such as look=lambda state: state"
            )
        self.model = model
        self.look: Features = flat_state if look is None else look
        self.gate = nn.Linear(features, 1)
        nn.init.constant_(self.gate.bias, bias)

    def hazard(self, state: Any) -> Float[Tensor, "*units"]:
        """The gate's number for a state of the model, in float32 or wider."""
        seen = widen(self.look(state))
        weight, bias = self.gate.weight.to(seen.dtype), self.gate.bias.to(seen.dtype)
        return torch.sigmoid(nn.functional.linear(seen, weight, bias).squeeze(-1))

    def encode(self, inputs: Any, **options: Any) -> Any:
        return self.model.encode(inputs, **options)


class PonderNet(Gated):
    """A looped model that learns a hazard. State and readout are the model's own."""

    def __init__(self, model: LoopModel, *, features: int, look: Features | None = None, bias: float = 0.0) -> None:
        super().__init__(model, features=features, look=look, bias=bias)
        self.facts = _facts(model, anytime=True)

    def initial_state(self, context: Any, start: Any = None) -> Any:
        return self.model.initial_state(context, start)

    def step(self, state: Any, context: Any, loop: int) -> Any:
        return self.model.step(state, context, loop)

    def readout(self, state: Any, context: Any) -> Tensor:
        return self.model.readout(state, context)

    def signal(self, state: Any, prediction: Tensor | None) -> Float[Tensor, "*units"]:
        return self.hazard(state)

    def open_rows(self, state: Any, context: Any) -> tuple[Any, Any]:
        return self.model.open_rows(state, context)

    def keep_rows(self, state: Any, context: Any, index: Tensor) -> tuple[Any, Any]:
        return self.model.keep_rows(state, context, index)

    def close_rows(self, rows: Any, context: Any) -> Any:
        return self.model.close_rows(rows, context)

    def open_units(self, units: Tensor, context: Any) -> Tensor:
        return self.model.open_units(units, context)


@dataclass(frozen=True)
class ACTState:
    """What ACT carries from loop to loop, for N samples."""

    latest: Any
    """The model's own state, s_n."""
    mixed: Any
    """h_1 s_1 + ... + h_{n-1} s_{n-1}: what earlier loops gave to the mean (whole numbers have none)."""
    spent: Float[Tensor, " samples"]
    """h_1 + ... + h_{n-1}, in float32 or wider; the remainder R is what it lacks to 1."""
    loops: Int[Tensor, " samples"]
    """Loops run, n, and N once a sample has halted: it then changes no more."""


class ACT(Gated):
    """A looped model that halts where its gate's numbers add up, and answers from the mean of its states.

    Read after loop n < N, the last loop takes what is left, as if n were the limit on loops. The units are samples.
    """

    def __init__(
        self,
        model: LoopModel,
        *,
        features: int,
        look: Features | None = None,
        bias: float = 0.0,
        eps: float = 0.01,
    ) -> None:
        """
        Args:
            eps: a sample halts once the sum reaches 1 - eps, so that it can halt after one loop.

        Raises:
            ConfigError: for eps outside 0 to 1, or a model whose units are finer than samples.
        """
        if model.facts.unit != "sample":
            raise ConfigError(
                f"the units of {type(model).__name__} are {model.facts.unit}s; ACT takes models whose units are samples"
            )
        if not 0 <= eps < 1:
            raise ConfigError(f"eps={eps}: allowed is 0 up to, not including, 1, such as eps=0.01")
        super().__init__(model, features=features, look=look, bias=bias)
        self.eps = eps
        self.facts = _facts(model, anytime=False)

    def initial_state(self, context: Any, start: Any = None) -> ACTState:
        if isinstance(start, ACTState):
            return start
        latest = self.model.initial_state(context, start)
        here = first_tensor(latest)
        return ACTState(
            latest=latest,
            mixed=tree_map(torch.zeros_like, latest),
            spent=widen(here.new_zeros(len(here))),
            loops=torch.zeros(len(here), dtype=torch.long, device=here.device),
        )

    def step(self, state: ACTState, context: Any, loop: int) -> ACTState:
        share = self._share(state)
        running = ~self._halts(state, share)
        spend = torch.where(running, share, 0)
        onward = self.model.step(state.latest, context, loop)
        return ACTState(
            latest=_together(lambda new, old: _where(running, new, old), onward, state.latest),
            mixed=_together(lambda mixed, part: _added(mixed, part, spend), state.mixed, state.latest),
            spent=state.spent + spend,
            loops=state.loops + running,
        )

    def keep_rows(self, state: ACTState, context: Any, index: Tensor) -> tuple[ACTState, Any]:
        latest, kept = self.model.keep_rows(state.latest, context, index)
        mixed, _ = self.model.keep_rows(state.mixed, context, index)
        return ACTState(latest=latest, mixed=mixed, spent=state.spent[index], loops=state.loops[index]), kept

    def readout(self, state: ACTState, context: Any) -> Tensor:
        remainder = 1 - state.spent
        mean = _together(lambda mixed, part: _added(mixed, part, remainder), state.mixed, state.latest)
        return self.model.readout(mean, context)

    def signal(self, state: ACTState, prediction: Tensor | None) -> Float[Tensor, " samples"]:
        """The chance of stopping here given that one got here: h_n / R_n, and 1 where the sample halts.

        The exit distribution of these hazards (`loops.hazard`) is what each loop gives to the mean.
        """
        share = self._share(state)
        left = 1 - state.spent
        return torch.where(self._halts(state, share), 1.0, share / left.clamp_min(torch.finfo(left.dtype).tiny))

    def _share(self, state: ACTState) -> Float[Tensor, " samples"]:
        """h_n; 0 before loop 1, when there is nothing to give."""
        return torch.where(state.loops > 0, self.hazard(state.latest), 0)

    def _halts(self, state: ACTState, share: Float[Tensor, " samples"]) -> Bool[Tensor, " samples"]:
        """Whether the loop that made this state is the sample's last."""
        return (state.loops > 0) & (state.spent + share >= 1 - self.eps)


def _facts(model: LoopModel, *, anytime: bool) -> LoopFacts:
    facts = model.facts
    return LoopFacts(
        unit=facts.unit,
        signal="hazard",
        anytime=anytime,
        trained_loops=facts.trained_loops,
        random_start=facts.random_start,
        loop_dependent=facts.loop_dependent,
        readout_mixes=facts.readout_mixes,
    )


def _together(apply: Callable[[Tensor, Tensor], Tensor], first: Any, second: Any) -> Any:
    """`apply` to each pair of tensors of two equal nests."""
    others = iter(leaves(second))
    return tree_map(lambda tensor: apply(tensor, next(others)), first)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _added(mixed: Tensor, part: Tensor, share: Tensor) -> Tensor:
    """A share of one part more; of counts, which have no mean, the latest."""
    return mixed + part * _per_sample(share, part).to(part.dtype) if part.is_floating_point() else part


def _where(running: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(_per_sample(running, new), new, old)
