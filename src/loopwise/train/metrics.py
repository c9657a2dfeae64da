"""Metrics of a run as JSON lines, which a resumed run continues as if it had never been killed."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from loopwise.errors import InputError, StorageError


class MetricsLog:
    """Appends one JSON object per line to `path`; each line reaches the operating system at once, and whole.

    Every line carries `step`, the number of optimiser steps completed. With `resume_step`, lines beyond that step
    and a torn last line are dropped first, so the steps that are run again are not listed twice. Values that hang
    on the clock (tokens/s, seconds) belong under the key `timing`: everything else is then equal between a run
    that was killed and one that was not.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                rewind(self.path, resume_step)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise _refused(self.path, error) from error

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Appends a line. NaN and infinities are written as the strings "NaN", "Infinity" and "-Infinity"."""
        line = json.dumps({"step": step, **_encode(values)}, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise _refused(self.path, error) from error
        if written != len(line):
            raise StorageError(f"cannot write {self.path}: the disk is full; free some space, then resume the run")

    def sync(self) -> None:
        """Forces the lines to the disk; call it before saving a checkpoint, which must never be ahead of them."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _refused(self.path, error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, also of a run that is still going on; a torn last line is left out."""
    return [_decode(line) for line, _ in _whole_lines(Path(path))]


def rewind(path: Path, step: int | None) -> None:
    """Drops a torn last line and, unless `step` is None, all lines of later steps; one rename replaces the file."""
    kept = b"".join(raw for line, raw in _whole_lines(path) if step is None or line["step"] <= step)
    if len(kept) == path.stat().st_size:
        return
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _whole_lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    lines = path.read_bytes().splitlines(keepends=True)
    whole = []
    for number, raw in enumerate(lines, start=1):
        try:
            line = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            whole.append((line, raw))
        elif number < len(lines):
            raise InputError(f"{path}, line {number}, is not a JSON object with a step; mend or remove that line")
    return whole


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encode(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_decode(inner) for inner in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}; free some space or give another run folder")
