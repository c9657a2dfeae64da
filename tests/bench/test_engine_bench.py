"""The benchmark's arithmetic and its plumbing, on tiny models; no test looks at a clock."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

import loopwise
from loopwise.bench.drafts import keep_drafts, tune_drafts
from loopwise.bench.engine import (
    BenchConfig,
    Load,
    asking,
    crowd,
    depth_batching,
    load_flops,
    one_request,
    ratios,
    take_turns,
)
from loopwise.cli.bench import render
from loopwise.engine.engine import Engine
from loopwise.engine.speculation import saved_speculation
from loopwise.errors import ConfigError, StorageError
from loopwise.models.looped_lm import LoopedLM

TESTS = Path(__file__).parents[1]
tiny: Callable[..., LoopedLM] = runpy.run_path(str(TESTS / "models" / "naive_lm.py"))["tiny"]
LOAD = Load(requests=5, seats=2, prompt=3, tokens=4, rounds=1)


def test_depths_are_the_same_in_every_run_and_have_half_the_loops_on_average() -> None:
    load = Load(requests=200, tokens=20)
    depths = load.depths(8)
    assert depths == load.depths(8)
    assert all(loops[0] == 8 and len(loops) == 20 for loops in depths)
    rest = [loops for answer in depths for loops in answer[1:]]
    assert set(rest) == set(range(1, 8))
    assert sum(rest) / len(rest) == pytest.approx(4, abs=0.1)


def test_the_work_of_a_load_is_counted_row_by_row() -> None:
    model = tiny("llama")
    config = model.config
    block = config.width * (2 * (config.heads + config.kv_heads) * config.head_width + 3 * config.mlp_width)
    loop, head = 2 * config.core_layers * block, 2 * config.vocab_size * config.width
    work = 0.0
    for _ in range(LOAD.requests):
        work += LOAD.prompt * config.loops * loop + head
        # The last token of an answer is emitted, not run.
        work += (LOAD.tokens - 1) * (2.5 * loop + head)
    assert load_flops(model, LOAD, 2.5, attention=False) == pytest.approx(work)


def test_sides_take_turns() -> None:
    order: list[str] = []
    found = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert {name: len(results) for name, results in found.items()} == {"a": 2, "b": 2}
    assert ratios([2.0, 6.0, 4.0], [1.0, 1.0, 2.0]) == {"median": 2.0, "least": 2.0, "most": 6.0}


@pytest.mark.parametrize(("shape", "rule"), [("ouro", "hazard:0.5"), ("huginn", "delta:0.8")])
def test_scenarios_run_on_any_model_and_become_a_table(shape: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # It reads gigabytes, which says nothing here.
    monkeypatch.setattr("loopwise.bench.engine.read_bandwidth", lambda: 1e10)
    model = tiny(shape)
    found = {
        "threads": 1,
        "depth": depth_batching(model, LOAD, rule=rule) | {"held_still": True},
        "asking": asking(model, LOAD) | {"held_still": True},
        "one": one_request(model, Load(requests=1, seats=1, prompt=3, tokens=4, rounds=1)) | {"held_still": True},
        "crowd": crowd(model, LOAD) | {"held_still": False},
    }
    replayed = found["depth"]["depths"]
    assert 1 <= replayed["mean_loops"] <= model.config.loops
    assert replayed["bound"] > 1
    assert len(found["one"]["agreement_by_loop"]) == model.config.loops
    assert found["one"]["agreement_by_loop"][-1] == 1.0
    assert found["one"]["core_bytes"] == sum(weight.nbytes for weight in model.core.parameters())
    table = render("tiny", found)
    assert table.row_count >= 6
    assert table.caption == "the machine did not hold still during: crowd"


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"requests": 0}, "requests=0"), ({"temperature": -1.0}, "temperature=-1"), ({"exit": "hazzard:1"}, "hazzard")],
)
def test_a_wrong_setting_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BenchConfig(**settings)  # type: ignore[arg-type]


def test_the_best_drafts_are_kept_beside_the_weights_and_found_again(tmp_path: Path) -> None:
    model = tiny("ouro")
    loopwise.save(model, tmp_path / "model")
    model = loopwise.load(tmp_path / "model")
    found = tune_drafts(model, Load(requests=1, seats=1, prompt=3, tokens=3, rounds=1))
    assert set(found["speedup"]) == {"off", "1", "1:once", "2"}
    assert found["best"] in found["speedup"]
    for best in ("1:once", "off"):
        kept = keep_drafts(model, best)
        assert saved_speculation(tmp_path / "model") == best
        speculator = Engine(loopwise.load(tmp_path / "model"))._core.speculator
        assert best == ("off" if speculator is None else str(speculator.settings))
    # What else stood there stays.
    raw = json.loads(kept.read_text())
    kept.write_text(json.dumps(raw | {"temperature": 0.7}))
    keep_drafts(model, "2")
    assert json.loads(kept.read_text())["temperature"] == 0.7


def test_a_model_without_a_folder_cannot_keep_drafts() -> None:
    with pytest.raises(StorageError, match="save it first"):
        keep_drafts(tiny("ouro"), "1")


def test_a_seat_for_every_request_leaves_no_steady_stretch() -> None:
    found = depth_batching(tiny("ouro"), Load(requests=2, seats=2, prompt=3, tokens=3, rounds=1))
    assert "steady_speedup" not in found["depths"]
    assert found["depths"]["speedup"]["median"] > 0


def test_a_model_of_one_loop_has_no_drafts_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopwise.bench.engine.read_bandwidth", lambda: 1e10)
    model = tiny("ouro", loops=1, trained_loops=(1, 1))
    found = one_request(model, Load(requests=1, seats=1, prompt=3, tokens=3, rounds=1))
    assert "drafts" not in found
    assert "tick_cost" not in found
