"""Attention of single rows over slots of a pool, through a page table.

Axes: N rows, H heads, G key-value heads, K head width, S slots of the pool, M rows of the table, C its columns.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor

from loopwise.nn.kernels.cpu import load_cpu_kernels

_Sizes = ctypes.c_int64 * 10

COPIED = 2**25
"""Numbers of keys that `gathered_attention` copies at a time; as many of values."""
TILE = 64
"""Queries, rows times heads, that a GPU's program takes together at most where rows read the same table row."""
_TRITON_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def tiles_wanted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `paged_attention` there is a kernel that takes `cut_tiles`: a GPU of NVIDIA or AMD, and Triton."""
    return device.type == "cuda" and dtype in _TRITON_DTYPES and _has_triton()


def cut_tiles(rows: Sequence[int], group: int) -> Int32[Tensor, "tiles two"]:
    """First row and number of rows of every tile: neighbours of a launch that read the same table row.

    Args:
        rows: the table row of each row.
        group: query heads of one key-value head.
    """
    most = max(1, TILE // group)
    tiles: list[list[int]] = []
    for place, row in enumerate(rows):
        if tiles and rows[tiles[-1][0]] == row and tiles[-1][1] < most:
            tiles[-1][1] += 1
        else:
            tiles.append([place, 1])
    return torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2)


def paged_attention(
    q: Float[Tensor, "rows heads head_width"],
    keys: Float[Tensor, "slots kv_heads head_width"],
    values: Float[Tensor, "slots kv_heads head_width"],
    table: Int32[Tensor, "sequences columns"],
    rows: Int[Tensor, " rows"],
    lengths: Int[Tensor, " rows"],
    scale: float | None = None,
    tiles: Int32[Tensor, "tiles two"] | None = None,
) -> Float[Tensor, "rows heads head_width"]:
    """Row n attends over slots `table[rows[n], :lengths[n]]` of `keys` and `values`; a row of length 0 answers zeros.

    Head h reads key-value head h // (H / G). Neighbours with the same table row share what is read of it, so keep the
    rows of a prompt together. `scale` multiplies the scores; None means K ** -0.5.

    Without gradients this is one pass over the pool where it lies: on a CPU in float32 and float64, on a GPU with
    Triton in float32, bfloat16 and float16. Elsewhere it is `gathered_attention`. `tiles` are those of `cut_tiles`, on
    the device, for who has them already.

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
    if tiles_wanted(q.device, q.dtype) and not torch.is_grad_enabled() and q.dtype == keys.dtype == values.dtype:
        from loopwise.nn.kernels.triton_attention import triton_attention

        if tiles is None:
            tiles = cut_tiles(rows.tolist(), heads // kv_heads).to(q.device)
        return triton_attention(q, keys, values, table, rows, lengths, tiles, scale)
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
        if not together:
            out.append(masked_attention(q[part], keys, values, table[rows[part], :longest], lengths[part], scale))
            continue
        read = torch.arange(longest, device=q.device) < lengths[part, None]
        # Every slot up to the longest is one that a row reads, so all of it is finite.
        slots = table[rows[first], :longest][None]
        found = _answer(q[part].transpose(0, 1)[None], keys[slots], values[slots], read[None, None], scale)
        out.append(torch.where(lengths[part, None, None] > 0, found[0].transpose(0, 1), 0))
    return torch.cat(out)


def masked_attention(
    q: Float[Tensor, "rows heads head_width"],
    keys: Float[Tensor, "slots kv_heads head_width"],
    values: Float[Tensor, "slots kv_heads head_width"],
    table: Int32[Tensor, "rows columns"],
    lengths: Int[Tensor, " rows"],
    scale: float | None = None,
) -> Float[Tensor, "rows heads head_width"]:
    """Row n attends over slots `table[n, :lengths[n]]`; a row of length 0 answers zeros.

    No shape depends on a number in a tensor and the device is asked nothing, so a CUDA graph may hold it; for that, as
    many slots are copied for each row as the table has columns.
    """
    read = torch.arange(table.shape[1], device=q.device) < lengths[:, None]
    # Beyond its length a table row may hold anything, and another's slot may hold what is not finite.
    slots = torch.where(read, table, table[:, :1] * (lengths[:, None] > 0))
    found = _answer(q[:, :, None], keys[slots], values[slots], read[:, None, None], scale)
    return torch.where(lengths[:, None, None] > 0, found[:, :, 0], 0)


def _answer(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(
        queries,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[2],
    )


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
