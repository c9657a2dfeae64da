"""Norms, attention and blocks where `LoopedLM` as a whole would not show a mistake."""

import pytest
import torch

from loopwise.nn.attention import attend_dense
from loopwise.nn.norms import RMSNorm


def test_norm_statistics_are_float32_in_a_narrow_model() -> None:
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)).bfloat16() * 7
    out = RMSNorm(512, 1e-6).bfloat16()(x)
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    assert out.dtype == torch.bfloat16
    # A scale rounded to bfloat16 first would be off by up to 0.4% in a whole row.
    assert float((out == exact.bfloat16()).double().mean()) > 0.999


def test_eps_stands_inside_the_root() -> None:
    norm = RMSNorm(2, 1.0).double()
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(norm(x), x / 13.5**0.5, rtol=1e-15, atol=0)
    assert torch.equal(norm(torch.zeros(2, dtype=torch.float64)), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("masked", [False, True])
def test_query_heads_share_key_heads_in_order(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 6, 4, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64, generator=generator)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    out = attend_dense(q, k, v, mask[None, None] if masked else None)
    for head in range(6):
        scores = torch.einsum("bqk,btk->bqt", q[:, :, head], k[:, :, head // 2]) / 2
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        torch.testing.assert_close(out[:, :, head], weights @ v[:, :, head // 2], rtol=0, atol=1e-12)
