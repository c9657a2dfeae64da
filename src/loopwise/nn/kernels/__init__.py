"""Fast paths of a serving engine on a CPU; each has an equal in torch's own operations."""

from loopwise.nn.kernels.attention import gathered_attention, paged_attention
from loopwise.nn.kernels.cpu import load_cpu_kernels, why_no_cpu_kernels

__all__ = ["gathered_attention", "load_cpu_kernels", "paged_attention", "why_no_cpu_kernels"]
