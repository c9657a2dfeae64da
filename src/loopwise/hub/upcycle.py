"""Layer-stack upcycling: a deeper core made of copies of a trained one.

Ouro-2.6B grew out of Ouro-1.4B so, 24 layers to 48 (arXiv 2510.25741, section 4); the paper does not say in which order
the copies stand. Two are offered:

stack    0 1 2 ... 0 1 2 ...   the default. R loops of the new core are 2R loops of the old one, less the norm between
                               two of them, and the paper went from 8 loops to 4 at this very step. Depth-wise stacking
                               was also the best way to grow ordinary language models (Du et al. 2024, G_stack).
repeat   0 0 1 1 2 2 ...       each layer twice in a row, so every copy stands at its old relative depth.
"""

from dataclasses import replace
from typing import Literal, get_args

import torch

from loopwise.errors import ConfigError
from loopwise.models.looped_lm import LoopedLM

Order = Literal["stack", "repeat"]


def copy_order(old_layers: int, new_layers: int, order: str = "stack") -> list[int]:
    """Which old layer each new one copies.

    Raises:
        ConfigError: when the new number is no multiple of the old one, or the order is unknown.
    """
    if order not in get_args(Order):
        raise ConfigError(f"order={order!r}: allowed are {', '.join(get_args(Order))}")
    times, rest = divmod(new_layers, old_layers)
    if rest or times < 2:
        raise ConfigError(
            f"layers={new_layers}: the core has {old_layers}; allowed are its multiples, {2 * old_layers} for one"
        )
    return [layer % old_layers if order == "stack" else layer // times for layer in range(new_layers)]


def upcycle(model: LoopedLM, layers: int, order: str = "stack") -> LoopedLM:
    """A model whose core has `layers` layers, copies of this one's; all else is the same.

    Raises:
        ConfigError: as `copy_order`.
    """
    sources = copy_order(model.config.core_layers, layers, order)
    with torch.device("meta"):
        deeper = LoopedLM(replace(model.config, core_layers=layers))
    old = dict(model.named_parameters())
    deeper = deeper.to(model.embed.weight.dtype).to_empty(device=model.embed.weight.device)
    with torch.no_grad():
        for name, parameter in deeper.named_parameters():
            parameter.copy_(old[_source_name(name, sources)])
    deeper.origin, deeper.tokenizer = model.origin, model.tokenizer
    return deeper.eval()


def _source_name(name: str, sources: list[int]) -> str:
    stack, _, rest = name.partition(".")
    if stack != "core":
        return name
    layer, _, leaf = rest.partition(".")
    return f"core.{sources[int(layer)]}.{leaf}"
