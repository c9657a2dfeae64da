"""Runs launches: embeddings and prelude for rows that begin, one loop for rows that are ready, coda and head for rows
that answer. Knows states and tables; who runs when is the scheduler's business.

Axes: N rows of a launch, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.engine.few import FewRows
from loopwise.engine.graphs import GraphedRows, read_numbers
from loopwise.engine.plan import columns_of
from loopwise.engine.request import Chunk, Request, Row
from loopwise.engine.seats import Seats
from loopwise.memory.paged import PagedMemory
from loopwise.models.looped_lm import LMContext, LoopedLM
from loopwise.nn.fast import fast_model
from loopwise.nn.kernels import linear
from loopwise.nn.rotary import Rotary


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
        served = self.model, memory, self.seats
        self._few: FewRows | GraphedRows | None = FewRows.of(*served) or GraphedRows.of(*served)
        self._hazards: list[float] | Float[Tensor, " rows"] | None = None
        """What the gate said after the last launch, where that is known already."""
        self._gated = model.gate is not None
        self._positions = 256
        self._rotary = model.rotary(torch.arange(self._positions, device=self.device))
        self._position_free = memory.boundary is None and model.config.start != "normal"
        nowhere = torch.zeros(0, dtype=torch.long, device=self.device)
        self._bare = LMContext(injected=self.seats.state[:0], rotary=self._rotary, positions=nowhere, memory=memory)
        """What a readout without a coda is given: it looks at none of it."""

    def launch(
        self, rows: Sequence[tuple[Request, Row]], chunks: Sequence[tuple[Request, Chunk]]
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
        """Begin what has not begun, then one loop of everything, each at its own; states of `rows` before and after."""
        self._hazards = None
        few = self._few
        if few is not None and chunks:
            few.find_weights()
        if few is None or chunks or len(rows) > few.most:
            fresh = [(request, row) for request, row in rows if not row.started]
            self.encode(fresh, [(request, chunk) for request, chunk in chunks if chunk.state is None])
            return self.loop(rows, chunks)
        return self._loop_few(few, rows)

    @property
    def few(self) -> FewRows | None:
        """Launches of few rows in one call on a CPU; None where they cannot be had."""
        return self._few if isinstance(self._few, FewRows) else None

    def is_bare(self, rows: Sequence[tuple[Request, Row]], chunks: Sequence[tuple[Request, Chunk]]) -> bool:
        """Whether torch has no part in a launch of these."""
        return not chunks and isinstance(self._few, FewRows) and len(rows) <= self._few.most

    def _loop_few(
        self, few: FewRows | GraphedRows, rows: Sequence[tuple[Request, Row]]
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
        begun = [job for job in rows if not (job[1].started or (few.begins and job[0].sampling.start is None))]
        if begun:
            self.encode(begun, [])
        numbers: list[int] = []
        last = 0
        for number, (request, row) in enumerate(rows):
            assert request.pages is not None
            token = -1
            if not row.started:
                row.seat, row.started, token = self.seats.take(), True, row.token
            row.loop = loop = row.loop + 1
            row.launched = number
            position = row.position
            if position > last:
                last = position
            numbers += (row.seat, token, request.pages.seat, loop, position)
        if last >= self._positions:
            self._reach(last)
        states = few.loop(numbers, self._rotary)
        if self._gated:
            self._hazards = few.hazards(len(rows))
        return states

    def say(
        self, rows: Sequence[tuple[Request, Row]], after: Float[Tensor, "launched width"]
    ) -> tuple[list[int], list[float]] | None:
        """The tokens that some rows of a launch say, and the raw log-probabilities of those that have stopped.

        None where `read` and a choice of another kind are needed: many rows, a coda, settings beyond temperature.
        """
        few = self._few
        if few is None or not few.says or len(rows) > few.most:
            return None
        numbers: list[int | float] = []
        for request, row in rows:
            sampling, replay = request.sampling, request.replay
            if not sampling.plain or (replay is not None and replay.tokens is not None):
                return None
            tells = row.left > 0 or request.provisional
            numbers += (row.launched, tells, sampling.key, request.answer.sample, row.position + 1)
            numbers.append(sampling.temperature)
        if isinstance(few, FewRows):
            return few.say(after, numbers)
        self._reach(max(row.position for _, row in rows))
        return few.say(after, read_numbers(rows, [row.launched for _, row in rows]), numbers, self._rotary)

    def signals(self, states: Float[Tensor, "rows width"]) -> list[float] | None:
        """The model's signal for the states that the last launch has left; None without a gate."""
        if self._hazards is not None:
            return self._hazards if isinstance(self._hazards, list) else self._hazards.tolist()
        signal = self.model.signal(states, None)
        return None if signal is None else signal.tolist()

    @torch.inference_mode()
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
            chunk.before, chunk.state = chunk.state, new[first : first + chunk.rows]
            chunk.loop += 1
            first += chunk.rows
        return whole[:count], new[:count]

    def read(
        self, rows: Sequence[tuple[Request, Row]], states: Float[Tensor, "rows width"]
    ) -> Float[Tensor, "rows vocab"]:
        """Coda and head of these rows from these states."""
        few = self._few
        if isinstance(few, GraphedRows) and 0 < len(rows) <= few.most:
            self._reach(max(row.position for _, row in rows))
            return few.read(states, read_numbers(rows, range(len(rows))), self._rotary)
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
        seats, loops, positions = columns_of(rows, chunks, boundary=boundary)
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
        self._reach(last)
        return Rotary(self._rotary.cos[positions], self._rotary.sin[positions])

    def rotary_to(self, last: int) -> Rotary:
        """Tables of all positions up to one."""
        self._reach(last)
        return self._rotary

    def _reach(self, last: int) -> None:
        """Make the tables long enough for a position."""
        if last >= self._positions:
            self._positions = max(2 * self._positions, last + 1)
            self._rotary = self.model.rotary(torch.arange(self._positions, device=self.device))


def _join(rows: Tensor | None, chunks: Sequence[Tensor]) -> Tensor:
    parts = [*([] if rows is None else [rows]), *chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
