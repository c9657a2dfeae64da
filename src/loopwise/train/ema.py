"""Exponential moving average of the weights, for evaluation and for the weights that are given away."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loopwise.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How long the average remembers."""

    decay: float = 0.999
    """Weight of the past in each update: the average spans about 1/(1-decay) steps."""
    start: int = 0
    """Steps before the average begins; until then it is the weights themselves."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"ema.decay={self.decay}: use a number from 0 up to, not including, 1, such as 0.999")
        if self.start < 0:
            raise ConfigError(f"ema.start={self.start}: use 0 or more steps")


class Ema:
    """average <- decay * average + (1 - decay) * weights after every step, in float32 or wider."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: EmaConfig) -> None:
        self.config = config
        self._parameters = dict(named_parameters)
        self._average: dict[str, Tensor] = {}
        """Empty until `start` steps are done."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the weights into the average; `step` is the number of optimiser steps completed."""
        if step < self.config.start:
            return
        if not self._average:
            self._average = {name: _wide(parameter).clone() for name, parameter in self._parameters.items()}
            return
        weights = [_wide(parameter) for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._average.values()), weights, 1.0 - self.config.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model carries the average inside the block and gets its own weights back, bit for bit, after it.

        The tensors are written in place, so optimisers, compiled code and views of them stay valid.
        """
        kept = {name: self._parameters[name].detach().clone() for name in self._average}
        try:
            self._put(self._average)
            yield
        finally:
            self._put(kept)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name (live tensors); empty before `start`."""
        return dict(self._average)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a state written by `state`; raises `CheckpointError` if it is of other parameters."""
        if state and state.keys() != self._parameters.keys():
            few = ", ".join(sorted(state.keys() ^ self._parameters.keys())[:3])
            raise CheckpointError(f"the averaged weights are of another model (they differ in: {few})")
        self._average = {name: value.to(self._parameters[name].device, copy=True) for name, value in state.items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)


def _wide(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
