"""Walking nests of tensors, and what the protocol gives a model for free."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loopwise.loops.protocol import first_tensor, flat_state, scatter, select, stack, tree_map


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Nest:
    pair: Pair
    parts: list[Tensor]
    table: dict[str, Tensor]
    name: str = "kept"


def nest(rows: int, seed: int = 0) -> Nest:
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = (torch.randn(rows, *shape, generator=generator) for shape in ((), (2,), (3, 1), (4,)))
    return Nest(Pair(a, b), [c], {"d": d})


def leaves(tree: Nest) -> list[Tensor]:
    return [*tree.pair, *tree.parts, *tree.table.values()]


def test_tree_map_keeps_the_kind_of_every_nest() -> None:
    doubled = tree_map(lambda tensor: tensor * 2, nest(3))
    assert isinstance(doubled.pair, Pair)
    assert doubled.name == "kept"
    for old, new in zip(leaves(nest(3)), leaves(doubled), strict=True):
        assert torch.equal(new, old * 2)


@given(st.lists(st.integers(0, 4), max_size=5, unique=True), st.integers(0, 9))
def test_scatter_undoes_select(index: list[int], seed: int) -> None:
    rows = torch.tensor(index, dtype=torch.long)
    whole, other = nest(5, seed), nest(5, seed + 1)
    expected = [leaf.clone() for leaf in leaves(other)]
    scatter(other, select(whole, rows), rows)
    for leaf, before, source in zip(leaves(other), expected, leaves(whole), strict=True):
        for row in range(5):
            assert torch.equal(leaf[row], source[row] if row in index else before[row])


def test_stack_adds_one_leading_axis_to_every_tensor() -> None:
    trees = [nest(3, seed) for seed in range(4)]
    stacked = stack(trees)
    for number, tree in enumerate(trees):
        for leaf, part in zip(leaves(stacked), leaves(tree), strict=True):
            assert leaf.shape == (4, *part.shape)
            assert torch.equal(leaf[number], part)


def test_flat_state_holds_every_number_of_a_unit() -> None:
    tree = nest(3)
    flat = flat_state(tree)
    assert flat.shape == (3, 1 + 2 + 3 + 4)
    expected = torch.cat([leaf.reshape(3, -1) for leaf in leaves(tree)], dim=1)
    assert torch.equal(flat, expected)
    assert torch.equal(flat_state(tree.pair.right), tree.pair.right)


def test_first_tensor() -> None:
    tree = nest(3)
    assert first_tensor(tree) is tree.pair.left
    with pytest.raises(TypeError, match="at least one tensor"):
        first_tensor({"name": 3})
