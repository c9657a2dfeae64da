"""Presets: a few dials make a whole run that trains, and every choice has its reason."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import loopwise
from loopwise.configuration import from_dict, to_dict
from loopwise.errors import ConfigError, NotFoundError
from loopwise.train.config import TrainConfig
from loopwise.train.presets import PRESETS, CalibrateDials, PointerDials, TextDials, find_preset
from loopwise.train.run import train

TINY: dict[str, Any] = {
    "ouro-tiny": TextDials(steps=20, width=32, layers=1, loops=2, rows=2, context=16, tokenizer="bytes"),
    "huginn-tiny": TextDials(steps=20, width=32, layers=1, loops=2, rows=2, context=16, tokenizer="bytes"),
    "pointer-chasing": PointerDials(steps=20, width=32, loops=2, nodes=4, rows=2),
}
FAMILIES = {"ouro-tiny": "ouro", "huginn-tiny": "huginn_raven", "pointer-chasing": "loopwise"}


def small(config: TrainConfig, folder: Path, corpus: Path) -> TrainConfig:
    text = {"corpus": str(corpus)} if config.task == "text" else {}
    return dataclasses.replace(config, run=str(folder), validation_rows=2, log_every=1, **text)


@pytest.mark.parametrize("name", TINY)
def test_a_preset_trains_saves_its_family_and_learns(
    name: str, tmp_path: Path, corpus: Path, quick_machine: None, watch: Any
) -> None:
    recipe = find_preset(name).build(TINY[name])
    assert recipe.config.steps == 20
    assert recipe.config.run == f"runs/{name}"
    seen = watch()
    train(small(recipe.config, tmp_path / "run", corpus), progress=seen)
    assert sum(seen.statuses[-1].losses) / len(seen.statuses[-1].losses) < sum(seen.statuses[0].losses) / len(
        seen.statuses[0].losses
    )
    model = loopwise.load(tmp_path / "run")
    assert model.origin is not None
    assert model.origin.family == FAMILIES[name]
    assert model.config.trained_loops[1] >= 2
    assert all(choice.reason for choice in recipe.choices)


def test_a_recipe_survives_json_as_it_is() -> None:
    for name, dials in TINY.items():
        config = find_preset(name).build(dials).config
        assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_calibration_takes_the_loops_of_the_model(
    tmp_path: Path, corpus: Path, quick_machine: None, watch: Any
) -> None:
    first = small(find_preset("ouro-tiny").build(TINY["ouro-tiny"]).config, tmp_path / "first", corpus)
    train(first, progress=watch())
    dials = CalibrateDials(init=first.run, corpus=str(corpus), steps=3, rows=2, context=16)
    recipe = find_preset("calibrate").build(dials)
    assert recipe.config.stages[0].objective == "calibrate:loops=2,rule=best-later"
    asked = find_preset("calibrate").build(dataclasses.replace(dials, loops=3, rule="unclamped"))
    assert asked.config.stages[0].objective == "calibrate:loops=3,rule=unclamped"
    result = train(small(recipe.config, tmp_path / "second", corpus), progress=watch())
    before = dict(loopwise.load(first.run).named_parameters())
    moved = [name for name, value in result.model.named_parameters() if not bool((value == before[name]).all())]
    assert moved == ["gate.weight", "gate.bias"]
    with pytest.raises(NotFoundError, match="no such folder"):
        find_preset("calibrate").build(CalibrateDials(init=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("name", ["ouro-tiny", "pointer-chasing"])
def test_one_loop_has_no_gate_to_calibrate_and_all_steps_go_to_the_model(name: str) -> None:
    config = find_preset(name).build(dataclasses.replace(TINY[name], loops=1)).config
    assert [stage.steps for stage in config.stages] == [20]


@pytest.mark.parametrize(
    ("kind", "dials", "said"),
    [
        (TextDials, {"loops": 0}, "loops=0; allowed is 1 or more"),
        (TextDials, {"steps": 19}, "steps=19; allowed is 20 or more"),
        (TextDials, {"width": 48}, "width=48; allowed are multiples of 32"),
        (PointerDials, {"width": 8}, "width=8; allowed are multiples of 16 from 32"),
        (PointerDials, {"loops": 0}, "loops=0; allowed is 1 or more"),
        (PointerDials, {"loops": 8, "nodes": 8}, "loops=8 with nodes=8; allowed are 1 to 7 loops"),
    ],
)
def test_dials_out_of_range_are_refused(kind: Any, dials: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        kind(**dials)


def test_an_unknown_preset_lists_the_right_ones() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'ouro_tiny'; did you mean ouro-tiny; allowed: ouro-tiny, "):
        find_preset("ouro_tiny")
    assert list(PRESETS) == ["ouro-tiny", "huginn-tiny", "pointer-chasing", "calibrate"]


def test_the_page_on_training_lists_the_dials() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(" `"): cells[4] for line in page.splitlines() if len(cells := line.split("|")) == 6}
    for name, preset in PRESETS.items():
        listed = rows["ouro-tiny" if rows[name].strip() == "the same" else name]
        assert [word.strip("`") for word in listed.split()] == [
            field.name for field in dataclasses.fields(preset.dials)
        ]
