"""Launches of few rows on a CPU: one loop in one call, what rows say in another (`nn/kernels/launch.cpp`).

For few rows most of a tick is the time that starting operations takes. What cannot be had this way (another device or
dtype, prompts, codas, filters) the runner does with the model's own modules, which are the reference.
"""

import ctypes
from collections.abc import Sequence
from struct import Struct

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loopwise.engine.seats import Seats
from loopwise.engine.weights import Weights
from loopwise.memory.paged import PagedMemory
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.block import Block, Residual
from loopwise.nn.fast import FastAttention, FastMLP, FastNorm
from loopwise.nn.kernels.launch import (
    DRAW,
    DRAW_NUMBERS,
    INJECTIONS,
    LAYER_POINTERS,
    LAYER_WEIGHTS,
    ROW,
    ROW_NUMBERS,
    CoreShape,
    LaunchKernels,
    SoloShape,
    load_launch_kernels,
)
from loopwise.nn.kernels.linear import FEW_ROWS, FewRowsLinear
from loopwise.nn.rotary import Rotary

_ROWS = [Struct(ROW * count) for count in range(FEW_ROWS + 1)]
_DRAWS = [Struct(DRAW * count) for count in range(FEW_ROWS + 1)]


class FewRows:
    """The core and the head of one model, for up to `FEW_ROWS` rows; see `of`.

    Args:
        model: a `fast_model`.
        seats: where the states of rows lie.
    """

    most = FEW_ROWS

    def __init__(self, model: LoopedLM, memory: PagedMemory, seats: Seats, kernels: LaunchKernels) -> None:
        self._model, self._memory, self._seats, self._kernels = model, memory, seats, kernels
        config, pool = model.config, memory.core
        self._outer = {
            "embed": model.embed.weight,
            "adapter": None if model.adapter is None else model.adapter.weight,
            "adapter_bias": None if model.adapter is None else model.adapter.bias,
            "loop_norm": model.norm.weight if config.loop_norm else None,
            "norm": model.norm.weight,
            "gate": None if model.gate is None else model.gate.weight,
            "gate_bias": None if model.gate is None else model.gate.bias,
            "head": model.head_weight,
        }
        self._inner = [dict(block.named_parameters()).get(name) for block in model.core for name in LAYER_WEIGHTS]
        weights = [weight for weight in (*self._outer.values(), *self._inner) if weight is not None]
        self._weights = Weights(weights, seats.state.dtype, rows=True)
        first = next(iter(pool.keys.values()))
        self._layers = (ctypes.c_void_p * (LAYER_POINTERS * len(model.core)))()
        self._shape = CoreShape(
            width=config.width,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            mlp_width=config.mlp_width,
            vocab=config.vocab_size,
            layer_count=len(model.core),
            interleaved=config.rotary == "interleaved",
            norms_sum=config.norm in ("post", "pre_post"),
            injection=INJECTIONS.index(config.injection),
            starts_zero=config.start == "zeros",
            read_norms=config.coda_norm + config.final_norm,
            planes=memory.planes + 1,
            slots=len(first),
            key_stride=first.stride(0),
            value_stride=first.stride(0),
            eps=config.norm_eps,
            embed_scale=config.embed_scale,
            layers=ctypes.addressof(self._layers),
        )
        self._at = ctypes.addressof(self._shape)
        self._states: Tensor | None = None
        self._tables: object = None
        self._cos: Tensor | None = None
        self._before = seats.state.new_zeros(FEW_ROWS, config.width)
        self._after = torch.zeros_like(self._before)
        self._views = [(self._before[:count], self._after[:count]) for count in range(FEW_ROWS + 1)]
        self._rows = ctypes.create_string_buffer(_ROWS[FEW_ROWS].size)
        self._hazards = (ctypes.c_double * FEW_ROWS)()
        self._draws = ctypes.create_string_buffer(_DRAWS[FEW_ROWS].size)
        self._tokens, self._chances = (ctypes.c_int64 * FEW_ROWS)(), (ctypes.c_double * FEW_ROWS)()
        self._shape.before, self._shape.after = self._before.data_ptr(), self._after.data_ptr()
        for name in ("rows", "hazards", "draws", "tokens", "chances"):
            setattr(self._shape, name, ctypes.addressof(getattr(self, f"_{name}")))
        self.begins = not len(model.prelude) and not len(model.coda) and config.start != "normal"
        """Whether a loop can begin with a token, where nothing asks for another start state."""
        self.says = not len(model.coda)
        """Whether `say` can be asked: a coda has keys and values of its own."""
        self.find_weights()

    @staticmethod
    def of(model: LoopedLM, memory: PagedMemory, seats: Seats) -> "FewRows | None":
        """None where the model, the policy or the machine is not one that this can serve."""
        state = seats.state
        kernels = load_launch_kernels().get(state.dtype) if state.device.type == "cpu" else None
        outer = [model.norm, *([] if model.adapter is None else [model.adapter])]
        plain = all(type(module) in (FastNorm, FewRowsLinear) for module in outer)
        plain = plain and all(_is_plain_block(block) for block in model.core) and not is_watched(model)
        if kernels is None or not plain or memory.policy.blends:
            return None
        if not all(weight.dtype == state.dtype and weight.is_contiguous() for weight in model.parameters()):
            return None
        return FewRows(model, memory, seats, kernels)

    def loop(
        self, numbers: Sequence[int], rotary: Rotary
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
        """One loop of up to `FEW_ROWS` rows in their seats; their states before and after, until the next call.

        Args:
            numbers: of each row its seat, the token that it begins with (-1 if it has begun), its sequence's seat, the
                loop, and its position.
            rotary: tables of all positions from 0.
        """
        count = len(numbers) // ROW_NUMBERS
        self._find(rotary)
        _ROWS[count].pack_into(self._rows, 0, *numbers)
        if not self._kernels.loop(self._at, count, torch.get_num_threads()):
            raise IndexError("a row points outside the tables or the pool of pages")
        return self._views[count]

    def hazards(self, count: int) -> list[float]:
        """What the gate said of each row of the last launch."""
        return self._hazards[:count]

    def say(
        self, states: Float[Tensor, "launched width"], numbers: Sequence[int | float]
    ) -> tuple[list[int], list[float]]:
        """What up to `FEW_ROWS` of these states say: tokens and raw log-probabilities.

        Args:
            numbers: of each the place of its state, whether its log-probability is wanted (it is 0 otherwise), the key
                of its seed, its sample, its position, and the temperature.
        """
        count = len(numbers) // DRAW_NUMBERS
        _DRAWS[count].pack_into(self._draws, 0, *numbers)
        self._kernels.say(self._at, states.data_ptr(), count, torch.get_num_threads())
        return self._tokens[:count], self._chances[:count]

    def run_alone(self, shape: SoloShape, rotary: Rotary) -> None:
        """Ticks of one request alone, see `engine/solo.py`; `shape` says which and is told what became of it."""
        self._find(rotary)
        if not self._kernels.alone(self._at, ctypes.addressof(shape), torch.get_num_threads()):
            raise IndexError("a row points outside the tables or the pool of pages")

    def _find(self, rotary: Rotary) -> None:
        """Note where everything lies that may have moved since the last call."""
        shape, seats, tables = self._shape, self._seats, self._memory.tables
        if seats.state is not self._states:
            self._states = seats.state
            shape.states = seats.state.data_ptr()
            shape.injected = None if seats.injected is None else seats.injected.data_ptr()
        if tables is not self._tables:
            self._tables = tables
            shape.table, shape.capacity = tables.ctypes.data, tables.shape[2]
        if rotary.cos is not self._cos:
            self._cos = rotary.cos
            shape.cos, shape.sin = rotary.cos.data_ptr(), rotary.sin.data_ptr()

    def find_weights(self) -> None:
        """Note where the weights lie, as some may have been put elsewhere: before any prompt runs. Answers that are
        begun go on with what was there.

        Raises:
            RuntimeError: they are of another type now.
        """
        if not self._weights.moved():
            return
        for name, weight in self._outer.items():
            setattr(self._shape, name, None if weight is None else weight.data_ptr())
        pool, weights = self._memory.core, iter(self._inner)
        for number, layer in enumerate(self._memory.layout.core):
            place = number * LAYER_POINTERS
            for offset in range(LAYER_POINTERS - 2):
                weight = next(weights)
                self._layers[place + offset] = None if weight is None else weight.data_ptr()
            self._layers[place + LAYER_POINTERS - 2] = pool.keys[layer].data_ptr()
            self._layers[place + LAYER_POINTERS - 1] = pool.values[layer].data_ptr()


def _is_plain_block(block: nn.Module) -> bool:
    """Whether a block consists of what `fast_model` makes, and of nothing that was put in its place (adapters)."""
    kinds = {Block, Residual, FastAttention, FastMLP, FastNorm, FewRowsLinear}
    return {type(part) for part in block.modules()} <= kinds and {name for name, _ in block.named_parameters()} <= set(
        LAYER_WEIGHTS
    )


def is_watched(module: nn.Module) -> bool:
    """Whether somebody has hung something on a module that a call past its `forward` would miss."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
