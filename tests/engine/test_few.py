"""Launches of few rows in two calls, against the model's own modules; float64."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loopwise.engine.answer import Completion
from loopwise.engine.choosing import Draw, choose_batch
from loopwise.engine.costs import measure_ticks
from loopwise.engine.engine import Engine
from loopwise.engine.sampling import Sampling
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.kernels import why_no_cpu_kernels
from loopwise.nn.kernels.launch import load_launch_kernels

tiny: Callable[..., LoopedLM] = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]
pytestmark = pytest.mark.skipif(not load_launch_kernels(), reason=f"no kernels: {why_no_cpu_kernels()}")
PROMPTS = [[1, 2, 3, 4, 5], [7, 6]]
SERVED = ("llama", "ouro", "retrofitted-llama", "universal", "zeros")


def answers(model: LoopedLM, settings: Sampling, *, few: bool, speculate: str, policy: str) -> list[Completion]:
    engine = Engine(model, policy, speculate=speculate, memory="1MiB")
    if few:
        assert engine._core.runner._few is not None
    else:
        engine._core.runner._few = None
    done = engine.generate(PROMPTS, settings, signals=model.facts.signal is not None)
    engine.check_idle()
    return done


def agree(found: list[Completion], wanted: list[Completion]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.tokens, mine.loops) == (theirs.tokens, theirs.loops)
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-10)
        for hazards, others in zip(mine.signals, theirs.signals, strict=True):
            assert hazards == pytest.approx(others, abs=1e-10)


@pytest.mark.parametrize("shape", SERVED)
@pytest.mark.parametrize(("policy", "temperature"), [("last_exited", 0.8), ("per_loop", 0.0)])
def test_answers_are_those_of_the_modules(shape: str, policy: str, temperature: float) -> None:
    model = tiny(shape)
    for rule in [None, "delta:0.3", *(["hazard:0.6"] if model.config.gate else [])]:
        settings = Sampling(max_tokens=8, temperature=temperature, seed=3, exit=rule)
        wanted = answers(model, settings, few=False, speculate="off", policy=policy)
        for speculate in ("off", "1"):
            agree(answers(model, settings, few=True, speculate=speculate, policy=policy), wanted)


@pytest.mark.parametrize("norm", ["pre", "post", "branch", "pre_branch", "pre_post"])
@pytest.mark.parametrize(
    "changes", [{"rotary": "interleaved", "final_norm": False}, {"coda_norm": True, "kv_heads": 1}]
)
def test_every_layout_of_norms(norm: str, changes: dict[str, object]) -> None:
    model = tiny("ouro", norm=norm, **changes)
    settings = Sampling(max_tokens=5, temperature=1.0)
    sides = [answers(model, settings, few=few, speculate="off", policy="last_exited") for few in (True, False)]
    agree(*sides)


@pytest.mark.parametrize("change", [{"qk_bias": True}, {"qk_norm": True}])
def test_other_models_are_left_to_their_modules(change: dict[str, object]) -> None:
    assert Engine(tiny("ouro", **change), memory="1MiB")._core.runner._few is None


def test_what_was_hung_on_a_module_is_not_passed_by() -> None:
    model = tiny("ouro")
    model.core[0].register_forward_hook(lambda *_: None)
    assert Engine(model, memory="1MiB")._core.runner._few is None
    assert Engine(tiny("ouro").bfloat16(), memory="1MiB")._core.runner._few is None
    assert Engine(tiny("ouro"), "average", chunk=None, prefix_cache=False, memory="1MiB")._core.runner._few is None


def test_weights_that_are_put_elsewhere_are_found() -> None:
    model, other = tiny("ouro"), tiny("ouro", seed=1)
    engine = Engine(model, memory="1MiB", prefix_cache=False)
    engine.generate(PROMPTS, Sampling(max_tokens=3))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()
    agree(
        engine.generate(PROMPTS, Sampling(max_tokens=6), signals=True),
        answers(other, Sampling(max_tokens=6), few=False, speculate="off", policy="per_loop"),
    )
    model.float()
    with pytest.raises(RuntimeError, match="changed their type"):
        engine.generate([[5]], Sampling(max_tokens=3))


def test_long_answers_outgrow_the_tables() -> None:
    model = tiny("ouro", max_positions=400, core_layers=1, loops=2)
    settings = Sampling(max_tokens=290, temperature=1.0, ignore_eos=True)
    sides = [answers(model, settings, few=few, speculate="off", policy="last_exited") for few in (True, False)]
    agree(*sides)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
def test_tokens_are_those_of_the_batch(temperature: float) -> None:
    model = tiny("ouro", vocab_size=5000)
    few = Engine(model, memory="1MiB")._core.runner._few
    assert few is not None
    states = torch.randn(9, model.config.width, dtype=torch.float64)
    rows = [
        Draw(sampling=Sampling(temperature=temperature, seed=seed), position=10 * seed + 1, sample=seed % 3)
        for seed in range(9)
    ]
    numbers: list[int | float] = []
    for place, row in enumerate(rows):
        numbers += (place, place % 2, row.sampling.key, row.sample, row.position, temperature)
    tokens, logprobs = few.say(states, numbers)
    wanted = choose_batch(states @ model.head_weight.detach().T, rows)
    assert tokens == wanted.tokens.tolist()
    told = [logprob if place % 2 else 0.0 for place, logprob in enumerate(wanted.logprobs.tolist())]
    assert logprobs == pytest.approx(told, abs=1e-10)


@pytest.mark.parametrize("shape", ["ouro", "huginn"])
def test_ticks_of_any_size_are_measured(shape: str) -> None:
    for read in (True, False):
        curve = measure_ticks(tiny(shape), 8, context=20, read=read)
        assert curve.rows[0] == 1
        assert curve.rows[-1] > 16
        assert all(0 < less <= more for less, more in zip(curve.seconds, curve.seconds[1:], strict=False))
