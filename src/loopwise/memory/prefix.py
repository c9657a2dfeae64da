"""The prefix cache: pages that are found again by what they hold.

A page's identity is the chain of all tokens up to its end, and whatever else changes the numbers: the start state's
seed, and with a coda the prompt's number of loops. The exit rule and the number of loops are left out otherwise: under
`full` prompt depth plane r depends on planes <= r alone, so requests of different efforts share a prompt, and a hit
needs no more planes than the request will read. Under `exit` prompt depth the rule is part of the identity; an entry
then knows after which loop each position stopped, and has the planes that some position on it reached. Tokens are
compared on every hit, so a collision is a miss.
"""

import hashlib
from bisect import insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from loopwise.memory.paged import PagedMemory, PageList
from loopwise.memory.pages import PagePool


@dataclass
class _Entry:
    """One page of tokens and where each plane of it lies."""

    key: bytes
    parent: bytes
    tokens: tuple[int, ...]
    planes: dict[int, int]
    """Physical page by plane."""
    used: int
    left: tuple[int, ...] = ()
    """The loop after which each position stopped, where prompts obey an exit rule."""
    children: set[bytes] = field(default_factory=set)


@dataclass(frozen=True)
class Beginning:
    """What is known of a sequence's beginning."""

    length: int
    """Positions."""
    left: tuple[int, ...]
    """The loop after which each of them stopped, where prompts obey an exit rule; else nothing."""


class PrefixCache:
    """Holds pages for later requests until their room is needed; the least recently used go first."""

    def __init__(self, memory: PagedMemory) -> None:
        self._memory = memory
        self._entries: dict[bytes, _Entry] = {}
        self._clock = 0
        self.hits = 0
        """Tokens whose keys and values were found."""
        self.queries = 0
        """Tokens that were looked for."""

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, pages: PageList, identity: Hashable, tokens: Sequence[int], planes: Sequence[int]) -> Beginning:
        """Lend a new sequence the pages of its longest known beginning.

        Args:
            pages: the sequence's list, empty so far.
            tokens: what may be found; leave out the last token, whose prediction has to be computed.
            planes: the planes that the request will read.
        """
        size = self._memory.layout.page
        self._clock += 1
        key, found = _root(identity), 0
        left: tuple[int, ...] = ()
        for index in range(len(tokens) // size):
            part = tuple(tokens[index * size : (index + 1) * size])
            key = _extend(key, part)
            entry = self._entries.get(key)
            wanted = planes if entry is None else self._reached(planes, entry.left)
            if entry is None or entry.tokens != part or not set(wanted) <= entry.planes.keys():
                break
            entry.used = self._clock
            for plane in wanted:
                page = entry.planes[plane]
                self._memory.pool(plane).share(page)
                self._memory.place(pages, plane, index, page)
            left += entry.left
            found += size
        return Beginning(found, left)

    def _reached(self, planes: Sequence[int], left: Sequence[int]) -> Sequence[int]:
        """Those of the planes that a page has whose positions stopped after these loops."""
        if not left or self._memory.policy.fills:
            return planes
        return [plane for plane in planes if plane <= max(left)]

    def count(self, *, asked: int, found: int) -> None:
        """Note that a sequence began with `found` of `asked` tokens."""
        self.queries += asked
        self.hits += found

    def publish(
        self,
        pages: PageList,
        identity: Hashable,
        tokens: Sequence[int],
        planes: Sequence[int],
        left: Sequence[int] = (),
    ) -> None:
        """Keep the whole pages of these settled positions; planes that an entry already has are not kept twice.

        Args:
            left: the loop after which each position stopped, where prompts obey an exit rule.
        """
        size = self._memory.layout.page
        self._clock += 1
        parent = _root(identity)
        for index in range(len(tokens) // size):
            part = tuple(tokens[index * size : (index + 1) * size])
            key = _extend(parent, part)
            entry = self._entries.get(key)
            exits = tuple(left[index * size : (index + 1) * size])
            if entry is not None and (entry.tokens, entry.left) != (part, exits):
                return
            have = {plane: pages.planes.get(plane, []) for plane in self._reached(planes, exits)}
            if any(index >= len(own) or own[index] < 0 for own in have.values()):
                return
            if entry is None:
                entry = self._entries[key] = _Entry(key, parent, part, {}, self._clock, exits)
                if parent in self._entries:
                    self._entries[parent].children.add(key)
            entry.used = self._clock
            for plane, own in have.items():
                if plane not in entry.planes:
                    self._memory.pool(plane).share(own[index])
                    entry.planes[plane] = own[index]
            parent = key

    def shrink(self, plane: int, pages: int) -> bool:
        """Free at least `pages` pages of this plane's pool, if what the cache alone holds allows it; else nothing."""
        pool = self._memory.pool(plane)
        target = pool.free + pages
        if pool.free + sum(self._frees(entry, pool) for entry in self._entries.values()) < target:
            return False

        def order(entry: _Entry) -> tuple[bool, int]:
            # Pages that somebody reads just now give no room; their entries go only to get at what they stand before.
            return self._frees(entry, pool) == 0, entry.used

        leaves = sorted((entry for entry in self._entries.values() if not entry.children), key=order)
        while pool.free < target and leaves:
            entry = leaves.pop(0)
            parent = self._drop(entry)
            if parent is not None and not parent.children:
                insort(leaves, parent, key=order)
        return pool.free >= target

    def _frees(self, entry: _Entry, pool: PagePool) -> int:
        """Pages of this pool that nobody but the cache holds."""
        return sum(self._memory.pool(plane) is pool and pool.holders(page) == 1 for plane, page in entry.planes.items())

    def clear(self) -> None:
        """Forget everything."""
        for entry in list(self._entries.values()):
            self._drop(entry)

    def _drop(self, entry: _Entry) -> _Entry | None:
        for plane, page in entry.planes.items():
            self._memory.pool(plane).release(page)
        del self._entries[entry.key]
        parent = self._entries.get(entry.parent)
        if parent is not None:
            parent.children.discard(entry.key)
        return parent

    @property
    def pages(self) -> dict[int, int]:
        """Pages held, by plane."""
        held: dict[int, int] = {}
        for entry in self._entries.values():
            for plane in entry.planes:
                held[plane] = held.get(plane, 0) + 1
        return held


def _root(identity: Hashable) -> bytes:
    return hashlib.blake2b(repr(identity).encode(), digest_size=16).digest()


def _extend(parent: bytes, tokens: Sequence[int]) -> bytes:
    text = ",".join(map(str, tokens)).encode()
    return hashlib.blake2b(parent + text, digest_size=16).digest()
