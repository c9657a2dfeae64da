import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopwise.nn.neuron_models import NeuronModels

NEURONS, MEMORY, HIDDEN, ROWS = 5, 4, 3, 6


def made(hidden: int | None, *, norm: bool = False) -> NeuronModels:
    torch.manual_seed(0)
    models = NeuronModels(NEURONS, MEMORY, hidden, norm=norm, dropout=0.0).double()
    with torch.no_grad():
        for parameter in models.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return models


def one_by_one(models: NeuronModels, history: Tensor) -> Tensor:
    """Each neuron and row alone, through ordinary linear layers."""
    out = torch.zeros(NEURONS, ROWS, dtype=history.dtype)
    for neuron in range(NEURONS):
        for row in range(ROWS):
            x = history[neuron, :, row]
            for layer in models.layers:
                if layer.norm is not None:
                    x = F.layer_norm(x, x.shape, layer.norm.weight, layer.norm.bias)
                x = F.glu(F.linear(x, layer.weight[neuron], layer.bias[neuron]) / layer.temperature, dim=0)
            out[neuron, row] = x[0]
    return out


@pytest.mark.parametrize("hidden", [None, HIDDEN])
@pytest.mark.parametrize("norm", [False, True])
def test_all_neurons_at_once_equal_each_alone(hidden: int | None, norm: bool) -> None:
    models = made(hidden, norm=norm)
    history = torch.randn(NEURONS, MEMORY, ROWS, dtype=torch.float64)
    found, expected = models(history), one_by_one(models, history)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), models.parameters()),
        torch.autograd.grad((expected * weights).sum(), models.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_neurons_share_nothing() -> None:
    models = made(HIDDEN)
    history = torch.randn(NEURONS, MEMORY, ROWS, dtype=torch.float64)
    before = models(history)
    history[2] += 1.0
    changed = (models(history) != before).any(1)
    assert changed.tolist() == [False, False, True, False, False]


def test_dropout_acts_in_training_alone() -> None:
    models = NeuronModels(NEURONS, MEMORY, HIDDEN, norm=False, dropout=0.5)
    history = torch.randn(NEURONS, MEMORY, ROWS)
    assert not torch.equal(models(history), models(history))
    models.eval()
    assert torch.equal(models(history), models(history))
