import torch
from torch import nn

from loopwise.nn.cross_attention import CrossAttention


def test_equals_torchs_multihead_attention_with_keys_projected_once() -> None:
    torch.manual_seed(0)
    ours = CrossAttention(12, 3, dropout=0.0).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        three = (ours.query, ours.key, ours.value)
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in three]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in three]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    features = torch.randn(4, 7, 12, dtype=torch.float64)
    memories = ours.remember(features)
    for _ in range(2):
        query = torch.randn(4, 12, dtype=torch.float64)
        expected, weights = theirs(query[:, None], features, features, average_attn_weights=False)
        torch.testing.assert_close(ours(query, memories), expected[:, 0])
        torch.testing.assert_close(ours.weights(query, memories), weights[:, :, 0])


def test_heads_begin_as_torchs_do() -> None:
    torch.manual_seed(0)
    ours, theirs = CrossAttention(256, 4, dropout=0.0), nn.MultiheadAttention(256, 4)
    spread = torch.cat([layer.weight for layer in (ours.query, ours.key, ours.value)]).std()
    torch.testing.assert_close(spread, theirs.in_proj_weight.std(), rtol=0.02, atol=0.0)
    assert not ours.query.bias.any()
