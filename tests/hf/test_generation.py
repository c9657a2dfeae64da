"""transformers' generation on looped models: caches, padding, beams, and the dial of loops."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import loopwise
from loopwise.errors import ConfigError, InputError, LoopRangeWarning
from loopwise.hf import LoopedCache, LoopedForCausalLM, wrap

TESTS = Path(__file__).parents[1]
tiny = runpy.run_path(str(TESTS / "models/naive_lm.py"))["tiny"]
SHAPES = ("ouro", "huginn", "coda", "zeros")
TOKENS = torch.tensor([[3, 1, 22, 7, 7, 0], [5, 5, 9, 14, 2, 8]])
ROWS = ([4, 20, 6, 11, 2], [9], [17, 3, 3])


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> LoopedForCausalLM:
    return wrap(tiny(request.param, trained_loops=(1, 5)))


def left_padded(rows: tuple[list[int], ...], pad: int = 0) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def test_cached_passes_equal_the_whole_sequence(model: LoopedForCausalLM) -> None:
    for loops in (1, 3):
        whole = model(TOKENS, num_loops=loops).logits
        cache, pieces = None, []
        for piece in (TOKENS[:, :3], TOKENS[:, 3:4], TOKENS[:, 4:]):
            out = model(piece, num_loops=loops, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-9)
        config = model.model.config
        assert len(cache) == config.prelude_layers + config.coda_layers + loops * config.core_layers
        assert model.config.num_hidden_layers == config.layers


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(model: LoopedForCausalLM) -> None:
    padded = left_padded(ROWS)
    flipped = {name: tensor.flip(1) for name, tensor in left_padded(tuple(row[::-1] for row in ROWS)).items()}
    for batch, right in ((padded, False), (flipped, True)):
        for use_cache in (False, True):
            logits = model(**batch, num_loops=3, use_cache=use_cache).logits
            for row, ids in enumerate(ROWS):
                here = logits[row, : len(ids)] if right else logits[row, -len(ids) :]
                alone = model(torch.tensor([ids]), num_loops=3).logits[0]
                torch.testing.assert_close(here, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_gives_the_same_with_and_without_a_cache(
    model: LoopedForCausalLM, options: dict[str, object]
) -> None:
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        runs.append(
            model.generate(
                **left_padded(ROWS), num_loops=3, max_new_tokens=5, use_cache=use_cache, pad_token_id=0, **options
            )
        )
    assert torch.equal(*runs)


def test_a_left_padded_batch_generates_what_each_row_does_alone(model: LoopedForCausalLM) -> None:
    out = model.generate(**left_padded(ROWS), num_loops=2, max_new_tokens=5, do_sample=False)
    for row, ids in enumerate(ROWS):
        done = model.loop_generate([ids], loopwise.Sampling(max_tokens=5, max_loops=2))[0]
        assert out[row, -5:].tolist() == list(done.tokens)


@torch.no_grad()
def test_scores_along_the_way_are_the_whole_sequences(model: LoopedForCausalLM) -> None:
    out = model.generate(
        TOKENS, num_loops=3, max_new_tokens=4, return_dict_in_generate=True, output_logits=True, do_sample=False
    )
    whole = model(out.sequences, num_loops=3).logits
    # generate keeps what it returns in float32.
    torch.testing.assert_close(torch.stack(out.logits, dim=1), whole[:, 5:-1].float(), rtol=1e-6, atol=1e-5)
    assert isinstance(out.past_key_values, LoopedCache)
    assert out.past_key_values.num_loops == 3


def test_drafts_from_the_prompt_and_a_prefilled_cache_change_nothing() -> None:
    model = wrap(tiny("coda"))
    prompt = torch.tensor([[3, 1, 22, 3, 1, 22, 3, 1]])
    options = {"num_loops": 2, "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=2, **options), plain)
    assert torch.equal(model.generate(prompt, prefill_chunk_size=3, **options), plain)
    cache = LoopedCache()
    model(prompt[:, :5], past_key_values=cache, num_loops=2)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options), plain)


def test_loops_and_starts_are_dials() -> None:
    model = wrap(tiny("huginn", trained_loops=(1, 4)))
    shallow, deep = (model.generate(TOKENS, num_loops=n, max_new_tokens=8, do_sample=False) for n in (1, 4))
    assert not torch.equal(shallow, deep)
    assert torch.equal(
        model.generate(TOKENS, max_new_tokens=8, do_sample=False),
        model.generate(TOKENS, num_loops=model.config.num_loops, max_new_tokens=8, do_sample=False),
    )
    with torch.no_grad():
        for start in (3, "zero"):
            assert torch.equal(model(TOKENS, start=start).logits, model.model(TOKENS, start=start).logits)
    seeded = [model.generate(TOKENS, start=start, max_new_tokens=8, do_sample=False) for start in (3, 4)]
    assert not torch.equal(*seeded)
    with pytest.warns(LoopRangeWarning, match="loops=5 is beyond the 4"):
        model(TOKENS, num_loops=5)
    with pytest.raises(ConfigError, match="loops=0"):
        model(TOKENS, num_loops=0)


@torch.no_grad()
def test_states_and_kept_logits() -> None:
    model = wrap(tiny("coda"))
    out = model(TOKENS, num_loops=3, output_hidden_states=True, logits_to_keep=2, return_dict=False)
    logits, states = out
    expected = model.model(TOKENS, loops=3, collect=("states",))
    assert torch.equal(logits, expected.logits[:, -2:])
    assert torch.equal(torch.stack(states[1:]), expected.loop_states)
    assert torch.equal(model(TOKENS, logits_to_keep=torch.tensor([0, 4])).logits, model(TOKENS).logits[:, [0, 4]])


def test_what_generation_cannot_do_is_said() -> None:
    model = wrap(tiny("ouro"))
    for options, message in (
        ({"exit": "hazard:0.6"}, r"model\.loop_generate"),
        ({"early_exit_threshold": 0.5}, r"model\.loop_generate"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"past_key_values": DynamicCache()}, r"give loopwise\.hf\.LoopedCache"),
        ({"num_lops": 3}, "num_lops"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(TOKENS, max_new_tokens=2, **options)
    with pytest.raises(TypeError, match="num_lops"):
        model(TOKENS, num_lops=3)
    cache = model(TOKENS, num_loops=2, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="filled with num_loops=2"):
        model(TOKENS[:, :1], num_loops=3, past_key_values=cache)
    cache.reset()
    model(TOKENS, num_loops=3, past_key_values=cache)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = wrap(tiny("ouro", max_positions=8))
    mask = torch.ones(2, 6)
    for options, message in (
        ({"input_ids": TOKENS, "inputs_embeds": torch.zeros(2, 6, 16)}, "give input_ids"),
        ({"input_ids": TOKENS, "attention_mask": mask[:, None, None]}, "4 axes"),
        ({"input_ids": TOKENS, "attention_mask": mask[:, :4]}, r"shape \(2, 4\)"),
        ({"input_ids": TOKENS.repeat(1, 2)}, "context is 8"),
        ({"input_ids": TOKENS, "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]]), "use_cache": True}, "documents"),
        ({"input_ids": TOKENS + 20}, "token ids"),
    ):
        with pytest.raises(InputError, match=message):
            model(**options)
    with pytest.raises(ConfigError, match="output_attentions"):
        model(TOKENS, output_attentions=True)
    with pytest.raises(ConfigError, match="labels need the whole sequence"):
        model(TOKENS, labels=TOKENS, use_cache=True)


@torch.no_grad()
def test_positions_that_begin_anew_are_documents() -> None:
    model = wrap(tiny("coda"))
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    packed = model(TOKENS, position_ids=positions).logits
    torch.testing.assert_close(packed, model.model(TOKENS, documents=documents).logits, rtol=0, atol=1e-12)


def test_exits_per_token_are_the_reference_generators() -> None:
    model = wrap(tiny("ouro"))
    sampling = loopwise.Sampling(max_tokens=4, exit="hazard:0.5", temperature=1.0, seed=3)
    from loopwise.engine.reference import generate

    (got,), (wanted,) = model.loop_generate([[1, 2, 3]], sampling), generate(model.model, [[1, 2, 3]], sampling)
    assert (got.tokens, got.loops) == (wanted.tokens, wanted.loops)
    assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-9)
