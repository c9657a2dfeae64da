"""LoopedLM against a second implementation of the same formulas, token by token and head by head."""

import runpy
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.errors import ConfigError, InputError
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM, initialise
from loopwise.nn.block import NORM_LAYOUTS
from loopwise.nn.rotary import RotaryScaling

naive = runpy.run_path(str(Path(__file__).with_name("naive_lm.py")))
SHAPES, NaiveLM, tiny = naive["SHAPES"], naive["NaiveLM"], naive["tiny"]
TOKENS = torch.tensor([[3, 1, 22, 7, 7, 0], [5, 5, 9, 14, 2, 8]])


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test run's own type checks off, so that a wrong word gets as far as it does for a user."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def assert_equals_naive(model: LoopedLM, tokens: torch.Tensor, loops: int, start: object = None) -> None:
    with torch.no_grad():
        out = model(tokens, loops=loops, collect=("logits", "states", "signals"), start=start)
    assert torch.equal(out.logits, out.loop_logits[-1])
    for batch, sequence in enumerate(tokens.tolist()):
        given_start = start[batch].numpy() if isinstance(start, torch.Tensor) else start
        reference = NaiveLM(model)
        rows = reference.run(sequence, loops=loops, start=given_start)
        for loop in range(1, loops + 1):
            states = [row.states[loop] for row in rows]
            np.testing.assert_allclose(out.loop_states[loop - 1, batch], np.stack(states), rtol=0, atol=1e-10)
            np.testing.assert_allclose(
                out.loop_logits[loop - 1, batch], reference.read_out_all(states), rtol=0, atol=1e-10
            )
            if model.config.gate:
                hazards = [row.hazards[loop - 1] for row in rows]
                np.testing.assert_allclose(out.loop_signals[loop - 1, batch], hazards, rtol=0, atol=1e-12)
    assert (out.loop_signals is None) == (not model.config.gate)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_loop_equals_the_formula(shape: str) -> None:
    assert_equals_naive(tiny(shape, seed=len(shape)), TOKENS, loops=4)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, object]:
    start = draw(st.sampled_from(["embeddings", "normal", "zeros"]))
    injection = draw(st.sampled_from(["none", "add", "adapter"] if start == "embeddings" else ["add", "adapter"]))
    heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (3, 3), (3, 1), (1, 1)]))
    scaling = RotaryScaling(
        factor=draw(st.sampled_from([0.5, 4.0, 32.0])),
        low_frequency_factor=draw(st.sampled_from([0.5, 1.0, 2.0])),
        original_positions=draw(st.sampled_from([16, 64])),
    )
    flags = ("loop_norm", "coda_norm", "final_norm", "qk_bias", "qk_norm", "tied_head", "adapter_bias", "gate")
    return {
        "start": start,
        "injection": injection,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": draw(st.sampled_from([2, 4, 6])),
        "core_layers": draw(st.integers(1, 2)),
        "prelude_layers": draw(st.integers(0, 2)),
        "coda_layers": draw(st.integers(0, 2)),
        "norm": draw(st.sampled_from(NORM_LAYOUTS)),
        "rotary": draw(st.sampled_from(["half", "interleaved"])),
        "rotary_base": draw(st.sampled_from([50.0, 10_000.0])),
        "rotary_scaling": draw(st.sampled_from([None, scaling])),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "embed_scale": draw(st.sampled_from([1.0, 3.5])),
        "start_seed": draw(st.integers(0, 5)),
        **{flag: draw(st.booleans()) for flag in flags},
    }


@given(shape=shapes(), loops=st.integers(1, 3), seed=st.integers(0, 9))
@settings(max_examples=settings().max_examples // 4)
def test_every_configuration_equals_the_formula(shape: dict[str, object], loops: int, seed: int) -> None:
    assert_equals_naive(tiny("llama", seed=seed, **shape), TOKENS[:, :4], loops)


class TestStart:
    def test_seed_zero_and_tensor(self) -> None:
        model = tiny("huginn", seed=1)
        state = torch.randn(2, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for start in (7, "zero", state):
            assert_equals_naive(model, TOKENS, loops=2, start=start)

    def test_a_model_without_random_start_takes_zero_and_tensor(self) -> None:
        for start in ("zero", torch.ones(2, 6, 16, dtype=torch.float64)):
            assert_equals_naive(tiny("universal"), TOKENS, loops=2, start=start)

    @pytest.mark.parametrize(("shape", "own"), [("ouro", "embeddings"), ("zeros", "zeros")])
    def test_a_seed_is_refused_where_nothing_is_drawn(self, shape: str, own: str) -> None:
        with pytest.raises(ConfigError, match=f"start=3: this model starts from {own}"):
            tiny(shape)(TOKENS, loops=1, start=3)

    @pytest.mark.usefixtures("unchecked")
    def test_other_words_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="an int seed"):
            tiny("huginn")(TOKENS, loops=1, start="random")

    def test_a_misshapen_state_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"\(2, 6, 16\)"):
            tiny("ouro")(TOKENS, loops=1, start=torch.ones(2, 5, 16))

    def test_training_draws_differ_by_sample_and_position_only(self) -> None:
        model = tiny("huginn")
        positions = torch.arange(3).expand(2, 3)
        draw = model.draw_start(positions, 0, samples=torch.tensor([[4], [9]]).expand(2, 3))
        assert not torch.equal(draw[0], draw[1])
        alone = model.draw_start(positions[:1, 1:], 0, samples=torch.full((1, 2), 9))
        assert torch.equal(alone[0], draw[1, 1:])


class TestGate:
    def test_bfloat16_model_computes_hazards_in_float32(self) -> None:
        model = tiny("ouro").bfloat16()
        out = model(TOKENS, loops=3, collect=("signals", "states"))
        assert out.logits.dtype == out.loop_states.dtype == torch.bfloat16
        assert out.loop_signals.dtype == torch.float32
        expected = torch.sigmoid(out.loop_states.float() @ model.gate.weight.float()[0] + model.gate.bias.float())
        torch.testing.assert_close(out.loop_signals, expected, rtol=1e-6, atol=1e-6)

    def test_autocast_does_not_narrow_it(self) -> None:
        model = tiny("ouro").float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(TOKENS, loops=3, collect=("signals", "states"))
        assert out.logits.dtype == torch.bfloat16
        assert out.loop_signals.dtype == torch.float32
        assert torch.equal(out.loop_signals, model.hazard(out.loop_states))

    def test_float64_stays_float64(self) -> None:
        assert tiny("ouro")(TOKENS, loops=1, collect=("signals",)).loop_signals.dtype == torch.float64

    def test_none_without_a_gate(self) -> None:
        model = tiny("llama")
        assert model.facts.signal is None
        assert model(TOKENS, loops=1, collect=("signals",)).loop_signals is None


class TestRefusals:
    def test_no_tokens(self) -> None:
        with pytest.raises(InputError, match="no tokens"):
            tiny()(torch.zeros(1, 0, dtype=torch.long))

    def test_too_many_tokens(self) -> None:
        with pytest.raises(InputError, match="context is 64"):
            tiny()(torch.zeros(1, 65, dtype=torch.long))

    @pytest.mark.parametrize("token", [-1, 23])
    def test_token_outside_the_vocabulary(self, token: int) -> None:
        with pytest.raises(InputError, match="allowed are 0 to 22"):
            tiny()(torch.tensor([[0, token]]))

    def test_no_loops(self) -> None:
        with pytest.raises(ConfigError, match="loops=0"):
            tiny()(TOKENS, loops=0)

    def test_unknown_option(self) -> None:
        with pytest.raises(TypeError, match="padding"):
            tiny().encode(TOKENS, padding=None)

    def test_masks_beside_a_memory(self) -> None:
        model = tiny()
        memory = model.encode(TOKENS).memory
        with pytest.raises(TypeError, match="memory"):
            model.encode(TOKENS, memory=memory, padding_mask=torch.ones_like(TOKENS, dtype=torch.bool))


class TestConfig:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"heads": 0}, "heads=0"),
            ({"coda_layers": -1}, "coda_layers=-1"),
            ({"norm": "sandwich"}, "allowed are pre, post"),
            ({"kv_heads": 3}, "multiple of kv_heads"),
            ({"head_width": 3}, "even"),
            ({"trained_loops": (3, 2)}, "trained_loops"),
            ({"start": "zeros"}, "never enter the loop"),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_refusals(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            LoopedLMConfig(**(naive["BASE"] | change))

    @pytest.mark.parametrize("change", [{"factor": 0.0}, {"low_frequency_factor": 5.0}, {"low_frequency_factor": 0.0}])
    def test_scaling_refusals(self, change: dict[str, float]) -> None:
        with pytest.raises(ConfigError, match="allowed are factor > 0"):
            RotaryScaling(**({"factor": 8.0} | change))


class TestInitialise:
    def test_a_function_of_the_seed_alone(self) -> None:
        first, second, third = (tiny("huginn", seed=seed).float() for seed in (1, 2, 3))
        for model, seed in ((first, 5), (second, 5), (third, 6)):
            initialise(model, seed=seed)
        for name, parameter in first.state_dict().items():
            assert torch.equal(parameter, second.state_dict()[name])
        assert not torch.equal(first.embed.weight, third.embed.weight)

    def test_the_gate_starts_at_one_half(self) -> None:
        model = tiny("ouro")
        initialise(model, seed=0)
        assert (model(TOKENS, loops=2, collect=("signals",)).loop_signals == 0.5).all()

    def test_sizes(self) -> None:
        model = LoopedLM(LoopedLMConfig(**(naive["BASE"] | {"width": 200, "mlp_width": 300, "embed_scale": 5.0})))
        initialise(model, seed=0)
        std = (2 / (5 * 200)) ** 0.5
        attention = model.core[0].attention.branch
        for weight, size in (
            (attention.qkv.weight, std),
            (attention.out.weight, std / (2 * 2 * 3) ** 0.5),
            (model.core[1].mlp.branch.down.weight, std / (2 * 2 * 3) ** 0.5),
            (model.embed.weight, 1 / 5),
            (model.head.weight, std),
        ):
            assert abs(float(weight.detach().std()) / size - 1) < 0.05


def test_autocast_leaves_the_hazard_in_float32() -> None:
    config = LoopedLMConfig(
        vocab_size=11,
        width=16,
        heads=2,
        kv_heads=2,
        head_width=8,
        mlp_width=16,
        core_layers=1,
        loops=2,
        trained_loops=(1, 2),
        max_positions=8,
        gate=True,
    )
    model = LoopedLM(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hazard = model.hazard(torch.randn(2, 3, 16))
    assert hazard is not None
    assert hazard.dtype == torch.float32
