"""The strip in a notebook: the traits that the JavaScript reads, and what a threshold does to them."""

import numpy as np
import pytest

from loopwise.errors import InputError
from loopwise.studio.widget import strip
from loopwise.trace import LoopTrace

pytestmark = pytest.mark.browser


def make(**changes):
    fields = {
        "model": "tiny",
        "rule": "hazard:0.5",
        "policy": "last_exited",
        "max_loops": 3,
        "tokens": np.array([1, 2, 3]),
        "texts": ["a", "\x1b[31m", "\n"],
        "loops": np.array([0, 2, 3]),
        "signal_kind": "hazard",
        "signals": np.array([[np.nan] * 3, [0.2, 0.5, 0.5], [0.6, 0.5, 0.5]]),
    }
    return LoopTrace(**(fields | changes))


def test_a_threshold_tints_the_strip():
    trace = make()
    shown = strip(trace)
    assert (shown.loops, shown.max) == ([0, 2, 3], 3)
    assert "\x1b" not in "".join(shown.texts)
    shown.threshold = 0.5
    assert shown.loops == trace.replay(0.5).tolist() == [0, 2, 1]
    shown.threshold = None
    assert shown.loops == [0, 2, 3]
    assert "export default" in shown._esm


def test_a_trace_without_hazards_has_no_threshold():
    shown = strip(make(signals=None, signal_kind=None))
    with pytest.raises(InputError, match="replay needs recorded hazards"):
        shown.threshold = 0.5
