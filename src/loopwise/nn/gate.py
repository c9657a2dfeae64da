"""The gate that says how likely a state is to be the last one."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class HazardGate(nn.Linear):
    """sigmoid(w x + b), the probability of stopping here (Ouro, arXiv 2510.25741, eq. 3)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)

    def hazard(self, seen: Float[Tensor, "... width"]) -> Float[Tensor, "..."]:
        """The probability in the dtype of `seen`, which should be float32 or wider."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if weight.dtype != seen.dtype:
            weight, bias = weight.to(seen.dtype), bias.to(seen.dtype)
        device = seen.device.type
        # Autocast would take the product back to bfloat16, whose steps near 1 are coarser than thresholds.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            logit = F.linear(seen, weight, bias)
        return torch.sigmoid(logit).squeeze(-1)
