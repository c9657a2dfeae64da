"""How the next token is chosen: penalty and bias, temperature, filters, then addressed Gumbel noise.

The noise of a token id is a function of (seed, sample, position, id) alone and is computed only for ids that survive
the filters, so a choice does not depend on batch mix, on speculation or on what was sampled before. `choose` is the
readable definition, for one row; `choosing.choose_batch` takes the same tokens for many rows of different requests.

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
from loopwise.nn.noise import gumbel, seed_key
from loopwise.nn.place import placed

_AHEAD = 2**15
"""Numbers of noise that are drawn together."""


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


def adjusted(logits: Float[Tensor, " vocab"], sampling: Sampling, seen: Sequence[int] = ()) -> Float[Tensor, " vocab"]:
    """Logits after penalty (Keskar et al. 2019, CTRL, as transformers has it) and bias; float64 if there is any."""
    if not sampling.adjusts:
        return logits
    wide = logits.double()
    if seen and sampling.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(seen)), device=logits.device)
        wide = wide.index_copy(0, ids, penalised(wide[ids], wide.new_tensor(sampling.repetition_penalty)))
    if sampling.logit_bias:
        ids = torch.tensor([token for token, _ in sampling.logit_bias], device=logits.device)
        wide = wide.index_add(0, ids, wide.new_tensor([added for _, added in sampling.logit_bias]))
    return wide


def penalised(logits: Tensor, penalty: Tensor) -> Tensor:
    """Logits of tokens that were seen."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def heat(logits: Float[Tensor, "rows vocab"], settings: Sequence[Sampling]) -> Float64[Tensor, "rows vocab"]:
    """Logits over each row's temperature."""
    # A tensor divides alike on every device; a Python number would be turned into a factor on some.
    return logits.double() / _column([sampling.temperature for sampling in settings], logits.device)


def _column(numbers: Sequence[int] | Sequence[float], device: torch.device) -> Float64[Tensor, "rows one"]:
    return placed(numbers, device, torch.float64)[:, None]


def count_survivors(
    ordered: Float64[Tensor, "rows likeliest"], settings: Sequence[Sampling], vocab: int
) -> Int[Tensor, " rows"]:
    """How many of each row's likeliest tokens survive its filters, from their falling probabilities.

    It is the beginning of a row that survives, and the answer is the same for any part of the row that is longer,
    unless top_k is beyond that part.
    """
    device, width = ordered.device, ordered.shape[1]
    top_k = placed([min(sampling.top_k or vocab, vocab) for sampling in settings], device)
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
    probabilities = torch.softmax(heat(logits[None], [sampling]), dim=-1)
    # A stable order makes ties fall to the lower id on every device.
    ordered, ids = torch.sort(probabilities, descending=True, stable=True)
    return ids[0, : int(count_survivors(ordered, [sampling], len(logits)))]


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
    # A tensor divides as in `heat`, bit for bit; one number makes it in one step.
    heated = logits.double() / torch.full((1,), sampling.temperature, dtype=torch.float64, device=logits.device)
    if not sampling.filters:
        rows = rows_ahead(len(logits))
        noise = noise_ahead(sampling.seed, sample, position // rows, rows, len(logits), logits.device)
        return int(torch.argmax(heated + noise[position % rows]))
    ids = candidates(logits, sampling).sort().values
    place = torch.full_like(ids, position)
    noise = gumbel(sampling.seed, "sampling", torch.full_like(ids, sample), place, ids)
    return int(ids[torch.argmax(heated[ids] + noise)])


def rows_ahead(vocab: int) -> int:
    """Positions of one block of noise."""
    return max(1, _AHEAD // vocab)


@lru_cache(maxsize=1)
def noise_ahead(
    seed: int, sample: int, block: int, rows: int, vocab: int, device: torch.device
) -> Float64[Tensor, "rows vocab"]:
    """Noise of every id at the positions of one block: for few numbers, starting the operations is what takes time."""
    places = torch.arange(block * rows, (block + 1) * rows, device=device)[:, None]
    return gumbel(seed, "sampling", torch.full_like(places, sample), places, torch.arange(vocab, device=device))


def log_probability(logits: Float[Tensor, " vocab"], token: int) -> float:
    """Log-probability in nats, before temperature and filters."""
    return float(log_softmax(logits)[token])


def likeliest(logits: Float[Tensor, " vocab"], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens and their log-probabilities, likeliest first, equal ones by rising id."""
    if not count:
        return ()
    values, ids = ordered_top(log_softmax(logits)[None], count)
    return tuple(zip(ids[0].tolist(), values[0].tolist(), strict=True))


def log_softmax(logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
    """In float32, or wider where the logits are."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def ordered_top(values: Float[Tensor, "rows vocab"], count: int) -> tuple[Tensor, Tensor]:
    """The largest `count` values of each row, falling, and their ids; equal values by rising id."""
    ids = torch.topk(values, count, dim=-1, sorted=False).indices.sort(-1).values
    ordered, order = torch.sort(values.gather(1, ids), dim=-1, descending=True, stable=True)
    return ordered, ids.gather(1, order)
