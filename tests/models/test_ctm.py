import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loopwise.errors import ConfigError, InputError
from loopwise.hub.ctm import load_ctm
from loopwise.loops.drivers import run_until, unroll
from loopwise.models.ctm import CTM, CTMState, certainty
from loopwise.models.ctm_config import CTMConfig
from loopwise.study.costs import count_costs
from loopwise.study.examples import Examples
from loopwise.testing import check_model

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = CTMConfig(
    ticks=5,
    neurons=10,
    width=8,
    heads=2,
    memory=3,
    classes=4,
    places=3,
    neuron_hidden=2,
    pairing="random",
    out_neurons=4,
    action_neurons=3,
    channels=5,
)


def made(config: CTMConfig = SMALL) -> CTM:
    """A machine whose decays are inside their range, where the clamp is smooth."""
    model = CTM(config)
    with torch.no_grad():
        for decay in (model.out_decay, model.action_decay):
            if decay is not None:
                decay.fill_(0.4)
    return model


def inputs_of(config: CTMConfig, rows: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    if config.backbone == "parity":
        return torch.randint(2, (rows, 6), generator=generator) * 2.0 - 1
    shape = (6,) if config.backbone == "given" else (8, 8)
    return torch.randn(rows, config.channels or 0, *shape, generator=generator)


@pytest.mark.parametrize("name", ["ctm-parity-tiny", "ctm-features-tiny"])
def test_golden_tick_by_tick(name: str) -> None:
    model = load_ctm(GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    context = model.encode(expected["inputs"])
    states = [model.initial_state(context)]
    with torch.no_grad():
        out = unroll(
            model,
            context,
            loops=model.config.ticks,
            collect=("logits", "signals"),
            visit=lambda _, state: states.append(state),
        )
        looked = [model.attention_weights(before, after, context) for before, after in pairwise(states)]
        found = {
            "predictions": out.logits.flatten(2).permute(1, 2, 0),
            "certainties": torch.stack((1 - out.signals, out.signals)).permute(2, 0, 1),
            "synch_out": torch.stack([model.out_synchronisation(state) for state in states[1:]]),
            "synch_action": torch.stack([model.action_synchronisation(state) for state in states[1:]]),
            "pre_activations": torch.stack([state.history[..., -1] for state in states[1:]]),
            "post_activations": torch.stack([state.activity for state in states[1:]]),
            "attention": torch.stack(looked)[:, :, :, None],
        }
    assert found.keys() | {"inputs"} == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")


VARIANTS: dict[str, dict[str, Any]] = {
    "random": {},
    "first-last, shallow": {"pairing": "first-last", "neuron_models": "shallow", "neuron_hidden": None},
    "random-pairing, U-Net, norm": {"pairing": "random-pairing", "self_pairs": 2, "synapse_depth": 3, "neurons": 20}
    | {"neuron_norm": True},
    "one answer, positions": {"places": None, "positions": "rotation"},
    "parity": {"backbone": "parity", "channels": None, "positions": "rotation"},
    "images": {"backbone": "convnet", "channels": 3, "backbone_width": 8, "halvings": 1},
    "no neuron models": {"neuron_models": "none", "neuron_hidden": None, "memory": 1},
    "no synchronisation": {"pairing": "none", "out_neurons": 0, "action_neurons": 0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_promises(variant: str) -> None:
    config = replace(SMALL, **VARIANTS[variant])
    # A rectified convolution has kinks, at which finite differences say little.
    check_model(made(config), inputs_of(config), loops=4, finite_differences=config.backbone != "convnet")


def test_promises_of_a_resnet() -> None:
    config = replace(SMALL, backbone="resnet18-2", channels=3)
    check_model(made(config), inputs_of(config, rows=2), loops=2, finite_differences=False)


def test_the_state_holds_all_that_a_tick_needs() -> None:
    """Cutting a run in two and copying the state over gives the same bits."""
    model = made()
    context = model.encode(inputs_of(SMALL))
    half = unroll(model, context, loops=2).state
    copied = CTMState(**{name: tensor.clone() for name, tensor in vars(half).items()})
    rest = unroll(model, context, loops=3, start=copied).state
    whole = unroll(model, context, loops=5).state
    for one, other in zip(vars(rest).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_samples_that_are_certain_leave() -> None:
    config = replace(SMALL, places=None)
    model = made(config)
    context = model.encode(inputs_of(config, rows=30))
    full = unroll(model, context, loops=5, collect=("logits", "signals"))
    bar = float(full.signals.detach().median())
    outcome = run_until(model, context, f"certainty:{bar}", max_loops=5)
    first = (full.signals >= bar).int().argmax(0) + 1
    expected = torch.where((full.signals >= bar).any(0), first, 5)
    assert torch.equal(outcome.loops, expected)
    assert len(outcome.loops.unique()) > 1
    torch.testing.assert_close(outcome.prediction, full.logits[outcome.loops - 1, torch.arange(30)])


def test_costs_are_counted_where_a_query_reads_the_learned_start_itself() -> None:
    config = replace(SMALL, pairing="none", out_neurons=0, action_neurons=0)
    inputs = inputs_of(config)
    costs = count_costs(made(config), Examples(inputs=inputs, targets=torch.zeros(4, 3, dtype=torch.long)))
    assert costs.readout == 2 * 10 * 12
    assert costs.per_loop > 2 * (10 * 8 + 18 * 20)


def test_certainty_of_known_chances() -> None:
    logits = torch.tensor([[[0.0, 0.0], [50.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert certainty(logits).tolist() == pytest.approx([0.5, 0.0], abs=1e-6)
    assert certainty(torch.tensor([[0.9, 0.1]]).log()).tolist() == pytest.approx([1 - 0.468996], abs=1e-6)
    assert certainty(logits.bfloat16()).dtype == torch.float32


def test_a_machine_follows_from_its_seed_alone() -> None:
    torch.manual_seed(5)
    first = CTM(SMALL, seed=1).state_dict()
    torch.manual_seed(6)
    before = torch.get_rng_state()
    second, third = CTM(SMALL, seed=1).state_dict(), CTM(SMALL, seed=2).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("head.weight", "out_pairs", "start_history", "neuron_models.layers.0.weight"):
        assert not torch.equal(first[name], third[name])


def test_the_authors_sizes_of_parity() -> None:
    config = CTMConfig(
        ticks=75,
        neurons=1024,
        width=512,
        heads=8,
        memory=25,
        classes=2,
        places=64,
        pairing="random",
        out_neurons=32,
        action_neurons=32,
        backbone="parity",
        positions="rotation",
    )
    assert (config.out_size, config.action_size) == (528, 528)
    with torch.device("meta"):
        model = CTM(config)
    neuron_models = 1024 * (25 * 32 + 32 + 16 * 2 + 2) + 2
    synapses = (1536 + 1) * 2048 + 2 * 1024
    attention = 4 * (512 + 1) * 512 + (528 + 1) * 512 + (512 + 1) * 512 + 2 * 512
    rest = 2 * 512 + (2 + 1) * 512 + (528 + 1) * 128 + 2 * 528 + 1024 * (25 + 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == neuron_models + synapses + attention + rest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads=3 do not divide width=8"),
        ({"classes": 1}, "classes=1"),
        ({"places": 0}, "places=0"),
        ({"neuron_hidden": None}, "neuron_hidden=None with neuron_models='deep'; give a number"),
        ({"neuron_models": "shallow"}, "give none"),
        ({"neuron_models": "none", "neuron_hidden": None}, "give memory=1"),
        ({"pairing": "none"}, "leave out out_neurons"),
        ({"out_neurons": 0}, "needs 1 or more of each"),
        ({"pairing": "first-last", "out_neurons": 9}, "12 of neurons=10"),
        ({"self_pairs": 1}, "self_pairs=1 with pairing='random'; allowed is 0 to 0"),
        ({"pairing": "random-pairing", "self_pairs": 4}, "allowed is 0 to 3"),
        ({"backbone": "parity"}, "channels=5 with backbone='parity'; give none"),
        ({"channels": None}, "channels=None with backbone='given'; give 1 or more"),
        ({"backbone": "convnet"}, "backbone_width=None with backbone='convnet'"),
        ({"halvings": 1}, "only a convnet halves"),
        ({"backbone": "resnet18-1", "positions": "rotation"}, "give positions='none'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"ticks": 0}, "ticks=0"),
    ],
)
def test_what_is_no_machine_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        replace(SMALL, **changes)


def test_what_is_no_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(4, 6\); \(rows, 5 channels, places...\)"):
        made().encode(torch.randn(4, 6))
    parity = made(replace(SMALL, backbone="parity", channels=None))
    with pytest.raises(InputError, match="of \\+1 and -1"):
        parity.encode(torch.zeros(2, 6))
    with pytest.raises(ConfigError, match="no options"):
        made().encode(inputs_of(SMALL), padding_mask=None)
    with pytest.raises(ConfigError, match="start is learned"):
        made().initial_state(made().encode(inputs_of(SMALL)), 3)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "ctm.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, "docs/ctm.md", "exec"), names)
    assert names["right"] > 0.9
    assert names["again"].config == names["config"]
