"""Record a loop trace: what every loop thought about every token of a finished text.

The text is run once more with every loop (teacher forcing), so hazards, losses and top tokens are known beyond each
token's exit too. Trace rows describe the row that *emitted* token i, that is position i - 1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loopwise.loops.drivers import bind_rule, unroll
from loopwise.loops.exits import replay
from loopwise.models.looped_lm import LoopedLM
from loopwise.trace import LoopTrace


@torch.no_grad()
def record_trace(
    model: LoopedLM,
    tokens: Sequence[int],
    *,
    prompt_length: int = 1,
    loops: Sequence[int] | None = None,
    max_loops: int | None = None,
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
        loops: loops that really emitted each generated token; None replays `rule` (or the last loop).
        rule: the exit rule that ran, or that is to be replayed.
        top: likeliest tokens kept per loop.
        keep_states: keep the states too (large).
    """
    most = max_loops or model.config.loops
    ids = torch.tensor([list(tokens)], device=model.embed.weight.device)
    context = model.encode(ids)
    out = unroll(model, context, loops=most, collect=("states", "signals"))
    rows = len(tokens)
    losses = np.full((rows, most), np.nan, dtype=np.float32)
    entropy = np.full((rows, most), np.nan, dtype=np.float32)
    top_ids = np.zeros((rows, most, top), dtype=np.int32)
    top_probs = np.full((rows, most, top), np.nan, dtype=np.float32)
    logits_by_loop: list[Tensor] = []
    bound = bind_rule(model, rule or f"fixed:{most}", sequential=True)
    for loop in range(most):
        logits = model.readout(out.states[loop], context)[0, :-1]
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        losses[1:, loop] = -logprobs.gather(-1, ids[0, 1:, None])[:, 0].cpu().numpy()
        entropy[1:, loop] = -(logprobs.exp() * logprobs).sum(-1).cpu().numpy()
        best = logprobs.exp().topk(top, dim=-1)
        top_ids[1:, loop], top_probs[1:, loop] = best.indices.cpu().numpy(), best.values.cpu().numpy()
        if "logits" in bound.needs:
            logits_by_loop.append(logits)
    if loops is None:
        exits = replay(
            bound,
            states=out.states[:, 0, :-1] if "state" in bound.needs else None,
            signals=None if out.signals is None else out.signals[:, 0, :-1],
            logits=torch.stack(logits_by_loop) if logits_by_loop else None,
            start=model.initial_state(context)[0, :-1],
            unit_axes=1,
        )
        ran = np.concatenate([[0], exits.cpu().numpy()])
    else:
        ran = np.concatenate([np.zeros(prompt_length), np.asarray(loops)])
    signals = None
    if out.signals is not None:
        signals = np.full((rows, most), np.nan, dtype=np.float32)
        signals[1:] = out.signals[:, 0, :-1].float().T.cpu().numpy()
    texts = _pieces(model, tokens)
    shown = sorted({int(i) for i in top_ids[1:].ravel()})
    return LoopTrace(
        model=name,
        title=title,
        rule=str(bound),
        policy=policy,
        max_loops=most,
        prompt_length=prompt_length,
        tokens=np.asarray(tokens, dtype=np.int32),
        texts=texts,
        loops=ran.astype(np.int32),
        signal_kind=model.facts.signal,
        signals=signals,
        top_ids=top_ids,
        top_probs=top_probs,
        losses=losses,
        entropy=entropy,
        states=out.states[:, 0].float().transpose(0, 1).cpu().numpy() if keep_states else None,
        vocabulary=dict(zip(shown, _pieces(model, shown), strict=True)),
    )


def _pieces(model: LoopedLM, tokens: Sequence[int]) -> list[str]:
    if model.tokenizer is None:
        return [str(token) for token in tokens]
    return model.tokenizer.pieces(list(tokens))
