"""The lock-step buffer against plain attention over what each row should find."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.memory.lockstep import LockstepMemory

SHAPE = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=3).filter(
    lambda rows: any(any(row) for row in rows)
)


@given(real=SHAPE, exits=st.lists(st.integers(1, 4), min_size=12, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=settings().max_examples // 4)
def test_a_reader_finds_the_last_written_loop_of_every_token(
    real: list[list[bool]], exits: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, heads, groups, width, layers = 4, 4, 2, 3, (5, 2)
    present = torch.tensor(real)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & present[:, None, :]
    batch, token = present.nonzero(as_tuple=True)
    memory = LockstepMemory(mask, batch, token)
    written: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    last = {place: exits[i] for i, place in enumerate(zip(batch.tolist(), token.tolist(), strict=True))}
    for loop in range(1, 5):
        places = list(zip(memory.batch.tolist(), memory.token.tolist(), strict=True))
        for layer in layers:
            q = torch.randn(len(places), heads, width, dtype=torch.float64, generator=generator)
            k, v = torch.randn(2, len(places), groups, width, dtype=torch.float64, generator=generator)
            for row, place in enumerate(places):
                written[layer, *place] = k[row], v[row]
            out = memory.plane(loop).attend(layer, q, k, v)
            for row, (sequence, here) in enumerate(places):
                seen = [written[layer, sequence, other] for other in range(here + 1) if real[sequence][other]]
                for head in range(heads):
                    scores = torch.stack([q[row, head] @ keys[head // 2] for keys, _ in seen]) / width**0.5
                    answer = sum(w * v[head // 2] for w, (_, v) in zip(scores.softmax(0), seen, strict=True))
                    torch.testing.assert_close(out[row, head], answer, rtol=0, atol=1e-12)
        staying = [row for row, place in enumerate(places) if last[place] > loop]
        if not staying:
            break
        memory = memory.keep(torch.tensor(staying))


def test_layers_keep_apart() -> None:
    one = torch.ones(1, 1, 2)
    memory = LockstepMemory(torch.ones(1, 1, 1, dtype=torch.bool), torch.tensor([0]), torch.tensor([0]))
    assert torch.equal(memory.attend(0, one, one, one * 3), one * 3)
    assert torch.equal(memory.attend(1, one, one, one * 5), one * 5)
    assert torch.equal(memory.values[0][0], one * 3)
