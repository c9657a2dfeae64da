"""The gated feed-forward layer (Shazeer 2020), gate and up projection fused."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopwise.nn.linear import WideLinear


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); rows of the fused projection: gate first, then up."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate_up = WideLinear(width, 2 * mlp_width)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out
