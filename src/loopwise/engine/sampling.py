"""How the next token is chosen: filters, then addressed Gumbel noise.

The noise of a token id is a function of (seed, sample, position, id) alone and is computed only for ids that survive
the filters, so a choice does not depend on batch mix, on speculation or on what was sampled before.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.nn.noise import gumbel

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
            ("max_loops", self.max_loops is None or self.max_loops >= 1, "1 or more"),
            ("min_loops", self.min_loops >= 1, "1 or more"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of texts that are not empty"),
            ("start", self.start is None or isinstance(self.start, int) or self.start == "zero", 'a seed or "zero"'),
        )
        for name, fine, allowed in checks:
            if not fine:
                raise ConfigError(f"{name}={getattr(self, name)!r}: allowed is {allowed}")


def candidates(logits: Float[Tensor, " vocab"], sampling: Sampling) -> Int[Tensor, " kept"]:
    """Ids that survive top-k, then top-p, then min-p, all measured at the sampling temperature; likeliest first."""
    scaled = logits.double() / sampling.temperature
    probabilities = torch.softmax(scaled, dim=-1)
    # A stable order makes ties fall to the lower id on every device.
    ordered, ids = torch.sort(probabilities, descending=True, stable=True)
    keep = torch.ones_like(ids, dtype=torch.bool)
    if sampling.top_k is not None:
        keep[sampling.top_k :] = False
    if sampling.top_p is not None:
        kept = torch.where(keep, ordered, 0.0)
        before = kept.cumsum(0) - kept
        keep &= before < sampling.top_p * kept.sum()
    if sampling.min_p is not None:
        keep &= ordered >= sampling.min_p * ordered[0]
    return ids[keep]


def choose(logits: Float[Tensor, " vocab"], sampling: Sampling, *, position: int, sample: int = 0) -> int:
    """The next token id.

    Args:
        logits: raw logits of one row.
        position: position of the token that is being chosen, counting real tokens.
        sample: which of several samples of one prompt this is.
    """
    if sampling.temperature == 0.0:
        return int(torch.argmax(logits))
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        rows = max(1, _AHEAD // len(logits))
        noise = _noise(sampling.seed, sample, position // rows, rows, len(logits), logits.device)[position % rows]
        return int(torch.argmax(logits.double() / sampling.temperature + noise))
    ids = candidates(logits, sampling)
    place = torch.full_like(ids, position)
    noise = gumbel(sampling.seed, "sampling", torch.full_like(ids, sample), place, ids)
    return int(ids[torch.argmax(logits[ids].double() / sampling.temperature + noise)])


@lru_cache(maxsize=1)
def _noise(
    seed: int, sample: int, block: int, rows: int, vocab: int, device: torch.device
) -> Float64[Tensor, "rows vocab"]:
    """Noise of every id at the positions of one block: for few numbers, starting the operations is what takes time."""
    places = torch.arange(block * rows, (block + 1) * rows, device=device)[:, None]
    return gumbel(seed, "sampling", torch.full_like(places, sample), places, torch.arange(vocab, device=device))


def log_probability(logits: Float[Tensor, " vocab"], token: int) -> float:
    """Log-probability in nats, before temperature and filters."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return float(torch.log_softmax(wide, dim=-1)[token])
