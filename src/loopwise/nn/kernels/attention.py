"""Attention of single rows over slots of a pool, through a page table.

Axes: N rows, H heads, G key-value heads, K head width, S slots of the pool, M rows of the table, C its columns.
"""

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor

from loopwise.nn.kernels.cpu import load_cpu_kernels

_Sizes = ctypes.c_int64 * 10


def paged_attention(
    q: Float[Tensor, "rows heads head_width"],
    keys: Float[Tensor, "slots kv_heads head_width"],
    values: Float[Tensor, "slots kv_heads head_width"],
    table: Int32[Tensor, "sequences columns"],
    rows: Int[Tensor, " rows"],
    lengths: Int[Tensor, " rows"],
    scale: float | None = None,
) -> Float[Tensor, "rows heads head_width"]:
    """Row n attends over slots `table[rows[n], :lengths[n]]` of `keys` and `values`; a row of length 0 answers zeros.

    Head h reads key-value head h // (H / G). Neighbours with the same table row share what is read of it, so keep the
    rows of a prompt together. `scale` multiplies the scores; None means K ** -0.5.

    On a CPU, in float32 and float64, without gradients, this is one pass over the pool where it lies; elsewhere it is
    `gathered_attention`.

    Raises:
        ValueError: for shapes that do not fit.
        IndexError: when rows, lengths or slots point outside the table or the pool.
    """
    heads, width = q.shape[1:]
    kv_heads = keys.shape[1]
    if (
        keys.shape != values.shape
        or keys.shape[2] != width
        or heads % kv_heads
        or not len(q) == len(rows) == len(lengths)
    ):
        raise ValueError(
            f"these do not fit: q {tuple(q.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}, "
            f"rows {tuple(rows.shape)}, lengths {tuple(lengths.shape)}"
        )
    if scale is None:
        scale = width**-0.5
    if q.device.type == "cpu" and not torch.is_grad_enabled() and q.dtype == keys.dtype == values.dtype:
        kernels = load_cpu_kernels()
        if kernels is not None and q.dtype in kernels.attend:
            return _attend(kernels.attend[q.dtype], q, keys, values, table, rows, lengths, scale)
    return gathered_attention(q, keys, values, table, rows, lengths, scale)


def gathered_attention(
    q: Float[Tensor, "rows heads head_width"],
    keys: Float[Tensor, "slots kv_heads head_width"],
    values: Float[Tensor, "slots kv_heads head_width"],
    table: Int32[Tensor, "sequences columns"],
    rows: Int[Tensor, " rows"],
    lengths: Int[Tensor, " rows"],
    scale: float | None = None,
) -> Float[Tensor, "rows heads head_width"]:
    """The same as `paged_attention` in torch's operations: everything copied out of the pool, padded to the longest.

    Any device, any dtype, with gradients.
    """
    columns = torch.arange(int(lengths.max()) if len(lengths) else 0, device=q.device)
    read = columns < lengths[:, None]
    # Beyond its length a table row may hold anything, and another's slot may hold what is not finite.
    own = table[rows, :1] * (lengths[:, None] > 0)
    slots = torch.where(read, table[rows, : len(columns)], own)
    out = F.scaled_dot_product_attention(
        q[:, :, None],
        keys[slots].transpose(1, 2),
        values[slots].transpose(1, 2),
        attn_mask=read[:, None, None],
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    )
    return torch.where(lengths[:, None, None] > 0, out[:, :, 0], 0)


def _attend(
    kernel: Callable[..., int],
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    rows: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    count, heads, width = q.shape
    slots, kv_heads, _ = keys.shape
    sequences, columns = table.shape
    q, rows, lengths = q.contiguous(), rows.long().contiguous(), lengths.long().contiguous()
    # A slot may lie anywhere; what it holds must lie together.
    whole = (width, 1)
    if keys.stride()[1:] != whole or values.stride()[1:] != whole or table.stride(1) != 1:
        raise ValueError("heads and features of a slot, and columns of the table, must be contiguous")
    out = torch.empty_like(q)
    sizes = _Sizes(
        *(keys.stride(0), values.stride(0), table.stride(0)),
        *(count, heads, kv_heads, width, slots, sequences, columns),
    )
    sound = kernel(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        table.data_ptr(),
        rows.data_ptr(),
        lengths.data_ptr(),
        sizes,
        scale,
        torch.get_num_threads(),
    )
    if not sound:
        raise IndexError(
            f"rows, lengths or slots point outside a table of {sequences} by {columns} or a pool of {slots} slots"
        )
    return out
