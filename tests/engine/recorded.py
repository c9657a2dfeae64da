"""What a CUDA graph does, on a CPU: a function's operations are noted once and repeated on the very same tensors.

No Python of the function runs again, so whatever it took from elsewhere than tensors stays as it was.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "unique_dim", "_unique2"}
"""Operations that ask for numbers, have shapes that depend on them, or bring new ones from Python."""


class Recorder:
    """A `Capture`. It runs a function to warm it up and once more to note it."""

    def __init__(self) -> None:
        self.graphs: list[Noted] = []

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        with Noted() as noted:
            function()
        self.graphs.append(noted)
        return noted.replay


class Noted(TorchDispatchMode):
    """A function's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, Tensor] = {}
        """By storage, what the operations make; they keep it."""
        self.given: set[int] = set()
        """Storages that they use and have not made."""
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        assert name not in REFUSED, f"a graph cannot hold {name}"
        taken = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        if name in ("index", "index_put_"):
            assert all(tensor.dtype != torch.bool for tensor in taken[1:]), "the shape of a choice depends on numbers"
        places = set(map(_storage, taken))
        self.given |= places - self.made.keys()
        out = func(*args, **kwargs)
        new = [each for each in tree_leaves(out) if isinstance(each, Tensor) and _storage(each) not in places]
        self.made |= {_storage(tensor): tensor for tensor in new}
        if new or func._schema.is_mutable:  # a view needs no repeating
            self.steps.append((func, args, kwargs, out))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        self.replays += 1
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)  # so that what is not computed again is seen
        for func, args, kwargs, kept in self.steps:
            out = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for there, now in zip(tree_leaves(kept), tree_leaves(out), strict=True):
                    if isinstance(there, Tensor):
                        there.copy_(now)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
