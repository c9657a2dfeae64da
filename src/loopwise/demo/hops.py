"""Pointer chasing: how many hops a model can follow, by the loops it is given."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from loopwise.models.looped_lm import LoopedLM
from loopwise.study.exits import ExitPoint, measure_depths, measure_exit
from loopwise.study.statistics import rank_correlation
from loopwise.tasks.pointer_chasing import PointerChasing
from loopwise.train.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Staircase:
    """What a trained model does on questions it has not seen."""

    accuracy: Float[np.ndarray, "loops hops"]
    """Share of right answers, rows 1..R loops, columns 1..K hops."""
    loops_used: Float[np.ndarray, " hops"]
    """Mean loops that the exit rule spends on each number of hops."""
    exit_accuracy: float
    """Share of right answers under the exit rule."""
    correlation: float
    """Rank correlation of loops used with hops asked."""
    point: ExitPoint


def measure_staircase(model: LoopedLM, batches: list[Batch], *, rule: str) -> Staircase:
    """Accuracy by loops and hops, and what the exit rule spends.

    Args:
        batches: validation questions; `first_loop` holds the hops.
        rule: the exit rule of the answers; the table and the questions run every loop, as prompts do.
    """
    hops = torch.cat([_hops(batch) for batch in batches]).numpy()
    depths = measure_depths(model, batches)
    kinds = range(1, int(hops.max()) + 1)
    accuracy = np.array([[right[hops == k].mean() for k in kinds] for right in depths.right])
    # A prompt runs every loop, whatever the rule; only what is answered stops early. Here the whole row is prompt but
    # for the answers, so keys and values are those of every loop.
    point = measure_exit(model, batches, rule, depths, policy="per_loop")
    return Staircase(
        accuracy=accuracy,
        loops_used=np.array([point.loops[hops == k].mean() for k in kinds]),
        exit_accuracy=point.accuracy,
        correlation=rank_correlation(point.loops, hops),
        point=point,
    )


def _hops(batch: Batch) -> torch.Tensor:
    assert batch.first_loop is not None
    return batch.first_loop[batch.mask]


def chance(task: PointerChasing) -> float:
    """Accuracy of guessing any node but the start."""
    return 1.0 / (task.config.nodes - 1)
