"""How the next token is chosen: penalty and bias, temperature, filters, then addressed Gumbel noise.

The noise of a token id is a function of (seed, sample, position, id) alone and is computed only for ids that survive
the filters, so a choice does not depend on batch mix, on speculation or on what was sampled before. `choose` is the
readable definition, for one row; `choose_batch` takes the same tokens for many rows of different requests at once.

Axes: N rows, V vocabulary, K likeliest tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.nn.kernels.rows import pick_rows
from loopwise.nn.noise import gumbel, gumbel_by_key, seed_key, seed_keys

_PREFIX = 512
"""Likeliest tokens among which filters are tried first: sorting a whole vocabulary takes several times as long."""
_AHEAD = 2**15
"""Numbers of noise that are drawn together."""
_CPU_NUMBERS = 2**16
"""Noise drawn at once on a CPU: larger intermediate tensors leave its cache, and take twice as long."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What to generate and how."""

    max_tokens: int = 64
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; larger is more random."""
    top_k: int | None = None
    """Keep only this many of the likeliest tokens."""
    top_p: float | None = None
    """Keep the fewest likeliest tokens whose probabilities reach this sum."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that are in the prompt or the answer, and multiplies the negative ones."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and what is added to its logit."""
    logprobs: int = 0
    """Likeliest tokens to report beside each chosen one, with their log-probabilities."""
    n: int = 1
    """Answers to each prompt; each draws its own noise."""
    seed: int = 0
    """Same seed, same tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are cut off."""
    ignore_eos: bool = False
    """Go on after an end-of-text token."""
    exit: str | None = None
    """Exit rule, such as "hazard:0.6"; None runs every loop."""
    max_loops: int | None = None
    """Loops per token at most; None means the model's own number."""
    min_loops: int = 1
    """Loops per token at least."""
    start: int | Literal["zero"] | None = None
    """Start state of random-start models: a seed or "zero"; None means the model's own seed."""

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("logit_bias", _is_bias(self.logit_bias), "a finite number for each of some different token ids"),
            ("logprobs", self.logprobs >= 0, "0 or more"),
            ("n", self.n >= 1, "1 or more"),
            ("max_loops", self.max_loops is None or self.max_loops >= 1, "1 or more"),
            ("min_loops", self.min_loops >= 1, "1 or more"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of texts that are not empty"),
            ("start", self.start is None or isinstance(self.start, int) or self.start == "zero", 'a seed or "zero"'),
        )
        for name, fine, allowed in checks:
            if not fine:
                raise ConfigError(f"{name}={getattr(self, name)!r}: allowed is {allowed}")

    @property
    def adjusts(self) -> bool:
        """Whether logits change before the temperature is applied."""
        return self.repetition_penalty != 1.0 or bool(self.logit_bias)

    @property
    def filters(self) -> bool:
        """Whether some tokens may be kept from being chosen."""
        return self.top_k is not None or (self.top_p or 1.0) < 1.0 or bool(self.min_p)

    @cached_property
    def plain(self) -> bool:
        """Whether only seed and temperature decide, and nothing but the token and its log-probability is wanted."""
        return not (self.adjusts or self.filters or self.logprobs)

    @cached_property
    def key(self) -> int:
        """What the seed becomes before its noise is addressed, see `seed_key`."""
        return seed_key(self.seed, "sampling")


def _is_bias(pairs: tuple[tuple[int, float], ...]) -> bool:
    ids = [token for token, _ in pairs]
    return len(set(ids)) == len(ids) and all(token >= 0 and math.isfinite(added) for token, added in pairs)


def check_vocabulary(sampling: Sampling, vocab_size: int) -> None:
    """See whether the token ids and counts in these settings are a vocabulary's.

    Raises:
        ConfigError: for a biased id outside it, or more log-probabilities than it has tokens.
    """
    wrong = [token for token, _ in sampling.logit_bias if token >= vocab_size]
    if wrong:
        raise ConfigError(f"logit_bias of token {wrong[0]}: allowed are ids from 0 to {vocab_size - 1}")
    if sampling.logprobs > vocab_size:
        raise ConfigError(f"logprobs={sampling.logprobs}: allowed is 0 to {vocab_size}, the size of the vocabulary")


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


def adjusted(logits: Float[Tensor, " vocab"], sampling: Sampling, seen: Sequence[int] = ()) -> Float[Tensor, " vocab"]:
    """Logits after penalty (Keskar et al. 2019, CTRL, as transformers has it) and bias; float64 if there is any."""
    if not sampling.adjusts:
        return logits
    wide = logits.double()
    if seen and sampling.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(seen)), device=logits.device)
        wide = wide.index_copy(0, ids, _penalised(wide[ids], wide.new_tensor(sampling.repetition_penalty)))
    if sampling.logit_bias:
        ids = torch.tensor([token for token, _ in sampling.logit_bias], device=logits.device)
        wide = wide.index_add(0, ids, wide.new_tensor([added for _, added in sampling.logit_bias]))
    return wide


def _penalised(logits: Tensor, penalty: Tensor) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def _heated(logits: Float[Tensor, "rows vocab"], settings: Sequence[Sampling]) -> Float64[Tensor, "rows vocab"]:
    # A tensor divides alike on every device; a Python number would be turned into a factor on some.
    return logits.double() / _column([sampling.temperature for sampling in settings], logits.device)


def _column(numbers: Sequence[int] | Sequence[float], device: torch.device) -> Float64[Tensor, "rows one"]:
    return torch.tensor(numbers, dtype=torch.float64, device=device)[:, None]


def _count_survivors(
    ordered: Float64[Tensor, "rows likeliest"], settings: Sequence[Sampling], vocab: int
) -> Int[Tensor, " rows"]:
    """How many of each row's likeliest tokens survive its filters, from their falling probabilities.

    It is the beginning of a row that survives, and the answer is the same for any part of the row that is longer,
    unless top_k is beyond that part.
    """
    device, width = ordered.device, ordered.shape[1]
    top_k = torch.tensor([min(sampling.top_k or vocab, vocab) for sampling in settings], device=device)
    top_p = _column([1.0 if sampling.top_p is None else sampling.top_p for sampling in settings], device)
    min_p = _column([sampling.min_p or 0.0 for sampling in settings], device)
    sums = ordered.cumsum(-1)
    of_top_k = sums.gather(1, (top_k.clamp(max=width) - 1)[:, None])
    total = torch.where(top_k[:, None] < vocab, of_top_k, 1.0)
    # The token that reaches the sum is the last to survive.
    reached = torch.searchsorted(sums, top_p * total) + 1
    reached = torch.where(top_p < 1.0, reached, vocab)[:, 0]
    likely = (ordered >= min_p * ordered[:, :1]).sum(-1)
    return torch.minimum(torch.minimum(top_k, reached), likely).clamp(min=1, max=width)


def candidates(logits: Float[Tensor, " vocab"], sampling: Sampling) -> Int[Tensor, " kept"]:
    """Ids that survive top-k, then top-p, then min-p, all measured at the sampling temperature; likeliest first."""
    probabilities = torch.softmax(_heated(logits[None], [sampling]), dim=-1)
    # A stable order makes ties fall to the lower id on every device.
    ordered, ids = torch.sort(probabilities, descending=True, stable=True)
    return ids[0, : int(_count_survivors(ordered, [sampling], len(logits)))]


def choose(
    logits: Float[Tensor, " vocab"],
    sampling: Sampling,
    *,
    position: int,
    sample: int = 0,
    seen: Sequence[int] = (),
) -> int:
    """The next token id; ties fall to the lower one.

    Args:
        logits: raw logits of one row.
        position: position of the token that is being chosen, counting real tokens.
        sample: which of several samples of one prompt this is.
        seen: prompt and answer so far, for a repetition penalty.
    """
    logits = adjusted(logits, sampling, seen)
    if sampling.temperature == 0.0:
        return int(torch.argmax(logits))
    # A tensor divides as in `_heated`, bit for bit; one number makes it in one step.
    heated = logits.double() / torch.full((1,), sampling.temperature, dtype=torch.float64, device=logits.device)
    if not sampling.filters:
        rows = _rows_ahead(len(logits))
        noise = _noise_ahead(sampling.seed, sample, position // rows, rows, len(logits), logits.device)
        return int(torch.argmax(heated + noise[position % rows]))
    ids = candidates(logits, sampling).sort().values
    place = torch.full_like(ids, position)
    noise = gumbel(sampling.seed, "sampling", torch.full_like(ids, sample), place, ids)
    return int(ids[torch.argmax(heated[ids] + noise)])


def _rows_ahead(vocab: int) -> int:
    """Positions of one block of noise."""
    return max(1, _AHEAD // vocab)


@lru_cache(maxsize=1)
def _noise_ahead(
    seed: int, sample: int, block: int, rows: int, vocab: int, device: torch.device
) -> Float64[Tensor, "rows vocab"]:
    """Noise of every id at the positions of one block: for few numbers, starting the operations is what takes time."""
    places = torch.arange(block * rows, (block + 1) * rows, device=device)[:, None]
    return gumbel(seed, "sampling", torch.full_like(places, sample), places, torch.arange(vocab, device=device))


def log_probability(logits: Float[Tensor, " vocab"], token: int) -> float:
    """Log-probability in nats, before temperature and filters."""
    return float(_log_softmax(logits)[token])


def likeliest(logits: Float[Tensor, " vocab"], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens and their log-probabilities, likeliest first, equal ones by rising id."""
    if not count:
        return ()
    values, ids = _ordered_top(_log_softmax(logits)[None], count)
    return tuple(zip(ids[0].tolist(), values[0].tolist(), strict=True))


def choose_batch(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> Chosen:
    """The tokens that `choose` takes row by row, in a few passes over all rows together.

    Greedy rows cost an argmax. Rows without filters draw noise for the whole vocabulary, unsorted. Rows with filters
    look at their likeliest tokens first; those that keep more are sorted whole (see `_choose_filtered`).

    Args:
        logits: raw logits.
        rows: what each of them is for; settings, seeds and positions may all differ.
    """
    chances = _log_softmax(logits)
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
    if any(sampling.adjusts or sampling.filters or sampling.logprobs for sampling in settings):
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
            index = torch.tensor(places, device=logits.device)
            tokens[index] = choose_rows(wide[index], [rows[i] for i in places])
    return tokens


def _adjust_rows(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> Float[Tensor, "rows vocab"]:
    """`adjusted` for rows of different settings; all of them in float64 if any row needs it."""
    if not any(row.sampling.adjusts for row in rows):
        return logits
    wide, device = logits.double(), logits.device
    if wide is logits:
        wide = logits.clone()
    penalised = [i for i, row in enumerate(rows) if row.sampling.repetition_penalty != 1.0]
    if penalised:
        counts = torch.tensor([len(rows[i].seen) for i in penalised])
        ids = torch.tensor([token for i in penalised for token in rows[i].seen], dtype=torch.long, device=device)
        penalties = torch.tensor([rows[i].sampling.repetition_penalty for i in penalised], dtype=wide.dtype)
        index = (torch.tensor(penalised).repeat_interleave(counts).to(device), ids)
        # A token that is seen twice is written twice, with the same number.
        wide[index] = _penalised(wide[index], penalties.repeat_interleave(counts).to(device))
    biased = [(i, token, added) for i, row in enumerate(rows) for token, added in row.sampling.logit_bias]
    if biased:
        where = torch.tensor([place[:2] for place in biased], device=device).unbind(1)
        wide[where] += torch.tensor([place[2] for place in biased], dtype=wide.dtype, device=device)
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
    ahead = _rows_ahead(vocab)
    blocks = {(row.sampling.seed, row.sample, row.position // ahead) for row in rows}
    heated = _heated(logits, [row.sampling for row in rows])
    if len(blocks) == 1:
        # One request and its drafts, which ask for the same positions again and again.
        noise = _noise_ahead(*blocks.pop(), ahead, vocab, logits.device)
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
    heated = _heated(logits, settings)
    probabilities = torch.softmax(heated, dim=-1)
    ordered, ids = _ordered_top(probabilities, width)
    survivors = _count_survivors(ordered, settings, vocab)
    if width < vocab:
        end = ordered.gather(1, (survivors - 1).clamp(min=0)[:, None])[:, 0]
        summed = torch.tensor([_sums_beyond(sampling, width, vocab) for sampling in settings], device=logits.device)
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
        survivors = _count_survivors(ordered, [row.sampling for row in theirs], vocab)
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
    keys = seed_keys([row.sampling.seed for row in rows], "sampling").to(ids.device)
    samples = torch.tensor([row.sample for row in rows], device=ids.device)
    positions = torch.tensor([row.position for row in rows], device=ids.device)
    return gumbel_by_key(keys[:, None], samples[:, None], positions[:, None], ids)


def _log_softmax(logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _likeliest(chances: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> tuple[Tensor | None, Tensor | None]:
    """`Chosen.top_ids` and `Chosen.top_logprobs`."""
    wanted = [row.sampling.logprobs for row in rows]
    if not any(wanted):
        return None, None
    top_ids = torch.full((len(rows), max(wanted)), -1, device=chances.device)
    top_logprobs = chances.new_full(top_ids.shape, -math.inf)
    # One pass for each number that is wanted: how ties are broken must not depend on the other rows.
    for count in sorted(set(wanted) - {0}):
        index = torch.tensor([i for i, number in enumerate(wanted) if number == count], device=chances.device)
        top_logprobs[index, :count], top_ids[index, :count] = _ordered_top(chances[index], count)
    return top_ids, top_logprobs


def _ordered_top(values: Float[Tensor, "rows vocab"], count: int) -> tuple[Tensor, Tensor]:
    """The largest `count` values of each row, falling, and their ids; equal values by rising id."""
    ids = torch.topk(values, count, dim=-1, sorted=False).indices.sort(-1).values
    ordered, order = torch.sort(values.gather(1, ids), dim=-1, descending=True, stable=True)
    return ordered, ids.gather(1, order)
