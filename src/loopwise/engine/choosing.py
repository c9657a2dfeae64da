"""The choice of many tokens at once: for rows of different requests, settings and positions, those that `choose` takes.

Axes: N rows, V vocabulary, K likeliest tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from loopwise.engine.request import Choice, Request, Row
from loopwise.engine.runner import Runner
from loopwise.engine.sampling import (
    Sampling,
    choose,
    count_survivors,
    heat,
    log_softmax,
    noise_ahead,
    ordered_top,
    penalised,
    rows_ahead,
)
from loopwise.nn.kernels.rows import pick_rows
from loopwise.nn.noise import gumbel_by_key
from loopwise.nn.place import placed

_PREFIX = 512
"""Likeliest tokens among which filters are tried first: sorting a whole vocabulary takes several times as long."""
_CPU_NUMBERS = 2**16
"""Noise drawn at once on a CPU: larger intermediate tensors leave its cache, and take twice as long."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One row of a batch of choices."""

    sampling: Sampling
    position: int
    """Position of the token that is being chosen, counting real tokens."""
    sample: int = 0
    """Which of several answers to one prompt this is."""
    seen: Sequence[int] = ()
    """Prompt and answer so far; only a repetition penalty looks at it."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The tokens of a batch of choices."""

    tokens: Int[Tensor, " rows"]
    logprobs: Float[Tensor, " rows"]
    """Log-probability of each token in nats, before penalty, bias, temperature and filters."""
    top_ids: Int[Tensor, "rows likeliest"] | None = None
    """The likeliest tokens by raw logits, likeliest first, -1 beyond what a row asked for; None when no row asked."""
    top_logprobs: Float[Tensor, "rows likeliest"] | None = None
    """Their raw log-probabilities, -inf beyond what a row asked for."""


def choose_launched(
    runner: Runner, jobs: Sequence[tuple[Request, Row]], after: Float[Tensor, "launched width"]
) -> list[Choice]:
    """What some rows of a launch say, from the states that it has left."""
    said = runner.say(jobs, after)
    if said is not None:
        return [Choice(token, logprob) for token, logprob in zip(*said, strict=True)]
    if len(jobs) < len(after):
        after = after[placed([row.launched for _, row in jobs], runner.device)]
    return choose_states(runner, jobs, after)


@torch.inference_mode()
def choose_states(
    runner: Runner, jobs: Sequence[tuple[Request, Row]], states: Float[Tensor, "rows width"]
) -> list[Choice]:
    """What rows say from these states."""
    return draw([(request, row.position) for request, row in jobs], runner.read(jobs, states))


def draw(places: Sequence[tuple[Request, int]], logits: Float[Tensor, "rows vocab"]) -> list[Choice]:
    """Choose the token that follows each (request, position)."""
    draws = [
        Draw(
            sampling=request.sampling,
            position=position + 1,
            sample=request.answer.sample,
            seen=request.seen(position),
        )
        for request, position in places
    ]
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(places)
    picked = pick(logits, draws)
    if picked is not None:
        tokens, logprobs = picked
    else:
        chosen = choose_batch(logits, draws)
        tokens, logprobs = chosen.tokens.tolist(), chosen.logprobs.tolist()
        if chosen.top_ids is not None and chosen.top_logprobs is not None:
            pairs = zip(chosen.top_ids.tolist(), chosen.top_logprobs.tolist(), strict=True)
            tops = [tuple((i, p) for i, p in zip(ids, chances, strict=True) if i >= 0) for ids, chances in pairs]
    for number, (request, position) in enumerate(places):
        forced = request.forced_token(position + 1)
        if forced is not None:
            wide = logits[number].to(torch.promote_types(logits.dtype, torch.float32))
            tokens[number], logprobs[number] = forced, float(torch.log_softmax(wide, dim=-1)[forced])
    return [Choice(*choice) for choice in zip(tokens, logprobs, tops, strict=True)]


def choose_batch(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> Chosen:
    """The tokens that `choose` takes row by row, in a few passes over all rows together.

    Greedy rows cost an argmax. Rows without filters draw noise for the whole vocabulary, unsorted. Rows with filters
    look at their likeliest tokens first; those that keep more are sorted whole (see `_choose_filtered`).

    Args:
        logits: raw logits.
        rows: what each of them is for; settings, seeds and positions may all differ.
    """
    chances = log_softmax(logits)
    top_ids, top_logprobs = _likeliest(chances, rows)
    tokens = _choose_rows(logits, rows)
    return Chosen(
        tokens=tokens,
        logprobs=chances.gather(1, tokens[:, None])[:, 0],
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )


def pick(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> tuple[list[int], list[float]] | None:
    """The tokens and log-probabilities of `choose_batch` in one call, where rows want no more and a kernel is there.

    None for rows with penalties, biases, filters or likeliest tokens to report, and for greedy beside sampled ones.
    """
    settings = [row.sampling for row in rows]
    if not all(sampling.plain for sampling in settings):
        return None
    sampled = sum(sampling.temperature > 0 for sampling in settings)
    if not sampled:
        return pick_rows(logits, None)
    if sampled < len(rows) or logits.numel() > _CPU_NUMBERS:
        return None
    return pick_rows(logits, _noisy(logits, rows))


def _choose_rows(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> Int[Tensor, " rows"]:
    if len(rows) == 1:
        # Alone it is faster one by one: the noise of the next positions is drawn ahead, and drafts ask again and again.
        row = rows[0]
        token = choose(logits[0], row.sampling, position=row.position, sample=row.sample, seen=row.seen)
        return torch.tensor([token], device=logits.device)
    wide = _adjust_rows(logits, rows)
    tokens = torch.argmax(wide, dim=-1)
    sampled = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    for choose_rows, places in (
        (_choose_open, [i for i in sampled if not rows[i].sampling.filters]),
        (_choose_filtered, [i for i in sampled if rows[i].sampling.filters]),
    ):
        if places:
            index = placed(places, logits.device)
            tokens[index] = choose_rows(wide[index], [rows[i] for i in places])
    return tokens


def _adjust_rows(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> Float[Tensor, "rows vocab"]:
    """`adjusted` for rows of different settings; all of them in float64 if any row needs it."""
    if not any(row.sampling.adjusts for row in rows):
        return logits
    wide, device = logits.double(), logits.device
    if wide is logits:
        wide = logits.clone()
    marked = [i for i, row in enumerate(rows) if row.sampling.repetition_penalty != 1.0]
    if marked:
        counts = torch.tensor([len(rows[i].seen) for i in marked])
        ids = placed([token for i in marked for token in rows[i].seen], device, torch.long)
        penalties = torch.tensor([rows[i].sampling.repetition_penalty for i in marked], dtype=wide.dtype)
        index = (torch.tensor(marked).repeat_interleave(counts).to(device), ids)
        # A token that is seen twice is written twice, with the same number.
        wide[index] = penalised(wide[index], penalties.repeat_interleave(counts).to(device))
    biased = [(i, token, added) for i, row in enumerate(rows) for token, added in row.sampling.logit_bias]
    if biased:
        where = (placed([i for i, _, _ in biased], device), placed([token for _, token, _ in biased], device))
        wide[where] += placed([added for _, _, added in biased], device, wide.dtype)
    return wide


def _choose_open(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> Int[Tensor, " rows"]:
    """The largest noisy logit of each row.

    Every token takes part: Gumbel noise of 52 bits reaches from -3.6 to 36.7, so only a logit 40 below the largest
    could be left out, and few are.
    """
    count, vocab = logits.shape
    step = max(1, _CPU_NUMBERS // vocab) if logits.device.type == "cpu" else count
    parts = [slice(first, first + step) for first in range(0, count, step)]
    return torch.cat([torch.argmax(_noisy(logits[part], rows[part]), dim=-1) for part in parts])


def _noisy(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> Float64[Tensor, "rows vocab"]:
    """Heated logits with their noise."""
    vocab = logits.shape[1]
    ahead = rows_ahead(vocab)
    blocks = {(row.sampling.seed, row.sample, row.position // ahead) for row in rows}
    heated = heat(logits, [row.sampling for row in rows])
    if len(blocks) == 1:
        # One request and its drafts, which ask for the same positions again and again.
        noise = noise_ahead(*blocks.pop(), ahead, vocab, logits.device)
        return heated + (
            noise[rows[0].position % ahead] if len(rows) == 1 else noise[[row.position % ahead for row in rows]]
        )
    return _noise(rows, torch.arange(vocab, device=logits.device)).add_(heated)


def _choose_filtered(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> Int[Tensor, " rows"]:
    """The largest noisy logit among each row's survivors, judged by the row's likeliest tokens where they suffice.

    That is exact. Survivors are the beginning of the row's tokens in order of (probability, lower id), and what the
    filters compare depends on that beginning alone; the one exception, the sum of a top-k that is wider than what was
    looked at, is seen beforehand. So if not all that was looked at survives, nothing beyond would have. Which tokens
    were looked at does not depend on how ties at their end were broken if the last survivor is likelier than the last
    of them. Rows of which this cannot be said have their whole vocabulary sorted.
    """
    vocab = logits.shape[1]
    width = min(_PREFIX, vocab)
    settings = [row.sampling for row in rows]
    heated = heat(logits, settings)
    probabilities = torch.softmax(heated, dim=-1)
    ordered, ids = ordered_top(probabilities, width)
    survivors = count_survivors(ordered, settings, vocab)
    if width < vocab:
        end = ordered.gather(1, (survivors - 1).clamp(min=0)[:, None])[:, 0]
        summed = placed([_sums_beyond(sampling, width, vocab) for sampling in settings], logits.device)
        unsure = (survivors == width) | (end <= ordered[:, -1]) | summed
    else:
        unsure = torch.zeros_like(survivors, dtype=torch.bool)
    tokens = torch.empty_like(survivors)
    few, many = (~unsure).nonzero()[:, 0], unsure.nonzero()[:, 0]
    if len(few):
        tokens[few] = _choose_among(heated[few], ids[few], survivors[few], [rows[i] for i in few.tolist()])
    if len(many):
        theirs = [rows[i] for i in many.tolist()]
        ordered, ids = torch.sort(probabilities[many], dim=-1, descending=True, stable=True)
        survivors = count_survivors(ordered, [row.sampling for row in theirs], vocab)
        lost = torch.ones_like(ids, dtype=torch.bool)
        lost.scatter_(1, ids, torch.arange(vocab, device=ids.device) >= survivors[:, None])
        tokens[many] = _choose_open(logits[many].masked_fill(lost, -math.inf), theirs)
    return tokens


def _sums_beyond(sampling: Sampling, width: int, vocab: int) -> bool:
    """Whether top-p is a part of a sum over more than `width` tokens that must be found by sorting."""
    return sampling.top_p is not None and sampling.top_k is not None and width < sampling.top_k < vocab


def _choose_among(
    heated: Float64[Tensor, "rows vocab"],
    ids: Int[Tensor, "rows likeliest"],
    survivors: Int[Tensor, " rows"],
    rows: Sequence[Draw],
) -> Int[Tensor, " rows"]:
    """The largest noisy logit among the first `survivors` ids of each row."""
    vocab = heated.shape[1]
    ids = ids[:, : max(int(survivors.max()), 1)]
    keep = torch.arange(ids.shape[1], device=ids.device) < survivors[:, None]
    # Sorted by id, those that are kept first: argmax takes the first of equals.
    ids = torch.where(keep, ids, ids + vocab).sort(-1).values
    lost, ids = ids >= vocab, ids % vocab
    noisy = heated.gather(1, ids) + _noise(rows, ids)
    best = torch.argmax(noisy.masked_fill(lost, -math.inf), dim=-1, keepdim=True)
    return ids.gather(1, best)[:, 0]


def _noise(rows: Sequence[Draw], ids: Int[Tensor, "... ids"]) -> Float64[Tensor, "rows ids"]:
    """The noise of `choose` for these ids, (N, K), or (K,) when they are the same in every row."""
    keys = placed([row.sampling.key for row in rows], ids.device)
    samples = placed([row.sample for row in rows], ids.device)
    positions = placed([row.position for row in rows], ids.device)
    return gumbel_by_key(keys[:, None], samples[:, None], positions[:, None], ids)


def _likeliest(chances: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> tuple[Tensor | None, Tensor | None]:
    """`Chosen.top_ids` and `Chosen.top_logprobs`."""
    wanted = [row.sampling.logprobs for row in rows]
    if not any(wanted):
        return None, None
    top_ids = torch.full((len(rows), max(wanted)), -1, device=chances.device)
    top_logprobs = chances.new_full(top_ids.shape, -math.inf)
    # One pass for each number that is wanted: how ties are broken must not depend on the other rows.
    for count in sorted(set(wanted) - {0}):
        index = placed([i for i, number in enumerate(wanted) if number == count], chances.device)
        top_logprobs[index, :count], top_ids[index, :count] = ordered_top(chances[index], count)
    return top_ids, top_logprobs
