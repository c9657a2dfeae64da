"""The smallest model that loops: a recurrent cell that looks at the same vector again and again.

    s = tanh(W x + U s + b)   or a gated recurrent unit of (x, s)          once per loop, from zeros
    logits = H s + c

PonderNet's parity network (Banino et al. 2021, arXiv 2107.05407, appendix) is such a cell of width 128; it has no
signal of its own and gets one from `models/pondering.py`.

Axes: N samples, F inputs, D width, K classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loopwise.errors import ConfigError, InputError
from loopwise.loops.protocol import LoopFacts, LoopModel

CELLS = ("tanh", "gru")


@dataclass(frozen=True, kw_only=True)
class RecurrentCellConfig:
    """Shapes and kind of a `RecurrentCell`."""

    inputs: int
    """Numbers of a sample, F."""
    classes: int = 2
    """Classes of the answer, K."""
    width: int = 128
    """Numbers of the state, D."""
    cell: str = "tanh"
    """`tanh`, Elman's, or `gru`, the gated recurrent unit."""
    trained_loops: tuple[int, int] = (1, 20)
    """Fewest and most loops of training."""

    def __post_init__(self) -> None:
        for name in ("inputs", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed is 1 or more")
        if self.classes < 2:
            raise ConfigError(f"classes={self.classes}: allowed is 2 or more")
        if self.cell not in CELLS:
            raise ConfigError(f"cell={self.cell!r} is unknown; allowed are {', '.join(CELLS)}")


class RecurrentCell(LoopModel):
    """A recurrent cell over one vector. Its state is (N, D), its unit the sample, its prediction (N, K)."""

    def __init__(self, config: RecurrentCellConfig) -> None:
        super().__init__()
        self.config = config
        self.facts = LoopFacts(
            unit="sample",
            signal=None,
            anytime=False,
            trained_loops=config.trained_loops,
            random_start=False,
            loop_dependent=False,
            readout_mixes=False,
        )
        gates = 1 if config.cell == "tanh" else 3
        # The input is the same at each loop, so its product is part of the context.
        self.enter = nn.Linear(config.inputs, gates * config.width)
        self.again = nn.Linear(config.width, gates * config.width)
        self.head = nn.Linear(config.width, config.classes)

    def encode(self, inputs: Float[Tensor, "..."], **options: Any) -> Float[Tensor, "samples gates"]:
        """What the cell makes of the input, once for all loops. Inputs are (N, F).

        Raises:
            InputError: for another shape.
        """
        if options:
            raise TypeError(f"encode does not take {', '.join(options)}")
        if inputs.dim() != 2 or inputs.shape[1] != self.config.inputs:
            raise InputError(f"inputs of shape {tuple(inputs.shape)}; this model takes (N, {self.config.inputs})")
        entered: Tensor = self.enter(inputs)
        return entered

    def initial_state(
        self, context: Float[Tensor, "samples gates"], start: Any = None
    ) -> Float[Tensor, "samples width"]:
        """Zeros, or the state that is given."""
        if isinstance(start, Tensor):
            return start
        if start in (None, "zero"):
            return context.new_zeros(len(context), self.config.width)
        raise ConfigError(f'start={start!r}: nothing is drawn here; allowed are "zero" or a state')

    def step(
        self, state: Float[Tensor, "samples width"], context: Float[Tensor, "samples gates"], loop: int
    ) -> Float[Tensor, "samples width"]:
        again = self.again(state)
        if self.config.cell == "tanh":
            return torch.tanh(context + again)
        reset_x, keep_x, new_x = context.chunk(3, dim=1)
        reset_s, keep_s, new_s = again.chunk(3, dim=1)
        keep = torch.sigmoid(keep_x + keep_s)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_s) * new_s)
        return new + keep * (state - new)

    def readout(
        self, state: Float[Tensor, "samples width"], context: Float[Tensor, "samples gates"]
    ) -> Float[Tensor, "samples classes"]:
        logits: Tensor = self.head(state)
        return logits

    def signal(self, state: Float[Tensor, "samples width"], prediction: Tensor | None) -> None:
        return None
