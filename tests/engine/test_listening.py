"""An engine with a listener: one call after each tick that brought something, whatever became of it."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from loopwise.engine.listening import ROWS, ListeningEngine, News
from loopwise.engine.sampling import Sampling
from loopwise.models.looped_lm import LoopedLM

tiny: Callable[..., LoopedLM] = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]


@pytest.fixture
def heard() -> list[list[News]]:
    return []


@pytest.fixture
def engine(heard: list[list[News]]) -> ListeningEngine:
    engine = ListeningEngine(tiny(), "last_exited", speculate="off")
    engine.listener = heard.append
    return engine


def test_every_token_is_heard_once_and_in_order(engine: ListeningEngine, heard: list[list[News]]) -> None:
    tickets = [engine.submit([3, 1, 7], Sampling(max_tokens=5)), engine.submit([2, 2], Sampling(max_tokens=3))]
    while engine.tick():
        pass
    assert all(heard)
    for ticket in tickets:
        mine = [news for call in heard for news in call if news.ticket is ticket]
        assert [one.token for news in mine for one in news.emissions] == list(ticket.completion.tokens)
        assert [news.over for news in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].emissions  # the last token and the end come together
    # Both prompts end in the same tick, so their first tokens come in one call.
    assert {id(news.ticket) for news in heard[0]} == {id(ticket) for ticket in tickets}


def test_ticks_are_counted_by_their_rows(engine: ListeningEngine) -> None:
    assert engine.rows_per_second is None
    engine.generate([[3, 1, 7]], Sampling(max_tokens=4))
    counts = engine._core.counts
    assert sum(engine.rows_per_tick) == counts.ticks
    loops = engine.model.config.loops
    assert engine.rows_per_tick[ROWS.index(4)] == loops  # the prompt's ticks hold 3 rows
    assert engine.rows_per_tick[ROWS.index(1)] == counts.ticks - loops
    assert engine.rows_per_second == pytest.approx(counts.rows / engine.busy_seconds)


def test_an_abort_is_heard(engine: ListeningEngine, heard: list[list[News]]) -> None:
    ticket = engine.submit([1, 2], Sampling(max_tokens=50))
    engine.abort(ticket)
    engine.tick()
    assert [(news.ticket, news.over) for call in heard for news in call] == [(ticket, True)]


def test_a_failure_ends_everything_that_is_open(
    engine: ListeningEngine, heard: list[list[News]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tickets = [engine.submit([1, 2], Sampling(max_tokens=50)) for _ in range(2)]

    def fail() -> bool:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(engine._core, "tick", fail)
    with pytest.raises(ZeroDivisionError):
        engine.tick()
    assert [(news.ticket, news.over) for news in heard[-1]] == [(ticket, True) for ticket in tickets]
