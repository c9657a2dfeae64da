"""Scores against the generator's log-probabilities and against the formulas, their gradients against differences."""

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from loopwise.engine.answer import Completion
from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.errors import ConfigError, InputError
from loopwise.models.looped_lm import LoopedLM

naive = runpy.run_path(str(Path(__file__).parent / "naive_lm.py"))
NaiveLM, tiny = naive["NaiveLM"], naive["tiny"]
PROMPT = (3, 1, 22, 7, 0)
POLICIES = ("per_loop", "last_exited")
CASES = [
    ("ouro", None),
    ("ouro", "fixed:2"),
    ("ouro", "hazard:0.7"),
    ("ouro", "delta:0.7"),
    ("huginn", "fixed:3"),
    ("huginn", "delta:0.8"),
    ("retrofitted-llama", "delta:0.7"),
    ("retrofitted-olmo", "entropy:0.1"),
    ("coda", "hazard:0.9"),
    ("universal", "hazard:0.8"),
]


def answer(model: LoopedLM, rule: str | None, policy: str, temperature: float = 0.0, tokens: int = 7) -> Completion:
    sampling = Sampling(
        max_tokens=tokens,
        temperature=temperature,
        top_p=0.9 if temperature else None,
        exit=rule,
        max_loops=5,
        start=9 if model.facts.random_start and temperature else None,
    )
    return generate(model, [PROMPT], sampling, policy=policy)[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_equals_what_the_generator_reported(shape: str, rule: str | None, policy: str, temperature: float) -> None:
    model = tiny(shape, seed=2)
    done = answer(model, rule, policy, temperature)
    seed = 9 if model.facts.random_start and temperature else None
    replayed = (done.prompt + done.tokens, done.loops, len(done.prompt))
    found = model.score(*replayed, policy=policy, start_seed=seed)
    assert found.shape == (7,)
    np.testing.assert_allclose(found.detach(), done.logprobs, rtol=0, atol=1e-9)

    narrow = model.float().score(*replayed, policy=policy, start_seed=seed)
    assert narrow.dtype == torch.float32
    np.testing.assert_allclose(narrow.detach(), done.logprobs, rtol=0, atol=3e-5)


def test_the_cases_stop_early_and_at_different_depths() -> None:
    depths = [answer(tiny(shape, seed=2), rule, "last_exited").loops for shape, rule in CASES]
    assert sum(min(loops) < 5 for loops in depths) >= len(CASES) - 1
    assert sum(len(set(loops[1:])) > 1 for loops in depths) >= 5


@pytest.mark.parametrize("shape", ["ouro", "huginn", "retrofitted-llama", "coda", "zeros"])
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_the_formulas_at_any_depths(shape: str, policy: str) -> None:
    """Tokens and depths that no rule chose; a reader at loop d takes plane d, or min(d, e)."""
    model = tiny(shape, seed=4)
    numbers = np.random.default_rng(6)
    tokens = numbers.integers(0, 23, 12).tolist()
    loops = [6, *numbers.integers(1, 7, 7).tolist()]
    exits = [6] * 4 + loops[1:]
    rows = NaiveLM(model).run(
        tokens[:-1],
        loops=6,
        stop=lambda place, row: len(row.states) - 1 >= exits[place],
        fill=policy == "per_loop",
        prompt=4,
    )
    logits = torch.tensor(np.stack([row.prediction for row in rows[3:]]))
    expected = logits.log_softmax(-1)[torch.arange(8), tokens[4:]]
    found = model.score(torch.tensor(tokens), torch.tensor(loops), 4, policy=policy)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["ouro", "huginn"])
def test_a_padded_batch_equals_its_sequences(shape: str, policy: str, side: str) -> None:
    model = tiny(shape, seed=3)
    numbers = torch.Generator().manual_seed(0)
    prompts, answers = [3, 1, 4], [5, 6, 2]
    tokens, real = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.bool)
    loops = torch.full((3, 6), 99)
    alone = []
    for i, (prompt, made) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.randint(0, 23, (prompt + made,), generator=numbers)
        depths = torch.randint(1, 5, (made,), generator=numbers)
        depths[0] = 4
        first = {"left": 12 - len(ids), "right": 0, "both": 1}[side]
        tokens[i, first : first + len(ids)], real[i, first : first + len(ids)] = ids, True
        loops[i, :made] = depths
        alone.append(model.score(ids, depths, prompt, policy=policy))
    found = model.score(tokens, loops, torch.tensor(prompts), policy=policy, padding_mask=real)
    expected = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    # Gradients too; padding must not leak NaN into them.
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    by_batch = torch.autograd.grad(found.sum(), weights, allow_unused=True)
    by_one = torch.autograd.grad(expected.sum(), weights, allow_unused=True)
    for whole, parts in zip(by_batch, by_one, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-9)


WEIGHTS: dict[str, Callable[[LoopedLM], torch.Tensor]] = {
    "embedding": lambda model: model.embed.weight,
    "query, key and value": lambda model: model.core[0].attention.branch.qkv.weight,
    "mlp": lambda model: model.core[0].mlp.branch.down.weight,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("shape", "rule"), [("ouro", "hazard:0.7"), ("huginn", "delta:0.8"), ("coda", "hazard:0.9")])
def test_gradients_equal_finite_differences(shape: str, rule: str, policy: str) -> None:
    model = tiny(shape, seed=2)
    done = answer(model, rule, policy)
    assert len(set(done.loops)) > 1
    advantages = torch.linspace(-1.0, 1.5, len(done.tokens), dtype=torch.float64)

    def objective() -> torch.Tensor:
        return model.score(done.prompt + done.tokens, done.loops, len(done.prompt), policy=policy) @ advantages

    objective().backward()
    for name, find in WEIGHTS.items():
        weight = find(model)
        gradient = weight.grad
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        direction /= direction.norm()
        steps = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                weight += step * direction
                steps.append(float(objective()))
                weight -= step * direction
        difference = (steps[0] - steps[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-6, abs=1e-7), name


def test_work_stops_where_rows_stop() -> None:
    model = tiny("ouro", seed=2)
    ran: list[int] = []
    model.core.register_forward_pre_hook(lambda _module, inputs: ran.append(len(inputs[0])))
    model.score(torch.arange(8), (4, 1, 2, 1), 4, policy="last_exited")
    assert ran == [7, 5, 4, 4]


@pytest.mark.parametrize(
    ("tokens", "loops", "prompt", "changes", "message"),
    [
        (6, (3, 2), 3, {}, "loops has 2 numbers for 3 generated tokens; give one for each of them"),
        (6, (3, 0, 2), 3, {}, "loops from 0 to 3 were given: allowed are 1 to 3"),
        (6, (3, 2, 4), 3, {"max_loops": 3}, "loops from 2 to 4 were given: allowed are 1 to 3"),
        (
            6,
            (2, 2, 3),
            3,
            {},
            "loops begins with [2]: the first token comes from the prompt, whose rows run max_loops=3",
        ),
        (3, (1,), 0, {}, "prompt_length=[0] of [3] tokens: allowed is 1 or more, and fewer than there are tokens"),
        (3, (1,), 3, {}, "prompt_length=[3] of [3] tokens: allowed is 1 or more, and fewer than there are tokens"),
    ],
)
def test_refusals_are_one_line(
    tokens: int, loops: tuple[int, ...], prompt: int, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError) as error:
        tiny().score(torch.arange(tokens), loops, prompt, **changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_sequences_and_loops_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError, match=r"^tokens are \[3\], loops \[1, 1\]: give both for the same sequences$"):
        tiny().score((0, 1, 2), torch.tensor([[1]]), 2)


def test_an_unknown_policy_and_an_unfit_start_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy='single': allowed are per_loop, last_exited"):
        tiny().score((1, 2), (3,), 1, policy="single")
    with pytest.raises(ConfigError, match="start=3: this model starts from embeddings"):
        tiny().score((1, 2), (3,), 1, start_seed=3)
