"""Plane policies: which plane a loop writes, which it reads, and what follows from that.

A position has a *store* for each loop: the plane in which its keys and values of that loop lie. A reader at loop d
finds the store of loop d. Policies differ in which loops share a store, in what a row does once its answer has left,
and in what becomes of the prompt. They are part of the model's meaning: changing one changes the numbers.

R loops, r the loop that writes, d the loop that reads, e the loop after which a position stopped.
"""

from dataclasses import dataclass
from typing import Literal

from loopwise.errors import ConfigError

Prefill = Literal["chunks", "lockstep", "per_position"]
"""How a prompt is run: in chunks of any size; all of it together, loop by loop; or one position after the other."""


@dataclass(frozen=True, kw_only=True)
class PlanePolicy:
    """One policy, declared.

    per_loop           a plane for each loop, as trained; who leaves early runs on to fill them (saves latency).
    last_exited        a plane for each loop; who leaves at e stops, and readers at d > e take plane e. Saves work.
    single             one plane, overwritten by every loop (variant C when the prompt runs `per_position`).
    average            one plane, the running mean of all loops so far.
    first_then_shared  loop 1 has a plane of its own, later loops share another.
    modulo:k           loops r, r + k, r + 2k, ... share a plane.
    collapse           the prompt keeps a plane per loop until it has been read, then only the last (variant B);
                       generated positions overwrite one plane.
    decode_shared      the prompt keeps a plane per loop; generated positions overwrite one plane (variant A).
    """

    name: str
    period: int = 0
    """k of `modulo:k`."""
    prefill: Prefill = "chunks"
    """How prompts are run."""

    def __str__(self) -> str:
        name = f"modulo:{self.period}" if self.name == "modulo" else self.name
        return f"{name}:per_position" if self.prefill == "per_position" else name

    @property
    def fills(self) -> bool:
        """Whether a row whose answer has left runs on to write its remaining planes."""
        return self.name == "per_loop"

    @property
    def blends(self) -> bool:
        """Whether a plane holds the mean of what was written to it, rather than the last."""
        return self.name == "average"

    @property
    def collapses(self) -> bool:
        """Whether only the prompt's last plane is kept once it has been read."""
        return self.name == "collapse"

    @property
    def speculates(self) -> bool:
        """Whether a position may run while the one before it does: w(r) = r in every loop."""
        return self.name in ("per_loop", "last_exited")

    @property
    def knows_depth(self) -> bool:
        """Whether loops overwrite each other's planes of a prompt, so that it matters how many there are."""
        return self.prefill != "chunks"

    @property
    def shares_generated(self) -> bool:
        """Whether pages of generated positions that ran every loop equal those of the same tokens in a prompt."""
        return self.prefill == "per_position" or self.name in ("per_loop", "last_exited")

    @property
    def chunk_invariant(self) -> bool:
        """Whether the numbers do not depend on how a prompt is cut into chunks; prefixes can be shared then."""
        return self.prefill != "lockstep"

    def store(self, loop: int, loops: int, *, generated: bool) -> int:
        """The plane, from 1 to `loops`, that holds a position's keys and values of this loop."""
        if self.name in ("single", "average"):
            return 1
        if self.name == "first_then_shared":
            return min(loop, 2)
        if self.name == "modulo":
            return (loop - 1) % self.period + 1
        if generated and self.name == "decode_shared":
            return 1
        if generated and self.name == "collapse":
            return loops
        return loop

    def kept(self, loops: int, *, generated: bool) -> int:
        """Planes that a position which ran every loop keeps for good, once the prompt has been read."""
        return 1 if self.collapses else len(self.stored(loops, generated=generated))

    def readers(self, loop: int, loops: int, *, generated: bool) -> list[int]:
        """The loops whose readers find what is written at `loop`."""
        mine = self.store(loop, loops, generated=generated)
        return [other for other in range(1, loops + 1) if self.store(other, loops, generated=generated) == mine]

    def stored(self, loops: int, *, generated: bool) -> list[int]:
        """The planes that a position of `loops` loops needs, without repetition."""
        return sorted({self.store(loop, loops, generated=generated) for loop in range(1, loops + 1)})


_PLAIN = ("per_loop", "last_exited", "collapse", "decode_shared")
_SHARED = ("single", "average", "first_then_shared")
POLICIES = (*_PLAIN, *_SHARED, "modulo:k")
"""Every form; the last four also with `:per_position` behind, which makes them independent of chunks, and slow."""


def parse_policy(text: "str | PlanePolicy") -> PlanePolicy:
    """The policy of this text, such as "last_exited", "modulo:2" or "single:per_position".

    Raises:
        ConfigError: when there is none.
    """
    if isinstance(text, PlanePolicy):
        return text
    name, *rest = text.split(":")
    if name in _PLAIN and not rest:
        return PlanePolicy(name=name)
    per_position = rest[-1:] == ["per_position"]
    numbers = rest[:-1] if per_position else rest
    prefill: Prefill = "per_position" if per_position else "lockstep"
    if name in _SHARED and not numbers:
        return PlanePolicy(name=name, prefill=prefill)
    if name == "modulo" and len(numbers) == 1 and numbers[0].isdigit() and int(numbers[0]) >= 1:
        return PlanePolicy(name=name, period=int(numbers[0]), prefill=prefill)
    raise ConfigError(
        f"policy={text!r}: allowed are {', '.join(POLICIES)}; {', '.join(_SHARED)} and modulo:k also with :per_position"
    )
