"""The authors' own numbers, on tiny random checkpoints of theirs, at every loop, threshold and padded row."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.hub.checkpoints import load
from loopwise.loops.exits import replay
from loopwise.models.looped_lm import LoopedLM, LoopOutput

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-4
HUGINN_LOOPS = [1, 2, 3, 4, 6, 8, 12, 16]


@cache
def model_and_answers(name: str) -> tuple[LoopedLM, dict[str, Tensor]]:
    return load(GOLDEN / name), load_file(GOLDEN / name / "expected.safetensors")


def close(ours: Tensor, theirs: Tensor) -> bool:
    assert ours.shape == theirs.shape
    return bool(torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE))


@cache
@torch.no_grad()
def ouro_output() -> LoopOutput:
    model, expected = model_and_answers("ouro-tiny")
    return model(expected["input_ids"], loops=4, collect=("logits", "states", "signals"))


@pytest.mark.parametrize("loop", [1, 2, 3, 4])
def test_ouro_at_every_loop(loop: int) -> None:
    _, expected = model_and_answers("ouro-tiny")
    out = ouro_output()
    assert out.loop_logits is not None
    assert out.loop_states is not None
    assert out.loop_signals is not None
    assert close(out.loop_logits[loop - 1], expected["loop_logits"][loop - 1])
    assert close(out.loop_states[loop - 1], expected["loop_states"][loop - 1])
    assert close(out.loop_signals[loop - 1], expected["gate_logits"][loop - 1].sigmoid())


@pytest.mark.parametrize("threshold", ["0.3", "0.6", "0.9"])
def test_ouro_at_every_threshold(threshold: str) -> None:
    _, expected = model_and_answers("ouro-tiny")
    out = ouro_output()
    assert out.loop_logits is not None
    loops = replay(f"hazard:{threshold}", signals=out.loop_signals)
    assert torch.equal(loops, expected[f"exit_loop_q{threshold}"])
    assert loops.unique().numel() > 1
    chosen = out.loop_logits.gather(0, (loops - 1)[None, ..., None].expand(1, *loops.shape, 320))[0]
    assert close(chosen, expected[f"logits_q{threshold}"])


def test_ouro_never_exits_early_at_one() -> None:
    loops = replay("hazard:1.0", signals=ouro_output().loop_signals)
    assert torch.equal(loops, torch.full_like(loops, 4))


@torch.no_grad()
def test_ouro_padded_row() -> None:
    model, expected = model_and_answers("ouro-tiny")
    mask = expected["padded_attention_mask"].bool()
    assert not mask[0].all()
    logits = model(expected["padded_input_ids"], loops=4, padding_mask=mask).logits
    assert close(logits[:, -1], expected["padded_last_logits"])


def test_ouro_greedy_tokens() -> None:
    model, expected = model_and_answers("ouro-tiny")
    prompts = expected["input_ids"].tolist()
    answers = generate(model, prompts, Sampling(max_tokens=12, ignore_eos=True))
    assert [list(answer.prompt + answer.tokens) for answer in answers] == expected["greedy_full_depth"].tolist()


@pytest.mark.parametrize("loops", HUGINN_LOOPS)
@torch.no_grad()
def test_huginn_from_zero_and_from_a_given_state(loops: int) -> None:
    model, expected = model_and_answers("huginn-tiny")
    zero = model(expected["input_ids"], loops=loops, start="zero", collect=("states",))
    assert zero.loop_states is not None
    assert close(zero.logits, expected[f"logits_zero_state_r{loops}"])
    assert close(model.norm(zero.loop_states[-1]), expected[f"normed_state_zero_r{loops}"])
    given = model(expected["input_ids"], loops=loops, start=expected["given_initial_state"])
    assert close(given.logits, expected[f"logits_given_state_r{loops}"])


@torch.no_grad()
def test_huginn_prelude_and_every_state() -> None:
    model, expected = model_and_answers("huginn-tiny")
    context = model.encode(expected["input_ids"])
    assert close(context.injected, expected["prelude_output"])
    out = model(expected["input_ids"], loops=16, start=expected["given_initial_state"], collect=("states",))
    assert out.loop_states is not None
    assert close(out.loop_states, expected["raw_state_trajectory"])


def test_huginn_greedy_tokens() -> None:
    model, expected = model_and_answers("huginn-tiny")
    answers = generate(model, expected["input_ids"].tolist(), Sampling(max_tokens=10, start="zero", max_loops=8))
    assert [list(answer.prompt + answer.tokens) for answer in answers] == expected["greedy_zero_state_r8"].tolist()


@torch.no_grad()
def test_huginn_starts_as_a_function_of_the_seed() -> None:
    model, expected = model_and_answers("huginn-tiny")
    tokens = expected["input_ids"]
    first, again, other = (model(tokens, loops=2, start=seed).logits for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
