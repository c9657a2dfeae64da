"""Norms, rotations, gates, hazards and choices of few rows on a CPU, each in one call: see `rows.cpp`.

float32 and float64, without gradients; where a function returns None or False, torch's own operations have to do it.

Axes: N rows, D width, H heads, K head width, V vocabulary.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from loopwise.nn.kernels.cpu import load_library


@dataclass(frozen=True)
class RowKernels:
    """The compiled functions of one dtype."""

    norm: Callable[..., None]
    rotate: Callable[..., None]
    gate: Callable[..., None]
    hazard: Callable[..., None]
    pick: Callable[..., None]


@cache
def load_row_kernels() -> dict[torch.dtype, RowKernels]:
    """By dtype; empty where they cannot be had. Compiles on the first call."""
    library = load_library()
    if library is None:
        return {}
    pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    arguments = {
        "norm": (*[pointer] * 3, size, size, ctypes.c_double, threads),
        "rotate": (*[pointer] * 3, *[size] * 4, ctypes.c_int, threads),
        "gate": (*[pointer] * 2, size, size, threads),
        "hazard": (*[pointer] * 4, size, size),
        "pick": (*[pointer] * 4, size, size, threads),
    }
    found = {}
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        functions = {}
        for function, types in arguments.items():
            functions[function] = getattr(library, f"loopwise_{function}_{name}")
            functions[function].argtypes, functions[function].restype = types, None
        found[dtype] = RowKernels(**functions)
    return found


def _kernels(x: Tensor) -> RowKernels | None:
    if x.device.type != "cpu" or torch.is_grad_enabled() or not x.is_contiguous() or not x.numel():
        return None
    return load_row_kernels().get(x.dtype)


def norm_rows(x: Float[Tensor, "... width"], weight: Float[Tensor, " width"], eps: float) -> Tensor | None:
    """`RMSNorm` of each row."""
    kernels = _kernels(x)
    if kernels is None or weight.dtype != x.dtype:
        return None
    out = torch.empty_like(x)
    width = x.shape[-1]
    kernels.norm(
        *(x.data_ptr(), weight.data_ptr(), out.data_ptr()),
        *(x.numel() // width, width, eps, torch.get_num_threads()),
    )
    return out


def gate_rows(x: Float[Tensor, "... both"]) -> Tensor | None:
    """silu of the first half of each row, times the second."""
    kernels = _kernels(x)
    if kernels is None:
        return None
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    kernels.gate(x.data_ptr(), out.data_ptr(), x.numel() // (2 * width), width, torch.get_num_threads())
    return out


def hazard_rows(
    x: Float[Tensor, "... width"], weight: Float[Tensor, "1 width"], bias: Float[Tensor, "1"]
) -> Tensor | None:
    """sigmoid(x w + b), a number per row."""
    kernels = _kernels(x)
    if kernels is None or not weight.dtype == bias.dtype == x.dtype or not weight.is_contiguous():
        return None
    width = x.shape[-1]
    out = x.new_empty(x.shape[:-1])
    kernels.hazard(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), x.numel() // width, width)
    return out


def rotate_rows(
    x: Float[Tensor, "rows features"],
    cos: Float[Tensor, "rows pairs"],
    sin: Float[Tensor, "rows pairs"],
    *,
    heads: int,
    interleaved: bool,
) -> bool:
    """Rotate the first heads of each row in place; False where that has to be done otherwise."""
    kernels = _kernels(x)
    if kernels is None or not cos.dtype == sin.dtype == x.dtype or not (cos.is_contiguous() and sin.is_contiguous()):
        return False
    rows, features = x.shape
    kernels.rotate(
        *(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, heads, 2 * cos.shape[1], features, interleaved),
        torch.get_num_threads(),
    )
    return True


def pick_rows(
    logits: Float[Tensor, "rows vocab"], noisy: Float64[Tensor, "rows vocab"] | None
) -> tuple[list[int], list[float]] | None:
    """The likeliest token of each row, or the one that is largest in `noisy`, the first of equals; and its raw
    log-probability in nats.
    """
    kernels = _kernels(logits)
    if kernels is None:
        return None
    rows, vocab = logits.shape
    tokens, chances = (ctypes.c_int64 * rows)(), (ctypes.c_double * rows)()
    kept = None if noisy is None else noisy.contiguous()
    kernels.pick(
        *(logits.data_ptr(), None if kept is None else kept.data_ptr(), tokens, chances),
        *(rows, vocab, torch.get_num_threads()),
    )
    return list(tokens), list(chances)
