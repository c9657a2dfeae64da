"""Fast paths of a serving engine on a CPU; each has an equal in torch's own operations."""

from loopwise.nn.kernels.attention import gathered_attention, paged_attention
from loopwise.nn.kernels.cpu import load_cpu_kernels, why_no_cpu_kernels
from loopwise.nn.kernels.linear import FewRowsLinear, fast_twin, linear, measure_few

__all__ = [
    "FewRowsLinear",
    "fast_twin",
    "gathered_attention",
    "linear",
    "load_cpu_kernels",
    "measure_few",
    "paged_attention",
    "why_no_cpu_kernels",
]
