"""The dense table: which plane a reader finds, and what it costs."""

import pytest
import torch

from loopwise.errors import ConfigError
from loopwise.memory.dense import DenseMemory, check_policy

ONE = torch.ones(1, 1, 2, dtype=torch.float64)


def write(memory: DenseMemory, loop: int, position: int, value: float, layer: int = 0) -> torch.Tensor:
    memory.positions = torch.tensor([position])
    return memory.plane(loop).attend(layer, ONE, ONE, ONE * value)[0, 0, 0]


def test_a_plane_per_loop() -> None:
    memory = DenseMemory(loops=2, capacity=3)
    assert write(memory, 1, 0, 10.0) == 10
    assert write(memory, 2, 0, 20.0) == 20
    # Equal keys: attention is the mean of the values of its own plane.
    assert write(memory, 1, 1, 30.0) == 20
    assert write(memory, 2, 1, 40.0) == 30


def test_a_settled_token_is_found_by_deeper_readers_and_not_by_shallower_ones() -> None:
    memory = DenseMemory(loops=4, capacity=2)
    write(memory, 1, 0, 10.0)
    write(memory, 2, 0, 20.0)
    memory.settle(0, 2)
    assert [float(write(memory, loop, 1, 0.0)) for loop in (1, 2, 3, 4)] == [5, 10, 10, 10]


def test_layers_outside_the_loop_have_one_plane_and_are_not_settled() -> None:
    memory = DenseMemory(loops=4, capacity=2)
    write(memory, 0, 0, 7.0, layer=0)
    write(memory, 1, 0, 10.0, layer=1)
    memory.settle(0, 1)
    assert write(memory, 0, 1, 9.0, layer=0) == 8
    assert memory.nbytes == (1 + 4) * 2 * (2 * 2 * 8)


def test_rows_that_run_together_see_no_later_row() -> None:
    memory = DenseMemory(loops=1, capacity=5)
    memory.positions = torch.arange(4)
    rows = ONE.expand(4, 1, 2)
    values = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)[:, None, None] * rows
    out = memory.plane(1).attend(0, rows, rows, values)
    assert out[:, 0, 0].tolist() == [1, 2, 3, 4]


def test_a_later_write_replaces() -> None:
    memory = DenseMemory(loops=1, capacity=1)
    write(memory, 0, 0, 1.0)
    assert write(memory, 0, 0, 4.0) == 4


def test_policy_names() -> None:
    assert check_policy("per_loop") == "per_loop"
    with pytest.raises(ConfigError, match="policy='perloop': allowed are per_loop, last_exited"):
        check_policy("perloop")
