"""A loop trace as the numbers that a page draws: small, finite, and computed here, by `LoopTrace`, never twice.

512 tokens of 32 loops with five candidates each stay under 3 MB of JSON, so numbers are rounded to what can be seen.
"""

import math
import re
from typing import Any

import numpy as np

from loopwise.studio.glyphs import label
from loopwise.trace import LoopTrace

CDF_UNITS = 10_000
"""The exit CDF travels as whole ten-thousandths."""


def wire(trace: LoopTrace) -> dict[str, Any]:
    """What a page needs to show a trace and to replay thresholds; a list per token, cut where nothing was recorded."""
    rule, _, value = trace.rule.partition(":")
    data: dict[str, Any] = {
        "max": trace.max_loops,
        "loops": trace.loops.tolist(),
        "ids": trace.tokens.tolist(),
        "labels": [label(text) for text in trace.texts],
        "kind": trace.signal_kind,
        "signals": _cut(trace.signals, 4),
        "losses": _cut(trace.losses, 3),
        "entropy": _cut(trace.entropy, 3),
        "kl": _cut(trace.kl, 3),
        "recorded": float(value) if rule == "hazard" and re.fullmatch(r"\d*\.?\d+", value) else None,
    }
    if trace.losses is not None and (~np.isnan(trace.losses).any(axis=1)).any():
        data["depths"] = np.round(trace.loss_by_loop(), 4).tolist()
    if trace.replayable:
        curve = trace.exit_curve()
        data["cdf"] = [_units(row[~np.isnan(row)]) for row in trace.exit_cdf()]
        data["curve"] = {
            "loops": np.round(curve.mean_loops, 4).tolist(),
            "loss": None if curve.mean_loss is None else np.round(curve.mean_loss, 4).tolist(),
            "mixed": None if curve.mixed_loss is None else np.round(curve.mixed_loss, 4).tolist(),
            "truncated": curve.truncated.tolist(),
            "tokens": curve.tokens,
            "home": _home(trace, data["recorded"], curve.thresholds),
        }
    if trace.top_ids is not None and trace.top_probs is not None:
        known = ~np.isnan(trace.top_probs)
        used = sorted(set(trace.top_ids[known].tolist()))
        place = {token: index for index, token in enumerate(used)}
        data["words"] = [label(trace.vocabulary[token]) for token in used]
        data["word_ids"] = used
        data["top"] = [
            [[place[token] for token in ids[there].tolist()] for ids, there in zip(*both, strict=True)]
            for both in zip(trace.top_ids, known, strict=True)
        ]
        data["probs"] = [
            [[round(prob, 3) for prob in probs[there].tolist()] for probs, there in zip(*both, strict=True)]
            for both in zip(trace.top_probs, known, strict=True)
        ]
    return data


def _units(cdf: np.ndarray) -> list[int]:
    """The largest n with n / CDF_UNITS <= cdf, so that integers reach a threshold exactly when the CDF does."""
    units = np.floor(cdf * CDF_UNITS).astype(int)
    units += (units + 1) / CDF_UNITS <= cdf
    units -= units / CDF_UNITS > cdf
    result: list[int] = units.tolist()
    return result


def _home(trace: LoopTrace, recorded: float | None, thresholds: np.ndarray) -> int | None:
    """The slider's step that shows the trace as it was recorded, if there is one."""
    if recorded is None or recorded > 1:
        return None
    step = int(np.abs(thresholds - recorded).argmin())
    same = abs(thresholds[step] - recorded) < 1e-9 and (trace.replay(float(thresholds[step])) == trace.loops).all()
    return step if same else None


def _cut(values: np.ndarray | None, digits: int) -> list[list[float | None]] | None:
    if values is None:
        return None
    rows = values.astype(np.float64).tolist()
    return [[round(value, digits) if math.isfinite(value) else None for value in row] for row in rows]
