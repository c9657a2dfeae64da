"""The ladder of effort: the default one, what is refused, and the way through a checkpoint's files."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loopwise.engine.ladder import EFFORTS, Ladder, Rung, default_ladder, parse_ladder, read_ladder, write_ladder
from loopwise.errors import CheckpointError, ConfigError, StorageError
from loopwise.hub.family import Origin
from loopwise.models.looped_lm import LoopedLM

tiny = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]


def in_folder(folder: Path, **changes: object) -> LoopedLM:
    model: LoopedLM = tiny("ouro", trained_loops=(1, 4), **changes)
    model.origin = Origin(family="ouro", folder=folder)
    return model


def measured() -> Ladder:
    means = (1.0, 1.4, 1.8, 2.2, 2.8, 3.5, 4.0)
    exits = (None, "hazard:0.3", "hazard:0.4", "hazard:0.5", "hazard:0.6", "hazard:0.8", None)
    loops = (1, 4, 4, 4, 4, 4, 4)
    return Ladder(
        measured=True,
        rungs=tuple(
            Rung(effort=effort, max_loops=most, exit=rule, mean_loops=mean, loss=3.0 - mean / 10)
            for effort, most, rule, mean in zip(EFFORTS, loops, exits, means, strict=True)
        ),
    )


@pytest.mark.parametrize(
    ("trained", "loops"),
    [
        ((1, 4), [1, 1, 2, 2, 3, 3, 4]),
        ((1, 64), [1, 2, 4, 8, 16, 32, 64]),
        ((3, 3), [3] * 7),
        ((2, 5), [2, 2, 3, 3, 4, 4, 5]),
    ],
)
def test_the_default_rises_in_equal_ratios_within_the_trained_range(trained: tuple[int, int], loops: list[int]) -> None:
    ladder = default_ladder(trained)
    assert [rung.max_loops for rung in ladder.rungs] == loops
    assert not ladder.measured
    assert all(rung.exit is None and rung.loss is None for rung in ladder.rungs)


def test_rungs_that_coincide_are_named() -> None:
    ladder = default_ladder((1, 4))
    assert [ladder.same_as(effort) for effort in EFFORTS] == [None, "none", None, "low", None, "high", None]
    told = {rung["effort"]: rung for rung in ladder.facts()["rungs"]}
    assert told["minimal"] == {"effort": "minimal", "max_loops": 1, "exit": None, "same_as": "none"}
    assert "same_as" not in told["low"]


def test_a_ladder_comes_back_from_its_facts_and_from_its_file(tmp_path: Path) -> None:
    ladder = measured()
    assert parse_ladder(json.loads(json.dumps(ladder.facts()))) == ladder
    whole = ladder.facts()
    whole["rungs"][0]["loss"] = 3
    assert parse_ladder(whole).rung("none").loss == 3.0
    model = in_folder(tmp_path)
    assert read_ladder(model) == default_ladder((1, 4))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    path = write_ladder(model, ladder)
    assert read_ladder(model) == ladder
    assert json.loads(path.read_text())["eos_token_id"] == 7
    assert [file.name for file in tmp_path.iterdir()] == ["generation_config.json"]
    elsewhere = tmp_path / "copy"
    elsewhere.mkdir()
    assert write_ladder(model, ladder, elsewhere).parent == elsewhere


def test_rules_are_kept_in_their_canonical_text() -> None:
    assert Rung(effort="low", max_loops=2, exit="delta").exit == "delta:0.03"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"effort": "lots"}, "none, minimal, low"),
        ({"max_loops": 0}, "1 or more"),
        ({"exit": "hazrd:0.5"}, "hazard"),
        ({"loss": float("nan")}, "loss"),
        ({"loss": -0.5}, "loss"),
        ({"mean_loops": 4.5}, "max_loops=4"),
        ({"mean_loops": 0.5}, "max_loops=4"),
    ],
)
def test_a_rung_that_means_nothing_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Rung(**({"effort": "low", "max_loops": 4} | change))


def broken() -> dict[str, Any]:
    facts = measured().facts()
    copies = (json.loads(json.dumps(facts)) for _ in range(9))
    short, beyond, unknown, fewer, other, text, boolean, words, figure = copies
    short["rungs"].pop()
    beyond["rungs"][-1]["max_loops"] = 5
    unknown["rungs"][0]["temperature"] = 1
    fewer["rungs"][3]["mean_loops"] = 1.1
    other["rungs"][2]["exit"] = "halt:0"
    text["rungs"][2]["exit"] = 0.5
    boolean["rungs"][0]["max_loops"] = True
    words["rungs"][0]["max_loops"] = "3"
    figure["rungs"][0]["loss"] = "small"
    return {
        "max_loops=True": boolean,
        "max_loops='3'": words,
        "loss='small'": figure,
        "in this order": short,
        "trained with at most 4": beyond,
        "temperature": unknown,
        "medium runs fewer loops than low": fewer,
        "halt_logit": other,
        "text of an exit rule": text,
        '"measured"': {"rungs": facts["rungs"]},
        '"rungs"': {"measured": True, "rungs": "low"},
        "lacks 'max_loops'": {"measured": True, "rungs": [{"effort": "none"}]},
    }


@pytest.mark.parametrize("says", list(broken()))
def test_a_broken_ladder_in_a_checkpoint_is_one_clear_line(says: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"loop_ladder": broken()[says]}))
    with pytest.raises(CheckpointError, match=says) as caught:
        read_ladder(in_folder(tmp_path))
    assert "\n" not in str(caught.value)
    assert "loopwise study ladder" in str(caught.value)


def test_what_the_model_cannot_serve_is_not_written(tmp_path: Path) -> None:
    model = in_folder(tmp_path, gate=False)
    with pytest.raises(ConfigError, match="delta"):
        write_ladder(model, measured())
    assert list(tmp_path.iterdir()) == []
    model.origin = None
    with pytest.raises(StorageError, match="no folder"):
        write_ladder(model, default_ladder((1, 4)))
    with pytest.raises(StorageError, match="cannot be written"):
        write_ladder(model, default_ladder((1, 4)), tmp_path / "missing")


def test_an_unknown_effort_lists_the_names() -> None:
    with pytest.raises(ConfigError, match="xhigh, max"):
        default_ladder((1, 4)).rung("huge")
    with pytest.raises(ConfigError, match="in this order"):
        replace(measured(), rungs=measured().rungs[::-1])
