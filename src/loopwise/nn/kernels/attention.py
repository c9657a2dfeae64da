"""Attention of single rows over slots of a pool, through a page table.

Axes: N rows, H heads, G key-value heads, K head width, S slots of the pool, M rows of the table, C its columns.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor

from loopwise.nn.kernels.cpu import load_cpu_kernels

_Sizes = ctypes.c_int64 * 10

COPIED = 2**25
"""Numbers of keys that `gathered_attention` copies at a time; as many of values."""


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
    most: int = COPIED,
) -> Float[Tensor, "rows heads head_width"]:
    """The same as `paged_attention` in torch's operations: what is read is copied out of the pool first.

    Any device, any dtype, with gradients. Neighbours with the same table row share a copy, others are padded to the
    longest of their slice; `most` bounds the numbers of a slice's keys (and, for neighbours, of its scores), so that
    memory does not grow with rows times lengths. A single row may need more.
    """
    if not len(q):
        return torch.zeros_like(q)
    size = keys.shape[1] * keys.shape[2]
    out = []
    for first, last, longest, together in _slices(rows.tolist(), lengths.tolist(), size, q.shape[1], most):
        part = slice(first, last)
        read = torch.arange(longest, device=q.device) < lengths[part, None]
        if together:
            # Every slot up to the longest is one that a row reads, so all of it is finite.
            slots = table[rows[first], :longest][None]
            queries, mask = q[part].transpose(0, 1)[None], read[None, None]
        else:
            # Beyond its length a table row may hold anything, and another's slot may hold what is not finite.
            slots = torch.where(read, table[rows[part], :longest], table[rows[part], :1] * (lengths[part, None] > 0))
            queries, mask = q[part, :, None], read[:, None, None]
        found = F.scaled_dot_product_attention(
            queries,
            keys[slots].transpose(1, 2),
            values[slots].transpose(1, 2),
            attn_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        found = found[0].transpose(0, 1) if together else found[:, :, 0]
        out.append(torch.where(lengths[part, None, None] > 0, found, 0))
    return torch.cat(out)


def _slices(
    rows: Sequence[int], lengths: Sequence[int], size: int, heads: int, most: int
) -> Iterator[tuple[int, int, int, bool]]:
    """First row, the row after the last, the longest length, and whether all read the same table row."""
    first = 0
    while first < len(rows):
        same = first + 1
        while same < len(rows) and rows[same] == rows[first]:
            same += 1
        together = same - first > 1
        last, longest = first + 1, lengths[first]
        while last < (same if together else len(rows)):
            if not together and last + 1 < len(rows) and rows[last] == rows[last + 1]:
                break  # neighbours begin here
            longer = max(longest, lengths[last])
            # Neighbours copy their keys once, and have a score for each query.
            numbers = longer * max(size, (last + 1 - first) * heads) if together else longer * size * (last + 1 - first)
            if numbers > most:
                break
            last, longest = last + 1, longer
        yield first, last, longest, together
        first = last


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
