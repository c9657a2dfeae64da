"""TRM and HRM in the authors' format: their numbers, their names, their parameter counts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loopwise.errors import CheckpointError, ConfigError, NotFoundError
from loopwise.hub.trm import load_trm, read_config, save_trm
from loopwise.loops.drivers import unroll
from loopwise.models.trm import TRM, TRMState
from loopwise.models.trm_config import TRMConfig

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDENS = ["trm-attention-tiny", "trm-mlp-tiny"]
TOLERANCE = 2e-4
SUDOKU = {
    "batch_size": 768,
    "seq_len": 81,
    "puzzle_emb_ndim": 512,
    "num_puzzle_identifiers": 1,
    "vocab_size": 11,
    "H_cycles": 3,
    "L_cycles": 6,
    "H_layers": 0,
    "L_layers": 2,
    "hidden_size": 512,
    "expansion": 4,
    "num_heads": 8,
    "pos_encodings": "rope",
    "halt_max_steps": 16,
    "halt_exploration_prob": 0.1,
}
HRM = {key: SUDOKU[key] for key in SUDOKU} | {"H_cycles": 2, "L_cycles": 2, "H_layers": 4, "L_layers": 4}


@pytest.mark.parametrize("name", GOLDENS)
def test_every_segment_is_the_authors(name):
    """Each from the authors' states before it.

    The random MLP is chaotic: a rounding grows twentyfold in a segment, and the authors' own code, run on another
    machine, is 1.6 away from its own fourth answer. So no segment is asked to undo the rounding of those before it.
    """
    model = load_trm(GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    with torch.no_grad():
        context = model.encode(expected["inputs"], puzzles=expected["puzzle_identifiers"])
        state = model.initial_state(context)
        for segment in range(1, 5):
            state = model.step(state, context, segment)
            found = {
                "logits": model.readout(state, context),
                "q_halt_logit": model.signal(state, None),
                "z_H": state.answer,
                "z_L": state.latent,
            }
            for part, tensor in found.items():
                assert (expected[f"{part}_segment{segment}"] - tensor).abs().max() < TOLERANCE, (part, segment)
            state = TRMState(answer=expected[f"z_H_segment{segment}"], latent=expected[f"z_L_segment{segment}"])


def test_four_segments_in_a_row_are_the_authors():
    model = load_trm(GOLDEN / "trm-attention-tiny")
    expected = load_file(GOLDEN / "trm-attention-tiny" / "expected.safetensors")
    with torch.no_grad():
        context = model.encode(expected["inputs"], puzzles=expected["puzzle_identifiers"])
        out = unroll(model, context, loops=4, collect=("states", "signals", "logits"))
    for theirs, ours in (
        ("logits", out.logits),
        ("q_halt_logit", out.signals),
        ("z_H", out.states.answer),
        ("z_L", out.states.latent),
    ):
        authors = torch.stack([expected[f"{theirs}_segment{segment}"] for segment in range(1, 5)])
        assert (authors - ours).abs().max() < TOLERANCE, theirs


@pytest.mark.parametrize("name", GOLDENS)
def test_saving_writes_the_same_files(name, tmp_path):
    model = load_trm(GOLDEN / name)
    raw = json.loads((GOLDEN / name / "config.json").read_text())
    save_trm(model, tmp_path, raw=raw)
    assert json.loads((tmp_path / "config.json").read_text()) == raw
    before, after = load_file(GOLDEN / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("raw", "count"),
    [
        (SUDOKU, 6_828_034),
        (SUDOKU | {"mlp_t": True, "pos_encodings": "none"}, 5_028_866),
        (HRM, 27_275_266),
    ],
    ids=["attention", "mlp", "hrm"],
)
def test_parameters_are_counted_as_in_the_papers(raw, count):
    with torch.device("meta"):
        model = TRM(read_config(raw))
    # Embeddings of puzzles are learned apart and never counted.
    counted = [p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings.puzzles")]
    assert sum(counted) == count


def test_hrm_is_a_configuration():
    config = read_config(HRM)
    assert (config.answer_layers, config.window, config.halts, config.prefix) == (4, "step", "over-continue", 1)
    # TRM's code ignores H_layers; the tensors tell.
    assert read_config(HRM, ["L_level.layers.0.mlp.down_proj.weight"]).answer_layers == 0


def small(**changes):
    shape = {"vocab_size": 5, "places": 6, "width": 16, "heads": 2, "layers": 1, "mlp_width": 256, "puzzle_width": 16}
    return TRM(TRMConfig(**(shape | changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"answer_layers": 2, "window": "step", "halts": "over-continue"},
        {"mixing": "mlp", "mixing_width": 256, "positions": "learned", "window": "all"},
        {"prefix": 3, "puzzles": 4, "puzzle_width": 40, "trained_loops": (2, 7)},
        {"prefix": 0, "puzzle_width": 0},
    ],
    ids=["hrm", "learned", "puzzles", "bare"],
)
def test_our_models_go_through_their_format(changes, tmp_path):
    model = small(**changes).eval()
    save_trm(model, tmp_path)
    back = load_trm(tmp_path)
    assert back.config == model.config
    inputs = torch.arange(12).reshape(2, 6) % 5
    with torch.no_grad():
        answers = [unroll(m, m.encode(inputs), loops=2, collect=("logits",)).logits for m in (model, back)]
    assert torch.equal(*answers)


def test_what_wrapped_the_model_is_looked_through(tmp_path):
    from safetensors.torch import save_file

    source = GOLDEN / GOLDENS[0]
    shutil.copy(source / "config.json", tmp_path)
    tensors = load_file(source / "model.safetensors")
    save_file({f"_orig_mod.model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert torch.equal(load_trm(tmp_path).head.weight, load_trm(source).head.weight)


def test_widths_that_their_format_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="mlp_width"):
        save_trm(small(mlp_width=100), tmp_path)


def test_pickles_are_refused(tmp_path):
    shutil.copy(GOLDEN / GOLDENS[0] / "config.json", tmp_path)
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(NotFoundError, match=r"model\.pt is a pickle, which is never read"):
        load_trm(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": "wide"}, "hidden_size='wide'; a whole number is needed"),
        ({"pos_encodings": "alibi"}, "pos_encodings='alibi'; read are rope, learned, none"),
        ({"num_heads": 7}, "the width of a head must be whole and even"),
        ({"hidden_size": 64}, "misshapen"),
    ],
)
def test_other_configurations_are_refused_in_one_line(change, told, tmp_path):
    source = GOLDEN / GOLDENS[0]
    shutil.copy(source / "model.safetensors", tmp_path)
    raw = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(CheckpointError, match=told) as refused:
        load_trm(tmp_path)
    assert "\n" not in str(refused.value)
