"""The two test runs are what they claim: one checks shapes and types, the other can compile."""

import pytest
import torch
from jaxtyping import TypeCheckError

from loopwise.nn.norms import RMSNorm


def test_shape_annotations_are_checked_here() -> None:
    with pytest.raises(TypeCheckError):
        RMSNorm(4, 1e-6)(torch.ones(2, 4, dtype=torch.long))


@pytest.mark.compiles
def test_annotated_code_compiles_whole() -> None:
    norm = RMSNorm(4, 1e-6)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), norm(x))
