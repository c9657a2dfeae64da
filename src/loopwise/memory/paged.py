"""The engine's memory: pages of every plane, and tables that say which slot a reader at loop d finds at a position.

Which plane a row reads is data, not control flow: rows of different requests at different loops share one launch, each
with its own row of the table. Axes: N rows of a launch, H heads, G key-value heads, K head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from loopwise.loops.planes import PlanePolicy
from loopwise.memory.pages import PagePool, page_bytes
from loopwise.nn.kernels import cut_tiles, paged_attention, tiles_wanted

BOUNDARY = 0
"""The plane of prelude and coda; the core's planes are 1 to R."""


@dataclass
class PageList:
    """The pages of one sequence: for each plane the physical page of every run of `page` positions, or -1."""

    seat: int
    """Which block of table rows the sequence has."""
    planes: dict[int, list[int]] = field(default_factory=dict)

    def held(self, plane: int) -> list[int]:
        return [page for page in self.planes.get(plane, []) if page >= 0]


@dataclass(frozen=True)
class Layout:
    """Where layers live and what a position costs."""

    core: range
    """Layers of the core."""
    boundary: tuple[int, ...]
    """Layers of prelude and coda."""
    heads: int
    kv_heads: int
    head_width: int
    dtype: torch.dtype
    page: int
    """Positions of one page."""

    def group_bytes(self, planes: int) -> int:
        """Bytes of one page in each of this many planes, and one for prelude and coda."""
        return planes * self.page_bytes(1) + (self.page_bytes(BOUNDARY) if self.boundary else 0)

    def page_bytes(self, plane: int) -> int:
        """Bytes of one page of this plane."""
        layers = len(self.boundary) if plane == BOUNDARY else len(self.core)
        return page_bytes(layers, self.page, self.kv_heads, self.head_width, self.dtype)


class PagedMemory:
    """Pools of pages and the tables of all sequences that run now.

    A launch is bound first (`bind`), then the model runs and calls `attend` once per layer.

    Args:
        planes: the core's planes, R at most.
        budget: bytes that all pages together may take.
        seats: sequences that may run at once.
    """

    def __init__(
        self, layout: Layout, policy: PlanePolicy, *, planes: int, budget: int, seats: int, device: torch.device
    ) -> None:
        self.layout = layout
        self.policy = policy
        self.planes = planes
        stored = len(policy.stored(planes, generated=False))
        groups = max(1, budget // layout.group_bytes(stored))
        shape = {"kv_heads": layout.kv_heads, "head_width": layout.head_width, "dtype": layout.dtype, "device": device}
        self.core = PagePool(layers=layout.core, pages=groups * stored, page=layout.page, **shape)  # type: ignore[arg-type]
        self.boundary = (
            PagePool(layers=layout.boundary, pages=groups, page=layout.page, **shape) if layout.boundary else None  # type: ignore[arg-type]
        )
        self._seats = list(range(seats - 1, -1, -1))
        self._table = np.zeros((seats, planes + 1, layout.page * 16), dtype=np.int32)
        self._readers: dict[tuple[int, bool], _Index] = {
            (loop, generated): _as_index(policy.readers(loop, planes, generated=generated))
            for loop in range(1, planes + 1)
            for generated in (False, True)
        }
        self._readers |= {(BOUNDARY, generated): BOUNDARY for generated in (False, True)}
        self._stored = {
            (loop, generated): policy.store(loop, planes, generated=generated) if loop else BOUNDARY
            for loop in range(planes + 1)
            for generated in (False, True)
        }
        self._alias = {
            (left, generated): self._unwritten(left, generated=generated)
            for left in range(1, planes + 1)
            for generated in (False, True)
        }
        self._launch: _Launch | None = None

    def _unwritten(self, left: int, *, generated: bool) -> "_Index":
        """Loops whose store holds nothing when a position stops after loop `left`; they follow the last written."""
        stores = [self.policy.store(loop, self.planes, generated=generated) for loop in range(1, self.planes + 1)]
        return _as_index([loop for loop, store in enumerate(stores, 1) if store not in stores[:left]])

    # Sequences and their pages

    def open(self) -> PageList:
        """A seat for a new sequence; the caller has seen that there is one."""
        return PageList(self._seats.pop())

    def close(self, pages: PageList) -> None:
        """Give everything back."""
        for plane in list(pages.planes):
            for page in pages.held(plane):
                self.pool(plane).release(page)
        pages.planes.clear()
        self._seats.append(pages.seat)

    def held_bytes(self, pages: PageList) -> int:
        """Bytes of the pages that a sequence holds."""
        return sum(len(pages.held(plane)) * self.layout.page_bytes(plane) for plane in pages.planes)

    def pool(self, plane: int) -> PagePool:
        """The pool that this plane's pages come from."""
        if plane != BOUNDARY:
            return self.core
        if self.boundary is None:
            raise RuntimeError("this model has neither prelude nor coda")
        return self.boundary

    def stores(self, loops: int, *, generated: bool) -> list[int]:
        """The planes that a position of `loops` loops takes pages in."""
        planes = sorted({self.policy.store(loop, self.planes, generated=generated) for loop in range(1, loops + 1)})
        return [BOUNDARY, *planes] if self.boundary is not None else planes

    def missing(self, pages: PageList, plane: int, first: int, last: int) -> list[int]:
        """Indices of the pages that positions `first` to `last` still lack in this plane.

        Earlier pages may be missing for good: of positions that all stopped before they reached this plane.
        """
        have, size = pages.planes.get(plane, []), self.layout.page
        return [index for index in range(first // size, last // size + 1) if index >= len(have) or have[index] < 0]

    def lacks(self, pages: PageList, plane: int, position: int) -> bool:
        """Whether this one position has no page in this plane."""
        have = pages.planes.get(plane)
        index = position // self.layout.page
        return have is None or index >= len(have) or have[index] < 0

    def place(self, pages: PageList, plane: int, index: int, page: int) -> None:
        """Let `page`, which the sequence holds now, be its page number `index` of this plane."""
        have = pages.planes.setdefault(plane, [])
        have.extend([-1] * (index + 1 - len(have)))
        have[index] = page

    def give_back(self, pages: PageList, plane: int, index: int) -> None:
        """One page of a plane is needed no more."""
        have = pages.planes.get(plane, [])
        if index < len(have) and have[index] >= 0:
            self.pool(plane).release(have[index])
            have[index] = -1

    def trim(self, pages: PageList, first: int, last: int) -> None:
        """Give back the pages on which none but positions `first` to `last`, the last that there are, have a place."""
        keep = -(-first // self.layout.page)
        if last // self.layout.page < keep:
            return
        for plane, have in pages.planes.items():
            for page in have[keep:]:
                if page >= 0:
                    self.pool(plane).release(page)
            del have[keep:]

    # Tables

    def write_at(self, pages: PageList, loop: int, first: int, last: int, *, generated: bool) -> None:
        """Point the readers of `loop` at these positions' own slots; loop 0 is prelude and coda."""
        self.reach(last)
        plane, readers = self._stored[loop, generated], self._readers[loop, generated]
        size, have = self.layout.page, pages.planes[plane]
        if first == last:
            slot = have[first // size] * size + first % size
            self._table[pages.seat, readers, first] = slot
            return
        positions = np.arange(first, last + 1)
        slots = np.asarray(have)[positions // size] * size + positions % size
        self._table[pages.seat, readers, first : last + 1] = slots

    def point(self, pages: PageList, loop: int, position: int, *, generated: bool) -> bool:
        """`write_at` one position, if it has a page there and the tables reach it; whether that is done."""
        plane = self._stored[loop, generated]
        have, (index, offset) = pages.planes.get(plane, ()), divmod(position, self.layout.page)
        if index >= len(have) or have[index] < 0 or position >= self._table.shape[2]:
            return False
        self._table[pages.seat, self._readers[loop, generated], position] = have[index] * self.layout.page + offset
        return True

    def write_every(self, pages: PageList, loops: int, first: int, last: int) -> None:
        """`write_at` for loops 1 to `loops`, under a policy that has a plane for each loop."""
        self.reach(last)
        size = self.layout.page
        begin, end = first // size, last // size + 1
        starts = np.array([pages.planes[plane][begin:end] for plane in range(1, loops + 1)]) * size
        slots = (starts[:, :, None] + np.arange(size)).reshape(loops, -1)
        offset = first - begin * size
        table = self._table[pages.seat]
        table[1 : loops + 1, first : last + 1] = slots[:, offset : offset + last + 1 - first]

    def settle(self, pages: PageList, position: int, left: int, *, generated: bool) -> None:
        """A position stopped after loop `left`: readers of planes that it never wrote find its last."""
        if left == self.planes:
            return  # there are none
        self._table[pages.seat, self._alias[left, generated], position] = self._table[pages.seat, left, position]

    def settle_many(self, pages: PageList, positions: Int[np.ndarray, " stopped"], left: int) -> None:
        """Several positions stopped after loop `left`, under a policy that has a plane for each loop."""
        table = self._table[pages.seat]
        for loop in range(left + 1, self.planes + 1):
            table[loop, positions] = table[left, positions]

    def collapse(self, pages: PageList, length: int, loops: int) -> None:
        """Every reader of the first `length` positions finds plane `loops`; the other planes' pages go back.

        What is kept becomes the plane of generated positions, so that the answer begins on the prompt's last page.
        """
        table = self._table[pages.seat]
        table[1:, :length] = table[loops, :length]
        for plane in [plane for plane in pages.planes if plane not in (BOUNDARY, loops)]:
            for page in pages.held(plane):
                self.core.release(page)
            del pages.planes[plane]
        pages.planes[self.policy.store(loops, self.planes, generated=True)] = pages.planes.pop(loops)

    def reach(self, position: int) -> None:
        """Make the tables long enough for a position."""
        seats, planes, capacity = self._table.shape
        if position >= capacity:
            grown = np.zeros((seats, planes, max(2 * capacity, position + 1)), dtype=np.int32)
            grown[:, :, :capacity] = self._table
            self._table = grown

    @property
    def tables(self) -> Int32[np.ndarray, "seats planes capacity"]:
        """The slots of every seat, plane and position; another array once it had to grow."""
        return self._table

    def table(self, pages: PageList, length: int) -> np.ndarray:
        """What readers of each plane find at the first `length` positions, (R + 1, length)."""
        return self._table[pages.seat, :, :length]

    # Launches

    def bind(
        self,
        seats: Int[np.ndarray, " rows"],
        loops: Int[np.ndarray, " rows"],
        positions: Int[np.ndarray, " rows"],
        device: torch.device,
        blend: Float[Tensor, " rows"] | None = None,
    ) -> None:
        """Prepare a launch: row n belongs to the sequence in seat n, reads plane loops[n] up to its own position."""
        slots = self._table[seats, loops, positions]
        capacity = self._table.shape[2]
        rows = seats.astype(np.int64) * (self.planes + 1) + loops
        lengths = positions.astype(np.int64) + 1
        table, tiles = torch.from_numpy(self._table).view(-1, capacity), None
        if tiles_wanted(device, self.layout.dtype):
            # Cut here, where the rows are known without asking the device.
            tiles = cut_tiles(rows.tolist(), self.layout.heads // self.layout.kv_heads).to(device)
        if device.type != "cpu":
            # Only what this launch reads goes to the device.
            kept, rows = cut_table(table.numpy(), rows, int(lengths.max()))
            table = torch.from_numpy(kept).to(device)
        self._launch = _Launch(
            slots=torch.from_numpy(slots.astype(np.int64)).to(device),
            table=table,
            rows=torch.from_numpy(rows).to(device),
            lengths=torch.from_numpy(lengths).to(device),
            tiles=tiles,
            blend=blend,
        )

    def plane(self, loop: int) -> "PagedMemory":
        """Rows carry their own planes, so every loop is served by the same object."""
        return self

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "rows heads head_width"],
        k: Float[Tensor, "rows kv_heads head_width"],
        v: Float[Tensor, "rows kv_heads head_width"],
    ) -> Float[Tensor, "rows heads head_width"]:
        launch = self._launch
        if launch is None:
            raise RuntimeError("bind a launch before the model runs")
        pool = self.core if layer in self.layout.core else self.pool(BOUNDARY)
        keys, values = pool.keys[layer], pool.values[layer]
        if launch.blend is not None and layer in self.layout.core:
            share = launch.blend[:, None, None]
            old_k, old_v = keys[launch.slots], values[launch.slots]
            # lerp would multiply what an unwritten slot holds, which may be NaN, by zero.
            k = torch.where(share == 1.0, k, old_k + (k - old_k) * share)
            v = torch.where(share == 1.0, v, old_v + (v - old_v) * share)
        keys[launch.slots] = k
        values[launch.slots] = v
        return paged_attention(q, keys, values, launch.table, launch.rows, launch.lengths, tiles=launch.tiles)


_Index = int | slice | Int[np.ndarray, " loops"]


def _as_index(loops: Sequence[int]) -> _Index:
    """These loops as an index; a number or a slice is much faster than a list, and most are one."""
    if len(loops) == 1:
        return loops[0]
    if not loops or list(loops) == list(range(loops[0], loops[-1] + 1)):
        return slice(loops[0], loops[-1] + 1) if loops else slice(0, 0)
    return np.array(loops, dtype=np.int64)


@dataclass(frozen=True)
class _Launch:
    """What one pass through the layers writes and reads."""

    slots: Int[Tensor, " rows"]
    table: Int[Tensor, "table_rows capacity"]
    rows: Int[Tensor, " rows"]
    lengths: Int[Tensor, " rows"]
    tiles: Int[Tensor, "tiles two"] | None
    blend: Float[Tensor, " rows"] | None


def cut_table(
    table: Int[np.ndarray, "table_rows capacity"], rows: Int[np.ndarray, " rows"], length: int
) -> tuple[Int[np.ndarray, "kept length"], Int[np.ndarray, " rows"]]:
    """The part of a table that these rows read, each table row once, and where each of them finds its own."""
    own, places = np.unique(rows, return_inverse=True)
    return table[own, :length], places


def take_pages(
    memory: PagedMemory, pages: PageList, plane: int, first: int, last: int, *, make_room: Callable[[int], bool]
) -> bool:
    """Give a sequence the pages it lacks for positions `first` to `last` of a plane.

    Args:
        make_room: asked to free a number of pages of this plane's pool; False when it cannot.

    Returns:
        whether it has them now; if not, nothing was taken.
    """
    missing = memory.missing(pages, plane, first, last)
    pool = memory.pool(plane)
    if pool.free < len(missing) and not make_room(len(missing) - pool.free):
        return False
    for index in missing:
        memory.place(pages, plane, index, pool.take())
    return True
