"""What launches of decode rows do, as functions of tensors that stay where they are.

They take no arguments, no shape depends on a number in a tensor, the device is asked nothing, and what they leave lies
in tensors made before: so a CUDA graph can hold them (`graphs.py`).

Axes: N rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.engine.seats import Seats
from loopwise.loops.hazard import widen
from loopwise.memory.paged import PagedMemory
from loopwise.memory.pages import PagePool
from loopwise.models.looped_lm import LMContext, LoopedLM
from loopwise.nn.kernels import masked_attention, tiles_wanted
from loopwise.nn.noise import gumbel_by_key
from loopwise.nn.rotary import Rotary

Kind = Literal["begin", "loop", "read", "say", "draw"]
"""Embeddings, prelude and start states; one loop; coda and head; the likeliest tokens; tokens with noise."""
NUMBERS = 5
"""Of a row that begins or runs: its seat, token, position, slot to write, slots to read. Of one that is read: place of
its state, nothing, then the same. Of a choice: key of its seed, sample, position, then nothing."""


class StillRows:
    """Launches of one model on the tensors that are there now. It holds all that they read beside weights and pages.

    Args:
        rotary: tables of all positions from 0.
        most: rows of a launch at most.
    """

    def __init__(self, model: LoopedLM, memory: PagedMemory, seats: Seats, rotary: Rotary, most: int) -> None:
        self._model, self._memory, self._rotary = model, memory, rotary
        self._state, self._injected = seats.state, seats.injected
        state, config = seats.state, model.config
        self.before = state.new_zeros(most, config.width)
        """States before the last loop."""
        self.after = torch.zeros_like(self.before)
        """And after it."""
        self.states = torch.zeros_like(self.before)
        """What is to be read."""
        self.hazards = widen(state.new_zeros(most))
        """What the gate said after the last loop."""
        self.logits = state.new_zeros(most, config.vocab_size)
        """What was read."""
        self.said = torch.zeros(most, 2, dtype=torch.float64, device=state.device)
        """Tokens that were chosen, and their raw log-probabilities."""
        self.temperatures = torch.ones(most, dtype=torch.float64, device=state.device)
        self.table = torch.zeros(most, memory.tables.shape[2], dtype=torch.int32, device=state.device)
        """The slots that each row reads."""
        self._vocabulary = torch.arange(config.vocab_size, device=state.device)
        self._rows = torch.arange(most, device=state.device)
        # Every row has its own row of the table.
        self._tiles = torch.stack((self._rows, torch.ones_like(self._rows)), dim=1).int()
        self._numbers: dict[int, Int[Tensor, "numbers rows"]] = {}

    def numbers(self, count: int) -> Int[Tensor, "numbers rows"]:
        """What launches of so many rows are told: see `NUMBERS`."""
        if count not in self._numbers:
            self._numbers[count] = self._vocabulary.new_zeros(NUMBERS, count)
        return self._numbers[count]

    def function(self, kind: Kind, count: int) -> Callable[[], None]:
        """What a launch of as many rows runs."""
        functions: dict[Kind, Callable[[int], Callable[[], None]]] = {
            "begin": self._begin,
            "loop": self._loop,
            "read": self._read,
            "say": partial(self._choose, noisy=False),
            "draw": partial(self._choose, noisy=True),
        }
        return functions[kind](count)

    def _begin(self, count: int) -> Callable[[], None]:
        """Embeddings, prelude and start states of as many rows."""
        model, state, injected = self._model, self._state, self._injected
        seats, tokens, positions, *_ = self.numbers(count)
        bind = self._binder(count, self._memory.boundary)

        def run() -> None:
            bound = bind(state)
            context = model.encode(tokens, positions=positions, rotary=bound.rotary, memory=bound.memory)
            state[seats] = model.initial_state(context)
            if injected is not None:
                injected[seats] = context.injected

        return run

    def _loop(self, count: int) -> Callable[[], None]:
        """One loop of as many rows, and what the gate says after it."""
        model, state, injected = self._model, self._state, self._injected
        seats, bind = self.numbers(count)[0], self._binder(count, self._memory.core)

        def run() -> None:
            before = state[seats]
            after = model.step(before, bind(state[:0] if injected is None else injected[seats]), 1)
            state[seats] = after
            self.before[:count], self.after[:count] = before, after
            hazards = model.signal(after, None)
            if hazards is not None:
                self.hazards[:count] = hazards

        return run

    def _read(self, count: int) -> Callable[[], None]:
        """Coda and head of as many states."""
        places, bind = self.numbers(count)[0], self._binder(count, self._memory.boundary)

        def run() -> None:
            states = self.states[places]
            self.logits[:count] = F.linear(self._model.read(states, bind(states)), self._model.head_weight)

        return run

    def _choose(self, count: int, *, noisy: bool) -> Callable[[], None]:
        """The choice of `choose_batch` from as many rows of what was read; at temperature 0 the likeliest."""
        temperature, address = self.temperatures[:count, None], self.numbers(count)[:3, :, None]

        def run() -> None:
            logits = self.logits[:count]
            chances = torch.log_softmax(widen(logits), dim=-1)
            if noisy:
                hot, raw = temperature > 0, logits.double()
                heated = raw / torch.where(hot, temperature, 1.0)
                logits = torch.where(hot, heated + gumbel_by_key(*address, self._vocabulary), raw)
            tokens = torch.argmax(logits, dim=-1, keepdim=True)
            self.said[:count, :1], self.said[:count, 1:] = tokens, chances.gather(1, tokens)

        return run

    def _binder(self, count: int, pool: PagePool | None) -> Callable[[Float[Tensor, "rows width"]], LMContext]:
        """What describes a launch to the model, given what its loops are injected."""
        _, _, positions, slots, lengths = self.numbers(count)
        planes = _StillPlanes(pool, slots, self.table[:count], self._rows[:count], lengths, self._tiles[:count])

        def bind(injected: Float[Tensor, "rows width"]) -> LMContext:
            rotary = Rotary(self._rotary.cos[positions], self._rotary.sin[positions])
            return LMContext(injected=injected, rotary=rotary, positions=positions, memory=planes)

        return bind


class _StillPlanes:
    """The planes of one launch: `PagedMemory.attend`, from tensors that stay where they are."""

    def __init__(
        self, pool: PagePool | None, slots: Tensor, table: Tensor, rows: Tensor, lengths: Tensor, tiles: Tensor
    ) -> None:
        self._pool, self._slots = pool, slots
        self._table, self._rows, self._lengths, self._tiles = table, rows, lengths, tiles

    def plane(self, loop: int) -> "_StillPlanes":
        return self

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "rows heads head_width"],
        k: Float[Tensor, "rows kv_heads head_width"],
        v: Float[Tensor, "rows kv_heads head_width"],
    ) -> Float[Tensor, "rows heads head_width"]:
        if self._pool is None:
            raise RuntimeError("this model has neither prelude nor coda")
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        keys[self._slots] = k
        values[self._slots] = v
        if not tiles_wanted(q.device, q.dtype):
            return masked_attention(q, keys, values, self._table, self._lengths)
        from loopwise.nn.kernels.triton_attention import triton_attention

        scale = q.shape[2] ** -0.5
        return triton_attention(q, keys, values, self._table, self._rows, self._lengths, self._tiles, scale)
