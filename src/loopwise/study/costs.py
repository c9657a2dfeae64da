"""What one unit costs at each depth: operations and bytes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from loopwise.loops.protocol import LoopModel, first_tensor, tree_map
from loopwise.models.accounting import count_flops, kv_bytes
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.examples import Examples


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one unit (a token, or a whole sample)."""

    encode: float
    """Floating-point operations before the loops."""
    per_loop: float
    """Operations of one loop."""
    readout: float
    """Operations of one readout; a rule that reads predictions pays it after every loop."""
    kv_fixed: float = 0.0
    """Bytes of keys and values kept whatever the loops."""
    kv_per_loop: float = 0.0
    """Bytes of keys and values that one loop keeps."""

    def flops(self, loops: Any, *, reads: bool = False) -> Any:
        """Operations of `loops` loops (a number or an array), with a readout after each of them or only the last."""
        return self.encode + loops * (self.per_loop + (self.readout if reads else 0.0)) + (not reads) * self.readout

    def kv_bytes(self, loops: Any) -> Any:
        """Bytes of keys and values when the planes of `loops` loops are kept."""
        return self.kv_fixed + loops * self.kv_per_loop


def count_costs(model: LoopModel, examples: Examples) -> Costs:
    """Operations and bytes per unit, a multiply-add counting as two.

    Of a language model they follow from its configuration, with attention over half a row's length; those of any
    other model are counted by torch while one batch runs once (matrix products, convolutions and attention).
    """
    if isinstance(model, LoopedLM):
        config = model.config
        context = examples.targets.shape[-1] // 2
        whole = count_flops(config, context=context)
        readout = count_flops(replace(config, prelude_layers=0), context=context).fixed
        number = model.embed.weight.element_size()
        one, two = (kv_bytes(config, "per_loop", loops=loops, bytes_per_number=number) for loops in (1, 2))
        return Costs(
            encode=float(whole.fixed - readout),
            per_loop=float(whole.per_loop),
            readout=float(readout),
            kv_fixed=2 * one - two,
            kv_per_loop=two - one,
        )
    found: list[float] = []

    def counted(run: Callable[[], Any]) -> Any:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            result = run()
        found.append(float(counter.get_total_flops()))
        return result

    context = counted(lambda: model.encode(examples.inputs, **examples.options))
    # Where a start is a view of a parameter, torch calls it differentiable even here, and the counter then stumbles.
    start = tree_map(torch.Tensor.detach, model.initial_state(context))
    state = counted(lambda: model.step(start, context, 1))
    counted(lambda: model.readout(state, context))
    units = _units(model, state, context, examples)
    return Costs(encode=found[0] / units, per_loop=found[1] / units, readout=found[2] / units)


def _units(model: LoopModel, state: Any, context: Any, examples: Examples) -> int:
    if model.facts.unit == "sample":
        return len(examples)
    return len(first_tensor(model.open_rows(state, context)[0]))
