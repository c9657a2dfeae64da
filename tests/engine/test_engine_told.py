"""What an engine tells beside tokens: signals after each loop, and drafts before they are certain."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loopwise.engine.engine import Engine
from loopwise.engine.sampling import Sampling
from loopwise.engine.speculation import Speculation
from loopwise.errors import ConfigError
from loopwise.models.looped_lm import LoopedLM

TESTS = Path(__file__).parents[1]
tiny: Callable[..., LoopedLM] = runpy.run_path(str(TESTS / "models" / "naive_lm.py"))["tiny"]
PROMPT = [3, 1, 7, 2]


@pytest.mark.parametrize("rule", [None, "hazard:0.7", "delta:0.7"])
@pytest.mark.parametrize("speculate", ["off", Speculation(window=3)])
def test_signals_are_the_hazards_of_the_row_that_emitted_each_token(
    rule: str | None, speculate: str | Speculation
) -> None:
    model = tiny("ouro")
    engine = Engine(model, "per_loop", speculate=speculate)
    settings = Sampling(max_tokens=8, exit=rule)
    done = engine.generate([PROMPT, [5]], settings, signals=True)
    for answer in done:
        tokens = torch.tensor([[*answer.prompt, *answer.tokens]])
        # Under `per_loop` every plane is filled, so hazards are those of a plain pass over the whole text.
        hazards = model(tokens, loops=3, collect=["signals"]).loop_signals
        assert hazards is not None
        for index, (signals, loops) in enumerate(zip(answer.signals, answer.loops, strict=True)):
            assert len(signals) == loops
            place = len(answer.prompt) + index - 1
            assert signals == pytest.approx(hazards[:loops, 0, place].tolist(), abs=1e-9)
    assert engine.generate([PROMPT], settings)[0].signals == ((),) * 8


def test_signals_of_a_model_without_a_gate_are_refused() -> None:
    with pytest.raises(ConfigError, match="no gate"):
        Engine(tiny("llama")).generate([PROMPT], signals=True)


def test_drafts_are_told_as_provisional_and_every_token_is_confirmed() -> None:
    model = tiny("ouro")
    engine = Engine(model, speculate=Speculation(window=2))
    plain = engine.generate([PROMPT], Sampling(max_tokens=10))[0]
    ticket = engine.submit(PROMPT, Sampling(max_tokens=10), provisional=True)
    told = list(ticket)
    certain = [emission for emission in told if not emission.provisional]
    drafts = [emission for emission in told if emission.provisional]
    assert tuple(emission.token for emission in certain) == plain.tokens
    assert [emission.index for emission in certain] == list(range(10))
    assert drafts
    confirmed_at = {emission.index: place for place, emission in enumerate(told) if not emission.provisional}
    for place, emission in enumerate(told):
        if emission.provisional:
            assert 1 <= emission.loops <= model.config.loops
            assert place < confirmed_at[emission.index]
    assert not any(emission.provisional for emission in engine.submit(PROMPT, Sampling(max_tokens=4)))
