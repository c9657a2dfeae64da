"""Paged attention on a GPU: one pass over the pool where it lies, in Triton.

A program takes a tile: one row, or neighbours that read the same table row (a prompt's), with the query heads of one
key-value head. It walks the table in blocks, with a running maximum and sum (Milakov and Gimelshein 2018), in float32.
Where there are too few programs for a GPU, several share what a tile reads, and a second kernel joins what they found
(Dao et al. 2023, "Flash-Decoding"). How many is a matter of shapes alone, so a CUDA graph can hold it.

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
PROGRAMS = 256
"""Programs wanted: large GPUs have some 130 multiprocessors."""
MOST_PARTS, LEAST_COLUMNS = 32, 128
"""Programs that share a tile at most, and columns of the table for each of them at least."""


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
    tops,
    totals,
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
    parts: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
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
    share = tl.cdiv(tl.cdiv(longest, block), parts) * block
    for begin in range(part * share, tl.minimum(longest, (part + 1) * share), block):
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
    if parts == 1:
        found = found / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + where, found.to(out.dtype.element_ty), mask=inside)
    else:
        # Query (row, head) of every part, one after the other.
        asking = (row * heads + head) * parts + part
        tl.store(tops + asking, top, mask=there)
        tl.store(totals + asking, total, mask=there)
        tl.store(out + asking[:, None] * width + feature[None, :], found, mask=inside)


@triton.jit
def _join(found, tops, totals, out, width: tl.constexpr, padded: tl.constexpr, parts: tl.constexpr):  # type: ignore[no-untyped-def]
    query = tl.program_id(0)
    part = query * parts + tl.arange(0, parts)
    feature = tl.arange(0, padded)
    real = feature < width
    top = tl.load(tops + part)
    highest = tl.max(top, axis=0)
    weight = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight * tl.load(totals + part), axis=0)
    each = tl.load(found + part[:, None] * width + feature[None, :], mask=real[None, :], other=0.0)
    joined = tl.sum(weight[:, None] * each, axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + query * width + feature, joined.to(out.dtype.element_ty), mask=real)


def triton_attention(
    q: Float[Tensor, "rows heads head_width"],
    keys: Float[Tensor, "slots kv_heads head_width"],
    values: Float[Tensor, "slots kv_heads head_width"],
    table: Int32[Tensor, "sequences columns"],
    rows: Int[Tensor, " rows"],
    lengths: Int[Tensor, " rows"],
    tiles: Int32[Tensor, "tiles two"],
    scale: float,
    parts: int | None = None,
) -> Float[Tensor, "rows heads head_width"]:
    """See `loopwise.nn.kernels.paged_attention`; `tiles` are those of `cut_tiles`, on the device.

    `parts` programs share a tile, a power of two; by default as many as `share_tiles` says.
    """
    (count, heads, width), kv_heads = q.shape, keys.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not count:
        return out
    group = heads // kv_heads
    # Without neighbours there are as many tiles as rows.
    least = group if len(tiles) == count else max(group, TILE)
    padded = max(16, triton.next_power_of_2(width))
    if parts is None:
        parts = share_tiles(len(tiles) * kv_heads, table.shape[1])
    found = out if parts == 1 else q.new_empty(count, heads, parts, width, dtype=torch.float32)
    tops = q.new_empty(count, heads, parts, dtype=torch.float32)
    totals = torch.empty_like(tops)
    with torch.cuda.device(q.get_device()):  # Triton launches on the current one; -1 changes nothing
        _attend[(len(tiles), kv_heads, parts)](
            q.contiguous(),
            keys,
            values,
            table,
            rows,
            lengths,
            tiles,
            found,
            tops,
            totals,
            scale,
            keys.stride(0),
            values.stride(0),
            table.stride(0),
            heads=heads,
            group=group,
            width=width,
            padded=padded,
            queries=max(_SMALLEST, triton.next_power_of_2(least)),
            block=_BLOCK,
            parts=parts,
        )
        if parts > 1:
            _join[(count * heads,)](found, tops, totals, out, width=width, padded=padded, parts=parts)
    return out


def share_tiles(programs: int, columns: int) -> int:
    """How many programs share what a tile reads, a power of two.

    Args:
        programs: one for each tile and key-value head.
        columns: of the table.
    """
    parts = 1
    while parts < MOST_PARTS and 2 * parts * programs <= PROGRAMS and 2 * parts * LEAST_COLUMNS <= columns:
        parts *= 2
    return parts
