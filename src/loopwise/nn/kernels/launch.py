"""One loop of a few rows in one call, what rows say in another, many ticks of one request in a third: `launch.cpp`
through ctypes.

Here is how its structures look; what fills them stands in `engine/few.py` and `engine/solo.py`.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from loopwise.nn.kernels.cpu import load_library

_SIZES = (
    *("width", "heads", "kv_heads", "head_width", "mlp_width", "vocab"),
    *("layer_count", "interleaved", "norms_sum", "injection", "starts_zero", "read_norms"),
    *("planes", "capacity", "slots", "key_stride", "value_stride"),
)
_POINTERS = (
    *("layers", "embed", "adapter", "adapter_bias", "loop_norm", "norm", "gate", "gate_bias", "head"),
    *("cos", "sin", "table", "states", "injected"),
    *("rows", "before", "after", "hazards", "draws", "tokens", "chances"),
)
INJECTIONS: tuple[Literal["none", "add", "adapter"], ...] = ("none", "add", "adapter")
"""In the order of the numbers that stand for them."""


class CoreShape(ctypes.Structure):
    """`Core` of launch.cpp: sizes, scales, where everything lies, and what goes into a call and comes out."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_double) for name in ("eps", "embed_scale")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


LAYER_WEIGHTS = (
    *("attention.norm_in.weight", "attention.branch.qkv.weight", "attention.branch.out.weight"),
    *("attention.norm_out.weight", "mlp.norm_in.weight", "mlp.branch.gate_up.weight"),
    *("mlp.branch.down.weight", "mlp.norm_out.weight"),
)
"""The parameters of a block in the order of the fields of `Layer`; its keys and values follow."""
LAYER_POINTERS = len(LAYER_WEIGHTS) + 2
ROW = "5q"
"""One `Row`, as `struct` packs it."""
ROW_NUMBERS = 5
DRAW = "5qd"
"""One `Draw`, as `struct` packs it."""
DRAW_NUMBERS = 6
FLYING, SAID = "7q2d", "4qd"
"""One `Flying` and one `Said`."""


class SoloShape(ctypes.Structure):
    """`Solo` of launch.cpp: one request alone, and what becomes of it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sequence", "loops", "last_row", "window", "draft_loop", "redraft")),
        *((name, ctypes.c_int64) for name in ("planned", "min_loops", "aliases", "first", "page")),
        *((name, ctypes.c_int64) for name in ("key", "sample", "end_count", "most")),
        *((name, ctypes.c_double) for name in ("threshold", "temperature", "seconds")),
        *(("ends", ctypes.c_void_p), ("own", ctypes.c_void_p), ("span", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("deepest", "flight", "seats", "said")),
        *((name, ctypes.c_int64) for name in ("flying", "free", "tokens", "ticks", "rows", "started")),
    )


@dataclass(frozen=True)
class LaunchKernels:
    """The compiled functions of one dtype; their arguments are those of the last lines of `launch.cpp`."""

    loop: Callable[..., int]
    say: Callable[..., None]
    alone: Callable[..., int]


@cache
def load_launch_kernels() -> dict[torch.dtype, LaunchKernels]:
    """By dtype; empty where they cannot be had. Compiles on the first call."""
    library = load_library()
    if library is None:
        return {}
    pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found = {}
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        loop, say, alone = (getattr(library, f"loopwise_{what}_{name}") for what in ("loop", "say", "alone"))
        loop.argtypes, loop.restype = (pointer, size, threads), ctypes.c_int
        say.argtypes, say.restype = (pointer, pointer, size, threads), None
        alone.argtypes, alone.restype = (pointer, pointer, threads), ctypes.c_int
        found[dtype] = LaunchKernels(loop, say, alone)
    return found
