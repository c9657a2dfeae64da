"""Numbers of parameters, operations and bytes, against the published figures and against real modules."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loopwise.errors import ConfigError
from loopwise.models.accounting import count_flops, count_parameters, count_planes, kv_bytes
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM

OURO_1_4B = LoopedLMConfig(
    vocab_size=49152,
    width=2048,
    heads=16,
    kv_heads=16,
    head_width=128,
    mlp_width=5632,
    core_layers=24,
    loops=4,
    trained_loops=(1, 4),
    max_positions=65536,
    norm="pre_branch",
    loop_norm=True,
    final_norm=False,
    gate=True,
)
HUGINN = LoopedLMConfig(
    vocab_size=65536,
    width=5280,
    heads=55,
    kv_heads=55,
    head_width=96,
    mlp_width=17920,
    prelude_layers=2,
    core_layers=4,
    coda_layers=2,
    loops=32,
    trained_loops=(1, 64),
    max_positions=4096,
    norm="pre_post",
    coda_norm=True,
    rotary="interleaved",
    qk_bias=True,
    tied_head=True,
    start="normal",
    injection="adapter",
)
SMALL = LoopedLMConfig(
    vocab_size=101,
    width=24,
    heads=6,
    kv_heads=2,
    head_width=6,
    mlp_width=40,
    prelude_layers=1,
    core_layers=3,
    coda_layers=2,
    loops=5,
    trained_loops=(1, 5),
    max_positions=64,
)


def test_ouro_as_published() -> None:
    assert count_parameters(OURO_1_4B).stored == 1_434_652_673
    larger = dataclasses.replace(OURO_1_4B, core_layers=48)
    assert count_parameters(larger).stored == 2_667_974_657
    assert kv_bytes(OURO_1_4B, "per_loop", loops=4, bytes_per_number=2) == 786_432
    assert kv_bytes(OURO_1_4B, "single", loops=4, bytes_per_number=2) == 196_608
    assert kv_bytes(larger, "per_loop", loops=4, bytes_per_number=2) == 1_572_864
    assert kv_bytes(larger, "single", loops=4, bytes_per_number=2) == 393_216


def test_huginn_as_published() -> None:
    count = count_parameters(HUGINN)
    assert count.stored == 3_564_976_800
    assert (count.core, count.prelude + count.coda, count.embedding) == (1_637_349_120, 1_581_592_320, 346_030_080)
    assert kv_bytes(HUGINN, "per_loop", loops=32, bytes_per_number=2) == 132 * 21_120
    assert kv_bytes(HUGINN, "single", loops=32, bytes_per_number=2) == 8 * 21_120
    # The authors' counter says 0.11 TFLOP per token at 32 loops.
    assert count_flops(HUGINN).total(32) == pytest.approx(0.11e12, rel=0.02)


VARIANTS: list[dict[str, object]] = [
    {},
    {"norm": "branch", "qk_norm": True, "tied_head": True},
    {"norm": "pre_branch", "gate": True, "injection": "adapter", "adapter_bias": True},
    {"norm": "pre_post", "qk_bias": True, "injection": "add", "prelude_layers": 0},
    {"norm": "post", "injection": "adapter", "start": "normal", "coda_layers": 0},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "plain")
def test_counts_equal_the_module(changes: dict[str, object]) -> None:
    config = dataclasses.replace(SMALL, **changes)
    with torch.device("meta"):
        model = LoopedLM(config)
    count = count_parameters(config)
    assert count.stored == sum(parameter.numel() for parameter in model.parameters())
    assert count.core == sum(
        parameter.numel() for name, parameter in model.named_parameters() if name.startswith(("core.", "adapter."))
    )
    assert count.unrolled(1) == count.stored
    assert count.unrolled(4) == count.stored + 3 * count.core


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "plain")
@pytest.mark.parametrize("loops", [1, 3])
def test_flops_equal_what_torch_counts(changes: dict[str, object], loops: int) -> None:
    config = dataclasses.replace(SMALL, **changes)
    model = LoopedLM(config)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(_MATH):
        # torch counts its own operations; it has them all where padding may be.
        model(tokens, loops=loops, collect=("signals",), padding_mask=torch.ones(1, 8, dtype=torch.bool))
    # Without a mask skip, each of the 8 tokens is scored against all 8 keys.
    assert counter.get_total_flops() == 8 * count_flops(config, context=8).total(loops)


_MATH = torch.nn.attention.SDPBackend.MATH


def test_bound_is_full_work_over_mean_work() -> None:
    flops = count_flops(OURO_1_4B)
    assert flops.per_loop == pytest.approx(2 * 1.233e9, rel=1e-3)
    assert flops.bound(4, 4) == 1
    assert flops.bound(4, 2.5) == pytest.approx((0.2013 + 4 * 2.4662) / (0.2013 + 2.5 * 2.4662), rel=1e-3)


def test_last_exited_keeps_a_plane_for_each_loop_that_ran() -> None:
    per_layer = 2 * 16 * 128 * 2
    assert kv_bytes(OURO_1_4B, "last_exited", loops=4, mean_loops=2.5, bytes_per_number=2) == 24 * 2.5 * per_layer
    assert kv_bytes(OURO_1_4B, "per_loop", loops=4, mean_loops=2.5, bytes_per_number=2) == 24 * 4 * per_layer
    assert count_planes("single", loops=5, mean_loops=2.0) == 1
    assert count_planes("last_exited", loops=5, mean_loops=2.0, generated=False) == 5


@pytest.mark.parametrize(
    ("policy", "prompt", "answer"),
    [
        ("per_loop", 5, 5),
        ("collapse", 1, 1),
        ("decode_shared", 5, 1),
        ("single", 1, 1),
        ("average:per_position", 1, 1),
        ("first_then_shared", 2, 2),
        ("modulo:3", 3, 3),
        ("modulo:7", 5, 5),
    ],
)
def test_what_policies_keep(policy: str, prompt: int, answer: int) -> None:
    assert count_planes(policy, loops=5, generated=False) == prompt
    assert count_planes(policy, loops=5) == answer
    assert count_planes(policy, loops=5, mean_loops=1) == (5 if policy == "per_loop" else 1)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"allowed are per_loop, last_exited, collapse"):
        count_planes("modulo", loops=5)
    with pytest.raises(ConfigError, match="allowed is 1 to loops=5"):
        count_planes("last_exited", loops=5, mean_loops=6.0)
