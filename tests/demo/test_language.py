"""What the demo says about its language model is what was measured."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from loopwise.demo.language import LanguageReport, ThresholdRow, measure_language
from loopwise.demo.story import verdict
from loopwise.study.exits import Depths, ExitPoint, measure_exit
from loopwise.study.speed import Speed, SpeedUp
from loopwise.train.batches import Batch

tiny = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]


def test_rows_are_exits_of_both_semantics_by_rising_mean() -> None:
    model = tiny("ouro", seed=2)
    tokens = torch.randint(model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        documents=torch.zeros(4, 11, dtype=torch.long),
        mask=torch.ones(4, 11, dtype=torch.bool),
    )
    report = measure_language(model, [batch])
    means = [row.fill.mean_loops for row in report.rows]
    assert means == sorted(means)
    for row in report.rows:
        assert (row.skip.policy, row.fill.policy) == ("last_exited", "per_loop")
        assert row.skip.loss == measure_exit(model, [batch], row.skip.rule, report.depths).loss
    middle = (1 + model.config.loops) / 2
    apart = [abs(row.skip.mean_loops - middle) for row in report.rows]
    assert abs(report.middle.skip.mean_loops - middle) == min(apart)


def point(loss: float) -> ExitPoint:
    return ExitPoint(
        rule="hazard:0.5",
        policy="last_exited",
        mean_loops=2.5,
        loss=loss,
        accuracy=0.5,
        mixed_loss=3.0,
        loops=np.array([2, 3]),
    )


@pytest.mark.parametrize(("loss", "side"), [(2.99, "0.0100 nats below"), (3.02, "0.0200 nats ABOVE")])
def test_the_verdict_says_which_way_it_went(loss: float, side: str) -> None:
    row = ThresholdRow(skip=point(loss), fill=point(loss))
    depths = Depths(losses=np.ones((4, 2)), right=np.ones((4, 2), dtype=bool), hazards=None)
    report = LanguageReport(depths=depths, rows=[row], middle=row)
    full, fast = Speed(rates=(100.0, 100.0), mean_loops=4.0), Speed(rates=(80.0, 90.0), mean_loops=2.51)
    said = verdict(report, SpeedUp(rule="hazard:0.4", full=full, exit=fast))
    assert side in said
    assert "mean of 2.51 makes 85 tokens/s" in said
    assert "depth 100: 0.85 times as fast" in said
