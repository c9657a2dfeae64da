"""Where the states of rows in flight lie."""

import torch


class Seats:
    """State vectors of rows in flight, found by index. Seat 0 is nobody's: rows that only pad a launch have it."""

    def __init__(self, width: int, *, injected: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.state = torch.zeros(16, width, dtype=dtype, device=device)
        self.injected = torch.zeros_like(self.state) if injected else None
        self._free = list(range(15, 0, -1))

    def take(self) -> int:
        if not self._free:
            size = len(self.state)
            self.state = torch.cat([self.state, torch.zeros_like(self.state)])
            if self.injected is not None:
                self.injected = torch.cat([self.injected, torch.zeros_like(self.injected)])
            self._free = list(range(2 * size - 1, size - 1, -1))
        return self._free.pop()

    def give(self, seat: int) -> None:
        self._free.append(seat)

    @property
    def taken(self) -> int:
        return len(self.state) - 1 - len(self._free)
