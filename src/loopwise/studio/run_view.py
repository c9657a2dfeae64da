"""A training run as lines to draw, read from its metrics.jsonl, also while it is still going on."""

import re
from pathlib import Path
from typing import Any

from loopwise.errors import NotFoundError
from loopwise.train.metrics import read_metrics

# What to draw together: title, unit of the axis, names in metrics.jsonl.
PANELS = (
    ("Validation loss by loop", "nats per token", r"validation_loss_loop_(\d+)"),
    ("Training loss by loop", "nats per token", r"loss_loop_(\d+)"),
    ("Mean exit loop", "loops", r"((?:validation_)?exit_loop)"),
    ("Exit distribution", "share of tokens", r"validation_exit_share_loop_(\d+)"),
    ("State norm after each loop", "root mean square", r"validation_state_norm_loop_(\d+)"),
    ("Correlation between tokens' states", "cosine", r"(validation_token_correlation)"),
    ("Gradient norm", "", r"(gradient_norm)"),
    ("Learning rate", "", r"(learning_rate)"),
    ("Speed", "tokens per second", r"timing\.(tokens_per_second)"),
    ("Share of the matrix-multiply peak", "share", r"timing\.(peak_share)"),
)


def run_view(folder: Path) -> dict[str, Any]:
    """Panels of lines: {"name", "steps", "panels": [{"title", "unit", "lines": [{"name", "x", "y"}]}]}.

    Raises:
        NotFoundError: the folder holds no metrics.
        InputError: a line in the middle of the file is broken.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise NotFoundError(f"{folder} has no metrics.jsonl; give the folder of a run of `loopwise train`")
    lines = [_flat(line) for line in read_metrics(folder / "metrics.jsonl")]
    panels = []
    for title, unit, pattern in PANELS:
        found: dict[str, tuple[list[int], list[float]]] = {}
        for line in lines:
            for name, value in line.items():
                match = re.fullmatch(pattern, name)
                if match and isinstance(value, int | float):
                    x, y = found.setdefault(match[1], ([], []))
                    x.append(line["step"])
                    y.append(float(value))
        if found:
            panels.append(
                {
                    "title": title,
                    "unit": unit,
                    "lines": [
                        {"name": f"loop {name}" if name.isdigit() else name.replace("_", " "), "x": x, "y": y}
                        for name, (x, y) in sorted(found.items(), key=lambda item: (len(item[0]), item[0]))
                    ],
                }
            )
    return {
        "name": folder.name,
        "steps": max((line["step"] for line in lines), default=0),
        "stages": list(dict.fromkeys(line["stage"] for line in lines if "stage" in line)),
        "panels": panels,
    }


def _flat(line: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
