import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopwise.errors import CheckpointError, ConfigError, NotFoundError
from loopwise.hub.ctm import load_ctm, save_ctm
from loopwise.models.ctm import CTM
from loopwise.models.ctm_config import CTMConfig

MAZE = CTMConfig(
    ticks=3,
    neurons=20,
    width=8,
    heads=2,
    memory=3,
    classes=5,
    places=4,
    neuron_hidden=2,
    synapse_depth=3,
    pairing="first-last",
    out_neurons=4,
    action_neurons=3,
    backbone="resnet34-2",
    channels=3,
)


def same(one: CTM, other: CTM) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return (
        one.config == other.config
        and first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first)
    )


@pytest.mark.parametrize("name", ["ctm-parity-tiny", "ctm-features-tiny"])
def test_the_authors_files_come_back_bit_for_bit(golden: Path, tmp_path: Path, name: str) -> None:
    save_ctm(load_ctm(golden / name), tmp_path)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (golden / name, tmp_path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (golden / name, tmp_path))
    assert after == before | {"dropout_nlm": None}


def test_a_maze_machine_in_the_authors_format(tmp_path: Path) -> None:
    model = CTM(MAZE)
    save_ctm(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"initial_rgb.weight", "backbone.layer2.0.downsample.0.weight", "backbone.layer1.2.bn2.running_var"} <= names
    # One tensor under two names there, of which safetensors keeps the first.
    assert "out_neuron_indices_left" in names
    assert "out_neuron_indices_right" not in names
    assert same(model, load_ctm(tmp_path))


@pytest.mark.parametrize("keep", [(), ("left", "right")])
def test_whichever_name_of_a_shared_tensor_is_there(tmp_path: Path, keep: tuple[str, ...]) -> None:
    model = CTM(MAZE)
    save_ctm(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "neuron_indices" not in name}
    for side in keep:
        tensors[f"out_neuron_indices_{side}"] = torch.arange(4)
        tensors[f"action_neuron_indices_{side}"] = torch.arange(17, 20)
    save_file(tensors, file)
    assert same(model, load_ctm(tmp_path))
    save_file({**tensors, "out_neuron_indices_left": torch.arange(1, 5)}, file)
    with pytest.raises(CheckpointError, match="not the neurons that first-last takes"):
        load_ctm(tmp_path)


def test_our_own_format_holds_every_machine(tmp_path: Path) -> None:
    config = replace(MAZE, pairing="none", out_neurons=0, action_neurons=0, backbone="convnet", backbone_width=8)
    model = CTM(config, seed=3)
    with pytest.raises(ConfigError, match="has no backbone='convnet'; type: save_ctm"):
        save_ctm(model, tmp_path)
    save_ctm(model, tmp_path, family="loopwise")
    assert same(model, load_ctm(tmp_path))


def spoiled(golden: Path, folder: Path, changes: dict[str, Any]) -> Path:
    raw = json.loads((golden / "ctm-parity-tiny" / "config.json").read_text()) | changes
    folder.joinpath("config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "GONE"}))
    folder.joinpath("model.safetensors").write_bytes((golden / "ctm-parity-tiny" / "model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": "GONE"}, "no 'd_model'"),
        ({"d_model": 49}, "has shape"),
        ({"d_model": "large"}, "a whole number is needed"),
        ({"surprise": 1}, "unknown surprise"),
        ({"backbone_type": "resnet50-4"}, "'resnet50-4' is not built here; there are none"),
        ({"backbone_type": "resnet18-1", "positional_embedding_type": "none"}, "no matrix initial_rgb.weight"),
        ({"positional_embedding_type": "learnable-fourier"}, "'learnable-fourier' is not built here"),
        ({"positional_embedding_type": "none"}, "with positional_embedding.projection"),
        ({"prediction_reshaper": [16, 3]}, "whose product is out_dims"),
        ({"heads": 0}, "without attention"),
        ({"heads": 5}, "do not divide"),
        ({"neuron_select_type": "all"}, "allowed are first-last"),
        ({"synapse_depth": 2}, "without synapses.down_projections"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(
    golden: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as told:
        load_ctm(spoiled(golden, tmp_path, changes))
    assert "\n" not in str(told.value)


def test_neurons_that_are_not_there_are_refused(golden: Path, tmp_path: Path) -> None:
    file = spoiled(golden, tmp_path, {}) / "model.safetensors"
    save_file(load_file(file) | {"out_neuron_indices_left": torch.arange(8) + 41}, file)
    with pytest.raises(CheckpointError, match="beyond the 48"):
        load_ctm(tmp_path)


def test_pickles_are_refused(golden: Path, tmp_path: Path) -> None:
    file = spoiled(golden, tmp_path, {}) / "model.safetensors"
    file.rename(tmp_path / "checkpoint_100.pt")
    with pytest.raises(NotFoundError, match="is a pickle, which is never read: convert it to safetensors"):
        load_ctm(tmp_path)
