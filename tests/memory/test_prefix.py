"""The prefix cache: what is found, what gives way, and that nothing is thrown away for nothing."""

import pytest
import torch

from loopwise.loops.planes import parse_policy
from loopwise.memory.paged import BOUNDARY, Layout, PagedMemory, PageList
from loopwise.memory.prefix import PrefixCache

PAGE = 4
PLANES = [BOUNDARY, 1, 2]
LAYOUT = Layout(core=range(1, 2), boundary=(0,), heads=1, kv_heads=1, head_width=2, dtype=torch.float64, page=PAGE)


@pytest.fixture
def memory() -> PagedMemory:
    """Room for ten pages of tokens in two planes."""
    device = torch.device("cpu")
    return PagedMemory(
        LAYOUT, parse_policy("per_loop"), planes=2, budget=10 * LAYOUT.group_bytes(2), seats=4, device=device
    )


@pytest.fixture
def cache(memory: PagedMemory) -> PrefixCache:
    return PrefixCache(memory)


def run(memory: PagedMemory, cache: PrefixCache, tokens: list[int], *, identity: object = "") -> PageList:
    """What a request does that reads this prompt to its end; its pages are still held."""
    pages = memory.open()
    cache.find(pages, identity, tokens[:-1], PLANES)
    for plane in PLANES:
        for index in memory.missing(pages, plane, 0, len(tokens) - 1):
            memory.place(pages, plane, index, memory.pool(plane).take())
    cache.publish(pages, identity, tokens, PLANES)
    return pages


def found(memory: PagedMemory, cache: PrefixCache, tokens: list[int], planes: list[int] = PLANES) -> int:
    pages = memory.open()
    length = cache.find(pages, "", tokens, planes).length
    memory.close(pages)
    return length


def test_the_longest_known_beginning_is_found_whole_pages_only(memory: PagedMemory, cache: PrefixCache) -> None:
    memory.close(run(memory, cache, list(range(11))))
    assert found(memory, cache, list(range(11))) == 8
    assert found(memory, cache, list(range(7))) == 4
    assert found(memory, cache, [0, 1, 2, 3, 9, 9, 9, 9]) == 4
    assert found(memory, cache, [9, 1, 2, 3]) == 0
    assert found(memory, cache, list(range(8)), [BOUNDARY, 1]) == 8
    assert found(memory, cache, list(range(8)), [BOUNDARY, 1, 2, 3]) == 0
    pages = memory.open()
    assert cache.find(pages, "another", list(range(8)), PLANES).length == 0
    memory.close(pages)
    cache.clear()
    assert (memory.core.free, memory.pool(BOUNDARY).free) == (20, 10)


def test_planes_are_added_to_known_pages(memory: PagedMemory, cache: PrefixCache) -> None:
    pages = run(memory, cache, list(range(8)))
    cache.clear()
    cache.publish(pages, "", list(range(8)), [BOUNDARY, 1])
    assert found(memory, cache, list(range(8))) == 0
    cache.publish(pages, "", list(range(8)), PLANES)
    assert found(memory, cache, list(range(8))) == 8
    assert cache.pages == {BOUNDARY: 2, 1: 2, 2: 2}
    memory.close(pages)


def test_the_least_recently_used_end_gives_way_first(memory: PagedMemory, cache: PrefixCache) -> None:
    memory.close(run(memory, cache, list(range(8))))
    memory.close(run(memory, cache, list(range(50, 58))))
    assert found(memory, cache, list(range(8))) == 8  # used again
    assert cache.shrink(1, 1)
    assert (found(memory, cache, list(range(50, 58))), found(memory, cache, list(range(8)))) == (4, 8)
    assert cache.shrink(BOUNDARY, 9 - memory.pool(BOUNDARY).free)
    assert len(cache) == 1


def test_pages_that_somebody_reads_stay_known_while_others_give_room(memory: PagedMemory, cache: PrefixCache) -> None:
    held = run(memory, cache, list(range(8)))
    memory.close(run(memory, cache, list(range(50, 58))))
    assert cache.shrink(1, 2)
    assert (found(memory, cache, list(range(8))), found(memory, cache, list(range(50, 58)))) == (8, 4)
    memory.close(held)


def test_nothing_is_forgotten_when_it_would_not_help(memory: PagedMemory, cache: PrefixCache) -> None:
    held = run(memory, cache, list(range(8)))
    memory.close(run(memory, cache, list(range(50, 58))))
    free = memory.core.free
    assert not cache.shrink(1, 5)
    assert (len(cache), memory.core.free) == (4, free)
    memory.close(held)
    assert cache.shrink(1, 5)


def test_what_stands_behind_pages_in_use_can_be_freed(memory: PagedMemory, cache: PrefixCache) -> None:
    """The first page's plane 2 is the cache's alone, though the second page is wholly in use."""
    memory.close(run(memory, cache, list(range(4))))
    pages = memory.open()
    assert cache.find(pages, "", list(range(4)), [BOUNDARY, 1]).length == 4
    for plane in (BOUNDARY, 1):
        memory.place(pages, plane, 1, memory.pool(plane).take())
    cache.publish(pages, "", list(range(8)), [BOUNDARY, 1])
    free = memory.core.free
    assert cache.shrink(2, 1)
    assert memory.core.free == free + 1
    memory.close(pages)
    assert memory.core.free == memory.core.pages
