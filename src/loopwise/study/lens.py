"""What would the model say after each loop? Two lenses, which do not agree and are therefore named.

    logit lens    head( norm( state ) )             the head applied to the bare state
    coda lens     head( norm( coda( state ) ) )     the model's own way to an answer

For Huginn the two read different things of the same state (Lu et al., arXiv 2507.02199). A model without a coda has
only one lens: its own readout is both.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from loopwise.errors import InputError, LoopRangeWarning
from loopwise.loops.drivers import check_loops
from loopwise.models.looped_lm import LMContext, LoopedLM

_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Lens:
    """S lenses, R loops, T tokens of one text, K candidates. Column t is what stands after token t."""

    model: str
    lenses: tuple[str, ...]
    """"coda" and "logit"; "readout" where there is no coda."""
    trained_loops: tuple[int, int]
    tokens: tuple[str, ...]
    """The text."""
    loops: Int[np.ndarray, " loops"]
    top: Int[np.ndarray, "lenses loops tokens candidates"]
    """Likeliest next tokens."""
    top_probability: Float[np.ndarray, "lenses loops tokens candidates"]
    vocabulary: dict[int, str]
    """Text of every id in `top`."""
    final_probability: Float[np.ndarray, "lenses loops tokens"]
    """Probability of the token that the model's own readout of the last trained loop finds likeliest."""
    entropy: Float[np.ndarray, "lenses loops tokens"]
    """Nats."""
    kl: Float[np.ndarray, "lenses loops tokens"]
    """KL(this || the model's readout at the last trained loop) in nats."""


@torch.no_grad()
def lens(
    model: LoopedLM,
    tokens: Sequence[int],
    *,
    max_loops: int | None = None,
    start: Any = None,
    candidates: int = 5,
    name: str = "",
) -> Lens:
    """Read one text through both lenses after every loop.

    Raises:
        InputError: for an empty or too long text.
    """
    if not tokens:
        raise InputError("there is no text to look at; give at least one token")
    full = model.facts.trained_loops[1]
    most = max_loops or full
    kinds = ("coda", "logit") if len(model.coda) else ("readout",)
    ids = torch.tensor([list(tokens)], device=model.embed.weight.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopRangeWarning)
        check_loops(model, most)
    context = model.encode(ids)
    state = model.initial_state(context, start)
    states = []
    for loop in range(1, max(most, full) + 1):
        state = model.step(state, context, loop)
        states.append(state)
    final = _chances(model, model.read(states[full - 1], context))
    best = final.argmax(-1)
    shape = (len(kinds), most, len(tokens))
    count = min(candidates, model.config.vocab_size)
    found = {key: np.zeros(shape) for key in ("final_probability", "entropy", "kl")}
    top, chance = np.zeros((*shape, count), dtype=np.int64), np.zeros((*shape, count))
    for row, kind in enumerate(kinds):
        for loop in range(most):
            chances = _chances(model, _hidden(model, states[loop], context, kind))
            probabilities = chances.exp()
            likeliest = probabilities.topk(count, dim=-1)
            top[row, loop], chance[row, loop] = likeliest.indices.cpu().numpy(), likeliest.values.cpu().numpy()
            found["final_probability"][row, loop] = probabilities.gather(-1, best[:, None])[:, 0].cpu().numpy()
            found["entropy"][row, loop] = torch.special.entr(probabilities).sum(-1).cpu().numpy()
            apart = torch.where(probabilities == 0, 0.0, probabilities * (chances - final)).sum(-1)
            found["kl"][row, loop] = apart.clamp(min=0).cpu().numpy()
    shown = np.unique(top).tolist()
    return Lens(
        model=name or type(model).__name__,
        lenses=kinds,
        trained_loops=model.facts.trained_loops,
        tokens=tuple(_pieces(model, tokens)),
        loops=np.arange(1, most + 1),
        top=top,
        top_probability=chance,
        vocabulary=dict(zip(shown, _pieces(model, shown), strict=True)),
        **found,
    )


def _hidden(model: LoopedLM, state: Tensor, context: LMContext, kind: str) -> Tensor:
    if kind != "logit":
        return model.read(state, context)
    # The final norm is what the head was trained behind; a state that was normed in the loop has had it.
    return model.norm(state) if model.config.final_norm or model.config.coda_norm else state


def _chances(model: LoopedLM, hidden: Tensor) -> Float[Tensor, "tokens vocab"]:
    parts = [functional.linear(part, model.head_weight) for part in torch.split(hidden[0], _CHUNK)]
    logits = torch.cat(parts)
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _pieces(model: LoopedLM, tokens: Sequence[int]) -> list[str]:
    return [str(token) for token in tokens] if model.tokenizer is None else model.tokenizer.pieces(list(tokens))
