"""The readable generator against recomputing everything at every token, and against the authors' own tokens."""

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from loopwise.engine.answer import Completion, Emission
from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling, choose
from loopwise.errors import ConfigError, InputError, LoopRangeWarning
from loopwise.hub.checkpoints import load
from loopwise.hub.token_bytes import BYTE_OF
from loopwise.hub.tokenizer import Tokenizer
from loopwise.hub.tokenizer_files import SpecialIds
from loopwise.loops.exits import replay
from loopwise.models.looped_lm import LoopedLM

TESTS = Path(__file__).parents[1]
naive = runpy.run_path(str(TESTS / "models" / "naive_lm.py"))
NaiveLM, naive_rule, tiny = naive["NaiveLM"], naive["naive_rule"], naive["tiny"]
PROMPT = (3, 1, 22, 7, 0)


def recomputed(model: LoopedLM, prompt: tuple[int, ...], sampling: Sampling, policy: str) -> Completion:
    """Every token from the very beginning, by the formulas."""
    tokens: list[int] = []
    loops: list[int] = []
    logprobs: list[float] = []
    for _ in range(sampling.max_tokens):
        row = NaiveLM(model).run(
            [*prompt, *tokens],
            loops=sampling.max_loops,
            stop=naive_rule(sampling.exit) if sampling.exit else None,
            fill=policy == "per_loop",
            prompt=len(prompt),
            min_loops=sampling.min_loops,
            start=sampling.start,
        )[-1]
        chances = np.exp(row.prediction - row.prediction.max())
        tokens.append(choose(torch.from_numpy(row.prediction), sampling, position=len(prompt) + len(tokens)))
        loops.append(row.loops)
        logprobs.append(float(np.log(chances[tokens[-1]] / chances.sum())))
    return Completion(
        prompt=prompt,
        tokens=tuple(tokens),
        text=None,
        loops=tuple(loops),
        logprobs=tuple(logprobs),
        finish_reason="length",
        kv_bytes=0,
    )


CASES = [
    ("ouro", None),
    ("ouro", "fixed:2"),
    ("ouro", "hazard:0.7"),
    ("ouro", "delta:0.7"),
    ("ouro", "kl:0.3"),
    ("ouro", "stable:1"),
    ("ouro", "certainty:0.15"),
    ("ouro", "budget:2.5:hazard:0.97"),
    ("ouro", "patience:2:delta:0.9"),
    ("universal", "hazard:0.8"),
    ("huginn", "delta:0.8"),
    ("huginn", "kl:0.3"),
    ("huginn", "budget:3.0:kl:0.3"),
    ("retrofitted-llama", "entropy:0.1"),
    ("coda", "hazard:0.9"),
    ("coda", "stable:2"),
    ("zeros", "hazard:0.8"),
]


@pytest.mark.parametrize(("shape", "rule"), CASES)
@pytest.mark.parametrize(("policy", "temperature"), [("per_loop", 1.0), ("last_exited", 0.0)])
def test_equals_recomputing_everything(shape: str, rule: str | None, policy: str, temperature: float) -> None:
    model = tiny(shape, seed=2)
    sampling = Sampling(
        max_tokens=4,
        temperature=temperature,
        top_p=0.9 if temperature else None,
        seed=4,
        exit=rule,
        max_loops=5,
        min_loops=2 if temperature else 1,
        start=5 if model.facts.random_start and temperature else None,
    )
    done = generate(model, [PROMPT], sampling, policy=policy)[0]
    expected = recomputed(model, PROMPT, sampling, policy)
    assert done.tokens == expected.tokens
    assert done.loops == expected.loops
    np.testing.assert_allclose(done.logprobs, expected.logprobs, rtol=0, atol=1e-9)
    assert (done.finish_reason, done.text, done.prompt) == ("length", None, PROMPT)
    assert done.loops[0] == 5


def test_the_cases_leave_early_and_the_policies_differ() -> None:
    differing = 0
    for shape, rule in CASES:
        model = tiny(shape, seed=2)
        sampling = Sampling(max_tokens=4, exit=rule, max_loops=5)
        filled, skipped = (
            generate(model, [PROMPT], sampling, policy=policy)[0] for policy in ("per_loop", "last_exited")
        )
        assert rule is None or min(skipped.loops) < 5, (shape, rule)
        differing += filled.logprobs != skipped.logprobs
    assert differing > len(CASES) // 2


@pytest.mark.parametrize("rule", ["hazard:0.7", "kl:0.3", "delta:0.7", "budget:2.5:hazard:0.97"])
def test_per_loop_equals_choosing_loops_of_a_full_unroll(rule: str) -> None:
    model = tiny("ouro", seed=2)
    done = generate(model, [PROMPT], Sampling(max_tokens=8, exit=rule, max_loops=5), policy="per_loop")[0]
    tokens = torch.tensor([PROMPT + done.tokens])[:, :-1]
    with torch.no_grad():
        out = model(tokens, loops=5, collect=("states", "logits", "signals"))
        start = model.initial_state(model.encode(tokens))
    made = slice(len(PROMPT), None)
    loops = replay(
        rule,
        states=out.loop_states[:, :, made],
        logits=out.loop_logits[:, :, made],
        signals=out.loop_signals[:, :, made],
        start=start[:, made],
    )[0]
    assert list(done.loops) == [5, *loops.tolist()]
    rows = out.loop_logits.log_softmax(-1)[:, 0, len(PROMPT) - 1 :]
    chosen = [rows[loop - 1, i, token] for i, (loop, token) in enumerate(zip(done.loops, done.tokens, strict=True))]
    np.testing.assert_allclose(done.logprobs, torch.stack(chosen), rtol=0, atol=1e-9)


def test_a_prompt_does_not_depend_on_its_neighbours() -> None:
    model = tiny("huginn", seed=2)
    sampling = Sampling(max_tokens=4, temperature=0.8, exit="delta:0.6", max_loops=6)
    prompts = [PROMPT, (1,), (9, 9, 9)]
    together = generate(model, prompts, sampling)
    assert together == [generate(model, [prompt], sampling)[0] for prompt in prompts]
    assert together == generate(model, prompts[::-1], sampling)[::-1]


def test_a_row_that_stops_runs_no_further_loop() -> None:
    model = tiny("ouro", seed=2)
    calls: list[int] = []
    model.core.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    sampling = Sampling(max_tokens=8, exit="hazard:0.7", max_loops=5)
    done = generate(model, [PROMPT], sampling, policy="last_exited")[0]
    # The last token is never run, the first is emitted by the prompt.
    assert calls == [len(PROMPT)] * 5 + [1] * sum(done.loops[1:])
    calls.clear()
    generate(model, [PROMPT], sampling, policy="per_loop")
    assert calls == [len(PROMPT)] * 5 + [1] * 5 * 7


def test_kept_memory_is_what_is_said() -> None:
    model = tiny("coda")
    done = generate(model, [PROMPT], Sampling(max_tokens=3, max_loops=4))[0]
    slots = model.config.prelude_layers + model.config.coda_layers + 4 * model.config.core_layers
    assert done.kv_bytes == slots * (len(PROMPT) + 3) * 2 * model.config.kv_heads * model.config.head_width * 8


def test_watchers_see_each_token_as_it_leaves() -> None:
    seen: list[Emission] = []
    model = tiny("ouro")
    done = generate(model, [PROMPT], Sampling(max_tokens=3, exit="hazard:0.7"), watch=seen.append)[0]
    assert tuple(emission.token for emission in seen) == done.tokens
    assert tuple(emission.loops for emission in seen) == done.loops
    assert tuple(emission.logprob for emission in seen) == done.logprobs
    assert done.mean_loops == sum(done.loops) / 3


class TestEnds:
    def test_context_runs_out(self) -> None:
        model = tiny("ouro", max_positions=8)
        done = generate(model, [PROMPT], Sampling(max_tokens=10))[0]
        assert (len(done.tokens), done.finish_reason) == (3, "context")
        done = generate(model, [PROMPT], Sampling(max_tokens=3))[0]
        assert (len(done.tokens), done.finish_reason) == (3, "length")

    def test_end_of_text(self) -> None:
        model = tiny("ouro")
        free = generate(model, [PROMPT], Sampling(max_tokens=6))[0].tokens
        end = free[2]
        model.tokenizer = letters(ends=(end,))
        done = generate(model, [PROMPT], Sampling(max_tokens=6))[0]
        assert done.tokens == free[: free.index(end) + 1]
        assert done.finish_reason == "stop"
        assert done.text == letters().decode(done.tokens[:-1])
        assert generate(model, [PROMPT], Sampling(max_tokens=6, ignore_eos=True))[0].tokens == free

    def test_stop_texts(self) -> None:
        model = tiny("ouro")
        model.tokenizer = letters()
        free = generate(model, [PROMPT], Sampling(max_tokens=6))[0]
        assert free.text == letters().decode(free.tokens)
        stop = free.text[1:3]
        done = generate(model, [PROMPT], Sampling(max_tokens=6, stop=(stop, "?")))[0]
        assert done.text == free.text[: free.text.index(stop)]
        assert done.tokens == free.tokens[: free.text.index(stop) + 2]
        assert done.finish_reason == "stop"

    def test_text_prompts(self) -> None:
        model = tiny("ouro")
        model.tokenizer = letters()
        assert generate(model, ["dbwha"], Sampling(max_tokens=2))[0].prompt == PROMPT


def letters(ends: tuple[int, ...] = ()) -> Tokenizer:
    """A tokenizer of one letter per id: 0 is `a`."""
    vocabulary = {letter: byte - ord("a") for letter, byte in BYTE_OF.items() if byte >= ord("a")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(tokenizer.to_str(), special=SpecialIds(stop=ends))


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"exit": "hazard:0.5"}, "signal is none"),
            ({"exit": "nonsense"}, "unknown exit rule"),
            ({"min_loops": 4, "max_loops": 3}, "min_loops=4"),
            ({"stop": ("x",)}, "no tokenizer.json"),
        ],
    )
    def test_sampling(self, change: dict[str, object], message: str) -> None:
        with pytest.raises((ConfigError, InputError), match=message):
            generate(tiny("llama"), [PROMPT], replace(Sampling(), **change))

    def test_policy(self) -> None:
        with pytest.raises(ConfigError, match="allowed are per_loop, last_exited"):
            generate(tiny(), [PROMPT], policy="single")

    @pytest.mark.parametrize(
        ("prompt", "message"), [((), "empty"), ((1,) * 64, "context holds 64"), ("text", "no tokenizer")]
    )
    def test_prompts(self, prompt: object, message: str) -> None:
        with pytest.raises(InputError, match=message):
            generate(tiny(), [prompt])

    def test_loops_beyond_training_warn(self) -> None:
        with pytest.warns(LoopRangeWarning):
            generate(tiny("ouro", trained_loops=(1, 3)), [PROMPT], Sampling(max_tokens=1, max_loops=4))


class TestGoldens:
    def test_ouro_greedy_at_full_depth(self) -> None:
        folder = TESTS / "golden" / "ouro-tiny"
        expected = load_file(folder / "expected.safetensors")
        length = expected["input_ids"].shape[1]
        tokens = expected["greedy_full_depth"]
        prompts = [tuple(row[:length].tolist()) for row in tokens]
        sampling = Sampling(max_tokens=tokens.shape[1] - length, ignore_eos=True)
        model = load(folder)
        done = generate(model, prompts, sampling)
        assert [list(answer.prompt + answer.tokens) for answer in done] == tokens.tolist()
        assert all(answer.loops == (4,) * 12 for answer in done)
        never = generate(model, prompts[:1], replace(sampling, exit="hazard:1.0"))
        assert never[0].tokens == done[0].tokens

    def test_huginn_greedy_from_zero(self) -> None:
        folder = TESTS / "golden" / "huginn-tiny"
        expected = load_file(folder / "expected.safetensors")
        length = expected["input_ids"].shape[1]
        tokens = expected["greedy_zero_state_r8"]
        sampling = Sampling(max_tokens=tokens.shape[1] - length, max_loops=8, start="zero", ignore_eos=True)
        done = generate(load(folder), [tuple(row[:length].tolist()) for row in tokens], sampling)
        assert [list(answer.prompt + answer.tokens) for answer in done] == tokens.tolist()
