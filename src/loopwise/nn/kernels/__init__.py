"""Fast paths of a serving engine; each has an equal in torch's own operations."""

from loopwise.nn.kernels.attention import (
    cut_tiles,
    gathered_attention,
    masked_attention,
    paged_attention,
    tiles_wanted,
)
from loopwise.nn.kernels.cpu import load_cpu_kernels, why_no_cpu_kernels
from loopwise.nn.kernels.linear import FewRowsLinear, fast_twin, linear, measure_few

__all__ = [
    "FewRowsLinear",
    "cut_tiles",
    "fast_twin",
    "gathered_attention",
    "linear",
    "load_cpu_kernels",
    "masked_attention",
    "measure_few",
    "paged_attention",
    "tiles_wanted",
    "why_no_cpu_kernels",
]
