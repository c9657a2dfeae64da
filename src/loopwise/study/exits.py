"""What an exit rule is worth: loss and loops spent, against fixed depths and against mixing them at random.

Two semantics are told apart everywhere. `per_loop` (fill): a token that stops still writes its remaining planes, so
later tokens read what they were trained on; saves latency. `last_exited` (skip): it stops for good and later tokens
read the plane of its exit; saves work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.loops.drivers import bind_rule, run_until, unroll
from loopwise.loops.exits import replay
from loopwise.memory.dense import check_policy
from loopwise.models.looped_lm import LoopedLM


@runtime_checkable
class Sample(Protocol):
    """Rows of tokens with their targets; `loopwise.train.batches.Batch` is one."""

    @property
    def tokens(self) -> Int[Tensor, "rows tokens"]: ...

    @property
    def targets(self) -> Int[Tensor, "rows tokens"]: ...

    @property
    def documents(self) -> Int[Tensor, "rows tokens"]: ...

    @property
    def mask(self) -> Bool[Tensor, "rows tokens"]: ...


@dataclass(frozen=True, kw_only=True)
class ExitPoint:
    """One rule on one set of tokens."""

    rule: str
    policy: str
    mean_loops: float
    """Loops per counted token."""
    loss: float
    """Nats per counted token."""
    accuracy: float
    """Share of counted tokens that are the likeliest."""
    mixed_loss: float
    """Loss of running tokens at random at the two neighbouring fixed depths, in the mix that has this mean."""
    loops: Int[np.ndarray, " tokens"]
    """Loops of each counted token."""

    @property
    def gain(self) -> float:
        """Nats by which the rule beats random mixing; below 0 it is worse than knowing nothing."""
        return self.mixed_loss - self.loss


@dataclass(frozen=True, kw_only=True)
class Depths:
    """Every loop of a model on one set of tokens, all N counted ones."""

    losses: Float[np.ndarray, "loops tokens"]
    """Nats after each loop."""
    right: Bool[np.ndarray, "loops tokens"]
    """Whether the likeliest token is the target."""
    hazards: Float[np.ndarray, "loops tokens"] | None
    """Hazard after each loop; None without a gate."""

    @property
    def mean_losses(self) -> Float[np.ndarray, " loops"]:
        return np.asarray(self.losses.mean(1))

    def mixed(self, mean_loops: float) -> float:
        """The chord between the fixed depths on both sides of a mean."""
        depths = np.arange(1, len(self.losses) + 1)
        return float(np.interp(mean_loops, depths, self.mean_losses))


@torch.no_grad()
def measure_depths(model: LoopedLM, samples: Sequence[Sample], *, max_loops: int | None = None) -> Depths:
    """Run every token for every loop and read it out each time."""
    most = max_loops or model.config.loops
    losses, right, hazards = [], [], []
    for sample in samples:
        context = model.encode(sample.tokens, documents=sample.documents)
        out = unroll(model, context, loops=most, collect=("states", "signals"))
        assert out.states is not None
        rows = [_read(model.readout(state, context), sample) for state in out.states]
        losses.append(torch.stack([row[0] for row in rows]))
        right.append(torch.stack([row[1] for row in rows]))
        if out.signals is not None:
            hazards.append(out.signals[:, sample.mask])
    return Depths(
        losses=torch.cat(losses, dim=1).double().cpu().numpy(),
        right=torch.cat(right, dim=1).cpu().numpy(),
        hazards=torch.cat(hazards, dim=1).double().cpu().numpy() if hazards else None,
    )


@torch.no_grad()
def measure_exit(
    model: LoopedLM,
    samples: Sequence[Sample],
    rule: str,
    depths: Depths,
    *,
    policy: str = "last_exited",
) -> ExitPoint:
    """One rule on the tokens that `depths` was measured on.

    Raises:
        ConfigError: for a rule that this model cannot serve.
    """
    chosen = check_policy(policy)
    most = len(depths.losses)
    bound = bind_rule(model, rule)
    losses, right, loops = [], [], []
    for sample in samples:
        context = model.encode(sample.tokens, documents=sample.documents)
        if chosen == "last_exited":
            outcome = run_until(model, context, bound, max_loops=most)
            logits, exits = outcome.prediction, outcome.loops
        else:
            out = unroll(model, context, loops=most, collect=("states", "signals", "logits"))
            assert out.logits is not None
            exits = replay(
                bound,
                states=out.states,
                signals=out.signals if "signal" in bound.needs else None,
                logits=out.logits if "logits" in bound.needs else None,
                start=model.initial_state(context),
                unit_axes=2,
            )
            logits = out.logits.gather(0, (exits - 1)[None, ..., None].expand(1, -1, -1, out.logits.shape[-1]))[0]
        found, hit = _read(logits, sample)
        losses.append(found)
        right.append(hit)
        loops.append(exits[sample.mask])
    counts = torch.cat(loops).cpu().numpy()
    mean = float(counts.mean())
    return ExitPoint(
        rule=str(bound),
        policy=chosen,
        mean_loops=mean,
        loss=float(torch.cat(losses).double().mean()),
        accuracy=float(torch.cat(right).double().mean()),
        mixed_loss=depths.mixed(mean),
        loops=counts,
    )


def hazard_for(depths: Depths, mean_loops: float) -> str:
    """The hazard rule whose replay on these tokens has a mean nearest to `mean_loops`.

    Raises:
        ValueError: when the model has no gate.
    """
    if depths.hazards is None:
        raise ValueError("the model has no gate")
    low, high = 0.0, 1.0
    signals = torch.from_numpy(depths.hazards)
    for _ in range(20):
        middle = (low + high) / 2
        mean = float(replay(f"hazard:{middle!r}", signals=signals).double().mean())
        low, high = (middle, high) if mean < mean_loops else (low, middle)
    return f"hazard:{round(high, 4)!r}"


def _read(logits: Float[Tensor, "rows tokens vocab"], sample: Sample) -> tuple[Tensor, Tensor]:
    """Losses and hits of the counted tokens."""
    counted, targets = logits[sample.mask].float(), sample.targets[sample.mask]
    return torch.nn.functional.cross_entropy(counted, targets, reduction="none"), counted.argmax(-1) == targets
