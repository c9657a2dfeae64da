import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from loopwise.errors import CheckpointError, InputError, NotFoundError, StorageError
from loopwise.trace import LoopTrace

TOKENS, LOOPS, CANDIDATES, WIDTH = 7, 4, 3, 5


def make(**changes: Any) -> LoopTrace:
    noise = np.random.default_rng(0)
    top_ids = noise.integers(0, 50, (TOKENS, LOOPS, CANDIDATES))
    fields: dict[str, Any] = {
        "title": "seven tokens",
        "model": "tiny",
        "rule": "hazard:0.6",
        "policy": "last_exited",
        "max_loops": LOOPS,
        "prompt_length": 2,
        "tokens": noise.integers(0, 50, TOKENS),
        "texts": ["a", " b", "\n", "\ud800", "", "</script>", "é"],
        "loops": np.array([0, 1, 2, 3, 4, 1, 2]),
        "signal_kind": "hazard",
        "signals": noise.random((TOKENS, LOOPS)).astype(np.float32),
        "top_ids": top_ids,
        "top_probs": np.sort(noise.random((TOKENS, LOOPS, CANDIDATES)))[..., ::-1].astype(np.float32),
        "vocabulary": {token: f"<{token}>" for token in range(50)},
        "losses": noise.random((TOKENS, LOOPS)).astype(np.float32) * 5,
        "entropy": noise.random((TOKENS, LOOPS)).astype(np.float32),
        "kl": noise.random((TOKENS, LOOPS)).astype(np.float32),
        "states": noise.random((TOKENS, LOOPS, WIDTH)).astype(np.float32),
    }
    return LoopTrace(**(fields | changes))


def naive_exit(hazards: list[float], threshold: float) -> int:
    stay = 1.0
    for loop, hazard in enumerate(hazards, start=1):
        stay *= 1 - hazard
        if threshold < 1 and 1 - stay >= threshold:
            return loop
    return len(hazards)


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    trace = make()
    again = LoopTrace.load(trace.save(tmp_path / "folder" / "trace.safetensors"))
    for name in (
        "title",
        "model",
        "rule",
        "policy",
        "max_loops",
        "prompt_length",
        "signal_kind",
        "texts",
        "vocabulary",
    ):
        assert getattr(again, name) == getattr(trace, name)
    for name in ("tokens", "loops", "signals", "top_ids", "losses", "states"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
        assert getattr(again, name).dtype == getattr(trace, name).dtype
    for name in ("top_probs", "entropy", "kl"):
        np.testing.assert_allclose(getattr(again, name), getattr(trace, name), rtol=2**-11)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["trace.safetensors"]


def test_wide_signals_stay_wide_so_that_no_exit_moves(tmp_path: Path) -> None:
    signals = np.random.default_rng(1).random((TOKENS, LOOPS))
    trace = make(signals=signals)
    again = LoopTrace.load(trace.save(tmp_path / "trace"))
    assert again.signals is not None
    np.testing.assert_array_equal(again.signals, signals)


def test_optional_parts_may_be_missing(tmp_path: Path) -> None:
    bare = LoopTrace(
        model="m",
        rule="fixed:2",
        policy="per_loop",
        max_loops=2,
        tokens=np.array([1, 2]),
        texts=["a", "b"],
        loops=np.array([0, 2]),
    )
    again = LoopTrace.load(bare.save(tmp_path / "trace"))
    assert again.signals is None
    assert again.losses is None
    assert not again.replayable
    assert again.mean_loops == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_loops": 5}, r"signals has shape \(7, 4\); with 7 texts it must be \(7, 5\)"),
        ({"tokens": np.arange(3)}, "tokens has shape"),
        ({"tokens": np.arange(7) / 2}, "must hold integers"),
        ({"tokens": np.arange(7) + 2**31}, "32 bits"),
        ({"loops": np.full(7, 5)}, "between 0 and 4"),
        ({"prompt_length": 8}, "between 0 and 7"),
        ({"max_loops": 0}, "at least 1"),
        ({"signal_kind": None}, "give both or neither"),
        ({"signal_kind": "mood"}, "hazard, halt_logit, certainty, delta"),
        ({"signals": np.full((7, 4), 1.5)}, "between 0 and 1"),
        ({"signals": np.array([[np.nan, 0.5, 0.5, 0.5]] * 7)}, "NaN before a number"),
        ({"losses": np.full((7, 4), np.inf)}, "infinity"),
        ({"top_probs": None}, "give both or neither"),
        ({"top_probs": np.ones((7, 4, 2))}, "make them equal"),
        ({"vocabulary": {}}, "vocabulary has no text"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_replay_by_hand() -> None:
    # CDF: 0.5, 0.75, 0.875, 0.9375 for every token.
    trace = make(signals=np.full((TOKENS, LOOPS), 0.5))
    np.testing.assert_allclose(trace.exit_cdf()[0], [0.5, 0.75, 0.875, 0.9375])
    assert [int(trace.replay(q)[0]) for q in (0.0, 0.5, 0.51, 0.75, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 4, 4, 4]


def test_a_threshold_of_one_means_never_early_even_if_the_gate_is_certain() -> None:
    assert make(signals=np.ones((TOKENS, LOOPS))).replay(1.0).tolist() == [LOOPS] * TOKENS


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=LOOPS, max_size=LOOPS), min_size=TOKENS, max_size=TOKENS),
    st.floats(0, 1),
)
def test_replay_equals_the_naive_rule(hazards: list[list[float]], threshold: float) -> None:
    trace = make(signals=np.array(hazards))
    assert trace.replay(threshold).tolist() == [naive_exit(row, threshold) for row in hazards]


def test_tokens_cut_at_their_exit_stay_there_and_are_counted() -> None:
    signals = np.full((TOKENS, LOOPS), 0.5)
    signals[0] = np.nan
    signals[1, 2:] = np.nan
    trace = make(signals=signals, losses=None)
    assert trace.replay(0.9).tolist() == [0, 2, 4, 4, 4, 4, 4]
    curve = trace.exit_curve([0.5, 0.75, 0.9])
    assert curve.tokens == 6
    assert curve.truncated.tolist() == [0, 0, 1]
    np.testing.assert_allclose(curve.mean_loops, [1, 2, (2 + 5 * 4) / 6])
    assert curve.mean_loss is None
    assert curve.mixed_loss is None


def test_exit_curve_equals_a_loop_over_tokens() -> None:
    trace = make()
    assert trace.signals is not None
    assert trace.losses is not None
    curve = trace.exit_curve()
    assert curve.mean_loss is not None
    assert curve.mixed_loss is not None
    assert len(curve.thresholds) == 201
    fixed = trace.losses.astype(np.float64).mean(axis=0)
    for at in (0, 37, 120, 199, 200):
        exits = [naive_exit(row, curve.thresholds[at]) for row in trace.signals.astype(np.float64).tolist()]
        assert curve.mean_loops[at] == pytest.approx(np.mean(exits))
        losses = [float(row[loop - 1]) for row, loop in zip(trace.losses, exits, strict=True)]
        assert curve.mean_loss[at] == pytest.approx(np.mean(losses))
        below = min(int(np.mean(exits)), LOOPS - 1)
        share = np.mean(exits) - below
        assert curve.mixed_loss[at] == pytest.approx((1 - share) * fixed[below - 1] + share * fixed[below])
    np.testing.assert_allclose(trace.loss_by_loop(), fixed)
    assert curve.mean_loss[-1] == pytest.approx(fixed[-1])


def test_losses_are_compared_over_the_same_tokens() -> None:
    signals, losses = np.full((TOKENS, LOOPS), 0.3), np.ones((TOKENS, LOOPS))
    signals[0], losses[0], losses[3] = np.nan, 99.0, np.nan
    trace = make(signals=signals, losses=losses)
    curve = trace.exit_curve([0.2, 1.0])
    assert curve.tokens == TOKENS - 2
    assert curve.mean_loss is not None
    np.testing.assert_allclose(curve.mean_loss, 1.0)
    np.testing.assert_allclose(trace.loss_by_loop(), 1.0)


def test_replay_without_hazards_says_what_is_there() -> None:
    with pytest.raises(InputError, match="carries certainty"):
        make(signal_kind="certainty").replay(0.5)
    with pytest.raises(InputError, match="between 0 and 1"):
        make().replay(1.5)
    with pytest.raises(InputError, match="no token"):
        make(signals=np.full((TOKENS, LOOPS), np.nan)).exit_curve()
    with pytest.raises(InputError, match="no losses"):
        make(losses=None).loss_by_loop()


def test_subset_keeps_rows_together() -> None:
    trace = make()
    part = trace.subset(1, 5)
    assert part.texts == trace.texts[1:5]
    assert part.prompt_length == 1
    assert part.states is not None
    assert trace.states is not None
    np.testing.assert_array_equal(part.states, trace.states[1:5])
    np.testing.assert_array_equal(part.loops, trace.loops[1:5])
    with pytest.raises(InputError, match="0 to 7"):
        trace.subset(3, 8)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no trace at"):
        LoopTrace.load(tmp_path / "none")


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = make().save(tmp_path / "trace")
    whole = path.read_bytes()
    for length in (0, 4, 9, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            LoopTrace.load(path)


def rewrite(path: Path, **metadata: str) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    old = json.loads(data[8 : 8 + size])["__metadata__"]
    path.write_bytes(save(load(data), old | metadata))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "3"}, "version 3, this Loopwise reads up to 2; type: pip install --upgrade loopwise"),
        ({"version": "one"}, "names no version"),
        ({"format": "pt"}, "is not a loop trace"),
        ({"trace": "{"}, "corrupt"),
        ({"trace": "[]"}, "broken header"),
        ({"trace": '{"vocabulary": {}, "colour": 1}'}, "corrupt"),
    ],
)
def test_a_strange_header_is_refused(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = make().save(tmp_path / "trace")
    rewrite(path, **metadata)
    with pytest.raises(CheckpointError, match=message):
        LoopTrace.load(path)


def test_an_unknown_array_is_refused(tmp_path: Path) -> None:
    path = make().save(tmp_path / "trace")
    data = path.read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    path.write_bytes(save(load(data) | {"extra": np.zeros(1)}, head))
    with pytest.raises(CheckpointError, match="unknown array 'extra'"):
        LoopTrace.load(path)


def test_a_refusing_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make().save(tmp_path / "trace")
    before = path.read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageError, match="No space left on device"):
        make(title="new").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_module_loads_without_torch() -> None:
    code = "import sys, loopwise.trace, loopwise.studio.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
