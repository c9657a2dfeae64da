"""The knob: effort through the ladder, the loop object before it, and nothing beyond the trained range unasked."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

import loopwise
from loopwise.engine.ladder import EFFORTS, Ladder, Rung, write_ladder
from loopwise.errors import ConfigError
from loopwise.models.looped_lm import LoopedLM
from loopwise.serve.effort import Efforts
from loopwise.serve.errors import ApiError
from loopwise.serve.schema import LoopOptions
from loopwise.serve.settings import ServeConfig

from .conftest import Live

RUNGS = (
    Rung(effort="none", max_loops=1, mean_loops=1.0),
    Rung(effort="minimal", max_loops=2, exit="hazard:0.2", mean_loops=1.2),
    Rung(effort="low", max_loops=2, mean_loops=2.0),
    Rung(effort="medium", max_loops=4, exit="hazard:0.4", mean_loops=2.5),
    Rung(effort="high", max_loops=4, exit="hazard:0.4", mean_loops=2.5),
    Rung(effort="xhigh", max_loops=4, exit="hazard:0.9", mean_loops=3.5),
    Rung(effort="max", max_loops=4, mean_loops=4.0),
)


def ask(client: openai.OpenAI, **options: Any) -> dict[str, Any]:
    """The loop part of the usage, and the receipt."""
    got = client.completions.create(model="talker", prompt="Once", max_tokens=10, seed=1, **options)
    return {"usage": (got.usage.model_extra or {})["loop"], "receipt": (got.model_extra or {})["loop"]}  # type: ignore[union-attr]


def efforts(model: LoopedLM, planes: int = 6, **settings: Any) -> Efforts:
    return Efforts(model, ServeConfig(**settings), planes=planes)


class TestOverHttp:
    @pytest.mark.parametrize("effort", EFFORTS)
    def test_each_effort_runs_the_loops_of_its_rung(self, live: Live, client: openai.OpenAI, effort: str) -> None:
        rung = live.service.efforts.ladder.rung(effort)
        got = ask(client, extra_body={"reasoning_effort": effort})
        assert got["usage"]["mean"] == got["usage"]["max"] == rung.max_loops
        assert got["receipt"]["effort"] == effort
        assert got["receipt"]["max"] == rung.max_loops

    def test_chat_has_the_same_knob(self, client: openai.OpenAI) -> None:
        got = client.chat.completions.create(
            model="talker", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, reasoning_effort="none"
        )
        assert (got.usage.model_extra or {})["loop"]["max"] == 1  # type: ignore[union-attr]

    def test_the_loop_object_goes_first(self, client: openai.OpenAI) -> None:
        got = ask(client, extra_body={"reasoning_effort": "none", "loop": {"max": 3, "min": 2, "rule": "hazard:0.1"}})
        assert got["receipt"] | {"seed": 1} == got["receipt"]
        assert (got["receipt"]["max"], got["receipt"]["min"], got["receipt"]["rule"]) == (3, 2, "hazard:0.1")
        assert got["usage"]["max"] == 3  # the prompt's own row
        assert 2 <= got["usage"]["mean"] < 2.5

    def test_beyond_the_trained_range_only_when_asked_for(self, live: Live, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="beyond_trained") as error:
            ask(client, extra_body={"loop": {"max": 6}})
        assert error.value.param == "loop.max"
        assert ask(client, extra_body={"loop": {"max": 6, "beyond_trained": True}})["usage"]["max"] == 6
        with pytest.raises(openai.BadRequestError, match="this server allows at most 6"):
            ask(client, extra_body={"loop": {"max": 7, "beyond_trained": True}})
        live.settle()

    @pytest.mark.parametrize(
        ("loop", "param"),
        [
            ({"max": 2, "min": 3}, "loop.min"),
            ({"max": 0}, "loop.max"),
            ({"rule": "sometimes"}, None),
            ({"rule": "certainty:0.5:x"}, None),
            ({"start": 3}, None),
            ({"depth": 3}, "loop.depth"),
            ({"drafts": True}, "loop.drafts"),
        ],
    )
    def test_what_cannot_be_is_refused(self, client: openai.OpenAI, loop: dict[str, Any], param: str | None) -> None:
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, extra_body={"loop": loop})
        assert error.value.param == param

    def test_the_ladder_is_shown(self, live: Live, client: openai.OpenAI) -> None:
        shown: Any = client.models.retrieve("talker").model_extra
        assert client.models.list().data[0].model_extra == shown
        assert shown["loop"]["ladder"] == live.service.efforts.ladder.facts()
        assert shown["loop"]["ladder"]["measured"] is False
        assert shown["loop"]["ladder"]["rungs"][1]["same_as"] == "none"
        assert (shown["loop"]["trained"], shown["loop"]["allowed"]) == ([1, 4], 6)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other/model")

    def test_a_measured_ladder_is_the_checkpoints_own(
        self,
        model: LoopedLM,
        tmp_path: Path,
        serve: Callable[..., contextlib.AbstractContextManager[Live]],
    ) -> None:
        loopwise.save(model, tmp_path, family="loopwise")
        write_ladder(model, Ladder(rungs=RUNGS, measured=True), tmp_path)
        with serve(loopwise.load(tmp_path), exit="hazard:0.1", loops=3) as live, live.client() as client:
            shown: Any = client.models.retrieve("talker").model_extra
            assert shown["loop"]["ladder"]["measured"] is True
            assert shown["loop"]["ladder"]["rungs"][4]["same_as"] == "medium"
            assert shown["loop"]["default"] == {"max": 3, "rule": "hazard:0.1"}
            assert ask(client, extra_body={"reasoning_effort": "medium"})["receipt"]["rule"] == "hazard:0.4"
            assert ask(client, extra_body={"reasoning_effort": "max"})["usage"]["mean"] == 4
            # Nothing said: the server's own defaults.
            assert ask(client)["receipt"] | {"max": 3, "rule": "hazard:0.1", "effort": None} == ask(client)["receipt"]


class TestPrecedence:
    def test_field_by_field(self, model: LoopedLM) -> None:
        known = efforts(model, exit="hazard:0.5", loops=3)
        assert known.resolve(None, None).rule == "hazard:0.5"
        assert known.resolve("max", None).rule is None  # an effort replaces the server's rule and number
        assert known.resolve("max", None).max_loops == 4
        mixed = known.resolve("none", LoopOptions(max=2))
        assert (mixed.max_loops, mixed.rule) == (2, None)
        mixed = known.resolve(None, LoopOptions(rule="off"))
        assert (mixed.max_loops, mixed.rule) == (3, None)

    def test_planes_that_were_not_made(self, model: LoopedLM) -> None:
        small = efforts(model, planes=2)
        assert small.default_loops == 2
        with pytest.raises(ApiError, match="effort max asks for 4 loops and this server allows 2"):
            small.resolve("max", None)
        with pytest.raises(ConfigError, match="max_loops=2 allows no more"):
            efforts(model, planes=2, loops=3)

    def test_a_servers_default_stays_within_the_trained_range(self, model: LoopedLM) -> None:
        with pytest.raises(ConfigError, match="trained with at most 4"):
            efforts(model, loops=5)
