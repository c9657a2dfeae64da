"""Neuron-level models: every neuron reads its own past through private weights (arXiv 2505.05522, section 2.3).

Everything is laid out neuron by neuron, (D, features, N), so that all private products are one batched product over
memory that is read in order.

Axes: D neurons, M past pre-activations, H hidden features, N rows.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class NeuronLinear(nn.Module):
    """A linear layer of its own for each neuron, (weight @ x + bias) / temperature; the temperature is shared."""

    def __init__(self, neurons: int, width_in: int, width_out: int, *, norm: bool, dropout: float) -> None:
        super().__init__()
        limit = (width_in + width_out) ** -0.5
        self.weight = nn.Parameter(torch.empty(neurons, width_out, width_in).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.zeros(neurons, width_out))
        self.temperature = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(width_in) if norm else None
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "neurons width_in rows"]) -> Float[Tensor, "neurons width_out rows"]:
        x = F.dropout(x, self.dropout, self.training)
        if self.norm is not None:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        # The temperature divides the weights, which are fewer numbers than the answers.
        weight, bias = self.weight / self.temperature, self.bias / self.temperature
        return torch.baddbmm(bias[:, :, None], weight, x)


class NeuronModels(nn.Module):
    """One small network per neuron, from its last M pre-activations to its activity.

    Deep: M -> 2H, GLU, H -> 2, GLU -> 1. Shallow (`hidden` None): M -> 2, GLU -> 1.
    """

    def __init__(self, neurons: int, memory: int, hidden: int | None, *, norm: bool, dropout: float) -> None:
        super().__init__()
        widths = [memory, 1] if hidden is None else [memory, hidden, 1]
        self.layers = nn.ModuleList(
            NeuronLinear(neurons, before, 2 * after, norm=norm, dropout=dropout) for before, after in pairwise(widths)
        )

    def forward(self, history: Float[Tensor, "neurons memory rows"]) -> Float[Tensor, "neurons rows"]:
        x = history
        for layer in self.layers:
            x = F.glu(layer(x), dim=1)
        return x[:, 0]
