"""Numbers from Python and numpy to a device, without waiting for a GPU.

Pinned memory is not given out again before a copy from it is over: torch's allocator of host memory sees to that.

Axes: N numbers.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def placed(
    numbers: Sequence[int] | Sequence[float] | Sequence[bool], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A new tensor of these numbers, (N,)."""
    here = torch.tensor(numbers, dtype=dtype)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)


def send(numbers: np.ndarray, there: Tensor) -> None:
    """Copy an array over a tensor of its shape."""
    here = torch.from_numpy(numbers)
    there.copy_(here.pin_memory() if there.is_cuda else here, non_blocking=True)
