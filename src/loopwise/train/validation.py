"""How a model does on held-out text, at several loop counts in one pass.

Axes: R loops, B batch, T tokens, M tokens whose loss counts, D width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from loopwise.loops.drivers import unroll
from loopwise.loops.hazard import exit_distribution
from loopwise.models.looped_lm import LMContext, LoopedLM
from loopwise.train.batches import Batch
from loopwise.train.guards import state_norms, token_correlation
from loopwise.train.step import read_hazards

_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How a model does on text it has not seen. A mean over nothing is NaN."""

    losses: dict[int, float]
    """Mean loss in nats per token, by loops."""
    accuracies: dict[int, float]
    """Share of targets that are the likeliest token, by loops."""
    exits: list[float] | None
    """Mean exit distribution p(1)..p(R); None without a gate."""
    correlation: float
    """Mean cosine between states of different tokens after the last loop."""
    norms: list[float]
    """Root mean square of the states after each loop."""

    @property
    def mean_exit(self) -> float | None:
        """Mean exit loop under the gate; None without one."""
        return None if self.exits is None else sum(loop * share for loop, share in enumerate(self.exits, 1))

    def figures(self, *, bytes_per_token: float | None) -> dict[str, float]:
        """Names and values for metrics.jsonl; bits per byte where the bytes behind a token are known."""
        values = {f"validation_loss_loop_{loop}": loss for loop, loss in self.losses.items()}
        values |= {f"validation_accuracy_loop_{loop}": share for loop, share in self.accuracies.items()}
        if bytes_per_token is not None:
            values |= {
                f"validation_bits_per_byte_loop_{loop}": loss / math.log(2) / bytes_per_token
                for loop, loss in self.losses.items()
            }
        if self.exits is not None and self.mean_exit is not None:
            values["validation_exit_loop"] = self.mean_exit
            values |= {f"validation_exit_share_loop_{loop}": share for loop, share in enumerate(self.exits, 1)}
        values["validation_token_correlation"] = self.correlation
        values |= {f"validation_state_norm_loop_{loop}": norm for loop, norm in enumerate(self.norms, 1)}
        return values


@torch.no_grad()
def validate(model: LoopedLM, batches: Sequence[Batch], loops: Sequence[int]) -> Validation:
    """Read batches at several loop counts in one pass each. Every token whose loss counts weighs the same.

    Args:
        loops: after which loops to read. A token with a `first_loop` counts from that loop on.
    """
    most = max(loops)
    reads = {loop: _Read() for loop in loops}
    leaving = torch.zeros(most, dtype=torch.float64)
    norms = torch.zeros(most, dtype=torch.float64)
    correlation, rows, tokens = 0.0, 0, 0
    for batch in batches:
        context = model.encode(batch.tokens, documents=batch.documents)
        states = _states(model, context, most)
        for loop, read in reads.items():
            mask = batch.mask if batch.first_loop is None else batch.mask & (batch.first_loop <= loop)
            read.add(model.read(states[loop - 1], context)[mask], model.head_weight, batch.targets[mask])
        hazards = read_hazards(model, states)
        if hazards is not None:
            leaving += exit_distribution(hazards)[:, batch.mask].double().sum(1).cpu()
        count = len(batch.tokens)
        norms += count * torch.tensor([state_norms(state[None])[0] for state in states], dtype=torch.float64)
        correlation += count * token_correlation(states[-1], batch.mask)
        rows, tokens = rows + count, tokens + int(batch.mask.sum())
    return Validation(
        losses={loop: _mean(read.loss, read.tokens) for loop, read in reads.items()},
        accuracies={loop: _mean(read.hits, read.tokens) for loop, read in reads.items()},
        exits=None if model.gate is None else [_mean(share, tokens) for share in leaving.tolist()],
        correlation=_mean(correlation, rows),
        norms=[_mean(norm, rows) for norm in norms.tolist()],
    )


def _states(model: LoopedLM, context: LMContext, loops: int) -> list[Tensor]:
    """The states after each loop, without a stacked copy."""
    states: list[Tensor] = []

    def keep(loop: int, state: Tensor) -> None:
        states.append(state)

    unroll(model, context, loops=loops, visit=keep)
    return states


@dataclass
class _Read:
    """Sums over the tokens that count after one loop."""

    loss: float = 0.0
    hits: int = 0
    tokens: int = 0

    def add(
        self,
        hidden: Float[Tensor, "counted width"],
        head: Float[Tensor, "vocab width"],
        targets: Int[Tensor, " counted"],
    ) -> None:
        for part, wanted in zip(torch.split(hidden, _CHUNK), torch.split(targets, _CHUNK), strict=True):
            logits = functional.linear(part, head)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            self.loss += float(functional.cross_entropy(logits, wanted, reduction="sum"))
            self.hits += int((logits.argmax(-1) == wanted).sum())
        self.tokens += targets.numel()


def _mean(total: int | float, count: int) -> float:
    return total / count if count else math.nan
