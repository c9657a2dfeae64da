"""A small language model: what each loop is worth, and what stopping early costs and saves."""

from dataclasses import dataclass

from loopwise.engine.sampling import Sampling
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.exits import Depths, ExitPoint, hazard_for, measure_depths, measure_exit
from loopwise.study.speed import SpeedUp, measure_speed
from loopwise.train.batches import Batch

MEANS = (1.5, 2.0, 2.5, 3.0, 3.5)
"""Mean loops that the table asks for, at four loops; scaled for others."""


@dataclass(frozen=True, kw_only=True)
class ThresholdRow:
    """One exit threshold."""

    skip: ExitPoint
    """Tokens that stop do no more work."""
    fill: ExitPoint
    """Tokens that stop fill their remaining planes, as in training."""


@dataclass(frozen=True, kw_only=True)
class LanguageReport:
    """What a trained language model does on held-out text."""

    depths: Depths
    rows: list[ThresholdRow]
    """By rising mean loops."""
    middle: ThresholdRow
    """The row nearest to the middle of the range, (1 + R) / 2."""


def measure_language(model: LoopedLM, batches: list[Batch]) -> LanguageReport:
    """Loss by loops, and by threshold under both semantics, on held-out text."""
    depths = measure_depths(model, batches)
    loops = model.config.loops
    rows = []
    for mean in MEANS:
        wanted = 1 + (mean - 1) * (loops - 1) / 3
        rule = hazard_for(depths, wanted)
        rows.append(
            ThresholdRow(
                skip=measure_exit(model, batches, rule, depths, policy="last_exited"),
                fill=measure_exit(model, batches, rule, depths, policy="per_loop"),
            )
        )
    middle = min(rows, key=lambda row: abs(row.skip.mean_loops - (1 + loops) / 2))
    return LanguageReport(depths=depths, rows=rows, middle=middle)


def measure_writing(
    model: LoopedLM, batches: list[Batch], *, answers: int = 2, tokens: int = 128, rounds: int = 3
) -> SpeedUp:
    """Speed of writing with exits at the middle of the range beside full depth, after beginnings of held-out text.

    Args:
        answers: how many are written, one after the other.
    """
    rows = [row for batch in batches for row in batch.tokens][:answers]
    prompts = [row[:32].tolist() for row in rows]
    sampling = Sampling(max_tokens=tokens, temperature=0.8, ignore_eos=True)
    return measure_speed(model, prompts, sampling, mean_loops=(1 + model.config.loops) / 2, rounds=rounds)
