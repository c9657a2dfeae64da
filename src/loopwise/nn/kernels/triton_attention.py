"""Paged attention on a GPU: one pass over the pool where it lies, in Triton.

A program takes a tile: one row, or neighbours that read the same table row (a prompt's), with the query heads of one
key-value head. It walks the table in blocks, with a running maximum and sum (Milakov and Gimelshein 2018), in float32.

Imported where Triton is there alone. With TRITON_INTERPRET=1 it runs on a CPU, slowly, for tests.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32
from torch import Tensor

from loopwise.nn.kernels.attention import TILE

_SMALLEST, _BLOCK = 16, 32
"""Queries of a tile at least, as Triton's products have it; columns of the table that a step reads."""


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    table,
    rows,
    lengths,
    tiles,
    out,
    scale,
    key_stride,
    value_stride,
    table_stride,
    heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
    queries: tl.constexpr,
    block: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    first = tl.load(tiles + 2 * tile)
    count = tl.load(tiles + 2 * tile + 1)
    query = tl.arange(0, queries)
    there = query // group < count
    row = first + query // group
    head = kv_head * group + query % group
    feature = tl.arange(0, padded)
    real = feature < width
    where = (row[:, None] * heads + head[:, None]) * width + feature[None, :]
    inside = there[:, None] & real[None, :]
    asked = tl.load(q + where, mask=inside, other=0.0)
    length = tl.load(lengths + row, mask=there, other=0)
    longest = tl.max(length, axis=0)
    slots = table + tl.load(rows + first) * table_stride
    top = tl.full([queries], float("-inf"), tl.float32)
    total = tl.zeros([queries], tl.float32)
    found = tl.zeros([queries, padded], tl.float32)
    for begin in range(0, longest, block):
        column = begin + tl.arange(0, block)
        known = column < longest
        slot = tl.load(slots + column, mask=known, other=0).to(tl.int64)
        at = known[:, None] & real[None, :]
        offset = kv_head * width + feature[None, :]
        key = tl.load(keys + slot[:, None] * key_stride + offset, mask=at, other=0.0)
        score = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(column[None, :] < length[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        # A query that has read nothing yet has no maximum; what is subtracted must be a number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - base[:, None])
        kept = tl.exp(top - base)
        value = tl.load(values + slot[:, None] * value_stride + offset, mask=at, other=0.0)
        total = total * kept + tl.sum(weight, axis=1)
        found = found * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        top = higher
    found = found / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + where, found.to(out.dtype.element_ty), mask=inside)


def triton_attention(
    q: Float[Tensor, "rows heads head_width"],
    keys: Float[Tensor, "slots kv_heads head_width"],
    values: Float[Tensor, "slots kv_heads head_width"],
    table: Int32[Tensor, "sequences columns"],
    rows: Int[Tensor, " rows"],
    lengths: Int[Tensor, " rows"],
    tiles: Int32[Tensor, "tiles two"],
    scale: float,
) -> Float[Tensor, "rows heads head_width"]:
    """See `loopwise.nn.kernels.paged_attention`; `tiles` are those of `cut_tiles`, on the device."""
    (count, heads, width), kv_heads = q.shape, keys.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not count:
        return out
    group = heads // kv_heads
    # Without neighbours there are as many tiles as rows.
    least = group if len(tiles) == count else max(group, TILE)
    with torch.cuda.device(q.get_device()):  # Triton launches on the current one; -1 changes nothing
        _attend[(len(tiles), kv_heads)](
            q.contiguous(),
            keys,
            values,
            table,
            rows,
            lengths,
            tiles,
            out,
            scale,
            keys.stride(0),
            values.stride(0),
            table.stride(0),
            heads=heads,
            group=group,
            width=width,
            padded=max(16, triton.next_power_of_2(width)),
            queries=max(_SMALLEST, triton.next_power_of_2(least)),
            block=_BLOCK,
        )
    return out
