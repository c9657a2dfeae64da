"""Deeper cores made of copies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwise.errors import ConfigError
from loopwise.hub.checkpoints import load, save
from loopwise.hub.upcycle import copy_order, upcycle
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM, initialise


def test_orders() -> None:
    assert copy_order(3, 6) == [0, 1, 2, 0, 1, 2]
    assert copy_order(3, 6, "repeat") == [0, 0, 1, 1, 2, 2]
    assert copy_order(2, 6, "stack") == [0, 1, 0, 1, 0, 1]
    assert copy_order(2, 6, "repeat") == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("layers", [25, 24, 12, 0, -24])
def test_numbers_that_are_no_multiple(layers: int) -> None:
    with pytest.raises(ConfigError, match="the core has 24; allowed are its multiples, 48 for one"):
        copy_order(24, layers)


def test_unknown_order() -> None:
    with pytest.raises(ConfigError, match="order='mirror': allowed are stack, repeat"):
        copy_order(24, 48, "mirror")


@pytest.mark.parametrize("order", ["stack", "repeat"])
def test_ouro_grows(order: str, golden: Path, tmp_path: Path) -> None:
    small = load(golden / "ouro-tiny")
    large = upcycle(small, 6, order)
    assert large.config.core_layers == 6
    old, new = dict(small.named_parameters()), dict(large.named_parameters())
    for place, layer in enumerate(copy_order(3, 6, order)):
        for leaf in ("attention.branch.qkv.weight", "mlp.norm_out.weight", "mlp.branch.down.weight"):
            assert torch.equal(new[f"core.{place}.{leaf}"], old[f"core.{layer}.{leaf}"])
    for name in ("embed.weight", "head.weight", "norm.weight", "gate.bias"):
        assert torch.equal(new[name], old[name])
        assert new[name].data_ptr() != old[name].data_ptr()

    save(large, tmp_path)
    raw, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, golden / "ouro-tiny"))
    assert {key for key in before if before[key] != raw[key]} == {"num_hidden_layers"}
    again = load(tmp_path)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, large(tokens).logits)


def test_layer_types_of_newer_config_files_grow_too(copy: Any, tmp_path: Path) -> None:
    folder = copy("ouro-tiny")
    folder.configure(layer_types=["full_attention"] * 3)
    save(upcycle(load(folder.path), 6), tmp_path / "large")
    assert json.loads((tmp_path / "large" / "config.json").read_text())["layer_types"] == ["full_attention"] * 6


@torch.no_grad()
def test_a_stack_of_two_is_twice_the_loops() -> None:
    config = LoopedLMConfig(
        vocab_size=31,
        width=16,
        heads=4,
        kv_heads=2,
        head_width=4,
        mlp_width=24,
        prelude_layers=1,
        core_layers=2,
        coda_layers=1,
        loops=3,
        trained_loops=(1, 8),
        max_positions=32,
    )
    small = LoopedLM(config).double().eval()
    initialise(small, seed=5)
    tokens = torch.arange(10)[None]
    stacked, repeated = upcycle(small, 4), upcycle(small, 4, "repeat")
    for loops in (1, 3):
        expected = small(tokens, loops=2 * loops).logits
        assert torch.allclose(stacked(tokens, loops=loops).logits, expected, rtol=0, atol=1e-12)
        assert not torch.allclose(repeated(tokens, loops=loops).logits, expected, rtol=0, atol=1e-6)
