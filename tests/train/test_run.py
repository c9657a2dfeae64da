"""A run as a whole: it goes on where it was, to the same bits; it survives bad numbers; it says what goes wrong."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loopwise
from loopwise.configuration import to_dict
from loopwise.train import checkpoint, run
from loopwise.train.config import TrainConfig
from loopwise.train.ema import EmaConfig
from loopwise.train.guards import GuardConfig
from loopwise.train.metrics import read_metrics
from loopwise.train.run import train

Make = Callable[..., TrainConfig]
RECIPES = ("two stages of Ouro", "random depth by Muon", "pointer chasing")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_dies_again_and_again_ends_in_the_same_bits(
    recipe: str, tiny_run: Make, watch: Any, metrics_of: Any, assert_same_run: Any
) -> None:
    undisturbed, broken = tiny_run(recipe, "undisturbed"), tiny_run(recipe, "broken")
    train(undisturbed, progress=watch())
    for step in range(1, undisturbed.steps + 1):
        with pytest.raises(watch.killed):
            train(broken, progress=watch(die_at=step))
    train(broken, progress=watch())
    assert_same_run(broken.run, undisturbed.run)
    assert len(metrics_of(broken.run)) > undisturbed.steps


def test_what_was_averaged_is_what_the_gate_learns_beside(tiny_run: Make, watch: Any) -> None:
    config = tiny_run(checkpoint_every=1, keep_checkpoints=100, ema=EmaConfig(decay=0.7))
    result = train(config, progress=watch())
    before = checkpoint.load(Path(config.run) / "checkpoints" / "step-00000007").tensors
    after = checkpoint.load(Path(config.run) / "checkpoints" / "step-00000008").tensors
    frozen = [name for name, _ in result.model.named_parameters() if not name.startswith("gate.")]
    for name in frozen:
        assert torch.equal(after[f"model/{name}"], before[f"ema/{name}"])
        assert torch.equal(result.model.get_parameter(name), before[f"ema/{name}"])
        assert not torch.equal(before[f"model/{name}"], before[f"ema/{name}"])
    assert not torch.equal(after["model/gate.weight"], before["ema/gate.weight"])


def test_the_averaged_weights_are_validated_and_saved(tiny_run: Make, watch: Any) -> None:
    config = tiny_run("random depth by Muon", ema=EmaConfig(decay=0.5))
    result = train(config, progress=watch())
    last = checkpoint.newest(Path(config.run) / "checkpoints")
    assert last is not None
    saved = loopwise.load(Path(config.run))
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, last.tensors[f"ema/{name}"])
        assert torch.equal(parameter, result.model.get_parameter(name))
    assert any(
        not torch.equal(last.tensors[f"ema/{name}"], last.tensors[f"model/{name}"])
        for name, _ in saved.named_parameters()
    )


def test_a_finished_run_typed_again_changes_nothing(tiny_run: Make, watch: Any, state_of: Any) -> None:
    config = tiny_run()
    first = train(config, progress=watch())
    kept = state_of(config.run)
    again = train(config, progress=watch())
    assert state_of(config.run) == kept
    assert again.validation == first.validation


def test_another_seed_is_another_run(tiny_run: Make, watch: Any, metrics_of: Any) -> None:
    for seed in (0, 1):
        train(tiny_run("random depth by Muon", f"seed {seed}", seed=seed), progress=watch())
    first, second = (tiny_run("random depth by Muon", f"seed {seed}").run for seed in (0, 1))
    assert metrics_of(first)[0] != metrics_of(second)[0]


def test_ctrl_c_waits_for_the_step_and_loses_nothing(tiny_run: Make, watch: Any, metrics_of: Any) -> None:
    undisturbed, stopped = tiny_run(folder="undisturbed"), tiny_run(folder="stopped")
    train(undisturbed, progress=watch())
    handler = signal.getsignal(signal.SIGINT)

    def press(step: int) -> None:
        if step in (3, 7):
            os.kill(os.getpid(), signal.SIGINT)

    for step in (3, 7):
        seen = watch(at_step=press)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, progress=seen)
        assert checkpoint.steps(Path(stopped.run) / "checkpoints")[-1] == step
        assert seen.notes[-1] == f"stopped at step {step}; type the same command again to go on"
        assert signal.getsignal(signal.SIGINT) is handler
    train(stopped, progress=watch())
    assert metrics_of(stopped.run) == metrics_of(undisturbed.run)
    last = "checkpoints/step-00000010/state.safetensors"
    assert (Path(stopped.run) / last).read_bytes() == (Path(undisturbed.run) / last).read_bytes()


def test_a_second_ctrl_c_stops_at_once(tiny_run: Make, watch: Any) -> None:
    config = tiny_run()

    def press_twice(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, progress=watch(at_step=press_twice))
    assert checkpoint.steps(Path(config.run) / "checkpoints") == [2]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps (counted from 1) whose loss is multiplied by NaN; each has one micro-batch."""
    steps: set[int] = set()
    calls = iter(range(1, 10**6))
    honest = run.micro_batch_loss

    def loss(*arguments: Any, **settings: Any) -> Any:
        result = honest(*arguments, **settings)
        factor = float("nan") if next(calls) in steps else 1.0
        return replace(result, loss=replace(result.loss, total=result.loss.total * factor))

    monkeypatch.setattr(run, "micro_batch_loss", loss)
    return steps


def test_a_step_without_finite_gradients_changes_no_weight_and_the_run_goes_on(
    tiny_run: Make, watch: Any, poisoned: set[int], metrics_of: Any
) -> None:
    poisoned.update({3, 6})
    stages = tuple(replace(stage, micro_batches=1, steps=4) for stage in tiny_run().stages[:2])
    config = tiny_run(stages=stages, checkpoint_every=1, keep_checkpoints=100)
    seen = watch()
    train(config, progress=seen)
    folder = Path(config.run) / "checkpoints"
    states = {step: checkpoint.load(folder / f"step-{step:08d}").tensors for step in range(1, 9)}
    for step in range(2, 9):
        same = all(torch.equal(states[step][name], states[step - 1][name]) for name in states[step - 1])
        assert same == (step in poisoned)
    lines = {line["step"]: line for line in metrics_of(config.run) if "skipped" in line}
    assert [lines[step]["skipped"] for step in range(1, 9)] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert lines[3]["gradient_norm"] != lines[3]["gradient_norm"]
    assert seen.statuses[-1].skipped == 2
    warnings = [line for line in metrics_of(config.run) if line.get("warning") == "skipped"]
    assert [line["step"] for line in warnings] == [3]
    assert "smaller learning_rate" in warnings[0]["message"]


def test_skipped_steps_are_counted_across_a_kill(
    tiny_run: Make, watch: Any, poisoned: set[int], metrics_of: Any
) -> None:
    poisoned.add(1)
    stages = tuple(replace(stage, micro_batches=1) for stage in tiny_run().stages)
    config = tiny_run(stages=stages)
    with pytest.raises(watch.killed):
        train(config, progress=watch(die_at=5))
    train(config, progress=watch())
    assert [line["skipped"] for line in metrics_of(config.run) if "skipped" in line] == [1] * 10


def planted(tiny_run: Make, watch: Any, change: Callable[[Any], None], recipe: str) -> TrainConfig:
    """A run that begins from a model in which `change` has planted a failure, and barely moves."""
    source = tiny_run(recipe, "source")
    stages = tuple(replace(stage, steps=1) for stage in source.stages[:1])
    result = train(replace(source, stages=stages, ema=None), progress=watch())
    with torch.no_grad():
        change(result.model)
    loopwise.save(result.model, Path(source.run) / "model")
    still = replace(stages[0], steps=8, learning_rate=1e-12, micro_batches=1)
    return tiny_run(
        recipe,
        model=None,
        family=None,
        tokenizer=None,
        init=source.run,
        stages=(still,),
        validate_every=1,
        guards=GuardConfig(after=2, cooldown=4),
    )


def collapse_gate(model: Any) -> None:
    model.gate.weight.zero_()
    model.gate.bias.fill_(1.0)


def ignore_loops(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith("core.") and name.endswith(("out.weight", "down.weight")):
            parameter.zero_()


def same_tokens(model: Any) -> None:
    model.embed.weight.fill_(1.0)


@pytest.mark.parametrize(
    ("change", "name", "cure"),
    [
        (collapse_gate, "first_exit", "uniform exit weights"),
        (ignore_loops, "loop_gain", "the model ignores its loops; use"),
        (same_tokens, "correlation", "use norm=pre_post with injection=adapter"),
    ],
)
def test_guards_see_planted_failures_and_name_the_cure_once_per_cooldown(
    change: Callable[[Any], None], name: str, cure: str, tiny_run: Make, watch: Any, metrics_of: Any
) -> None:
    config = planted(tiny_run, watch, change, "two stages of Ouro")
    seen = watch(die_at=5)
    with pytest.raises(watch.killed):
        train(config, progress=seen)
    train(config, progress=watch())
    spoken = [line for line in metrics_of(config.run) if line.get("warning") == name]
    assert [line["step"] for line in spoken] == [2, 6]
    assert cure in spoken[0]["message"]
    assert f"warning: {spoken[0]['message']}" in seen.notes


def test_a_healthy_model_is_left_in_peace(tiny_run: Make, watch: Any, metrics_of: Any) -> None:
    config = planted(tiny_run, watch, lambda model: None, "two stages of Ouro")
    train(config, progress=watch())
    assert {line["warning"] for line in metrics_of(config.run) if "warning" in line} <= {"loop_gain"}


def test_stage_two_alone_moves_the_gate_of_an_ouro_and_nothing_else(tiny_run: Make, watch: Any, ouro: Path) -> None:
    stage = replace(tiny_run().stages[-1], objective="calibrate:loops=4", steps=3)
    config = tiny_run(model=None, family=None, tokenizer=None, ema=None, init=str(ouro), stages=(stage,))
    train(config, progress=watch())
    model = Path(config.run) / "model"
    before, after = load_file(ouro / "model.safetensors"), load_file(model / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.early_exit_gate.bias", "model.early_exit_gate.weight"]
    assert json.loads((model / "config.json").read_text()) == json.loads((ouro / "config.json").read_text())
    assert (model / "tokenizer.json").read_bytes() == (ouro / "tokenizer.json").read_bytes()


@pytest.fixture
def ouro(tmp_path: Path) -> Path:
    """The golden checkpoint with a tokenizer beside it and a key in its config that nobody knows."""
    folder = tmp_path / "golden"
    model = loopwise.load(Path(__file__).parents[1] / "golden" / "ouro-tiny")
    model.tokenizer = loopwise.Tokenizer.bytes()
    loopwise.save(model, folder)
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(held | {"somebody_elses_key": [1, {"a": None}]}))
    return folder


def test_new_depths_are_stated_in_the_saved_model(tiny_run: Make, watch: Any) -> None:
    stages = (replace(tiny_run().stages[0], objective="last:loops=5", steps=1),)
    config = tiny_run(stages=stages, ema=None, validation_loops=(5,))
    train(config, progress=watch())
    assert loopwise.load(config.run).facts.trained_loops == (1, 5)
    assert not loopwise.load(config.run).facts.anytime
    stages = (replace(stages[0], objective="every:loops=6"),)
    longer = replace(config, model=None, family=None, tokenizer=None, init=config.run, stages=stages)
    train(replace(longer, run=f"{config.run}-longer", validation_loops=()), progress=watch())
    assert loopwise.load(f"{config.run}-longer").facts.trained_loops == (1, 6)
    assert loopwise.load(f"{config.run}-longer").facts.anytime


def test_bfloat16_trains_and_keeps_wide_gates_and_weights(
    tiny_run: Make, watch: Any, monkeypatch: pytest.MonkeyPatch, metrics_of: Any
) -> None:
    seen: list[torch.dtype] = []
    honest = run.micro_batch_loss

    def spy(*arguments: Any, **settings: Any) -> Any:
        result = honest(*arguments, **settings)
        seen.extend([result.inputs.hazards.dtype, result.loss.losses.dtype])
        return result

    monkeypatch.setattr(run, "micro_batch_loss", spy)
    wide, narrow = tiny_run(folder="wide"), tiny_run(folder="narrow", dtype="bfloat16")
    train(wide, progress=watch())
    result = train(narrow, progress=watch())
    assert set(seen) == {torch.float32}
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    first, other = metrics_of(wide.run)[0], metrics_of(narrow.run)[0]
    assert first["loss_total"] != other["loss_total"]
    assert first["loss_total"] == pytest.approx(other["loss_total"], rel=1e-2)


def test_curves_go_to_tensorboard(tiny_run: Make, watch: Any, metrics_of: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_run(trackers=("tensorboard",))
    train(config, progress=watch())
    events = EventAccumulator(str(Path(config.run) / "tensorboard"))
    events.Reload()
    lines = [line for line in metrics_of(config.run) if "loss_loop_2" in line]
    drawn = {event.step: event.value for event in events.Scalars("loss_loop_2")}
    assert drawn == pytest.approx({line["step"]: line["loss_loop_2"] for line in lines}, rel=1e-6)
    assert "timing/tokens_per_second" in events.Tags()["scalars"]


def test_the_progress_line_says_how_the_run_does(tiny_run: Make, watch: Any) -> None:
    config = tiny_run()
    seen = watch()
    train(config, progress=seen)
    assert [status.step for status in seen.statuses] == list(range(1, 11))
    assert [status.stage for status in seen.statuses] == ["I"] * 4 + ["Ib"] * 3 + ["II"] * 3
    assert [status.loops for status in seen.statuses][3:5] == [[1, 2], [1, 2, 3]]
    lines = {line["step"]: line for line in read_metrics(Path(config.run) / "metrics.jsonl") if "timing" in line}
    for status in seen.statuses:
        line = lines[status.step]
        assert list(status.losses) == [line[f"loss_loop_{loop}"] for loop in status.loops or ()]
        assert status.mean_exit == line["exit_loop"]
        assert status.tokens_per_second == line["timing"]["tokens_per_second"] > 0
        assert status.peak_share == line["timing"]["peak_share"] > 0
        assert status.learning_rate == line["learning_rate"]


def test_with_random_depth_each_loss_is_shown_with_its_loops(tiny_run: Make, watch: Any, metrics_of: Any) -> None:
    config = tiny_run("random depth by Muon")
    seen = watch()
    train(config, progress=seen)
    lines = {line["step"]: line for line in metrics_of(config.run) if "learning_rate" in line}
    objective = config.stages[0].learns()
    for status in seen.statuses[:4]:
        drawn = [objective.plan(seed=0, step=status.step - 1, micro=micro).loops for micro in range(2)]
        assert status.loops == sorted(set(drawn))
        assert lines[status.step]["loops"] == pytest.approx(sum(drawn) / 2, abs=0.5)
    assert any(len(status.loops or ()) == 2 for status in seen.statuses)


def test_a_run_that_was_moved_goes_on(tiny_run: Make, watch: Any, assert_same_run: Any) -> None:
    config = tiny_run()
    with pytest.raises(watch.killed):
        train(config, progress=watch(die_at=5))
    moved = replace(config, run=f"{config.run}-elsewhere")
    Path(config.run).rename(moved.run)
    seen = watch()
    train(moved, progress=seen)
    assert seen.notes[0] == f"resuming {moved.run} at step 4 of 10"
    train(config, progress=watch())
    assert_same_run(moved.run, config.run)


def test_the_folder_says_what_ran_and_on_what(tiny_run: Make, watch: Any) -> None:
    config = tiny_run()
    train(config, progress=watch())
    held = json.loads((Path(config.run) / "config.json").read_text())
    assert held == to_dict(config)
    assert json.loads((Path(config.run) / "environment.json").read_text())["packages"]["torch"] == torch.__version__


def test_memory_is_kept_on_a_cpu(tiny_run: Make, watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(run, "keep_freed_memory", lambda: asked.append(True))
    train(tiny_run(), progress=watch())
    assert asked == [True]


FAULTS = """
import resource
import torch
from loopwise.train.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(64 * 2**18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
print(keep_freed_memory(), returned, (faults(), faults())[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory when asked")
def test_kept_memory_is_used_again_without_a_page_fault() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    made, returned, kept = done.stdout.split()
    assert made == "True"
    assert int(kept) < int(returned) / 100


def test_the_page_on_training_names_every_figure(tiny_run: Make, watch: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+(?:_R)?)`", page))
    for recipe in RECIPES:
        config = tiny_run(recipe, recipe, guards=GuardConfig(after=0, loop_gain=9.0))
        train(config, progress=watch())
        for line in read_metrics(Path(config.run) / "metrics.jsonl"):
            keys = {re.sub(r"_\d+$", "_R", key) for key in [*line, *line.get("timing", ())]}
            assert keys <= named | {"step"}
    assert {name for name in vars(GuardConfig()) if name not in ("after", "cooldown")} <= named
