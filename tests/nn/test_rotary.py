"""Rotary tables and rotation against complex numbers and against transformers' own stretching."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loopwise.nn.rotary import RotaryScaling, rotary_tables, rotate


@given(
    factor=st.sampled_from([2.0, 8.0, 32.0]),
    low=st.sampled_from([0.5, 1.0, 2.0]),
    span=st.sampled_from([0.5, 3.0]),
    original=st.sampled_from([64, 1000, 8192]),
    base=st.sampled_from([100.0, 10_000.0, 500_000.0]),
)
@settings(max_examples=settings().max_examples * 3 // 10)
def test_llama3_stretching_is_transformers(factor: float, low: float, span: float, original: int, base: float) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + span,
        "original_max_position_embeddings": original,
    }
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=4 * original, rope_parameters=rope
    )
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert scale == 1.0
    scaling = RotaryScaling(
        factor=factor, low_frequency_factor=low, high_frequency_factor=low + span, original_positions=original
    )
    plain = 1.0 / base ** (torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(scaling.stretch(plain), expected, rtol=1e-5, atol=0)
    if base > 100.0:
        assert not torch.allclose(plain, expected, rtol=1e-2)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotation_is_multiplication_by_a_complex_number(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=generator)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 9, 100, 4000]])
    rotary = rotary_tables(positions, 8, 10_000.0, torch.float64)
    rotated = rotate(x, rotary, layout)
    frequencies = torch.tensor([10_000.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    turn = torch.polar(torch.ones(2, 5, 4, dtype=torch.float64), positions[..., None] * frequencies)[:, :, None]
    first, second = (slice(0, 4), slice(4, 8)) if layout == "half" else (slice(0, 8, 2), slice(1, 8, 2))
    expected = torch.complex(x[..., first], x[..., second]) * turn
    torch.testing.assert_close(rotated[..., first], expected.real, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotated[..., second], expected.imag, rtol=0, atol=1e-12)


def test_tables_are_float32_for_narrow_models_and_the_answer_is_narrow() -> None:
    rotary = rotary_tables(torch.arange(3), 4, 10_000.0, torch.bfloat16)
    assert rotary.cos.dtype == rotary.sin.dtype == torch.float32
    assert rotate(torch.ones(3, 1, 4, dtype=torch.bfloat16), rotary, "half").dtype == torch.bfloat16
    assert rotary_tables(torch.arange(3), 4, 10_000.0, torch.float64).cos.dtype == torch.float64
