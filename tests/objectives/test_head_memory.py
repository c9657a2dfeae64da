"""No tensor as large as all logits, or as one loop's logits, ever exists."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loopwise.objectives import EveryLoop, ObjectiveInputs, objective_loss


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_largest_tensor_of_a_training_step() -> None:
    loops, batch, tokens, width, vocab = 4, 2, 64, 8, 512
    torch.manual_seed(0)
    states = [torch.randn(batch, tokens, width, requires_grad=True) for _ in range(loops)]
    head = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (batch, tokens))
    objective = EveryLoop(loops=loops)
    mask = torch.rand(batch, tokens) < 0.9
    inputs = ObjectiveInputs(plan=objective.plan(seed=0, step=0, micro=0), mask=mask)
    rows = 16
    with LargestTensor() as largest:
        loss = objective_loss(
            objective, inputs, hidden=states, head_weight=head, targets=targets, chunk_bytes=rows * vocab * 4
        )
        loss.total.backward()
    assert states[0].grad is not None
    assert rows * vocab / 2 < largest.elements <= rows * vocab
    with LargestTensor() as naive:
        torch.stack(states) @ head.t()
    assert naive.elements == loops * batch * tokens * vocab
