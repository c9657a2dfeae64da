"""Launches of decode rows as CUDA graphs: hundreds of small operations are started in one call.

A graph repeats operations on tensors that stay where they are, with the shapes that they had when it was captured. So
rows are padded to one of a few numbers, and all that tells one launch from another is first copied to where the graph
looks for it: seats, tokens, positions, slots to write, slots to read. Rows that only pad have nobody's seat, write
where no one reads, and read nothing. States are read and written in their seats.

What cannot be had this way (prompts, start states of a request's own, many rows, other devices) the runner does with
the model's own modules, which are the reference. `LOOPWISE_GRAPHS=off` does without.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.engine.few import is_watched
from loopwise.engine.request import Request, Row
from loopwise.engine.seats import Seats
from loopwise.engine.still import NUMBERS, Kind, StillRows
from loopwise.engine.weights import Weights
from loopwise.memory.paged import BOUNDARY, PagedMemory
from loopwise.memory.pages import PagePool
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.kernels import tiles_wanted
from loopwise.nn.kernels.launch import DRAW_NUMBERS, ROW_NUMBERS
from loopwise.nn.place import send
from loopwise.nn.rotary import Rotary

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes what a launch runs, and gives what repeats it: the same operations on the same tensors."""

SWITCH = "LOOPWISE_GRAPHS"
MOST = 256
"""Rows of a graph at most. With more, running operations takes longer than starting them."""
NOISE = 2**22
"""Numbers of noise that a graph draws at most: it keeps the room for all that it computes."""
WARM = 3
"""Runs before a capture, for what libraries set up when they are first used; the number is that of torch's manual."""


class CudaCapture:
    """`torch.cuda.graph` as torch's manual has it: warmed up on a side stream, all graphs in one pool of memory.

    They may share it in any order: they run one after the other, and nobody looks at what lies in it afterwards, since
    all that a launch leaves is copied to tensors outside.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)  # what these graphs replace may still be running
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM):
                    function()
            torch.cuda.current_stream().wait_stream(self._stream)
            try:
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    function()
            except RuntimeError as error:
                raise RuntimeError(f"a launch could not be made a CUDA graph; {SWITCH}=off does without") from error
        return graph.replay


class GraphedRows:
    """The core and the head of one model, for up to `most` rows; in the runner it has the place of `FewRows`.

    Args:
        captures: makes a `Capture`; another one each time that something was put elsewhere.
    """

    begins = True
    """A loop can begin with a token, where nothing asks for another start state."""
    says = True

    def __init__(self, model: LoopedLM, memory: PagedMemory, seats: Seats, captures: Callable[[], Capture]) -> None:
        self._model, self._memory, self._seats, self._captures = model, memory, seats, captures
        self._weights = Weights(model.parameters(), seats.state.dtype, rows=False)
        self._rows: StillRows | None = None
        self._places: tuple[object, ...] = (None,) * 3
        self._replays: dict[tuple[Kind, int], Callable[[], None]] = {}
        self._capture = captures()
        self.most = min(MOST, _pad(max(16, 2 * len(memory.tables))))
        self.find_weights()

    @staticmethod
    def of(model: LoopedLM, memory: PagedMemory, seats: Seats) -> "GraphedRows | None":
        """None where the model, the policy or the machine is not one that this can serve."""
        device, dtype = seats.state.device, seats.state.dtype
        if not tiles_wanted(device, dtype) or os.environ.get(SWITCH) == "off":
            return None
        if memory.policy.blends or is_watched(model):
            return None
        return GraphedRows(model, memory, seats, partial(CudaCapture, device))

    @torch.inference_mode()
    def loop(
        self, numbers: Sequence[int], rotary: Rotary
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
        """One loop of up to `most` rows in their seats; their states before and after, until the next call.

        Args:
            numbers: of each row its seat, the token that it begins with (-1 if it has begun), its sequence's seat, the
                loop, and its position.
            rotary: tables of all positions from 0.
        """
        rows, columns = self._find(rotary), _columns(numbers)
        fresh = columns[:, columns[1] >= 0]
        if fresh.size:
            self._launch(rows, "begin", fresh)
        self._launch(rows, "loop", columns)
        count = columns.shape[1]
        return rows.before[:count], rows.after[:count]

    def hazards(self, count: int) -> Float[Tensor, " rows"]:
        """What the gate said of each row of the last launch, until the next."""
        assert self._rows is not None
        return self._rows.hazards[:count]

    @torch.inference_mode()
    def read(
        self, states: Float[Tensor, "launched width"], numbers: Sequence[int], rotary: Rotary
    ) -> Float[Tensor, "rows vocab"]:
        """Coda and head of up to `most` of these states, until the next call.

        Args:
            numbers: of each the place of its state, -1, its sequence's seat, 0, and its position.
            rotary: as that of `loop`.
        """
        rows, columns = self._find(rotary), _columns(numbers)
        if len(states) > self.most:
            states = states[torch.from_numpy(columns[0]).to(states.device)]
            columns[0] = range(len(states))
        rows.states[: len(states)] = states
        self._launch(rows, "read", columns)
        return rows.logits[: columns.shape[1]]

    @torch.inference_mode()
    def say(
        self,
        states: Float[Tensor, "launched width"],
        numbers: Sequence[int],
        draws: Sequence[int | float],
        rotary: Rotary,
    ) -> tuple[list[int], list[float]] | None:
        """What up to `most` of these states say: tokens and raw log-probabilities. None if that takes too much noise.

        Args:
            numbers, rotary: as those of `read`.
            draws: of each the place of its state, whether its log-probability is wanted, the key of its seed, its
                sample, its position, and the temperature.
        """
        key, sample, position, temperature = (draws[first::DRAW_NUMBERS] for first in range(2, DRAW_NUMBERS))
        count, noisy = len(key), any(temperature)
        if noisy and _pad(count) * self._model.config.vocab_size > NOISE:
            return None
        self.read(states, numbers, rotary)
        rows, bucket = self._find(rotary), _pad(count)
        replay = self._replay(rows, "draw" if noisy else "say", bucket)
        if noisy:
            told, heats = np.zeros((NUMBERS, bucket), dtype=np.int64), np.zeros(bucket)
            told[:3, :count], heats[:count] = (key, sample, position), temperature
            send(told, rows.numbers(bucket))
            send(heats, rows.temperatures[:bucket])
        replay()
        said = rows.said[:count].tolist()
        return [int(token) for token, _ in said], [chance for _, chance in said]

    def _launch(self, rows: StillRows, kind: Kind, columns: Int[np.ndarray, "numbers rows"]) -> None:
        """Put a launch where its graph looks for it, and run it."""
        seat, token, owner, loop, position = columns
        count, bucket = len(seat), _pad(len(seat))
        replay = self._replay(rows, kind, bucket)
        told = np.zeros((NUMBERS, bucket), dtype=np.int64)
        told[:3, :count] = seat, np.maximum(token, 0), position
        pool = self._pool(kind)
        if pool is not None:
            tables, plane = self._memory.tables, loop if kind == "loop" else np.full_like(loop, BOUNDARY)
            longest = int(position.max()) + 1
            send(tables[owner, plane, :longest], rows.table[:count, :longest])
            told[3:, :count] = tables[owner, plane, position], position + 1
            told[3, count:] = pool.nowhere
        send(told, rows.numbers(bucket))
        replay()

    def _pool(self, kind: Kind) -> PagePool | None:
        """Where launches of this kind have their keys and values."""
        return {"loop": self._memory.core, "begin": self._memory.boundary, "read": self._memory.boundary}.get(kind)

    # Graphs

    def _replay(self, rows: StillRows, kind: Kind, bucket: int) -> Callable[[], None]:
        """The graph of this kind and size. It is captured while all its rows only pad, so that this changes nothing."""
        replay = self._replays.get((kind, bucket))
        if replay is None:
            numbers, pool = rows.numbers(bucket).zero_(), self._pool(kind)
            if pool is not None:
                numbers[3] = pool.nowhere
            replay = self._replays[kind, bucket] = self._capture(rows.function(kind, bucket))
        return replay

    def _find(self, rotary: Rotary) -> StillRows:
        """What launches run on; made anew, and all graphs with it, if something has moved since the last call."""
        places = (self._seats.state, self._memory.tables, rotary.cos)
        moved = any(there is not known for there, known in zip(places, self._places, strict=True))
        if self._rows is None or moved:
            if self._replays:
                self._capture, self._replays = self._captures(), {}
            self._rows, self._places = StillRows(self._model, self._memory, self._seats, rotary, self.most), places
        return self._rows

    def find_weights(self) -> None:
        """Note where the weights lie, as some may have been put elsewhere: before any prompt runs. Answers that are
        begun go on with what was there.

        Raises:
            RuntimeError: they are of another type now.
        """
        if self._weights.moved():
            self._rows = None


def read_numbers(rows: Sequence[tuple[Request, Row]], places: Sequence[int]) -> list[int]:
    """Rows whose states lie at these places, as `GraphedRows.read` is told of them."""
    numbers: list[int] = []
    for place, (request, row) in zip(places, rows, strict=True):
        assert request.pages is not None
        numbers += (place, -1, request.pages.seat, BOUNDARY, row.position)
    return numbers


def _columns(numbers: Sequence[int]) -> Int[np.ndarray, "numbers rows"]:
    return np.array(numbers, dtype=np.int64).reshape(-1, ROW_NUMBERS).T


def _pad(count: int) -> int:
    """Rows of the graph that so many rows run in: a power of two."""
    return 1 << (count - 1).bit_length()
