"""Where states go from loop to loop: a projection for the eye, and beside it numbers that no projection can bend.

Axes: T tokens, R loops, D width.
"""

from typing import Any

import numpy as np

from loopwise.errors import InputError
from loopwise.study.statistics import principal_components
from loopwise.trace import LoopTrace


def state_paths(trace: LoopTrace) -> dict[str, Any]:
    """Principal coordinates of all states of a trace, with unprojected step lengths and angles.

    Returns lists per token and loop, four digits of each: `xyz` (T, R, 3), `explained` (3 shares of the variance),
    `steps` (T, R), the length of each update relative to the state it led to, and `angles` (T, R), in degrees between
    an update and the one before it. The first loop has no update that is known, the second no angle: None there, and
    where nothing ran.

    Raises:
        InputError: the trace was recorded without states.
    """
    if trace.states is None:
        raise InputError("this trace carries no states; record it with keep_states=True")
    states = trace.states.astype(np.float64)
    tokens, loops, width = states.shape
    flat = states.reshape(-1, width)
    known = ~np.isnan(flat).any(axis=1)
    coordinates = np.full((len(flat), 3), np.nan)
    explained = np.zeros(3)
    if known.any():
        placed, shares = principal_components(flat[known], 3)
        missing = 3 - len(shares)
        coordinates[known] = np.pad(placed, ((0, 0), (0, missing)))
        explained = np.pad(shares, (0, missing))
    updates = np.diff(states, axis=1)
    lengths = np.linalg.norm(updates, axis=-1)
    steps = np.full((tokens, loops), np.nan)
    steps[:, 1:] = lengths / np.maximum(np.linalg.norm(states[:, 1:], axis=-1), 1e-12)
    angles = np.full((tokens, loops), np.nan)
    if loops > 2:
        both = np.maximum(lengths[:, 1:] * lengths[:, :-1], 1e-300)
        cosine = np.clip((updates[:, 1:] * updates[:, :-1]).sum(-1) / both, -1, 1)
        angles[:, 2:] = np.degrees(np.arccos(cosine))
    return {
        "xyz": _short(coordinates.reshape(tokens, loops, 3)),
        "explained": np.round(explained, 4).tolist(),
        "steps": _short(steps),
        "angles": _short(angles),
    }


def _short(values: np.ndarray) -> Any:
    """Nested lists of four significant digits; NaN becomes None."""
    return _plain(values.tolist())


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if value != value else float(f"{value:.4g}")
