"""Record a loop trace: what every loop thought about every token of a finished text.

The text is run once more, every token with every loop (teacher forcing), so hazards, losses and candidates are known
beyond each token's exit too. What a token saw when it really left early may differ a little: under `last_exited` its
predecessors had not run all their loops, and a coda read them where they had left. Trace rows describe the row that
*emitted* token i, that is position i - 1.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from loopwise.errors import ConfigError, InputError
from loopwise.loops.drivers import bind_rule, unroll
from loopwise.loops.exits import replay
from loopwise.models.looped_lm import LoopedLM
from loopwise.trace import LoopTrace

_CHUNK = 256
"""Rows whose logits are in memory at a time."""


@torch.no_grad()
def record_trace(
    model: LoopedLM,
    tokens: Sequence[int],
    *,
    prompt_length: int = 1,
    loops: Sequence[int] | None = None,
    max_loops: int | None = None,
    min_loops: int = 1,
    start: int | Literal["zero"] | None = None,
    rule: str | None = None,
    policy: str = "per_loop",
    top: int = 5,
    keep_states: bool = False,
    title: str = "",
    name: str = "",
) -> LoopTrace:
    """Run a text through every loop and keep what can be seen.

    Args:
        tokens: prompt and answer, T ids.
        prompt_length: how many of them are prompt.
        loops: loops that really emitted each generated token, T - prompt_length numbers; None replays `rule` on every
            token (or the last loop, without a rule).
        max_loops: loops to run, R; None means the model's own number.
        min_loops: no replayed token leaves before.
        start: start state of random-start models, a seed or "zero"; None means the model's own seed.
        rule: the exit rule that ran, or that is to be replayed.
        policy: the plane policy that `loops` were made with.
        top: likeliest tokens kept per loop, K.
        keep_states: keep the states too (large).
        name: what the trace calls the model; by default its folder or family.

    Raises:
        InputError: for an empty or too long text, or loops that do not fit it.
        ConfigError: for a rule that this model cannot serve.
    """
    if not 1 <= prompt_length <= max(len(tokens), 1):
        raise InputError(f"prompt_length={prompt_length}: allowed is 1 to {len(tokens)}, the number of tokens")
    if loops is not None and len(loops) != len(tokens) - prompt_length:
        raise InputError(
            f"loops has {len(loops)} numbers; give one for each of the {len(tokens) - prompt_length} generated tokens"
        )
    most = model.config.loops if max_loops is None else max_loops
    if most < 1:
        raise ConfigError(f"max_loops={most}: allowed is 1 or more")
    bound = bind_rule(model, rule or f"fixed:{most}", sequential=True)
    needs = bound.needs if loops is None else frozenset()
    ids = torch.tensor([list(tokens)], dtype=torch.long, device=model.embed.weight.device)
    context = model.encode(ids)
    record = _Record(rows=len(tokens) - 1, loops=most, top=min(top, model.config.vocab_size))
    kept: dict[str, list[Tensor]] = {"states": [], "hidden": []}

    def look(loop: int, state: Tensor) -> None:
        kept["hidden"].append(model.read(state, context)[0, :-1])
        if "state" in needs or keep_states:
            kept["states"].append(state[0, :-1])

    out = unroll(model, context, loops=most, start=start, collect=["signals"], visit=look)
    record.read(kept["hidden"], model.head_weight, ids[0, 1:])
    seen = None if out.signals is None else out.signals[:, 0, :-1]
    if loops is not None:
        ran = np.concatenate([np.zeros(prompt_length, dtype=np.int64), np.asarray(loops, dtype=np.int64)])
    else:
        exits = replay(
            bound,
            states=torch.stack(kept["states"]) if "state" in needs else None,
            # A rule that reads nothing still has to be told how many units and loops there are.
            signals=seen if seen is not None else torch.zeros(most, record.rows) if not needs else None,
            logits=linear(torch.stack(kept["hidden"]), model.head_weight) if "logits" in needs else None,
            start=model.initial_state(context, start)[0, :-1] if "state" in needs else None,
            min_loops=min_loops,
            unit_axes=1,
        )
        ran = np.concatenate([[0], exits.cpu().numpy()])
    shown = np.unique(record.arrays["top_ids"][1:]).tolist() if record.rows else []
    return LoopTrace(
        model=name or _name(model),
        title=title,
        rule=str(bound),
        policy=policy,
        max_loops=most,
        prompt_length=prompt_length,
        tokens=np.asarray(tokens, dtype=np.int64),
        texts=_pieces(model, tokens),
        loops=ran,
        signal_kind=None if seen is None else model.facts.signal,
        signals=None if seen is None else _shift(seen.T),
        states=_shift(torch.stack(kept["states"]).transpose(0, 1)) if keep_states else None,
        vocabulary=dict(zip(shown, _pieces(model, shown), strict=True)),
        **record.arrays,
    )


class _Record:
    """What is kept of the predictions, T x R; row 0 stays empty, since no row emitted the first token."""

    def __init__(self, *, rows: int, loops: int, top: int) -> None:
        self.rows = rows
        self.top = top
        unknown = np.full((rows + 1, loops, top), np.nan, dtype=np.float32)
        self.arrays: dict[str, Any] = {
            "losses": unknown[:, :, 0].copy(),
            "entropy": unknown[:, :, 0].copy(),
            "kl": unknown[:, :, 0].copy(),
            "top_probs": unknown,
            "top_ids": np.zeros((rows + 1, loops, top), dtype=np.int64),
        }

    def read(
        self, hidden: Sequence[Float[Tensor, "rows width"]], head: Float[Tensor, "vocab width"], targets: Tensor
    ) -> None:
        """Note what every loop predicts, some rows at a time; the last loop first, as all others are held to it."""
        for first in range(0, self.rows, _CHUNK):
            rows = slice(first + 1, min(first + _CHUNK, self.rows) + 1)
            final: Tensor | None = None
            for loop in reversed(range(len(hidden))):
                logits = linear(hidden[loop][first : first + _CHUNK], head)
                logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
                # A probability that rounds to zero has a log of -inf, which counts as nothing.
                logprobs = logprobs.clamp(min=-1e4)
                final = logprobs if final is None else final
                probabilities = logprobs.exp()
                best = probabilities.topk(self.top, dim=-1)
                found = {
                    "losses": -logprobs.gather(-1, targets[first : first + _CHUNK, None])[:, 0],
                    "entropy": -(probabilities * logprobs).sum(-1),
                    "kl": (final.exp() * (final - logprobs)).sum(-1),
                    "top_probs": best.values,
                    "top_ids": best.indices,
                }
                for name, tensor in found.items():
                    self.arrays[name][rows, loop] = tensor.cpu().numpy()


def _shift(values: Tensor) -> np.ndarray:
    """What rows 0 to T - 2 did, (T - 1, ...), as what emitted tokens 0 to T - 1; NaN for token 0."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32)).cpu()
    shifted: np.ndarray = torch.cat([torch.full_like(wide[:1], torch.nan), wide]).numpy()
    if not len(wide):
        shifted = np.full((1, *wide.shape[1:]), np.nan, dtype=np.float32)
    return shifted


def _pieces(model: LoopedLM, tokens: Sequence[int]) -> list[str]:
    if model.tokenizer is None:
        return [str(token) for token in tokens]
    return model.tokenizer.pieces(list(tokens))


def _name(model: LoopedLM) -> str:
    if model.origin is None:
        return "LoopedLM"
    return model.origin.folder.name if model.origin.folder is not None else model.origin.family
