"""What a run says of itself: lines of metrics.jsonl, trackers, and the progress line."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopwise.configuration import to_dict
from loopwise.train.config import TrainConfig
from loopwise.train.metrics import MetricsLog
from loopwise.train.progress import Progress, Status
from loopwise.train.trackers import Tracker, build_trackers
from loopwise.train.validation import Validation


@dataclass
class Figures:
    """Means of the objective's figures over the micro-batches of one step, weighted by their shares."""

    total: float = 0.0
    """The step's loss."""
    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, found: Mapping[str, float], *, loops: int, share: float) -> None:
        """Take in a micro-batch of so many loops; a loss whose depth varies is kept by its depth as well."""
        for name, value in {**found, **({f"loss_loop_{loops}": found["loss"]} if "loss" in found else {})}.items():
            self.sums[name] = self.sums.get(name, 0.0) + share * value
            self.weights[name] = self.weights.get(name, 0.0) + share

    def means(self) -> dict[str, float]:
        """By name."""
        return {name: total / self.weights[name] for name, total in self.sums.items() if self.weights[name]}


class Stopwatch:
    """Work and time since the last look. It hangs on the clock and is no part of a run's state."""

    def __init__(self, peak: float) -> None:
        self.peak = peak
        """Floating-point operations per second that this machine can do."""
        self._seconds, self._tokens, self._flops = 0.0, 0, 0.0
        self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self, *, tokens: int, flops: float) -> None:
        """Count the work since `start`."""
        self._seconds += time.perf_counter() - self._began
        self._tokens += tokens
        self._flops += flops

    def look(self) -> dict[str, float]:
        """Tokens per second and the share of the peak, and begin anew."""
        seconds = max(self._seconds, 1e-9)
        found = {"tokens_per_second": self._tokens / seconds, "peak_share": self._flops / seconds / self.peak}
        self._seconds, self._tokens, self._flops = 0.0, 0, 0.0
        return found


@dataclass(frozen=True)
class Outputs:
    """Where a run reports to."""

    config: TrainConfig
    metrics: MetricsLog
    trackers: list[Tracker]
    progress: Progress

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """A line of metrics.jsonl, for the trackers too."""
        self.metrics.log(values, step)
        for tracker in self.trackers:
            tracker.log(values, step)

    def trained(self, values: Mapping[str, Any], timing: Mapping[str, float], step: int) -> None:
        """A step was done; `values` are functions of the run alone, `timing` hangs on the clock."""
        self.log({**values, "timing": dict(timing)}, step)
        losses = {int(name.removeprefix("loss_loop_")): loss for name, loss in values.items() if _is_loop_loss(name)}
        self.progress.update(
            Status(
                step=step,
                steps=self.config.steps,
                stage=values["stage"] if len(self.config.stages) > 1 else None,
                losses=[losses[loop] for loop in sorted(losses)],
                loops=sorted(losses),
                mean_exit=values.get("exit_loop"),
                tokens_per_second=timing["tokens_per_second"],
                peak_share=timing["peak_share"],
                learning_rate=values["learning_rate"],
                skipped=values["skipped"],
            )
        )

    def validated(self, found: Validation, step: int, *, bytes_per_token: float | None) -> None:
        """The held-out text was read."""
        self.log(found.figures(bytes_per_token=bytes_per_token), step)
        losses = " ".join(f"{loop}:{loss:.3f}" for loop, loss in found.losses.items())
        self.progress.note(f"step {step:,} · validation loss by loops {losses}")

    def warn(self, name: str, message: str, step: int) -> None:
        """A guard has spoken."""
        self.log({"warning": name, "message": message}, step)
        self.progress.note(f"warning: {message}")


@contextmanager
def open_outputs(config: TrainConfig, folder: Path, progress: Progress, *, step: int) -> Iterator[Outputs]:
    """The outputs of a run that has done `step` steps; lines of later steps are dropped from metrics.jsonl."""
    trackers = build_trackers(
        config.trackers, folder=folder, project="loopwise", run=folder.resolve().name, config=to_dict(config)
    )
    try:
        with progress, MetricsLog(folder / "metrics.jsonl", resume_step=step) as metrics:
            yield Outputs(config, metrics, trackers, progress)
    finally:
        for tracker in trackers:
            tracker.close()


def _is_loop_loss(name: str) -> bool:
    return name.startswith("loss_loop_")
