"""Rotary positions (Su et al. 2021), in the two layouts that checkpoints use.

`half` rotates coordinate i with i + K/2 (Llama, Ouro); `interleaved` rotates 2i with 2i + 1 (Huginn).
Axes: B batch, T tokens, H heads, K head width; "..." is (B, T) or a flat list of rows.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.errors import ConfigError

RotaryLayout = Literal["half", "interleaved"]


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Llama 3's stretching of slow frequencies (transformers' `rope_type: llama3`)."""

    factor: float
    """Wavelengths longer than the original context are stretched by this much."""
    low_frequency_factor: float = 1.0
    """Wavelengths above original_positions / this are stretched fully."""
    high_frequency_factor: float = 4.0
    """Wavelengths below original_positions / this are left alone."""
    original_positions: int = 8192
    """Context length before stretching."""

    def __post_init__(self) -> None:
        in_order = 0 < self.low_frequency_factor < self.high_frequency_factor
        if self.factor <= 0 or not in_order or self.original_positions < 1:
            raise ConfigError(
                f"rotary scaling factor={self.factor}, low={self.low_frequency_factor}, "
                f"high={self.high_frequency_factor}, original_positions={self.original_positions}: "
                "allowed are factor > 0, high > low > 0 and 1 or more positions"
            )

    def stretch(self, frequencies: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        wavelengths = 2 * math.pi / frequencies
        low = self.original_positions / self.low_frequency_factor
        high = self.original_positions / self.high_frequency_factor
        keep = (self.original_positions / wavelengths - self.low_frequency_factor) / (
            self.high_frequency_factor - self.low_frequency_factor
        )
        between = (1 - keep) * frequencies / self.factor + keep * frequencies
        stretched = torch.where(wavelengths > low, frequencies / self.factor, frequencies)
        return torch.where((wavelengths <= low) & (wavelengths >= high), between, stretched)


class Rotary(NamedTuple):
    """Cosines and sines for a set of positions."""

    cos: Float[Tensor, "... pairs"]
    sin: Float[Tensor, "... pairs"]


def rotary_tables(
    positions: Int[Tensor, "..."],
    head_width: int,
    base: float,
    dtype: torch.dtype,
    scaling: RotaryScaling | None = None,
) -> Rotary:
    """Tables for `positions` in float32, or in `dtype` when that is wider."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_width, 2, dtype=wide, device=positions.device) / head_width
    frequencies = 1.0 / base**exponents
    if scaling is not None:
        frequencies = scaling.stretch(frequencies)
    angles = positions.to(wide)[..., None] * frequencies
    return Rotary(angles.cos(), angles.sin())


def rotate(
    x: Float[Tensor, "... heads head_width"], rotary: Rotary, layout: RotaryLayout
) -> Float[Tensor, "... heads head_width"]:
    """Rotate queries or keys; computed in the tables' dtype and returned in x's."""
    cos, sin = rotary.cos[..., None, :], rotary.sin[..., None, :]
    wide = x.to(cos.dtype)
    if layout == "half":
        first, second = wide.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = wide[..., 0::2], wide[..., 1::2]
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return rotated.to(x.dtype)
