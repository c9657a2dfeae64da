"""Recording a trace: every number against running the model by itself, row by row."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from loopwise.engine import record
from loopwise.engine.record import record_trace
from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.errors import ConfigError, InputError
from loopwise.hub.checkpoints import load
from loopwise.hub.tokenizer import Tokenizer
from loopwise.models.looped_lm import LoopedLM
from loopwise.trace import LoopTrace

TESTS = Path(__file__).parents[1]
naive = runpy.run_path(str(TESTS / "models" / "naive_lm.py"))
NaiveLM, naive_rule, tiny = naive["NaiveLM"], naive["naive_rule"], naive["tiny"]
TOKENS = [3, 1, 22, 7, 0, 9, 4, 4, 11]


def chances_of(logits: np.ndarray) -> np.ndarray:
    chances = np.exp(logits - logits.max())
    return chances / chances.sum()


@pytest.mark.parametrize("shape", ["ouro", "huginn", "coda", "llama"])
@pytest.mark.parametrize("chunk", [4, 256])
def test_every_number_is_that_of_the_row_before(shape: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_CHUNK", chunk)
    model: LoopedLM = tiny(shape, seed=2)
    trace = record_trace(model, TOKENS, max_loops=4, top=3, keep_states=True)
    rows = [NaiveLM(model).run(TOKENS, loops=loops) for loops in range(1, 5)]
    for loop in range(4):
        for token in range(1, len(TOKENS)):
            chances, last = (chances_of(rows[which][token - 1].prediction) for which in (loop, 3))
            best = np.argsort(-chances, kind="stable")[:3]
            assert trace.top_ids is not None
            assert trace.top_ids[token, loop].tolist() == best.tolist()
            np.testing.assert_allclose(trace.top_probs[token, loop], chances[best], rtol=1e-5)
            np.testing.assert_allclose(trace.losses[token, loop], -np.log(chances[TOKENS[token]]), rtol=1e-5)
            np.testing.assert_allclose(trace.entropy[token, loop], -(chances * np.log(chances)).sum(), rtol=1e-5)
            apart = (last * (np.log(last) - np.log(chances))).sum()
            np.testing.assert_allclose(trace.kl[token, loop], apart, rtol=1e-4, atol=1e-6)
    for name in ("losses", "entropy", "kl", "top_probs", "states"):
        assert np.isnan(getattr(trace, name)[0]).all(), name
        assert not np.isnan(getattr(trace, name)[1:]).any(), name
    with torch.no_grad():
        out = model(torch.tensor([TOKENS]), loops=4, collect=("states", "signals"))
    assert out.loop_states is not None
    np.testing.assert_allclose(trace.states[1:], out.loop_states[:, 0, :-1].transpose(0, 1), atol=1e-5)
    if model.gate is None:
        assert trace.signals is None
        assert trace.signal_kind is None
    else:
        assert trace.signal_kind == "hazard"
        assert trace.signals.dtype == np.float64
        np.testing.assert_array_equal(trace.signals[1:], out.loop_signals[:, 0, :-1].T)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ("ouro", "hazard:0.7"),
        ("ouro", "delta:0.7"),
        ("ouro", "kl:0.3"),
        ("ouro", "fixed:2"),
        ("ouro", "budget:2.5:hazard:0.97"),
        ("llama", "fixed:2"),
        ("huginn", "delta:0.35"),
    ],
)
def test_without_loops_the_rule_is_replayed(shape: str, rule: str) -> None:
    model = tiny(shape, seed=2)
    trace = record_trace(model, TOKENS, max_loops=5, rule=rule, min_loops=2)
    # The naive run with `fill` decides row by row, and its planes are those of full depth.
    rows = NaiveLM(model).run(TOKENS, loops=5, stop=naive_rule(rule), fill=True, min_loops=2)
    assert trace.loops.tolist() == [0, *(row.loops for row in rows[:-1])]
    assert trace.prompt_length == 1
    assert trace.policy == "per_loop"


def test_without_a_rule_every_token_takes_the_last_loop() -> None:
    trace = record_trace(tiny("ouro"), TOKENS, max_loops=3)
    assert trace.loops.tolist() == [0] + [3] * 8
    assert (trace.rule, trace.max_loops) == ("fixed:3", 3)


@pytest.mark.parametrize("policy", ["per_loop", "last_exited"])
def test_an_answer_keeps_the_loops_that_really_ran(policy: str) -> None:
    model = tiny("ouro", seed=2)
    sampling = Sampling(max_tokens=8, exit="hazard:0.7", max_loops=5)
    done = generate(model, [TOKENS], sampling, policy=policy)[0]
    trace = record_trace(
        model,
        done.prompt + done.tokens,
        prompt_length=len(done.prompt),
        loops=done.loops,
        max_loops=5,
        rule=sampling.exit,
        policy=policy,
        title="a title",
        name="a name",
    )
    assert trace.loops.tolist() == [0] * len(TOKENS) + list(done.loops)
    assert (trace.rule, trace.policy, trace.title, trace.model) == ("hazard:0.7", policy, "a title", "a name")
    assert trace.mean_loops == pytest.approx(done.mean_loops)
    losses = -trace.losses[np.arange(len(TOKENS), len(trace)), trace.loops[len(TOKENS) :] - 1]
    if policy == "per_loop":
        # Under this policy the second run sees what the first one saw.
        np.testing.assert_allclose(losses, done.logprobs, rtol=1e-5)
        assert trace.replay(0.7)[len(TOKENS) + 1 :].tolist() == list(done.loops[1:])
    else:
        assert abs(losses - np.array(done.logprobs)).max() > 1e-3


def test_start_state_of_random_start_models() -> None:
    model = tiny("huginn", seed=2)
    losses = {start: record_trace(model, TOKENS, max_loops=3, start=start).losses for start in (None, 5, "zero")}
    np.testing.assert_array_equal(losses[None], record_trace(model, TOKENS, max_loops=3).losses)
    assert not np.array_equal(losses[None][1:], losses[5][1:])
    assert not np.array_equal(losses[5][1:], losses["zero"][1:])
    done = generate(model, [TOKENS], Sampling(max_tokens=3, max_loops=3, start=5))[0]
    trace = record_trace(model, done.prompt + done.tokens, max_loops=3, start=5)
    np.testing.assert_allclose(-trace.losses[-3:, -1], done.logprobs, rtol=1e-5)


def test_names_and_texts(tmp_path: Path) -> None:
    model = load(TESTS / "golden" / "ouro-tiny")
    trace = record_trace(model, [104, 105], max_loops=2)
    assert trace.texts == ("104", "105")
    assert trace.model == "ouro-tiny"
    model.tokenizer = Tokenizer.bytes()
    trace = record_trace(model, [104, 105], max_loops=2, top=1000)
    assert trace.texts == ("h", "i")
    assert trace.top_ids.shape == (2, 2, 320)
    assert trace.vocabulary[104] == "h"
    assert LoopTrace.load(trace.save(tmp_path / "a.trace")).texts == trace.texts
    assert record_trace(tiny(), TOKENS).model == "LoopedLM"


@pytest.mark.parametrize("rule", [None, "hazard:0.5", "kl:0.3", "delta:0.1"])
def test_one_token_alone(rule: str | None) -> None:
    trace = record_trace(tiny("ouro"), [3], max_loops=2, rule=rule, keep_states=True)
    assert trace.loops.tolist() == [0]
    assert np.isnan(trace.losses).all()


def test_hopeless_tokens_have_finite_numbers() -> None:
    model = tiny("ouro")
    with torch.no_grad():
        model.head_weight.mul_(1e5)
    trace = record_trace(model, TOKENS, max_loops=2)
    assert np.isfinite(trace.losses[1:]).all()
    assert np.isfinite(trace.entropy[1:]).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_length": 0}, InputError, "prompt_length=0: allowed is 1 to 9"),
        ({"prompt_length": 10}, InputError, "prompt_length=10"),
        ({"prompt_length": 5, "loops": [1, 2]}, InputError, "loops has 2 numbers; give one for each of the 4"),
        ({"prompt_length": 8, "loops": [9], "max_loops": 2}, InputError, "between 0 and 2"),
        ({"rule": "halt:0"}, ConfigError, "reads a halt_logit"),
        ({"max_loops": 0}, ConfigError, "max_loops=0"),
    ],
)
def test_refusals(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        record_trace(tiny("ouro"), TOKENS, **options)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(InputError):
        record_trace(tiny("ouro"), [])
