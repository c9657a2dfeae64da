"""What of the page tables goes to a device."""

import numpy as np
import torch

from loopwise.memory.paged import cut_table
from loopwise.nn.kernels import gathered_attention


def test_rows_find_in_the_part_of_a_table_what_they_find_in_the_whole() -> None:
    draw = np.random.default_rng(0)
    table = draw.permutation(60).reshape(6, 10).astype(np.int32)
    # A prompt of three rows, two alone, and one more of the prompt's sequence.
    rows, lengths = np.array([4, 4, 4, 1, 5, 4]), np.array([3, 4, 5, 7, 2, 6])
    part, places = cut_table(table, rows, 7)
    assert part.shape == (3, 7)
    assert np.array_equal(part[places], table[rows, :7])
    q, keys, values = (torch.from_numpy(draw.normal(size=(count, 2, 8))) for count in (6, 60, 60))
    whole, cut = (
        gathered_attention(q, keys, values, *map(torch.from_numpy, (found, where, lengths)))
        for found, where in ((table, rows), (part, places))
    )
    torch.testing.assert_close(cut, whole, rtol=0, atol=0)
