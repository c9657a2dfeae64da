"""Products of a few rows with a matrix, and a model's twin that uses them.

Such a product only reads the matrix. torch's own reads it at full speed for one or two rows and takes twice as long or
more for three and up; the kernel here goes on at nearly the speed of one row.

Axes: N rows.
"""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopwise.nn.kernels.cpu import load_cpu_kernels
from loopwise.nn.linear import WideLinear

Model = TypeVar("Model", bound=nn.Module)

FEW_ROWS = 16
"""Up to so many rows the kernel was faster than torch's `F.linear`, or equal, wherever it was measured."""
CANDIDATES = (1, 2, 4, 8, 16, 32)
ROUNDS = 5


def linear(
    x: Float[Tensor, "... inputs"], weight: Float[Tensor, "outputs inputs"], few: int = FEW_ROWS
) -> Float[Tensor, "... outputs"]:
    """`F.linear(x, weight)`; up to `few` rows on a CPU, without gradients, by a kernel that reads the matrix once.

    float32 and float64, right to rounding; anything else is `F.linear`.
    """
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if 0 < rows <= few and x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_grad_enabled():
        kernels = load_cpu_kernels()
        kernel = None if kernels is None else kernels.linear.get(x.dtype)
        if kernel is not None and weight.is_contiguous():
            return _multiply(kernel, x, weight, rows)
    return F.linear(x, weight)


def _multiply(kernel: Callable[..., None], x: Tensor, weight: Tensor, rows: int) -> Tensor:
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs:
        raise ValueError(f"these do not fit: x {tuple(x.shape)}, weight {tuple(weight.shape)}")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    kernel(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, inputs, outputs, torch.get_num_threads())
    return y


class FewRowsLinear(nn.Linear):
    """An `nn.Linear` whose products of up to `few` rows are the kernel's."""

    few: int

    def forward(self, input: Tensor) -> Tensor:
        out = linear(input, self.weight, self.few)
        return out if self.bias is None else out + self.bias


def fast_twin(model: Model, few: int | None = FEW_ROWS) -> Model:
    """A model of the same parameters and buffers (the very tensors) whose linear layers are fast for few rows.

    The given model is not touched, and what is later loaded or trained into it the twin sees as well; modules that are
    added to it afterwards (adapters), it does not.

    Args:
        few: products of up to so many rows are the kernel's; None measures it, for each shape of matrix, on the
            model's own matrices. That costs some ten products each, and the last bits of results then depend on what
            the clock said.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    classes: dict[tuple[torch.Size, torch.dtype], list[nn.Linear]] = {}
    for module in twin.modules():
        if type(module) is nn.Linear or type(module) is WideLinear:
            classes.setdefault((module.weight.shape, module.weight.dtype), []).append(module)
    for modules in classes.values():
        crossing = measure_few([module.weight for module in modules]) if few is None else few
        for module in modules:
            module.__class__ = FewRowsLinear
            cast(FewRowsLinear, module).few = crossing
    return twin


def measure_few(weights: Sequence[Float[Tensor, "outputs inputs"]]) -> int:
    """The most rows at which the kernel is faster than `F.linear` for these matrices of one shape, taken in turn.

    One of `CANDIDATES`, or 0.
    """
    few = 0
    with torch.no_grad():
        for rows in CANDIDATES:
            x = weights[0].new_ones(rows, weights[0].shape[1])
            # At one or two rows both only read the matrix: a tie there says nothing of more rows.
            if _shortest(partial(linear, few=rows), x, weights) < _shortest(F.linear, x, weights):
                few = rows
    return few


def _shortest(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Sequence[Tensor]) -> float:
    """Seconds of the fastest of a few products."""
    times = []
    for i in range(ROUNDS):
        began = time.perf_counter()
        product(x, weights[i % len(weights)])
        times.append(time.perf_counter() - began)
    return min(times)
