"""Padding and packed documents: each row and each document as if it were alone."""

import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.models.looped_lm import LoopedLM, attention_mask, count_positions, document_starts

naive = runpy.run_path(str(Path(__file__).with_name("naive_lm.py")))
SHAPES, tiny = naive["SHAPES"], naive["tiny"]
MODELS = {shape: tiny(shape, seed=3) for shape in SHAPES}
COLLECT = ("logits", "states", "signals")


def everything(model: LoopedLM, tokens: torch.Tensor, **masks: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(tokens, loops=3, collect=COLLECT, **masks)
    return [part for part in (out.loop_logits, out.loop_states, out.loop_signals) if part is not None]


@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 1000), filler=st.integers(0, 22))
@settings(max_examples=settings().max_examples * 3 // 100)
def test_padding_changes_nothing(shape: str, seed: int, filler: int) -> None:
    model, generator = MODELS[shape], torch.Generator().manual_seed(seed)
    sequences = [torch.randint(23, (length,), generator=generator) for length in (5, 2, 1, 4)]
    tokens = torch.full((4, 6), filler)
    real = torch.zeros(4, 6, dtype=torch.bool)
    # Left, right, both sides, and a hole in the middle.
    for row, columns in enumerate(([1, 2, 3, 4, 5], [0, 1], [3], [0, 1, 4, 5])):
        tokens[row, columns] = sequences[row]
        real[row, columns] = True
    padded = everything(model, tokens, padding_mask=real)
    for part in padded:
        assert part.isfinite().all()
    for row, sequence in enumerate(sequences):
        for part, alone in zip(padded, everything(model, sequence[None]), strict=True):
            torch.testing.assert_close(part[:, row, real[row]], alone[:, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_documents_do_not_see_each_other(shape: str) -> None:
    model, generator = MODELS[shape], torch.Generator().manual_seed(0)
    tokens = torch.randint(23, (2, 9), generator=generator)
    # The second row uses one number for two documents that do not touch.
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [7, 7, 3, 3, 3, 3, 7, 7, 7]])
    packed = everything(model, tokens, documents=documents)
    for row, borders in enumerate(((0, 3, 5, 9), (0, 2, 6, 9))):
        for begin, end in pairwise(borders):
            for part, alone in zip(packed, everything(model, tokens[row : row + 1, begin:end]), strict=True):
                torch.testing.assert_close(part[:, row, begin:end], alone[:, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", ["huginn", "ouro"])
def test_documents_and_padding_together(shape: str) -> None:
    model = MODELS[shape]
    tokens = torch.tensor([[9, 1, 2, 3, 9, 4, 5, 9]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    real = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0]], dtype=torch.bool)
    packed = everything(model, tokens, documents=documents, padding_mask=real)
    for columns in ([1, 2], [3, 5, 6]):
        for part, alone in zip(packed, everything(model, tokens[:, columns]), strict=True):
            torch.testing.assert_close(part[:, :, columns], alone, rtol=0, atol=1e-10)


def test_without_masks_a_document_would_be_seen() -> None:
    model = MODELS["ouro"]
    tokens = torch.tensor([[1, 2, 3, 4]])
    packed = everything(model, tokens, documents=torch.tensor([[0, 0, 1, 1]]))[0]
    assert not torch.allclose(packed, everything(model, tokens)[0], atol=1e-3)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=12))
def test_positions_and_mask_equal_counting(cells: list[tuple[int, bool]]) -> None:
    documents = torch.tensor([[number for number, _ in cells]])
    real = torch.tensor([[is_real for _, is_real in cells]])
    tokens = torch.zeros_like(documents)
    positions = count_positions(tokens, real, documents)[0]
    mask = attention_mask(tokens, real, documents)[0, 0]
    begin = 0
    for i in range(len(cells)):
        begin = i if i and cells[i][0] != cells[i - 1][0] else begin
        if cells[i][1]:
            assert positions[i] == sum(is_real for _, is_real in cells[begin:i])
            expected = [begin <= j <= i and cells[j][1] for j in range(len(cells))]
            assert mask[i].tolist() == expected
        assert positions[i] >= 0
        assert mask[i].any()


def test_plain_causal_attention_needs_no_mask() -> None:
    assert attention_mask(torch.zeros(1, 3, dtype=torch.long)) is None


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_starts_of_documents_say_what_the_mask_says(numbers: list[int]) -> None:
    documents = torch.tensor([numbers])
    tokens = torch.zeros_like(documents)
    mask = attention_mask(tokens, documents=documents)[0, 0]
    assert document_starts(tokens, documents)[0].tolist() == [row.nonzero()[0].item() for row in mask]
    assert document_starts(tokens).tolist() == [[0] * len(numbers)]


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_mask_agree_with_their_gradients(shape: str) -> None:
    model = MODELS[shape]
    tokens = torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [7, 7, 3, 3, 3, 3, 7, 7, 7]])
    found = []
    # Where padding may be, a mask says who reads whom.
    for padding in (None, torch.ones(2, 9, dtype=torch.bool)):
        logits = model(tokens, loops=2, documents=documents, padding_mask=padding).logits
        gradients = torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.core.parameters()))
        found.append([logits, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
