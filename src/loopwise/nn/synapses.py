"""Synapses: the layers through which neurons speak to each other (arXiv 2505.05522, section 2.2).

A single gated layer, or a U-Net over widths: down from the number of neurons to 16 and up again, with a skip at each
width.
"""

from itertools import pairwise

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

NARROWEST = 16
"""Width at the bottom of the U-Net, fixed in the authors' code."""


class GatedSynapse(nn.Module):
    """norm(glu(linear(dropout(x))))."""

    def __init__(self, width_in: int, neurons: int, *, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, 2 * neurons)
        self.norm = nn.LayerNorm(neurons)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "rows width_in"]) -> Float[Tensor, "rows neurons"]:
        out: Tensor = self.norm(F.glu(self.linear(F.dropout(x, self.dropout, self.training))))
        return out


class _Layer(nn.Module):
    """silu(norm(linear(dropout(x))))."""

    def __init__(self, width_in: int, width_out: int, *, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width_out)
        self.norm = nn.LayerNorm(width_out)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "rows width_in"]) -> Float[Tensor, "rows width_out"]:
        return F.silu(self.norm(self.linear(F.dropout(x, self.dropout, self.training))))


class UNetSynapse(nn.Module):
    """`depth` widths from `neurons` down to 16, evenly spaced; each way up adds what the way down had at that width."""

    def __init__(self, width_in: int, neurons: int, depth: int, *, dropout: float) -> None:
        super().__init__()
        widths = unet_widths(neurons, depth)
        steps = list(pairwise(widths))
        self.first = _Layer(width_in, neurons, dropout=0.0)
        self.down = nn.ModuleList(_Layer(wide, narrow, dropout=dropout) for wide, narrow in steps)
        self.up = nn.ModuleList(_Layer(narrow, wide, dropout=dropout) for wide, narrow in steps)
        self.skip_norms = nn.ModuleList(nn.LayerNorm(wide) for wide, _ in steps)

    def forward(self, x: Float[Tensor, "rows width_in"]) -> Float[Tensor, "rows neurons"]:
        below: list[Tensor] = [self.first(x)]
        for layer in self.down:
            below.append(layer(below[-1]))
        out = below.pop()
        for layer, norm in zip(reversed(self.up), reversed(self.skip_norms), strict=True):
            out = norm(layer(out) + below.pop())
        return out


def unet_widths(neurons: int, depth: int) -> list[int]:
    """The widths of the U-Net from top to bottom, rounded down as the authors' linspace does."""
    return [int(width) for width in np.linspace(neurons, NARROWEST, depth)]
