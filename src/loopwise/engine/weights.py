"""Where a model's weights lie, for launches that go past its modules."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Weights:
    """Notices when weights were put elsewhere, and keeps those that launches have been told of.

    Args:
        rows: whether launches need each to lie row after row.
    """

    def __init__(self, weights: Iterable[Tensor], dtype: torch.dtype, *, rows: bool) -> None:
        self._weights, self._dtype, self._rows = list(weights), dtype, rows
        self._addresses: list[int] = []
        self._kept: list[Tensor] = []

    def moved(self) -> bool:
        """Whether some lie elsewhere than at the last call; True at the first.

        Raises:
            RuntimeError: they are of another type or layout now.
        """
        addresses = [weight.data_ptr() for weight in self._weights]
        if addresses == self._addresses:
            return False
        fit = (weight.dtype == self._dtype and (weight.is_contiguous() or not self._rows) for weight in self._weights)
        if not all(fit):
            raise RuntimeError("the model's weights have changed their type or layout; make a new engine")
        self._addresses, self._kept = addresses, [weight.data for weight in self._weights]
        return True
