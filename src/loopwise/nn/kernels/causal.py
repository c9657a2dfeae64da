"""Causal attention within documents, with gradients, on a CPU in float32 and float64.

The work is done by `causal.cpp`. To torch it is one operation forward and one backward, so a compiled model keeps it in
its graph. Nothing is summed in an order that depends on threads: the same inputs give the same bits.

Axes: B batch, T tokens, H heads, G key-value heads, K head width.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from loopwise.nn.kernels.cpu import load_library
from loopwise.nn.rotary import Rotary, RotaryLayout

SOURCE = Path(__file__).with_name("causal.cpp")
DTYPES = (torch.float32, torch.float64)

_Data = ctypes.c_void_p * 8
_Sizes = ctypes.c_int64 * (5 + 3 * 8)
Kernels = dict[torch.dtype, Callable[..., int]]


@cache
def load_causal_kernels() -> Kernels | None:
    """The compiled function of each dtype; None where it cannot be had. Compiles on the first call."""
    library = load_library(SOURCE)
    if library is None:
        return None
    kernels = {torch.float32: library.loopwise_causal_float32, torch.float64: library.loopwise_causal_float64}
    for kernel in kernels.values():
        kernel.argtypes = (
            ctypes.POINTER(ctypes.c_void_p),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.POINTER(ctypes.c_int64), ctypes.c_double, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        )
    return dict(kernels)


def has_causal_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `causal_attention` can be had here."""
    return device.type == "cpu" and dtype in DTYPES and load_causal_kernels() is not None


def causal_attention(
    q: Float[Tensor, "batch tokens heads head_width"],
    k: Float[Tensor, "batch tokens kv_heads head_width"],
    v: Float[Tensor, "batch tokens kv_heads head_width"],
    starts: Int32[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens heads head_width"]:
    """Token t reads tokens starts[t] to t; `starts` says where each token's document begins.

    Head h reads key-value head h // (H / G); scores are multiplied by K ** -0.5. Any strides, as long as a head lies
    together. Derivatives once, not twice.

    Raises:
        ValueError: for shapes or starts that do not fit.
        RuntimeError: where `load_causal_kernels` returns None.
    """
    answers: Tensor = _forward(q, k, v, starts)[0]
    return answers


@torch.library.custom_op(
    "loopwise::causal_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor starts) -> (Tensor, Tensor)",
)
def _forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The answers, and for the way back the logarithm of each row's sum of exponentials, (B, H, T)."""
    out, lse = _shapes_forward(q, k, v, starts)
    _run((q, k, v, out), lse, starts)
    return out, lse


@_forward.register_fake
def _shapes_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, tokens)


@torch.library.custom_op(
    "loopwise::causal_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = _shapes_backward(grad, q, k, v, out, lse, starts)
    _run((q, k, v, out, grad, *grads), lse, starts)
    return grads


@_backward.register_fake
def _shapes_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def rotary_attention(
    qkv: Float[Tensor, "batch tokens all_heads head_width"],
    rotary: Rotary,
    starts: Int32[Tensor, "batch tokens"],
    *,
    kv_heads: int,
    layout: RotaryLayout,
) -> Float[Tensor, "batch tokens heads head_width"]:
    """`causal_attention` of one fused projection, queries and keys rotated on the way: see `nn.rotary.rotate`.

    `qkv` holds the heads of queries, keys and values one after the other. Nothing is split, rotated or joined in
    memory, neither forward nor backward. The tables take no gradient.

    Raises:
        ValueError: for shapes, dtypes or starts that do not fit.
        RuntimeError: where `load_causal_kernels` returns None.
    """
    answers: Tensor = _rotary_forward(qkv, *rotary, starts, kv_heads, layout == "interleaved")[0]
    return answers


@torch.library.custom_op(
    "loopwise::rotary_attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor cos, Tensor sin, Tensor starts, int kv_heads, bool interleaved) -> (Tensor, Tensor)",
)
def _rotary_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, starts: Tensor, kv_heads: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    out, lse = _shapes_rotary_forward(qkv, cos, sin, starts, kv_heads, interleaved)
    _run((*_parts(qkv, kv_heads), out), lse, starts, Rotary(cos, sin), interleaved)
    return out, lse


@_rotary_forward.register_fake
def _shapes_rotary_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, starts: Tensor, kv_heads: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, all_heads, width = qkv.shape
    heads = all_heads - 2 * kv_heads
    return qkv.new_empty(batch, tokens, heads, width), qkv.new_empty(batch, heads, tokens)


@torch.library.custom_op(
    "loopwise::rotary_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor cos, Tensor sin, Tensor starts, int kv_heads, bool interleaved,"
    " Tensor out, Tensor lse) -> Tensor",
)
def _rotary_backward(
    grad: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    kv_heads: int,
    interleaved: bool,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    grads = qkv.new_empty(qkv.shape)
    tensors = (*_parts(qkv, kv_heads), out, grad, *_parts(grads, kv_heads))
    _run(tensors, lse, starts, Rotary(cos, sin), interleaved)
    return grads


@_rotary_backward.register_fake
def _(grad: Tensor, qkv: Tensor, *others: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _parts(qkv: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
    return torch.split(qkv, [qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)


def _rotary_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kv_heads, ctx.interleaved = inputs
    ctx.save_for_backward(*tensors, *output)


def _rotary_give(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    return _rotary_backward(grad, *tensors, ctx.kv_heads, ctx.interleaved, out, lse), None, None, None, None, None


_rotary_forward.register_autograd(_rotary_give, setup_context=_rotary_keep)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])


def _give(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors), None)


_forward.register_autograd(_give, setup_context=_keep)


def _run(
    tensors: tuple[Tensor, ...],
    lse: Tensor,
    starts: Tensor,
    rotary: Rotary | None = None,
    interleaved: bool = False,
) -> None:
    """Fill what comes after q, k and v: the answers alone, or from the answers and their gradient the three others."""
    kernels = load_causal_kernels()
    if kernels is None:
        raise RuntimeError("there are no CPU kernels")
    q, k, v = tensors[:3]
    batch, tokens, heads, width = q.shape
    kv_heads = k.shape[2]
    fit = k.shape == v.shape == (batch, tokens, kv_heads, width) and heads % kv_heads == 0
    if not fit or starts.shape != (batch, tokens):
        raise ValueError(
            f"these do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
            f"starts {tuple(starts.shape)}"
        )
    angles = () if rotary is None else (rotary.cos.contiguous(), rotary.sin.contiguous())
    if any(table.shape != (batch, tokens, width // 2) or width % 2 for table in angles):
        raise ValueError(f"tables of {[tuple(table.shape) for table in angles]} do not fit q {tuple(q.shape)}")
    # The kernel reads where it is told to: a number of another size would lie outside.
    if starts.dtype != torch.int32 or any(x.dtype != q.dtype for x in (*tensors, *angles, lse)):
        raise ValueError(f"dtypes differ: {', '.join(str(x.dtype) for x in (*tensors, *angles, lse, starts))}")
    laid = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    starts = starts.contiguous()
    sound = kernels[q.dtype](
        _Data(*(x.data_ptr() for x in laid)),
        *((table.data_ptr() for table in angles) if angles else (None, None)),
        lse.data_ptr(),
        starts.data_ptr(),
        _Sizes(batch, tokens, heads, kv_heads, width, *(step for x in laid for step in x.stride()[:3])),
        width**-0.5,
        interleaved,
        torch.get_num_threads(),
        len(tensors) > 4,
    )
    if not sound:
        raise ValueError(
            "starts are not those of documents: each is its own token's number or that of the token before"
        )
