"""The loop trace: one versioned record of what a looped model did, token by loop.

Axes: T tokens of the text, R loops (`max_loops`), K candidates, D width. Row i of every array belongs to the
*row that emitted token i*, that is, to the position before it: `loops[i]` is how many loops it ran, `signals[i]`
what its gate said, `top_ids[i]` what it would have said after each loop, `losses[i]` what token i cost it.
A token that no row emitted (the first one, a prompt that was only read) has `loops[i] == 0`.

Replay asks what an exit threshold *would* have done with the signals that were recorded. It is a what-if: a real
early exit changes the keys and values that later tokens read, and so their signals.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from loopwise.errors import CheckpointError, InputError, NotFoundError, StorageError

SIGNAL_KINDS = ("hazard", "halt_logit", "certainty", "delta")
FORMAT = "loopwise-trace"
ARRAYS = ("tokens", "loops", "signals", "top_ids", "top_probs", "losses", "entropy", "kl", "states")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitCurve:
    """What each threshold would have cost on one trace, by replay. N thresholds."""

    thresholds: Float[np.ndarray, " thresholds"]
    """The hazard CDF at which a token leaves; 1.0 means never early."""
    mean_loops: Float[np.ndarray, " thresholds"]
    """Mean loops per counted token."""
    mean_loss: Float[np.ndarray, " thresholds"] | None
    """Mean loss in nats at the loop where each counted token leaves; None if the trace has no losses."""
    mixed_loss: Float[np.ndarray, " thresholds"] | None
    """Loss of random mixing at the same mean: the chord between the two neighbouring fixed depths. None unless
    every counted token was recorded at every loop."""
    truncated: Int[np.ndarray, " thresholds"]
    """Counted tokens that would have run deeper than they were recorded; they count at their recorded depth."""
    tokens: int
    """How many tokens are counted: those with a signal and, if the trace has losses, a loss at each such loop."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopTrace:
    """What happened, token x loop. Arrays of any integer or float dtype are accepted and converted.

    Raises InputError if shapes, ranges or names do not fit together. The fields carry no shape annotations, so
    that this check with its message is the one that speaks.
    """

    version: ClassVar[int] = 2
    """Of the file format; a reader refuses newer ones. 2 added `kl`."""

    title: str = ""
    """One line for people; empty: the model's name is shown."""
    model: str
    """Name, path or hub id of the model."""
    rule: str
    """Canonical text of the exit rule, such as `hazard:0.6`."""
    policy: str
    """Plane policy. Only `last_exited` saves work by leaving early; `per_loop` saves latency."""
    max_loops: int
    """R: the loops a token could have run."""
    prompt_length: int = 0
    """How many of the tokens were given."""
    tokens: np.ndarray
    """(T,) ids, int32."""
    texts: Sequence[str]
    """Display text of each token."""
    loops: np.ndarray
    """(T,) loops of the row that emitted each token, int32; 0 where there was none."""
    signal_kind: str | None = None
    """`hazard`, `halt_logit`, `certainty` or `delta`; None without signals."""
    signals: np.ndarray | None = None
    """(T, R) stopping signal after each loop, float32 or wider; NaN from the first loop that was not run."""
    top_ids: np.ndarray | None = None
    """(T, R, K) most probable ids after each loop, best first, int32; meaningless where `top_probs` is NaN."""
    top_probs: np.ndarray | None = None
    """(T, R, K) their probabilities, NaN where not run. float32; float16 in the file (error under 0.00025)."""
    vocabulary: Mapping[int, str] = field(default_factory=dict)
    """Display text of every id in `top_ids`."""
    losses: np.ndarray | None = None
    """(T, R) loss of this token after each loop in nats, float32; NaN where unknown."""
    entropy: np.ndarray | None = None
    """(T, R) entropy of the prediction in nats, NaN where unknown. float32; float16 in the file (error under 0.004)."""
    kl: np.ndarray | None = None
    """(T, R) Kullback-Leibler divergence in nats of the prediction after each loop from that after the last one,
    KL(last || this); NaN where unknown. float32; float16 in the file."""
    states: np.ndarray | None = None
    """(T, R, D) state after each loop, NaN where not run; float16 is kept as such, all else is float32."""

    def __post_init__(self) -> None:
        for name in ARRAYS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _array(name, value))
        object.__setattr__(self, "texts", tuple(self.texts))
        self._check_tokens()
        self._check_loops()

    def _check_tokens(self) -> None:
        if self.max_loops < 1:
            raise InputError(f"max_loops is {self.max_loops}; it must be at least 1")
        count = len(self.texts)
        shapes: dict[str, tuple[int | None, ...]] = dict.fromkeys(("tokens", "loops"), (count,))
        shapes |= dict.fromkeys(("signals", "losses", "entropy", "kl"), (count, self.max_loops))
        shapes |= dict.fromkeys(("top_ids", "top_probs", "states"), (count, self.max_loops, None))
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and not _fits(value.shape, shape):
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                raise InputError(f"{name} has shape {value.shape}; with {count} texts it must be ({wanted})")
        if not 0 <= self.prompt_length <= count:
            raise InputError(f"prompt_length is {self.prompt_length}; it must lie between 0 and {count}")
        if count and not 0 <= self.loops.min() <= self.loops.max() <= self.max_loops:
            raise InputError(
                f"loops go from {self.loops.min()} to {self.loops.max()}; they must lie between 0 and {self.max_loops}"
            )

    def _check_loops(self) -> None:
        if (self.signals is None) != (self.signal_kind is None):
            raise InputError("signals and signal_kind belong together: give both or neither")
        if self.signal_kind is not None and self.signal_kind not in SIGNAL_KINDS:
            raise InputError(f"signal_kind is {self.signal_kind!r}; it must be one of {', '.join(SIGNAL_KINDS)}")
        if self.signals is not None:
            known = ~np.isnan(self.signals)
            if (known[:, 1:] & ~known[:, :-1]).any():
                raise InputError("signals have a NaN before a number; only loops after the last one run may be NaN")
            if self.signal_kind == "hazard" and ((self.signals < 0) | (self.signals > 1)).any():
                raise InputError("a hazard is a probability; signals must lie between 0 and 1")
        if self.losses is not None and np.isinf(self.losses).any():
            raise InputError("losses hold an infinity; a loss must be finite, or NaN where it is unknown")
        if (self.top_ids is None) != (self.top_probs is None):
            raise InputError("top_ids and top_probs belong together: give both or neither")
        if self.top_ids is not None and self.top_probs is not None:
            if self.top_ids.shape != self.top_probs.shape:
                raise InputError(
                    f"top_ids has shape {self.top_ids.shape}, top_probs {self.top_probs.shape}; make them equal"
                )
            missing = set(self.top_ids[~np.isnan(self.top_probs)].tolist()) - set(self.vocabulary)
            if missing:
                raise InputError(f"vocabulary has no text for id {min(missing)} of top_ids; add one for every id")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def mean_loops(self) -> float:
        """Mean loops over the tokens that a row emitted; NaN if there are none."""
        ran = self.loops[self.loops > 0]
        return float(ran.mean()) if ran.size else float("nan")

    @property
    def replayable(self) -> bool:
        """True if hazards were recorded, so that thresholds can be replayed."""
        return self.signals is not None and self.signal_kind == "hazard" and self._counted().any().item()

    def exit_cdf(self) -> Float[np.ndarray, "tokens loops"]:
        """Probability of having left by each loop, CDF(n) = 1 - prod over m <= n of (1 - hazard(m)), in float64.

        NaN where no hazard was recorded. Raises InputError without hazards. Source: Ouro (arXiv 2510.25741), Q-exit.
        """
        if self.signals is None or self.signal_kind != "hazard":
            raise InputError(f"this trace carries {self.signal_kind or 'no signals'}; replay needs recorded hazards")
        result: Float[np.ndarray, "tokens loops"] = 1 - np.cumprod(1 - self.signals.astype(np.float64), axis=1)
        return result

    def replay(self, threshold: float) -> Int[np.ndarray, " tokens"]:
        """Loops of every token if it had left at the first loop whose CDF reaches `threshold` (1.0: never early).

        A token that never reaches it counts at the last loop recorded; one without signals keeps its own loops.
        """
        return self._replay(self.exit_cdf(), threshold)

    def exit_curve(self, thresholds: Sequence[float] | Float[np.ndarray, " thresholds"] | None = None) -> ExitCurve:
        """Mean loops and mean loss for each threshold (default: 0, 0.005, ... 1), by replay.

        Raises InputError if the trace has no hazards.
        """
        cdf, counted = self.exit_cdf(), self._counted()
        if not counted.any():
            raise InputError("no token of this trace has a recorded hazard; record some to draw its exit curve")
        grid = np.arange(201) / 200 if thresholds is None else np.asarray(thresholds, dtype=np.float64)
        exits = np.stack([self._replay(cdf, float(threshold))[counted] for threshold in grid])
        reached = np.stack([_reaches(cdf[counted], float(threshold)).any(axis=1) for threshold in grid])
        depth = (~np.isnan(cdf[counted])).sum(axis=1)
        mean_loops = exits.mean(axis=1)
        mean_loss = mixed_loss = None
        if self.losses is not None:
            losses = self.losses[counted].astype(np.float64)
            mean_loss = losses[np.arange(len(losses)), exits - 1].mean(axis=1)
            if (depth == self.max_loops).all():
                mixed_loss = np.interp(mean_loops, np.arange(1, self.max_loops + 1), losses.mean(axis=0))
        return ExitCurve(
            thresholds=grid,
            mean_loops=mean_loops,
            mean_loss=mean_loss,
            mixed_loss=mixed_loss,
            truncated=(~reached & (depth < self.max_loops)).sum(axis=1),
            tokens=int(counted.sum()),
        )

    def loss_by_loop(self) -> Float[np.ndarray, " loops"]:
        """Mean loss in nats of every fixed depth, over the tokens whose loss is known at all of them.

        On a trace that can be replayed these are the tokens of the exit curve. Raises InputError without losses.
        """
        if self.losses is None:
            raise InputError("this trace carries no losses; record it over a text whose next tokens are known")
        whole = ~np.isnan(self.losses).any(axis=1)
        if self.replayable and (both := whole & self._counted()).any():
            whole = both
        if not whole.any():
            raise InputError("no token of this trace has a loss at every loop; record it at full depth")
        result: Float[np.ndarray, " loops"] = self.losses[whole].astype(np.float64).mean(axis=0)
        return result

    def subset(self, start: int, stop: int) -> "LoopTrace":
        """Tokens start (included) to stop (excluded) as a trace of their own."""
        if not 0 <= start <= stop <= len(self):
            raise InputError(f"tokens {start} to {stop} were asked for; this trace has tokens 0 to {len(self)}")
        arrays: dict[str, Any] = {
            name: value[start:stop] for name in ARRAYS if (value := getattr(self, name)) is not None
        }
        given = min(max(self.prompt_length - start, 0), stop - start)
        return replace(self, texts=self.texts[start:stop], prompt_length=given, **arrays)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, whole or not at all. Raises StorageError if the disk refuses."""
        from safetensors.numpy import save

        arrays = {name: value for name in ARRAYS if (value := getattr(self, name)) is not None}
        for name in ("top_probs", "entropy", "kl"):
            if name in arrays:
                arrays[name] = arrays[name].astype(np.float16)
        head = self._head() | {
            "prompt_length": self.prompt_length,
            "texts": list(self.texts),
            "vocabulary": {str(token): text for token, text in self.vocabulary.items()},
        }
        contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        data = save(contiguous, {"format": FORMAT, "version": str(self.version), "trace": json.dumps(head)})
        return _write_whole(Path(path), data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LoopTrace":
        """Read a file of `save`. Raises NotFoundError, or CheckpointError if it is corrupt or of a newer version."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise NotFoundError(f"no trace at {path}; give the path of a file that LoopTrace.save wrote")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                head = _read_head(path, metadata)
                unknown = set(file.keys()) - set(ARRAYS)
                if unknown:
                    raise CheckpointError(f"trace {path} holds the unknown array {min(unknown)!r}; record it again")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(**head, **arrays)
        except (SafetensorError, InputError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"trace {path} is corrupt ({error}); record it again") from error

    def _head(self) -> dict[str, Any]:
        names = ("title", "model", "rule", "policy", "max_loops", "signal_kind")
        return {name: getattr(self, name) for name in names}

    def _counted(self) -> np.ndarray:
        if self.signals is None:
            return np.zeros(len(self), dtype=bool)
        known = ~np.isnan(self.signals)
        counted: np.ndarray = known[:, 0].copy()
        if self.losses is not None:
            counted &= ~(known & np.isnan(self.losses)).any(axis=1)
        return counted

    def _replay(self, cdf: np.ndarray, threshold: float) -> np.ndarray:
        reached = _reaches(cdf, threshold)
        depth = (~np.isnan(cdf)).sum(axis=1)
        never = np.where(depth > 0, depth, self.loops)
        return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, never)


def _reaches(cdf: np.ndarray, threshold: float) -> np.ndarray:
    if not 0 <= threshold <= 1:
        raise InputError(f"the threshold is {threshold}; it must lie between 0 and 1 (1 means never early)")
    return np.zeros(cdf.shape, dtype=bool) if threshold == 1 else cdf >= threshold


def _array(name: str, value: object) -> np.ndarray:
    array = np.asarray(value)
    if name in ("tokens", "loops", "top_ids"):
        if array.size and array.dtype.kind not in "iu":
            raise InputError(f"{name} has dtype {array.dtype}; it must hold integers")
        if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
            raise InputError(f"{name} does not fit into 32 bits; ids must lie below 2^31")
        return array.astype(np.int32)
    if array.size and array.dtype.kind not in "fiu":
        raise InputError(f"{name} has dtype {array.dtype}; it must hold numbers")
    if name == "signals" and array.dtype == np.float64 and isinstance(value, np.ndarray):
        return array
    if name == "states" and array.dtype == np.float16:
        return array
    return array.astype(np.float32)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (None, size) for size, want in zip(shape, wanted, strict=True))


def _read_head(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a loop trace; give the path of a file that LoopTrace.save wrote")
    version = int(metadata["version"]) if metadata.get("version", "").isdecimal() else 0
    if version > LoopTrace.version:
        raise CheckpointError(
            f"trace {path} has version {version}, this Loopwise reads up to {LoopTrace.version}; "
            "type: pip install --upgrade loopwise"
        )
    if version < 1:
        raise CheckpointError(f"trace {path} names no version; record it again")
    head = json.loads(metadata.get("trace", ""))
    if not isinstance(head, dict) or not isinstance(head.get("vocabulary"), dict):
        raise CheckpointError(f"trace {path} has a broken header; record it again")
    head["vocabulary"] = {int(token): str(text) for token, text in head["vocabulary"].items()}
    return head


def _write_whole(path: Path, data: bytes) -> Path:
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"cannot write {path}: {reason}; free some space or choose another path") from error
    return path
