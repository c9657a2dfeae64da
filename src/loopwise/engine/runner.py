"""Runs launches: embeddings and prelude for rows that begin, one loop for rows that are ready, coda and head for rows
that answer. Knows states and tables; who runs when is the scheduler's business.

Axes: N rows of a launch, D width, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.engine.request import Chunk, Request, Row
from loopwise.engine.speculation import CostCurve, measure_costs
from loopwise.loops.planes import parse_policy
from loopwise.memory.paged import BOUNDARY, Layout, PagedMemory
from loopwise.models.looped_lm import LMContext, LoopedLM
from loopwise.nn.fast import fast_model
from loopwise.nn.kernels import linear
from loopwise.nn.rotary import Rotary

PAGE = 16
"""Positions of one page of keys and values."""


class Seats:
    """State vectors of rows in flight, found by index."""

    def __init__(self, width: int, *, injected: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.state = torch.zeros(16, width, dtype=dtype, device=device)
        self.injected = torch.zeros_like(self.state) if injected else None
        self._free = list(range(15, -1, -1))

    def take(self) -> int:
        if not self._free:
            size = len(self.state)
            self.state = torch.cat([self.state, torch.zeros_like(self.state)])
            if self.injected is not None:
                self.injected = torch.cat([self.injected, torch.zeros_like(self.injected)])
            self._free = list(range(2 * size - 1, size - 1, -1))
        return self._free.pop()

    def give(self, seat: int) -> None:
        self._free.append(seat)

    @property
    def taken(self) -> int:
        return len(self.state) - len(self._free)


class Runner:
    """One model on one device, with the states of everything in flight."""

    def __init__(self, model: LoopedLM, memory: PagedMemory) -> None:
        # The same weights; on a CPU, products of few rows read each matrix once, at the speed of memory.
        self.model = fast_model(model)
        self.memory = memory
        self.device = model.embed.weight.device
        self.seats = Seats(
            model.config.width,
            injected=model.config.injection != "none",
            dtype=model.embed.weight.dtype,
            device=self.device,
        )
        self._rotary = model.rotary(torch.arange(256, device=self.device))
        self._position_free = memory.boundary is None and model.config.start != "normal"
        nowhere = torch.zeros(0, dtype=torch.long, device=self.device)
        self._bare = LMContext(injected=self.seats.state[:0], rotary=self._rotary, positions=nowhere, memory=memory)
        """What a readout without a coda is given: it looks at none of it."""

    def encode(self, rows: Sequence[tuple[Request, Row]], chunks: Sequence[tuple[Request, Chunk]]) -> None:
        """Embeddings, prelude and start states of rows and chunks that begin."""
        if not rows and not chunks:
            return
        for _, row in rows:
            row.seat = self.seats.take()
        numbers = [row.token for _, row in rows]
        for request, chunk in chunks:
            numbers += request.prompt[chunk.first : chunk.last + 1]
        tokens = torch.tensor(numbers, device=self.device)
        if self._position_free:
            # Nothing looks at positions before the first loop, so any will do.
            context = self.model.encode(tokens, positions=tokens, rotary=self._rotary, memory=self.memory)
        else:
            context = self._context(rows, chunks, boundary=True, tokens=tokens)
        state = self._start(context, rows, chunks)
        if rows:
            index = self._index(rows)
            self.seats.state[index] = state[: len(rows)]
            if self.seats.injected is not None:
                self.seats.injected[index] = context.injected[: len(rows)]
        first = len(rows)
        for _, row in rows:
            row.started = True
        for _, chunk in chunks:
            chunk.state = state[first : first + chunk.rows]
            chunk.injected = context.injected[first : first + chunk.rows]
            first += chunk.rows

    def _start(
        self, context: LMContext, rows: Sequence[tuple[Request, Row]], chunks: Sequence[tuple[Request, Chunk]]
    ) -> Float[Tensor, "rows width"]:
        starts = [request.sampling.start for request, _ in rows]
        for request, chunk in chunks:
            starts += [request.sampling.start] * chunk.rows
        kinds = list(dict.fromkeys(starts))
        if len(kinds) == 1:
            return self.model.initial_state(context, kinds[0])
        state = torch.empty_like(context.injected)
        for kind in kinds:
            mine = torch.tensor([start == kind for start in starts], device=self.device)
            part = LMContext(
                injected=context.injected[mine],
                rotary=context.rotary,
                positions=context.positions[mine],
                memory=context.memory,
            )
            state[mine] = self.model.initial_state(part, kind)
        return state

    def loop(
        self, rows: Sequence[tuple[Request, Row]], chunks: Sequence[tuple[Request, Chunk]]
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
        """One loop of every row and chunk, each at its own; the states of `rows` before and after."""
        index = self._index(rows)
        state = self.seats.state[index] if rows else None
        parts = [chunk.state for _, chunk in chunks if chunk.state is not None]
        whole = _join(state, parts)
        context = self._context(rows, chunks, boundary=False, index=index)
        new = self.model.step(whole, context, 1)
        count = len(rows)
        if rows:
            self.seats.state[index] = new[:count]
        for number, (_, row) in enumerate(rows):
            row.loop += 1
            row.launched = number
        first = count
        for _, chunk in chunks:
            chunk.state = new[first : first + chunk.rows]
            chunk.loop += 1
            first += chunk.rows
        return whole[:count], new[:count]

    def read(
        self, rows: Sequence[tuple[Request, Row]], states: Float[Tensor, "rows width"]
    ) -> Float[Tensor, "rows vocab"]:
        """Coda and head of these rows from these states."""
        return linear(self._hidden(rows, [], states), self.model.head_weight)

    def read_chunks(self, chunks: Sequence[tuple[Request, Chunk]]) -> None:
        """The coda of whole chunks, for the keys and values it keeps."""
        if len(self.model.coda) and chunks:
            states = torch.cat([chunk.state for _, chunk in chunks if chunk.state is not None])
            hidden = self._hidden([], chunks, states)
            first = 0
            for _, chunk in chunks:
                # From here on only the coda's result is of interest.
                chunk.state = hidden[first : first + chunk.rows]
                first += chunk.rows

    def prompt_logits(self, chunks: Sequence[Chunk]) -> Float[Tensor, "chunks vocab"]:
        """The head at the last position of prompts that have been read; `read_chunks` has run."""
        last = torch.stack([chunk.state[-1] for chunk in chunks if chunk.state is not None])
        hidden = last if len(self.model.coda) else self._hidden([], [], last)
        return linear(hidden, self.model.head_weight)

    def _hidden(
        self,
        rows: Sequence[tuple[Request, Row]],
        chunks: Sequence[tuple[Request, Chunk]],
        states: Float[Tensor, "rows width"],
    ) -> Float[Tensor, "rows width"]:
        coda = bool(len(self.model.coda))
        context = self._context(rows, chunks, boundary=True, states=states) if coda else self._bare
        return self.model.read(states, context)

    def _index(self, rows: Sequence[tuple[Request, Row]]) -> Int[Tensor, " rows"]:
        return torch.tensor([row.seat for _, row in rows], dtype=torch.long, device=self.device)

    def _context(
        self,
        rows: Sequence[tuple[Request, Row]],
        chunks: Sequence[tuple[Request, Chunk]],
        *,
        boundary: bool,
        tokens: Int[Tensor, " rows"] | None = None,
        index: Int[Tensor, " rows"] | None = None,
        states: Float[Tensor, "rows width"] | None = None,
    ) -> LMContext:
        """Bind the memory to a launch and describe it to the model."""
        seats, loops, positions = _columns(rows, chunks, boundary=boundary)
        blend = None
        if self.memory.policy.blends and not boundary:
            blend = torch.from_numpy(1.0 / loops).to(self.seats.state)
        if not boundary or self.memory.boundary is not None:
            self.memory.bind(seats, loops, positions, self.device, blend)
        where = torch.from_numpy(positions).to(self.device)
        rotary = self.rotary(where, int(positions.max()))
        if tokens is not None:
            return self.model.encode(tokens, positions=where, rotary=rotary, memory=self.memory)
        if states is not None:
            injected = states
        elif self.seats.injected is None:
            injected = self.seats.state[:0]
        else:
            mine = self.seats.injected[index] if rows else None
            injected = _join(mine, [chunk.injected for _, chunk in chunks if chunk.injected is not None])
        return LMContext(injected=injected, rotary=rotary, positions=where, memory=self.memory)

    def rotary(self, positions: Int[Tensor, " rows"], last: int) -> Rotary:
        """Tables of these positions, looked up."""
        have = len(self._rotary.cos)
        if last >= have:
            self._rotary = self.model.rotary(torch.arange(max(2 * have, last + 1), device=self.device))
        return Rotary(self._rotary.cos[positions], self._rotary.sin[positions])


def _join(rows: Tensor | None, chunks: Sequence[Tensor]) -> Tensor:
    parts = [*([] if rows is None else [rows]), *chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _columns(
    rows: Sequence[tuple[Request, Row]], chunks: Sequence[tuple[Request, Chunk]], *, boundary: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seat, loop and position of every row of a launch; the loop is the one about to run."""
    seats = [request.pages.seat for request, _ in rows if request.pages is not None]
    loops = [BOUNDARY if boundary else row.loop + 1 for _, row in rows]
    positions = [row.position for _, row in rows]
    columns = [np.array(seats, dtype=np.int64), np.array(loops, dtype=np.int64), np.array(positions, dtype=np.int64)]
    if not chunks:
        return columns[0], columns[1], columns[2]
    for request, chunk in chunks:
        seat = -1 if request.pages is None else request.pages.seat
        columns[0] = np.concatenate([columns[0], np.full(chunk.rows, seat)])
        columns[1] = np.concatenate([columns[1], np.full(chunk.rows, BOUNDARY if boundary else chunk.loop + 1)])
        columns[2] = np.concatenate([columns[2], np.arange(chunk.first, chunk.last + 1)])
    return columns[0], columns[1], columns[2]


def layout_of(model: LoopedLM) -> Layout:
    """Where a model's layers keep their keys and values, and what they cost."""
    config = model.config
    coda = config.prelude_layers + config.core_layers
    return Layout(
        core=range(config.prelude_layers, coda),
        boundary=(*range(config.prelude_layers), *range(coda, config.layers)),
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_width=config.head_width,
        dtype=model.embed.weight.dtype,
        page=PAGE,
    )


@torch.inference_mode()
def measure_ticks(model: LoopedLM, most: int, *, context: int = 1, read: bool = True) -> CostCurve:
    """Seconds of one loop of n rows, by n, for about `most` rows.

    Args:
        context: positions that each row reads; with few of them attention hardly counts.
        read: whether each row is read out too.
    """
    counts = [count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if count <= 2 * most + 8]
    config, weight = model.config, model.embed.weight
    layout = layout_of(model)
    seats = counts[-1]
    memory = PagedMemory(
        layout,
        parse_policy("per_loop"),
        planes=1,
        budget=seats * -(-context // layout.page) * layout.group_bytes(1),
        seats=seats,
        device=weight.device,
    )
    lists = [memory.open() for _ in range(seats)]
    for pages in lists:
        for plane in memory.stores(1, generated=True):
            for index in memory.missing(pages, plane, 0, context - 1):
                memory.place(pages, plane, index, memory.pool(plane).take())
            memory.write_at(pages, plane, 0, context - 1, generated=True)
    for table in (*memory.core.keys.values(), *memory.core.values.values()):
        table.zero_()
    states = torch.randn(seats, config.width, dtype=torch.float32).to(weight)

    def run(count: int) -> None:
        own = np.array([pages.seat for pages in lists[:count]])
        places = np.full(count, context - 1, dtype=np.int64)
        memory.bind(own, np.ones(count, dtype=np.int64), places, weight.device)
        where = torch.full((count,), context - 1, device=weight.device)
        within = LMContext(injected=states[:count], rotary=model.rotary(where), positions=where, memory=memory)
        out = model.step(states[:count], within, 1)
        (linear(out, model.head_weight).argmax(-1) if read else out[:, 0]).tolist()

    return measure_costs(run, rows=counts)
