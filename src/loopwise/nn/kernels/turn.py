"""A transposed matrix laid in rows, by all threads of a CPU; torch takes one. The work is done in `causal.cpp`."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from loopwise.nn.kernels.cpu import load_library

SOURCE = Path(__file__).with_name("causal.cpp")


@cache
def _kernels() -> dict[torch.dtype, Callable[..., int]]:
    """By dtype; empty where they cannot be had. Compiles on the first call."""
    library = load_library(SOURCE)
    if library is None:
        return {}
    found = {torch.float32: library.loopwise_turn_float32, torch.float64: library.loopwise_turn_float64}
    for kernel in found.values():
        kernel.argtypes = (*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_int)
    return dict(found)


def in_rows(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The same numbers, row after row; the matrix itself where it already is that, or where autograd watches."""
    if matrix.is_contiguous() or matrix.requires_grad:
        return matrix
    kernel = _kernels().get(matrix.dtype) if matrix.device.type == "cpu" and matrix.t().is_contiguous() else None
    if kernel is not None:
        out = torch.empty(matrix.shape, dtype=matrix.dtype)
        if kernel(matrix.data_ptr(), out.data_ptr(), *matrix.shape, torch.get_num_threads()):
            return out
    return matrix.contiguous()
