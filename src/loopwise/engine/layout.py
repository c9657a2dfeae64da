"""Where a model's layers keep their keys and values."""

from loopwise.memory.paged import Layout
from loopwise.models.looped_lm import LoopedLM

PAGE = 16
"""Positions of one page of keys and values."""


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
