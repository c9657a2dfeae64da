"""Does thinking longer help? Loss and accuracy by loops, inside the trained range and beyond it, and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from loopwise.errors import InputError
from loopwise.study.record import Record
from loopwise.study.statistics import clustered_error, t_quantile


@dataclass(frozen=True, kw_only=True)
class DepthCurve:
    """Every fixed depth. S seeds (models or data), R loops."""

    models: tuple[str, ...]
    trained_loops: tuple[int, int]
    units: int
    """Of each seed."""
    loops: Int[np.ndarray, " loops"]
    """1 to R."""
    seed_accuracy: Float[np.ndarray, "seeds loops"]
    seed_loss: Float[np.ndarray, "seeds loops"]
    accuracy: Float[np.ndarray, " loops"]
    """Share of units whose answer is right, the mean over seeds."""
    loss: Float[np.ndarray, " loops"]
    """Nats per unit."""
    share: Float[np.ndarray, " loops"]
    """Share of places that are right; where units have one place, the accuracy."""
    accuracy_band: Float[np.ndarray, "ends loops"]
    """95% interval: Student's over seeds, or within the one seed over its problems."""
    loss_band: Float[np.ndarray, "ends loops"]
    band: str
    """Which of the two it is."""
    flops: Float[np.ndarray, " loops"]
    """Operations per unit."""
    seconds: Float[np.ndarray, " loops"]
    """Measured seconds per unit, all units of a batch together."""
    kv_bytes: Float[np.ndarray, " loops"]
    """Bytes of keys and values per unit; 0 for models without."""

    @property
    def best(self) -> int:
        """The depth of the least loss."""
        return int(self.loops[self.loss.argmin()])


def depth(records: Record | Sequence[Record]) -> DepthCurve:
    """Loss and accuracy at every depth.

    Args:
        records: one, or one per seed, all with the same loops.

    Raises:
        InputError: records of different depths.
    """
    taken = [records] if isinstance(records, Record) else list(records)
    if not taken or any(each.loops != taken[0].loops for each in taken):
        raise InputError("give at least one record, all with the same number of loops")
    first = taken[0]
    accuracies = np.stack([each.right.mean(axis=1) for each in taken])
    losses = np.stack([each.losses.mean(axis=1) for each in taken])
    if len(taken) > 1:
        band = f"95% interval over {len(taken)} seeds"
        width = t_quantile(len(taken) - 1) / np.sqrt(len(taken))
        errors = [width * values.std(axis=0, ddof=1) for values in (accuracies, losses)]
    else:
        band = "95% interval over problems"
        errors = [
            1.96 * clustered_error(values, first.problem) for values in (first.right.astype(np.float64), first.losses)
        ]
    accuracy, loss = accuracies.mean(axis=0), losses.mean(axis=0)
    return DepthCurve(
        models=tuple(each.model for each in taken),
        trained_loops=first.trained_loops,
        units=first.units,
        loops=first.depths,
        seed_accuracy=accuracies,
        seed_loss=losses,
        accuracy=accuracy,
        loss=loss,
        share=np.mean([each.share.mean(axis=1) for each in taken], axis=0),
        accuracy_band=np.clip(np.stack([accuracy - errors[0], accuracy + errors[0]]), 0, 1),
        loss_band=np.stack([loss - errors[1], loss + errors[1]]),
        band=band,
        flops=first.costs.flops(first.depths),
        seconds=np.mean([each.seconds / each.units for each in taken], axis=0),
        kv_bytes=first.costs.kv_bytes(first.depths) + 0.0,
    )
