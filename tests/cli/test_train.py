"""`loopwise train` as it is typed: presets, files, JSON stages, resuming, and one line for each mistake."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loopwise
from loopwise.cli import main
from loopwise.train import checkpoint, run
from loopwise.train.metrics import read_metrics

STAGE = {"name": "one", "objective": "every:loops=2", "steps": 4, "rows": 2, "context": 12, "learning_rate": 1e-2}
MODEL = {
    "vocab_size": 1,
    "width": 16,
    "heads": 2,
    "kv_heads": 2,
    "head_width": 8,
    "mlp_width": 16,
    "core_layers": 1,
    "loops": 2,
    "trained_loops": [1, 2],
    "max_positions": 32,
    "gate": True,
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "matmul_peak", lambda dtype, device: 1e9)
    monkeypatch.setattr(run, "keep_freed_memory", lambda: True)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: {i * i % 97} and {i * 31 % 89}.\n" for i in range(120)))
    return path


@pytest.fixture
def settings(tmp_path: Path, corpus: Path) -> dict[str, Any]:
    """A whole configuration, as it stands in a file."""
    return {
        "run": str(tmp_path / "run"),
        "corpus": str(corpus),
        "tokenizer": "bytes",
        "model": MODEL,
        "stages": [STAGE],
        "validation_rows": 2,
        "log_every": 1,
        "checkpoint_every": 2,
    }


Type = Callable[..., int]


@pytest.fixture
def typed(tmp_path: Path, settings: dict[str, Any]) -> Type:
    """`typed("seed=1", corpus="x")` runs `loopwise train --config FILE seed=1` with that setting in the file."""

    def type_in(*words: str, **changes: Any) -> int:
        file = tmp_path / "run.json"
        kept = {key: value for key, value in (settings | changes).items() if value is not None}
        file.write_text(json.dumps(kept))
        return main(["train", "--config", str(file), *words])

    return type_in


def losses(folder: str | Path) -> list[dict[str, Any]]:
    return [
        {key: line[key] for key in line if key != "timing"} for line in read_metrics(Path(folder) / "metrics.jsonl")
    ]


def test_a_preset_says_what_it_chose_and_why(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["loops=2", "width=32", "layers=1", "steps=20", "rows=2", "context=16", "tokenizer=bytes"]
    folder = tmp_path / "tiny"
    others = [f"corpus={corpus}", f"run={folder}", "optimizer.name=muon", "validation_rows=2", "ema.decay=0.9"]
    assert main(["train", "--preset", "ouro-tiny", *words, *others]) == 0
    out, err = capsys.readouterr()
    assert f"try it: loopwise generate {folder}" in out
    assert re.search(r"^learning_rate = \S+  \(.+ at width 256, falling with its root\)$", err, re.M)
    assert "mlp_width = 96  (" in err
    assert "settings given beside the dials win over these choices" in err
    assert "stage II · step 20/20 · loss " in err
    held = json.loads((folder / "config.json").read_text())
    assert held["optimizer"]["name"] == "muon"
    assert held["ema"]["decay"] == 0.9
    assert loopwise.load(folder).facts.signal == "hazard"


def test_stages_are_json_on_the_command_line(
    typed: Type, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        STAGE | {"steps": 2, "schedule": {"warmup": 1}},
        STAGE | {"name": "two", "objective": "expected:loops=3", "steps": 3, "context": 16, "micro_batches": 2},
    ]
    assert typed(f"stages={json.dumps(stages)}", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["model"] == f"{settings['run']}/model"
    assert list(said["validation_loss"]) == ["1", "2", "3"]
    lines = [line for line in losses(settings["run"]) if "stage" in line]
    assert [line["stage"] for line in lines] == ["one"] * 2 + ["two"] * 3


def test_resume_goes_on_with_the_run_in_a_folder(
    typed: Type, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed() == 0
    whole = losses(settings["run"])
    honest, calls = run.micro_batch_loss, iter(range(100))

    def break_at_four(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError
        return honest(*arguments, **options)

    monkeypatch.setattr(run, "micro_batch_loss", break_at_four)
    assert typed(run=str(tmp_path / "broken")) == 1
    (tmp_path / "broken").rename(tmp_path / "moved")
    assert main(["train", "--resume", str(tmp_path / "moved")]) == 0
    assert losses(tmp_path / "moved") == whole


def test_a_dry_run_shows_the_configuration_and_does_nothing(
    typed: Type, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("--dry", "seed=7") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["seed"] == 7
    assert shown["stages"][0]["objective"] == "every:loops=2"
    assert not Path(settings["run"]).exists()


def test_ctrl_c_saves_and_exits_with_130(settings: dict[str, Any], tmp_path: Path) -> None:
    """In a process of its own, where the signal arrives as it does from a terminal."""
    file = tmp_path / "run.json"
    file.write_text(json.dumps(settings | {"stages": [STAGE | {"steps": 10**6}], "checkpoint_every": 10**6}))
    script = (
        "import sys; from loopwise.train import run; run.matmul_peak = lambda *a: 1e9; "
        "from loopwise.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "train", "--config", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait() == 130, said
    assert first.startswith("step 1/1,000,000 · loss ")
    (step,) = checkpoint.steps(Path(settings["run"]) / "checkpoints")
    assert f"stopped at step {step:,}; type the same command again to go on" in said
    assert said.endswith("interrupted\n")
    assert "Traceback" not in said


def test_another_run_in_the_folder_is_left_alone(typed: Type, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed() == 0
    capsys.readouterr()
    assert typed("seed=1", "log_every=2") == 2
    error = capsys.readouterr().err
    assert "holds another run (it differs in seed, log_every); give run=OTHER_FOLDER" in error


def test_a_mistake_leaves_the_folder_free_for_the_next_try(typed: Type, tmp_path: Path) -> None:
    assert typed(corpus=str(tmp_path / "nowhere")) == 2
    assert typed() == 0


def test_a_changed_corpus_is_noticed(
    typed: Type, corpus: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(tokenizer="bpe:270") == 0
    kept = {path: path.read_bytes() for path in Path(settings["run"]).rglob("*") if path.is_file()}
    corpus.write_text(corpus.read_text() + "one more line of text, a little longer than the others.\n" * 9)
    capsys.readouterr()
    assert typed(tokenizer="bpe:270") == 2
    assert "the data of" in (said := capsys.readouterr().err)
    assert "has changed since its checkpoint at step 4; restore the corpus" in said
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_corrupt_checkpoint_costs_a_warning_and_the_steps_since_the_one_before(
    typed: Type, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed() == 0
    whole = losses(settings["run"])
    damaged = Path(settings["run"]) / "checkpoints" / "step-00000004" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert typed() == 0
    error = capsys.readouterr().err
    assert "warning: passing over a broken checkpoint" in error
    assert "resuming" in error
    assert "at step 2 of 4" in error
    assert losses(settings["run"]) == whole


def test_when_every_checkpoint_is_broken_nothing_is_overwritten(
    typed: Type, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed() == 0
    whole = losses(settings["run"])
    for damaged in Path(settings["run"]).glob("checkpoints/*/state.safetensors"):
        damaged.write_bytes(b"")
    assert typed() == 2
    assert "is broken; mend one, or remove that folder to train from step 0" in capsys.readouterr().err
    assert losses(settings["run"]) == whole


def test_a_full_disk_while_saving_is_one_line_and_the_older_checkpoint_stays(
    typed: Type, settings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed() == 0
    whole = losses(settings["run"])
    other = str(Path(settings["run"]).with_name("other"))
    honest, room = os.fsync, iter([True])

    def full(descriptor: int) -> None:
        if "state.safetensors" in os.readlink(f"/proc/self/fd/{descriptor}") and not next(room, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell files apart")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert typed(run=other) == 2
    error = capsys.readouterr().err
    assert "No space left on device; earlier checkpoints are intact; free some space" in error.splitlines()[-1]
    assert checkpoint.steps(Path(other) / "checkpoints") == [2]
    assert typed(run=other) == 0
    assert losses(other) == whole


def test_two_processes_do_not_train_in_one_folder(
    typed: Type, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from loopwise.train.folder import locked

    with locked(Path(settings["run"])):
        assert typed() == 2
    assert "another process is training in" in capsys.readouterr().err
    assert typed() == 0


def test_an_unfinished_run_is_no_checkpoint_to_start_from(
    typed: Type,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_model", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        assert typed() == 130
    capsys.readouterr()
    assert typed(model=None, tokenizer=None, init=settings["run"], run=str(tmp_path / "next")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bad_weights_of_a_checkpoint_to_start_from_are_one_line(
    typed: Type, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed() == 0
    weights = Path(settings["run"]) / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    capsys.readouterr()
    assert typed(model=None, tokenizer=None, init=settings["run"], run=str(tmp_path / "next")) == 2
    assert capsys.readouterr().err.startswith("error: ")


def stages(**changes: Any) -> dict[str, Any]:
    return {"stages": [STAGE | changes]}


MISTAKES: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "missing corpus": ([], {"corpus": "nowhere.txt"}, "there is no corpus 'nowhere.txt'; give python, a folder"),
    "empty corpus": ([], {"corpus": "EMPTY"}, "holds no text"),
    "small corpus": (
        [],
        {"corpus": "SMALL"},
        "stage one: the corpus makes 6 tokens, too few for one row of context=12",
    ),
    "unknown setting": (["validate_evry=3"], {}, "unknown key validate_evry; did you mean validate_every"),
    "unknown nested setting": (["optimizer.nme=muon"], {}, "unknown key optimizer.nme; did you mean optimizer.name"),
    "wrong type": (["log_every=often"], {}, "log_every: expected integer"),
    "unknown objective": ([], stages(objective="expcted:loops=2"), "did you mean 'expected'"),
    "unknown objective setting": ([], stages(objective="expected:lops=2"), "did you mean 'loops'"),
    "no loops": ([], stages(objective="every:loops=0"), "loops=0"),
    "no steps": ([], stages(steps=0), "stage one: steps=0; allowed is 1 or more"),
    "schedule too long": ([], stages(schedule={"warmup": 9}), "stage one: schedule.warmup=9"),
    "no gate": (
        ["model.gate=false"],
        stages(objective="expected:loops=2"),
        "needs an exit gate and this model has none",
    ),
    "context too long": ([], stages(context=33), "sequences of 33 tokens, and this model holds 32"),
    "no context": ([], stages(context=None), "stage one: context is missing"),
    "no such checkpoint": ([], {"init": "nowhere/at/all", "model": None, "tokenizer": None}, "no such folder"),
    "neither model nor init": ([], {"model": None}, "give either model=... (a new model) or init=PATH_OR_ID"),
    "init with a tokenizer": ([], {"init": "x", "model": None}, "a model started from init keeps its own tokenizer"),
    "unknown tokenizer": (["tokenizer=words"], {}, "allowed are bpe:SIZE, bytes, or a checkpoint's folder"),
    "tokenizer too small": (["tokenizer=bpe:100"], {}, "vocab_size=100 is too small"),
    "vocabulary too small": (["model.vocab_size=100"], {}, "the model has 100 token ids and the data makes up to 257"),
    "a shape that the family lacks": (["family=huginn_raven"], {}, "family=loopwise"),
    "no such device": (["device=cuda:99"], {}, "device=cuda:99: there is no such device here"),
    "no device at all": (["device=gpu"], {}, "device=gpu: allowed are cpu, cuda, cuda:1, mps"),
    "a rate without effect": (["optimizer.learning_rate=1"], {}, "learning_rate"),
    "a task's setting for text": (["pointer_chasing.nodes=5"], {}, "pointer_chasing has no effect with task=text"),
    "text's setting for a task": (["task=pointer-chasing"], {}, "corpus has no effect with task=pointer-chasing"),
    "unknown tracker": (['trackers=["wandbb"]'], {}, "trackers"),
    "a model key twice": (["seed=1", "seed=2"], {}, "give it once"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_type(
    mistake: str, typed: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").write_text(" \n")
    Path("SMALL").write_text("a b\nc d\n")
    words, changes, said = MISTAKES[mistake]
    assert typed(*words, **changes) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing says what to train; type for example: loopwise train --preset ouro-tiny"),
        (["--preset", "uoro-tiny"], "did you mean ouro-tiny"),
        (["--preset", "ouro-tiny", "widht=64"], "ouro-tiny has no dial and a run no setting widht; did you mean width"),
        (["--preset", "ouro-tiny", "widht.x=64"], "did you mean width"),
        (["--preset", "ouro-tiny", "optimiser.name=muon"], "did you mean optimizer"),
        (["--preset", "ouro-tiny", "width=40"], "width=40; allowed are multiples of 32"),
        (["--preset", "calibrate"], "missing init; type: init=VALUE"),
        (["--resume", "nowhere"], "there is no run in nowhere; give a folder that `loopwise train` has written"),
        (["--resume", "x", "seed=1"], "--resume goes on with a run as it is; leave out everything else"),
        (["--config", "nowhere.json"], "there is no file nowhere.json"),
    ],
)
def test_a_wrong_command_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
