"""One `load` and one `inspect` for every kind of model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import loopwise
from loopwise.errors import CheckpointError, NotFoundError
from loopwise.hub import checkpoints
from loopwise.hub.ctm import load_ctm, save_ctm
from loopwise.hub.machines import Inspection, inspect, load
from loopwise.hub.trm import load_trm, save_trm
from loopwise.models.ctm import CTM
from loopwise.models.ctm_config import CTMConfig
from loopwise.models.trm import TRM
from loopwise.models.trm_config import TRMConfig

OURS = CTMConfig(
    ticks=3, neurons=12, width=8, heads=2, memory=2, classes=5, places=4, neuron_hidden=2, out_neurons=6,
    action_neurons=5, backbone="convnet", channels=3, backbone_width=8,
)  # fmt: skip
HRM = TRMConfig(
    vocab_size=5, places=6, width=32, heads=2, layers=1, answer_layers=1, mlp_width=256, prefix=1, puzzle_width=8,
    window="step", halts="over-continue", trained_loops=(1, 4),
)  # fmt: skip


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", ["ctm-parity-tiny", "ctm-features-tiny", "trm-attention-tiny", "trm-mlp-tiny"])
def test_what_the_kinds_own_reader_gives(golden: Path, name: str) -> None:
    own = load_ctm(golden / name) if name.startswith("ctm") else load_trm(golden / name)
    model = loopwise.load(golden / name)
    assert type(model) is type(own)
    assert equal(model, own)
    assert not model.training


def test_every_kind_is_told_from_its_config(golden: Path, tmp_path: Path) -> None:
    save_ctm(CTM(OURS), tmp_path / "ctm", family="loopwise")
    save_trm(TRM(HRM), tmp_path / "hrm")
    ours = load(tmp_path / "ctm")
    assert isinstance(ours, CTM)
    assert ours.config == OURS
    hrm = load(tmp_path / "hrm")
    assert isinstance(hrm, TRM)
    assert hrm.config == HRM
    assert isinstance(load(golden / "huginn-tiny"), loopwise.LoopedLM)


@pytest.mark.parametrize("name", ["ctm-parity-tiny", "trm-mlp-tiny", "ouro-tiny"])
def test_dtypes(golden: Path, name: str) -> None:
    def kinds(dtype: Any) -> set[torch.dtype]:
        return {parameter.dtype for parameter in load(golden / name, dtype=dtype).parameters()}

    assert kinds(None) == {torch.float32}
    assert kinds("float64") == kinds(torch.float64) == {torch.float64}
    with pytest.raises(loopwise.errors.ConfigError, match="dtype=fp8: allowed are float64"):
        load(golden / name, dtype="fp8")


def test_the_whole_numbers_of_a_ctm_stay_whole(golden: Path) -> None:
    half, whole = load(golden / "ctm-parity-tiny", dtype="bfloat16"), load(golden / "ctm-parity-tiny")
    assert isinstance(half, CTM)
    assert isinstance(whole, CTM)
    assert torch.equal(half.out_pairs, whole.out_pairs)


@pytest.mark.parametrize(
    "raw", [{"model_type": "gpt2"}, {}, {"model_type": "hrm_text", "H_cycles": 2, "seq_len": 16}, {"H_cycles": 2}]
)
def test_what_is_of_no_kind_is_refused_in_one_line(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for read in (load, inspect):
        with pytest.raises(
            CheckpointError, match="supported are ouro, huginn_raven, loopwise, a CTM, a TRM and"
        ) as told:
            read(tmp_path)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(("name", "kind"), [("ctm-parity-tiny", "CTM"), ("trm-mlp-tiny", "TRM or HRM")])
def test_who_needs_a_language_model_says_so(name: str, kind: str, golden: Path) -> None:
    for read in (checkpoints.load, checkpoints.inspect):
        with pytest.raises(CheckpointError, match=f"of a {kind}, and only a language model will do here") as told:
            read(golden / name)
        assert "\n" not in str(told.value)


def test_a_model_that_is_no_language_model_is_refused_in_one_line(golden: Path) -> None:
    # In a process of its own: where tests check the types of arguments, these would be refused before we are asked.
    script = f"""
import loopwise
model = loopwise.load({str(golden / "ctm-parity-tiny")!r})
for act in (lambda: loopwise.generate(model, ["a"]), lambda: loopwise.Engine(model), lambda: loopwise.save(model, "x")):
    try:
        act()
    except loopwise.errors.ConfigError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    generate, engine, save = done.stdout.splitlines()
    assert generate == engine
    assert generate.startswith("a CTM is no language model, which is needed here; to ask it, type: loopwise.run_until(")
    assert save.endswith("to write it, type: loopwise.hub.ctm.save_ctm or loopwise.hub.trm.save_trm")


def look(folder: Path) -> Inspection:
    seen = inspect(folder)
    assert isinstance(seen, Inspection)
    return seen


def test_inspection_of_whole_weights(golden: Path, tmp_path: Path) -> None:
    save_trm(TRM(HRM), tmp_path)
    for folder, family, tensors in (
        (golden / "ctm-features-tiny", "ctm", 60),
        (golden / "trm-attention-tiny", "trm", 15),
        (tmp_path, "hrm", len(TRM(HRM).state_dict())),
    ):
        seen, model = look(folder), load(folder)
        assert (seen.family, seen.problem) == (family, None)
        assert seen.machine.config == model.config
        assert seen.weights is not None
        assert (seen.weights.tensors, seen.weights.dtypes) == (tensors, ("float32",))


def test_inspection_without_weights(golden: Path, copy: Any) -> None:
    for name in ("ctm-parity-tiny", "trm-mlp-tiny"):
        folder = copy(name).path
        (folder / "model.safetensors").unlink()
        seen = look(folder)
        assert (seen.weights, seen.problem) == (None, None)
        assert seen.machine.config == load(golden / name).config
    folder = copy("ctm-features-tiny").path
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not tell the channels of its input; its weights do, and they are"):
        inspect(folder)
    with pytest.raises(NotFoundError, match=r"has no model\.safetensors"):
        load(folder)


def test_inspection_of_broken_weights(copy: Any) -> None:
    for name in ("ctm-parity-tiny", "trm-mlp-tiny"):
        folder = copy(name)
        tensors = folder.tensors()
        folder.store(dict(list(tensors.items())[1:]))
        seen = look(folder.path)
        assert seen.weights is None
        assert seen.problem is not None
        assert next(iter(tensors)) in seen.problem
    features = copy("ctm-features-tiny").path
    (features / "model.safetensors").write_bytes((features / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        inspect(features)
