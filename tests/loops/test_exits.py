"""Exit rules on traces worked by hand, on the authors' own exit loops, and at their edges."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.loops.exits import (
    Certainty,
    Observation,
    parse_rule,
    replay,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "ouro-tiny" / "expected.safetensors"


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_unit(values: list[float] | list[list[float]]) -> Tensor:
    """A trace of a single unit: (R, 1) or (R, 1, D)."""
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def odds(*probabilities: tuple[float, ...]) -> Tensor:
    """Logits (R, 1, V) of one unit whose predictions are the given distributions."""
    return one_unit([list(row) for row in probabilities]).log()


class TestHandWorked:
    """Numbers computed on paper from each formula."""

    @pytest.mark.parametrize(
        ("q", "loop"),
        # CDF .1, .28, .64, .64: nothing is gained at loop 4.
        [(0.05, 1), (0.099, 1), (0.101, 2), (0.279, 2), (0.281, 3), (0.639, 3), (0.641, 4), (0.99, 4)],
    )
    def test_hazard(self, q: float, loop: int) -> None:
        assert replay(f"hazard:{q}", signals=one_unit([0.1, 0.2, 0.5, 0.0])).tolist() == [loop]

    @pytest.mark.parametrize(("q", "loop"), [(0.0, 1), (0.5, 1), (0.5000001, 2), (0.75, 2), (0.7500001, 3)])
    def test_hazard_stops_when_the_threshold_is_reached_exactly(self, q: float, loop: int) -> None:
        assert replay(f"hazard:{q}", signals=one_unit([0.5, 0.5, 0.5, 0.5])).tolist() == [loop]

    @pytest.mark.parametrize("q", [1.0, 1.5])
    def test_hazard_from_one_on_means_never_early(self, q: float) -> None:
        certain = one_unit([1.0, 1.0, 1.0])
        assert replay(f"hazard:{q}", signals=certain).tolist() == [3]
        assert replay("hazard:0.999999", signals=certain).tolist() == [1]

    @pytest.mark.parametrize(("count", "loop"), [(1, 1), (3, 3), (4, 4), (9, 4)])
    def test_fixed(self, count: int, loop: int) -> None:
        assert replay(f"fixed:{count}", signals=one_unit([0.0] * 4)).tolist() == [loop]

    @pytest.mark.parametrize(("x", "loop"), [(-2.0, 1), (-1.0, 2), (0.0, 3), (0.1, 4), (5.0, 4)])
    def test_halt_needs_more_than_the_threshold(self, x: float, loop: int) -> None:
        assert replay(f"halt:{x}", signals=one_unit([-1.0, 0.0, 0.1, 0.1])).tolist() == [loop]

    @pytest.mark.parametrize(
        # 5 / 5 = 1, then 0.1 / sqrt(9 + 4.1^2) = 0.1 / 5.080354 = 0.019684, then 0 / 5.080354.
        ("x", "loop"),
        [(1.1, 1), (0.03, 2), (0.01969, 2), (0.01968, 3), (1e-9, 3)],
    )
    def test_delta(self, x: float, loop: int) -> None:
        states = one_unit([[3.0, 4.0], [3.0, 4.1], [3.0, 4.1], [3.0, 4.1]])
        assert replay(f"delta:{x}", states=states, start=torch.zeros(1, 2).double()).tolist() == [loop]

    def test_delta_is_strict(self) -> None:
        states = one_unit([[2.0], [4.0]])
        assert replay("delta:0.5", states=states, start=numbers(1.0).view(1, 1)).tolist() == [2]
        assert replay("delta:0.5000001", states=states, start=numbers(1.0).view(1, 1)).tolist() == [1]

    def test_delta_takes_the_norm_over_the_whole_unit(self) -> None:
        # Places change by 0/1 and 1/1: the mean of the ratios is 0.5, the ratio of the norms sqrt(1/2) = 0.7071.
        states = torch.tensor([[[[1.0], [1.0]]]])
        start = torch.tensor([[[1.0], [0.0]]])
        observation = Observation(loop=1, state=states[0], previous=start)
        assert parse_rule("delta:0.7").track(1).update(observation).tolist() == [False]
        assert parse_rule("delta:0.71").track(1).update(observation).tolist() == [True]

    def test_delta_at_a_zero_state(self) -> None:
        still, arrived = torch.zeros(1, 2), torch.ones(1, 2)
        tracker = parse_rule("delta:0.03").track(2)
        observation = Observation(loop=1, state=torch.zeros(2, 2), previous=torch.cat([still, arrived]))
        assert tracker.update(observation).tolist() == [True, False]

    @pytest.mark.parametrize(
        ("trace", "loop"),
        [
            ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3),  # steps 1 1 1: second differences 0 at loops 2 and 3
            ([1.0, 3.0, 4.0, 5.0, 6.0, 7.0], 5),  # steps 1 2 1 1 1: 1 1 0 0
            ([1.0, 2.0, 5.0, 8.0, 12.0, 16.0], 6),  # steps 1 1 3 3 4 4: 0 2 0 1 0, never two in a row
        ],
    )
    def test_second_difference(self, trace: list[float], loop: int) -> None:
        states = one_unit([[value] for value in trace])
        assert replay("second-difference:0.5", states=states, start=torch.zeros(1, 1).double()).tolist() == [loop]

    def test_second_difference_is_strict(self) -> None:
        states = one_unit([[1.0], [3.0], [6.0], [10.0]])  # steps 1 2 3 4: always 1
        start = torch.zeros(1, 1).double()
        assert replay("second-difference:1", states=states, start=start).tolist() == [4]
        assert replay("second-difference:1.0001", states=states, start=start).tolist() == [3]

    def test_without_a_start_state_the_first_change_is_unknown(self) -> None:
        states = one_unit([[0.0], [0.0], [0.0], [0.0], [0.0]])
        start = torch.zeros(1, 1).double()
        assert replay("delta:0.03", states=states, start=start).tolist() == [1]
        assert replay("delta:0.03", states=states).tolist() == [2]
        assert replay("second-difference:0.1", states=states, start=start).tolist() == [3]
        assert replay("second-difference:0.1", states=states).tolist() == [4]

    @pytest.mark.parametrize(
        # KL(u || p1) = .5 ln(.5/.9) + .5 ln(.5/.1) = .510826; KL(p1 || p2) = .9 ln(.9/.8) + .1 ln(.1/.2) = .036690.
        ("x", "loop"),
        [(0.511, 1), (0.5108, 2), (0.0367, 2), (0.03669, 3), (5e-4, 3)],
    )
    def test_kl(self, x: float, loop: int) -> None:
        assert replay(f"kl:{x}", logits=odds((0.9, 0.1), (0.8, 0.2), (0.8, 0.2), (0.8, 0.2))).tolist() == [loop]

    def test_kl_of_a_uniform_first_prediction(self) -> None:
        assert replay("kl", logits=odds((0.25,) * 4, (0.7, 0.1, 0.1, 0.1))).tolist() == [1]

    def test_kl_direction(self) -> None:
        # KL(p1 || p2) with p1 = (1, 0), p2 = (.5, .5) is ln 2 = .6931; the other way round it is infinite.
        logits = odds((1.0, 0.0), (0.5, 0.5), (0.9, 0.1))
        assert replay("kl:0.6932", logits=logits).tolist() == [2]
        assert replay("kl:0.6931", logits=logits).tolist() == [3]

    @pytest.mark.parametrize(
        # H = .325083, .500402, .500402: the difference is .175319.
        ("x", "loop"),
        [(9.0, 2), (0.17532, 2), (0.17531, 3)],
    )
    def test_entropy(self, x: float, loop: int) -> None:
        assert replay(f"entropy:{x}", logits=odds((0.9, 0.1), (0.8, 0.2), (0.2, 0.8), (0.9, 0.1))).tolist() == [loop]

    def test_entropy_does_not_compare_the_first_prediction_with_uniform(self) -> None:
        assert replay("entropy", logits=odds((0.5, 0.5), (0.9, 0.1), (0.6, 0.4))).tolist() == [3]

    @pytest.mark.parametrize(("count", "loop"), [(1, 3), (2, 4), (3, 6)])
    def test_stable(self, count: int, loop: int) -> None:
        best = [1, 2, 2, 2, 0, 1]
        logits = torch.nn.functional.one_hot(torch.tensor(best), 3).double().unsqueeze(1)
        assert replay(f"stable:{count}", logits=logits).tolist() == [loop]

    def test_stable_asks_for_every_place_of_a_unit(self) -> None:
        best = torch.tensor([[[0, 1]], [[0, 2]], [[0, 2]], [[0, 2]]])
        logits = torch.nn.functional.one_hot(best, 3).double()
        assert replay("stable:1", logits=logits, unit_axes=1).tolist() == [3]

    @pytest.mark.parametrize(
        # 1 - H / ln 2 = .278072, .531004, 1.
        ("x", "loop"),
        [(0.0, 1), (0.278, 1), (0.2781, 2), (0.531, 2), (0.532, 3), (1.0, 3)],
    )
    def test_certainty_of_logits(self, x: float, loop: int) -> None:
        assert replay(f"certainty:{x}", logits=odds((0.8, 0.2), (0.9, 0.1), (1.0, 0.0), (0.5, 0.5))).tolist() == [loop]

    def test_certainty_of_a_uniform_prediction_is_zero(self) -> None:
        assert replay("certainty:0", logits=torch.zeros(2, 1, 7)).tolist() == [1]

    def test_certainty_averages_over_places(self) -> None:
        logits = odds((1.0, 0.0), (0.5, 0.5)).view(1, 1, 2, 2).expand(2, 1, 2, 2)
        assert replay("certainty:0.5", logits=logits, unit_axes=1).tolist() == [1]
        assert replay("certainty:0.51", logits=logits, unit_axes=1).tolist() == [2]

    def test_certainty_signal(self) -> None:
        assert replay("certainty:0.5", signals=one_unit([0.4, 0.5, 0.6])).tolist() == [2]

    def test_patience(self) -> None:
        signals = one_unit([1.0, -1.0, 1.0, 1.0, 1.0])
        assert [replay(f"patience:{k}:halt:0", signals=signals).item() for k in (1, 2, 3, 4)] == [1, 4, 5, 5]

    def test_budget_spends_its_mean(self) -> None:
        # Earned 2.5, 5, 7.5, 10; loops 2 (of 2.5), 3 (of 3), 2 (of 2.5), 3 (of 3).
        assert replay("budget:2.5:hazard:0.6", signals=torch.zeros(6, 4)).tolist() == [2, 3, 2, 3]

    def test_budget_saves_what_easy_units_leave(self) -> None:
        signals = torch.zeros(6, 3)
        signals[0, 0] = 1.0  # stops at loop 1 and leaves 1.5 over
        assert replay("budget:2.5:hazard:0.6", signals=signals).tolist() == [1, 4, 2]

    def test_budget_is_kept_per_request(self) -> None:
        signals = torch.zeros(6, 2, 3)
        signals[0, 0, 0] = 1.0
        assert replay("budget:2.5:hazard:0.6", signals=signals).tolist() == [[1, 4, 2], [2, 3, 2]]

    def test_budget_in_debt_lets_every_unit_run_once(self) -> None:
        assert replay("budget:1:hazard:0.6", signals=torch.zeros(6, 4)).tolist() == [1, 1, 1, 1]
        assert replay("budget:1:hazard:0.6", signals=torch.zeros(6, 4), min_loops=2).tolist() == [2, 2, 2, 2]

    def test_min_loops(self) -> None:
        hazards = one_unit([0.9, 0.0, 0.0, 0.0])
        assert [replay("hazard:0.6", signals=hazards, min_loops=m).item() for m in (1, 2, 4)] == [1, 2, 4]
        # The rule watches earlier loops but must fire at a permitted one.
        halts = one_unit([-1.0, 1.0, -1.0, 1.0])
        assert [replay("halt:0", signals=halts, min_loops=m).item() for m in (1, 2, 3)] == [2, 2, 4]


@pytest.mark.parametrize(
    ("text", "earliest"),
    [
        ("fixed:2", 2),
        ("hazard:0", 1),
        ("halt:0", 1),
        ("delta", 1),
        ("second-difference", 3),
        ("kl", 1),
        ("entropy", 2),
        ("stable:2", 3),
        ("certainty:0", 1),
        ("patience:3:second-difference", 5),
        ("budget:1:hazard:1", 1),
    ],
)
def test_earliest_loop_on_a_trace_where_nothing_moves(text: str, earliest: int) -> None:
    loops = replay(
        text,
        states=torch.ones(9, 1, 3),
        start=torch.ones(1, 3),
        signals=torch.ones(9, 1),
        logits=torch.zeros(9, 1, 5),
    )
    assert loops.tolist() == [earliest]


class TestNaN:
    """A NaN never stops a unit at its loop."""

    @pytest.mark.parametrize("name", ["hazard:0", "halt:-1e9", "certainty:0"])
    def test_signals(self, name: str) -> None:
        assert replay(name, signals=one_unit([math.nan, math.nan, 1.0, 1.0])).tolist() == [3]
        assert replay(name, signals=one_unit([math.nan] * 4)).tolist() == [4]

    def test_a_nan_hazard_counts_as_zero(self) -> None:
        assert replay("hazard:0.5", signals=one_unit([0.4, math.nan, 0.2, 0.0])).tolist() == [3]
        # CDF is .6 already, and yet the loop with the NaN does not stop.
        assert replay("hazard:0.5", signals=one_unit([0.6, math.nan, 0.0, 0.0]), min_loops=2).tolist() == [3]

    @pytest.mark.parametrize(
        ("name", "loop"), [("kl", 4), ("entropy", 4), ("stable:1", 4), ("certainty:0", 1), ("stable:2", 5)]
    )
    def test_logits(self, name: str, loop: int) -> None:
        logits = torch.zeros(6, 1, 3)
        logits[:, :, 0] = 9.0
        logits[1, 0, 2] = math.nan
        assert replay(name, logits=logits).tolist() == [loop]
        assert replay(name, logits=torch.full((6, 1, 3), math.nan)).tolist() == [6]

    def test_stable_does_not_take_two_nan_for_one_answer(self) -> None:
        logits = torch.zeros(5, 1, 3)
        logits[:, :, 2] = math.nan
        assert replay("stable:1", logits=logits).tolist() == [5]

    @pytest.mark.parametrize(("name", "loop"), [("delta", 4), ("second-difference", 6), ("patience:2:delta", 5)])
    def test_states(self, name: str, loop: int) -> None:
        states = torch.ones(7, 1, 2)
        states[1, 0, 1] = math.nan
        assert replay(name, states=states, start=torch.zeros(1, 2)).tolist() == [loop]

    def test_other_units_do_not_notice(self) -> None:
        signals = torch.tensor([[0.7, math.nan], [0.7, 0.7]])
        assert replay("hazard:0.6", signals=signals).tolist() == [1, 2]


class TestWidth:
    def test_tiny_hazards_add_up(self) -> None:
        # 1 - (1 - 2^-10)^m >= .01 from m = ln .99 / ln(1 - 2^-10) = 10.3 on; 1 - 2^-10 is 1 in bfloat16.
        assert replay("hazard:0.01", signals=torch.full((20, 1), 2.0**-10, dtype=torch.bfloat16)).tolist() == [11]
        # 1 - 2^-26 is 1 in float32.
        assert replay("hazard:1e-7", signals=torch.full((20, 1), 2.0**-26)).tolist() == [7]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["delta:0.5", "second-difference:3", "kl:0.1", "entropy:0.05", "certainty:0.2"])
    def test_half_precision_decides_like_float32(self, name: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        trace = torch.randn(12, 500, 8, generator=generator).cumsum(0).to(dtype)
        half = replay(name, states=trace, logits=trace)
        assert half.tolist() == replay(name, states=trace.float(), logits=trace.float()).tolist()
        assert len(set(half.tolist())) > 2

    def test_no_gradient_is_kept(self) -> None:
        tracker = parse_rule("kl").track(1)
        tracker.update(Observation(loop=1, logits=torch.zeros(1, 3, requires_grad=True)))
        assert not any(value.requires_grad for value in vars(tracker).values() if isinstance(value, Tensor))


class TestGolden:
    """The authors' Q-exit loops on a tiny Ouro."""

    @pytest.mark.parametrize("q", [0.3, 0.6, 0.9])
    def test_exit_loops(self, q: float) -> None:
        expected = load_file(GOLDEN)
        for dtype in (torch.float32, torch.float64):
            hazards = torch.sigmoid(expected["gate_logits"].to(dtype))
            loops = replay(f"hazard:{q}", signals=hazards)
            assert torch.equal(loops, expected[f"exit_loop_q{q}"])
        assert len(loops.unique()) > 1

    def test_exit_loop_is_the_first_with_enough_cdf(self) -> None:
        expected = load_file(GOLDEN)
        loops = replay("hazard:0.5", signals=torch.sigmoid(expected["gate_logits"]))
        assert torch.equal(loops, (expected["exit_cdf"] < 0.5).sum(dim=0) + 1)


class TestModels:
    """Rules against the signal a model has."""

    def test_bind(self) -> None:
        hazard = parse_rule("patience:2:hazard:0.5")
        assert hazard.bind("hazard") == hazard
        assert hazard.signal_kind == "hazard"
        for kind in ("certainty", "halt_logit", None):
            with pytest.raises(ConfigError, match=r"reads a hazard; this model's signal is"):
                hazard.bind(kind)
        assert parse_rule("delta").bind(None) == parse_rule("delta")

    def test_certainty_reads_the_models_own(self) -> None:
        unbound = parse_rule("budget:2:patience:2:certainty:0.5")
        assert unbound.needs == {"logits", "allowance"}
        bound = unbound.bind("certainty")
        assert bound.needs == {"signal", "allowance"}
        assert bound.signal_kind == "certainty"
        assert str(bound) == str(unbound)
        assert unbound.bind("hazard") == unbound
        assert Certainty(threshold=0.5).bind("certainty").bind(None) == Certainty(threshold=0.5)

    def test_replay_chooses_between_signal_and_logits(self) -> None:
        signals, logits = one_unit([1.0, 1.0, 1.0]), odds((0.5, 0.5), (0.5, 0.5), (0.5, 0.5))
        assert replay("certainty:0.9", signals=signals, logits=logits).tolist() == [3]
        assert replay("certainty:0.9", signals=signals, logits=logits, signal_kind="certainty").tolist() == [1]
        assert replay("certainty:0.9", signals=signals).tolist() == [1]
        with pytest.raises(ConfigError, match="reads a hazard"):
            replay("hazard:0.5", signals=signals, signal_kind="certainty")


class TestMistakes:
    def test_replay(self) -> None:
        signals = torch.zeros(3, 2)
        with pytest.raises(ConfigError, match="reads states, which were not recorded; pass states="):
            replay("delta", signals=signals)
        with pytest.raises(ConfigError, match="nothing to replay"):
            replay("fixed:2")
        for min_loops in (0, 4):
            with pytest.raises(ConfigError, match=f"min_loops={min_loops}: allowed is 1 to 3"):
                replay("hazard", signals=signals, min_loops=min_loops)
        with pytest.raises(InputError, match="must be equal"):
            replay("hazard", signals=signals, logits=torch.zeros(3, 5, 4))
        with pytest.raises(InputError, match=r"start has shape \(2, 4\)"):
            replay("delta", states=torch.zeros(3, 2, 5), start=torch.zeros(2, 4))
        with pytest.raises(InputError, match="pass unit_axes="):
            replay("delta", states=torch.zeros(3))

    def test_tracker(self) -> None:
        tracker = parse_rule("hazard").track(3)
        with pytest.raises(InputError, match="reads 'signal', which was not observed"):
            tracker.update(Observation(loop=1))
        with pytest.raises(InputError, match="observed signal has 2 units, the tracker has 3"):
            tracker.update(Observation(loop=1, signal=torch.zeros(2)))
