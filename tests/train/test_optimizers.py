import copy
import itertools
import math

import pytest
import torch
from torch import nn

from loopwise.errors import CheckpointError, ConfigError
from loopwise.train.checkpoint import flatten, newest, save, unflatten
from loopwise.train.optimizers import (
    OptimizerConfig,
    WideMuon,
    build_optimizer,
    fused_blocks,
    gradient_norm,
    orthogonalize,
    role,
)

BLOCKS = fused_blocks(heads=2, kv_heads=1, head_width=4, mlp_width=12)
SHAPES = {
    "embed.weight": (20, 8),
    "core.0.attention.branch.qkv.weight": (16, 8),
    "core.0.attention.branch.qk_bias": (3, 4),
    "core.0.attention.branch.out.weight": (8, 8),
    "core.0.mlp.branch.gate_up.weight": (24, 8),
    "core.0.mlp.branch.down.weight": (8, 12),
    "core.0.experts.up": (3, 5, 8),
    "norm.weight": (8,),
    "gate.weight": (1, 8),
    "gate.bias": (1,),
    "head.weight": (20, 8),
}


def make_parameters(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in SHAPES.items()}


def fill_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def snapshot(parameters):
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def naive_adamw(parameter, gradients, rates, decay, betas=(0.9, 0.95), eps=1e-8):
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    value, first, second = parameter.double().clone(), 0.0, 0.0
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        value = value - rate * decay * value
        value = value - rate * (first / (1 - betas[0] ** t)) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
    return value


def naive_polar(matrix):
    """Five steps of the quintic Newton-Schulz iteration, on singular values, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


def naive_muon(matrix, gradients, rates, decay, momentum=0.95):
    """Jordan 2024 with the update scale of Liu et al. 2025, equation 4."""
    value, buffer = matrix.double().clone(), torch.zeros_like(matrix, dtype=torch.float64)
    for gradient, rate in zip(gradients, rates, strict=True):
        buffer = momentum * buffer + (1 - momentum) * gradient
        update = naive_polar((1 - momentum) * gradient + momentum * buffer)
        value = (1 - rate * decay) * value - rate * 0.2 * math.sqrt(max(matrix.shape)) * update
    return value


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embed.weight", "embedding"),
        ("head.weight", "head"),
        ("gate.weight", "gate"),
        ("gate.bias", "vector"),
        ("core.0.attention.branch.qk_bias", "vector"),
        ("core.0.mlp.branch.gate_up.weight", "matrix"),
        ("norm.weight", "vector"),
        ("core.0.experts.up", "matrix"),
    ],
)
def test_roles(name, expected):
    assert role(name, torch.zeros(SHAPES[name])) == expected


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_adamw_against_the_formula(decay_embeddings):
    parameters = make_parameters()
    before = snapshot(parameters)
    optimizer = build_optimizer(
        parameters.items(), OptimizerConfig(clip=None, weight_decay=0.1, decay_embeddings=decay_embeddings)
    )
    gradients, rates = {name: [] for name in parameters}, [1e-2, 2e-2, 5e-3]
    for seed, rate in enumerate(rates):
        fill_gradients(parameters, seed)
        for name, parameter in parameters.items():
            gradients[name].append(parameter.grad.clone())
        report = optimizer.step(rate)
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
        assert report.gradient_norm == pytest.approx(float(flat.norm()), rel=1e-12)
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters.values())
    undecayed = {"core.0.attention.branch.qk_bias", "norm.weight", "gate.weight", "gate.bias"}
    undecayed |= set() if decay_embeddings else {"embed.weight"}
    for name, parameter in parameters.items():
        expected = naive_adamw(before[name], gradients[name], rates, 0.0 if name in undecayed else 0.1)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-12)


def test_muon_treats_each_logical_matrix_alone():
    parameters = make_parameters()
    before = snapshot(parameters)
    config = OptimizerConfig(name="muon", clip=None, muon_scale=0.5)
    optimizer = build_optimizer(parameters.items(), config, blocks=BLOCKS)
    gradients, rates = {name: [] for name in parameters}, [1e-2, 3e-2, 1e-2]
    for seed, rate in enumerate(rates):
        fill_gradients(parameters, seed)
        for name, parameter in parameters.items():
            gradients[name].append(parameter.grad.clone())
        optimizer.step(rate)
    muon_rates = [0.5 * rate for rate in rates]

    def expected_rows(name, start, stop):
        return naive_muon(before[name][start:stop], [g[start:stop] for g in gradients[name]], muon_rates, 0.1)

    def close(actual, expected):
        torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=1e-11)

    for name, cuts in (
        ("core.0.attention.branch.qkv.weight", (0, 8, 12, 16)),
        ("core.0.mlp.branch.gate_up.weight", (0, 12, 24)),
        ("core.0.attention.branch.out.weight", (0, 8)),
        ("core.0.mlp.branch.down.weight", (0, 8)),
    ):
        for start, stop in itertools.pairwise(cuts):
            close(parameters[name][start:stop], expected_rows(name, start, stop))
    for expert in range(3):
        name = "core.0.experts.up"
        close(
            parameters[name][expert],
            naive_muon(before[name][expert], [g[expert] for g in gradients[name]], muon_rates, 0.1),
        )
    for name, decay in (("embed.weight", 0.0), ("head.weight", 0.1), ("gate.weight", 0.0), ("norm.weight", 0.0)):
        close(parameters[name], naive_adamw(before[name], gradients[name], rates, decay))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (11, 5), (1, 7)])
def test_newton_schulz_in_float32_against_singular_values(shape):
    torch.manual_seed(3)
    matrix = torch.randn(shape)
    result = orthogonalize(matrix)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), naive_polar(matrix), rtol=0, atol=3e-5)
    assert orthogonalize(matrix.bfloat16()).dtype == torch.float32
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def test_the_wide_muon_is_torchs_up_to_bfloat16():
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(12, 20))
    theirs = nn.Parameter(ours.detach().clone())
    options = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    pair = [(ours, WideMuon([ours], **options)), (theirs, torch.optim.Muon([theirs], **options))]
    start = ours.detach().clone()
    for _ in range(3):
        gradient = torch.randn(12, 20)
        for parameter, optimizer in pair:
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (ours.detach() - start).norm()
    assert float((ours.detach() - theirs.detach()).norm() / moved) < 0.03
    buffers = [optimizer.state[parameter] for parameter, optimizer in pair]
    assert buffers[0].keys() == buffers[1].keys()
    assert torch.equal(buffers[0]["momentum_buffer"], buffers[1]["momentum_buffer"])


def test_a_matrix_that_moved_elsewhere_is_still_trained():
    parameters = make_parameters()
    optimizer = build_optimizer(parameters.items(), OptimizerConfig(name="muon"), blocks=BLOCKS)
    parameter = parameters["core.0.attention.branch.qkv.weight"]
    parameter.data = parameter.data.clone()
    before = parameter.detach().clone()
    fill_gradients(parameters, 0)
    optimizer.step(1e-2)
    assert bool((parameter != before).all())


def test_clipping_scales_to_the_norm_and_only_when_above():
    for clip, scaled in ((0.5, True), (1e9, False)):
        parameters = make_parameters()
        optimizer = build_optimizer(parameters.items(), OptimizerConfig(clip=clip))
        fill_gradients(parameters, 0)
        before = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        norm = optimizer.step(1e-3).gradient_norm
        for name, parameter in parameters.items():
            expected = before[name] * (clip / norm) if scaled else before[name]
            assert torch.equal(parameter.grad, expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["embed.weight", "core.0.attention.branch.qkv.weight", "gate.bias"])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(name, poison, where):
    parameters = make_parameters(torch.float32)
    optimizer = build_optimizer(parameters.items(), OptimizerConfig(name=name), blocks=BLOCKS)
    fill_gradients(parameters, 0)
    assert not optimizer.step(1e-2).skipped
    before, state = snapshot(parameters), copy.deepcopy(optimizer.state())
    fill_gradients(parameters, 1)
    parameters[where].grad.view(-1)[0] = poison
    report = optimizer.step(1e-2)
    assert report.skipped
    assert not math.isfinite(report.gradient_norm)
    assert optimizer.skipped == 1
    for key, parameter in parameters.items():
        assert torch.equal(parameter.detach(), before[key])
    after = optimizer.state()
    assert after["moments"].keys() == state["moments"].keys()
    for key, moments in state["moments"].items():
        for kind, tensor in moments.items():
            assert torch.equal(after["moments"][key][kind], tensor)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resuming_from_disk_continues_bit_for_bit(tmp_path, name):
    config = OptimizerConfig(name=name)

    def run(parameters, optimizer, steps):
        for step in steps:
            fill_gradients(parameters, step)
            if step == 1:
                parameters["embed.weight"].grad[0, 0] = math.nan
            optimizer.step(1e-2 / (step + 1))

    whole = make_parameters(torch.float32)
    run(whole, build_optimizer(whole.items(), config, blocks=BLOCKS), range(6))

    first = make_parameters(torch.float32)
    optimizer = build_optimizer(first.items(), config, blocks=BLOCKS)
    run(first, optimizer, range(3))
    flat = flatten(optimizer.state(), "optimizer")
    save(tmp_path, 3, {**flat.tensors, **first}, {"optimizer": flat.skeleton})

    found = newest(tmp_path)
    assert found is not None
    second = {key: nn.Parameter(found.tensors[key].clone()) for key in SHAPES}
    optimizer = build_optimizer(second.items(), config, blocks=BLOCKS)
    optimizer.load_state(unflatten(found.tensors, found.meta["optimizer"]))
    stored = {key: tensor.clone() for key, tensor in found.tensors.items()}
    run(second, optimizer, range(3, 6))
    assert optimizer.skipped == 1
    for key in SHAPES:
        assert torch.equal(second[key], whole[key])
    # Training went on without writing into the checkpoint's tensors.
    assert all(torch.equal(found.tensors[key], stored[key]) for key in stored)


def test_a_state_keeps_the_rates_of_the_new_configuration():
    parameters = make_parameters()
    old = build_optimizer(parameters.items(), OptimizerConfig(weight_decay=0.5, betas=(0.5, 0.5)))
    fill_gradients(parameters, 0)
    old.step(0.0)
    before = snapshot(parameters)
    new = build_optimizer(parameters.items(), OptimizerConfig(weight_decay=0.0))
    new.load_state(old.state())
    fill_gradients(parameters, 1)
    for parameter in parameters.values():
        parameter.grad.zero_()
    new.step(1.0)
    # First moment: 0.9 of the old one over 1 - 0.9^2; no decay.
    moments = old.state()["moments"]["norm.weight"]
    first, second = 0.9 * moments["exp_avg"] / (1 - 0.9**2), 0.95 * moments["exp_avg_sq"] / (1 - 0.95**2)
    expected = before["norm.weight"] - first / (second.sqrt() + 1e-8)
    torch.testing.assert_close(parameters["norm.weight"].detach(), expected, rtol=0, atol=1e-12)


def test_a_state_of_other_parameters_is_refused():
    parameters = make_parameters()
    adamw = build_optimizer(parameters.items(), OptimizerConfig())
    muon = build_optimizer(parameters.items(), OptimizerConfig(name="muon"), blocks=BLOCKS)
    with pytest.raises(CheckpointError, match="other parameters"):
        muon.load_state(adamw.state())


def test_frozen_parameters_and_missing_gradients_stay():
    parameters = make_parameters()
    parameters["embed.weight"].requires_grad_(False)
    optimizer = build_optimizer(parameters.items(), OptimizerConfig(name="muon"), blocks=BLOCKS)
    before = snapshot(parameters)
    assert optimizer.step(1e-2).gradient_norm == 0.0
    parameters["gate.bias"].grad = torch.ones(1, dtype=torch.float64)
    optimizer.step(1e-2)
    changed = {name for name in parameters if not torch.equal(parameters[name].detach(), before[name])}
    assert changed == {"gate.bias"}


def test_low_precision_weights_have_their_norm_taken_in_float32():
    gradient = torch.full((4096,), 1e-2, dtype=torch.bfloat16)
    assert gradient_norm([gradient]) == pytest.approx(float(gradient.double().norm()), rel=1e-6)
    parameter = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer([("a.weight", parameter)], OptimizerConfig(name="muon"))
    optimizer.step(0.1)
    assert parameter.dtype == torch.bfloat16
    assert bool((parameter < 1).any())


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "sgd"},
        {"eps": 0.0},
        {"muon_scale": math.inf},
        {"betas": (0.9, 1.0)},
        {"weight_decay": -0.1},
        {"clip": 0.0},
        {"muon_momentum": 0.9},
        {"name": "muon", "muon_scale": -1.0},
    ],
)
def test_wrong_settings_are_refused_in_one_line(wrong):
    with pytest.raises(ConfigError) as error:
        OptimizerConfig(**wrong)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("optimizer.")


def test_what_cannot_be_built_is_refused():
    parameters = make_parameters()
    with pytest.raises(ConfigError, match="add up to 15"):
        build_optimizer(parameters.items(), OptimizerConfig(name="muon"), blocks={"qkv.weight": (5, 5, 5)})
    with pytest.raises(ConfigError, match="no parameter is named"):
        build_optimizer(parameters.items(), OptimizerConfig(name="muon"), blocks={"kv.weight": (8, 8)})
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter requires a gradient"):
        build_optimizer(parameters.items(), OptimizerConfig())
