"""Does a model keep the promises of the protocol? `check_model` tries them all on inputs of your choice.

    from loopwise.testing import check_model

    print(check_model(MyModel(), torch.randn(6, 10)))

Everything is tried on a float64 copy whose weights are slightly disturbed, so that rounding cannot hide a mistake and
neither can the zeros and ones of an initialisation. The model itself is not touched.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopwise.errors import ConfigError, LoopRangeWarning, LoopwiseError, UserError
from loopwise.loops.drivers import Outcome, run_until, unroll
from loopwise.loops.exits import ExitRule, Observation, Tracker
from loopwise.loops.protocol import LoopFacts, LoopModel, SignalKind, Unit, first_tensor, flat_state, leaves, tree_map

Reference = Callable[[LoopModel, Any, Tensor], Tensor]
"""(model, inputs, loops (units...)) -> predictions (units..., ...), computed in some naive way."""

_TOLERANCE = 1e-9
_STEP = 1e-6
_DIRECTIONS = 3
_RANGES: dict[str, tuple[float, float]] = {
    "hazard": (0.0, 1.0),
    "certainty": (0.0, 1.0),
    "delta": (0.0, float("inf")),
    "halt_logit": (-float("inf"), float("inf")),
}


class ConformanceError(LoopwiseError, AssertionError):
    """A model breaks at least one promise; the message lists every one that it breaks."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was tried of a model that keeps all its promises."""

    model: str
    """Name of its class."""
    units: int
    """Units that the inputs held."""
    passed: tuple[str, ...]
    """Promises that were tried."""
    skipped: tuple[str, ...]
    """Promises that were not, each with the reason."""

    def __str__(self) -> str:
        lines = [f"{self.model} keeps its {len(self.passed)} promises on {self.units} units"]
        return "\n".join([*lines, *(f"  not tried: {skip}" for skip in self.skipped)])


def check_model(
    model: LoopModel,
    inputs: Any,
    *,
    loops: int = 4,
    reference: Reference | None = None,
    finite_differences: bool = True,
    **encode_options: Any,
) -> Report:
    """Try every promise of `LoopModel` and say at once which are broken.

    Args:
        model: any looped model.
        inputs: what `encode` takes: a tensor, or a nest of tensors that share a leading batch axis. A handful of
            samples is enough; different ones, so that a mix-up shows.
        loops: deepest loop to try, 2 or more.
        reference: predictions of units that stop at given loops, computed naively. Token models need it to have
            "a later token reads loop min(d, e)" checked; without it they are compared with each sequence alone.
        finite_differences: False for a model that cuts its own gradient on purpose.
        encode_options: handed to `encode`, such as a padding mask.

    Raises:
        ConformanceError: listing every broken promise.
        ConfigError: for fewer than two loops.
    """
    if loops < 2:
        raise ConfigError(f"loops={loops}: allowed is 2 or more, since depths have to differ")
    name = type(model).__name__
    broken: list[str] = []
    passed: list[str] = []
    skipped: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopRangeWarning)
        try:
            trial = _Trial(model, inputs, loops, encode_options)
        # Whatever a model raises is a finding about the model, here and below.
        except Exception as error:
            raise ConformanceError(f"{name} does not run in float64: {_told(error)}") from error
        for promise, attempt in trial.promises(reference, finite_differences):
            try:
                attempt()
                passed.append(promise)
            except _Skipped as reason:
                skipped.append(f"{promise} ({reason})")
            except Exception as error:
                broken.append(f"{promise}: {_told(error)}")
    if broken:
        count = len(broken) + len(passed)
        raise ConformanceError("\n  - ".join([f"{name} breaks {len(broken)} of {count} promises:", *broken]))
    return Report(model=name, units=trial.units, passed=tuple(passed), skipped=tuple(skipped))


class _Broken(Exception):
    pass


class _Skipped(Exception):
    pass


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, _Broken) else f"{type(error).__name__}: {lines[0]}"


def _insist(kept: bool, otherwise: str) -> None:
    if not kept:
        raise _Broken(otherwise)


@dataclass(frozen=True)
class _Script(ExitRule):
    """Each unit stops where it is told to."""

    exits: tuple[int, ...]

    needs = frozenset()

    @classmethod
    def parse(cls, argument: str) -> "_Script":
        return cls(tuple(int(part) for part in argument.split(",")))

    @property
    def argument(self) -> str:
        return ",".join(map(str, self.exits))

    def track(self, units: int, device: Any = None) -> Tracker:
        _insist(units == len(self.exits), f"open_rows laid out {units} rows for {len(self.exits)} units")
        return _Scripted(torch.tensor(self.exits, device=device))


class _Scripted(Tracker):
    def __init__(self, exits: Tensor) -> None:
        super().__init__(len(exits), exits.device)
        self._exits = exits

    def judge(self, observation: Observation) -> Tensor:
        return self._exits <= observation.loop


class _Trial:
    """One model, one set of inputs, and the promises as methods."""

    def __init__(self, model: LoopModel, inputs: Any, loops: int, options: dict[str, Any]) -> None:
        self.given, self.given_inputs, self.given_options = model, inputs, options
        self.facts, self.loops = model.facts, loops
        self.model = copy.deepcopy(model).double().eval()
        self.inputs, self.options = _cast(inputs, torch.float64), _cast(options, torch.float64)
        self.noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                size = parameter.square().mean().sqrt().clamp(min=0.1)
                parameter.add_(0.1 * size * self.random_like(parameter))
            self.context = self.encode()
            self.start = self.model.initial_state(self.context)
            self.units = first_tensor(self.model.open_rows(self.start, self.context)[0]).shape[0]
        exits = torch.randint(1, loops + 1, (self.units,), generator=self.noise)
        exits[:1], exits[-1:] = loops, 1
        self.exits = exits

    def promises(self, reference: Reference | None, differences: bool) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "facts are declared", self.declares_facts
        yield "methods are pure functions", self.is_pure
        yield "facts say whether the loop index matters", self.loop_dependence
        yield "facts say whether a readout looks at other units", self.readout_dependence
        yield "start states are as asked for", self.starts
        yield "signals are one number per unit, in range, float32 or wider", self.signals
        yield "stopping every unit at a loop equals unroll", self.fixed_depth
        yield "units that stop leave the computation", self.leaving
        yield "what runs on does not change what has stopped", self.stopped_stay
        yield "nothing depends on the rest of the batch", self.alone
        yield "mixed depths equal the reference", lambda: self.by_reference(reference)
        yield "gradients reach every parameter", self.gradients_reach
        yield "gradients equal finite differences", lambda: self.finite_differences(differences)
        yield "the state dict survives safetensors", self.stored

    def random_like(self, tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=self.noise, dtype=torch.float64)
        return drawn.to(tensor.device)

    def encode(self) -> Any:
        return self.model.encode(self.inputs, **self.options)

    def declares_facts(self) -> None:
        facts = self.facts
        _insist(isinstance(facts, LoopFacts), "set `facts` to a LoopFacts")
        _insist(facts.unit in get_args(Unit), f"unit={facts.unit!r}; allowed are {', '.join(get_args(Unit))}")
        kinds = get_args(SignalKind)
        _insist(facts.signal in (None, *kinds), f"signal={facts.signal!r}; allowed are {', '.join(kinds)} and None")
        least, most = facts.trained_loops
        _insist(1 <= least <= most, f"trained_loops={facts.trained_loops}; allowed is 1 <= fewest <= most")
        has = self.signal_of(self.start, self.context) is not None
        _insist(
            has == (facts.signal is not None),
            f"facts.signal is {facts.signal}, yet signal() returns {'one' if has else 'None'}",
        )

    @torch.no_grad()
    def signal_of(self, state: Any, context: Any, model: LoopModel | None = None) -> Tensor | None:
        model = model or self.model
        reads = self.facts.signal_reads == "prediction"
        return model.signal(state, model.readout(state, context) if reads else None)

    @torch.no_grad()
    def is_pure(self) -> None:
        model, context = self.model, self.context
        _same("encode twice", self.model.initial_state(self.encode()), self.model.initial_state(self.encode()))
        state = model.step(self.start, context, 1)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        calls: list[tuple[str, Callable[[], Any]]] = [
            ("step", lambda: model.step(state, context, 2)),
            ("readout", lambda: model.readout(state, context)),
        ]
        if self.facts.signal is not None:
            calls.append(("signal", lambda: self.signal_of(state, context)))
        for name, call in calls:
            before, around = tree_map(torch.clone, state), tree_map(torch.clone, context)
            first = tree_map(torch.clone, call())
            _same(f"{name} changed the state it was given; the state", before, state)
            _same(f"{name} changed the context, which is read-only; the context", around, context)
            other = model.step(self.start, context, 1)
            model.signal(other, model.readout(other, context))
            _same(f"{name} remembers earlier calls; its answer", first, call())
        for name, tensor in model.state_dict().items():
            _insist(torch.equal(weights[name], tensor), f"a forward pass changed {name}")

    @torch.no_grad()
    def loop_dependence(self) -> None:
        first = flat_state(self.model.step(self.start, self.context, 1))
        others = [flat_state(self.model.step(self.start, self.context, loop)) for loop in range(2, self.loops + 1)]
        differs = any(_distance(first, other) > _TOLERANCE for other in others)
        _insist(
            differs == self.facts.loop_dependent,
            f"facts.loop_dependent is {self.facts.loop_dependent}, yet loops 1 to {self.loops} "
            f"{'differ' if differs else 'do the same'} to one state",
        )

    @torch.no_grad()
    def readout_dependence(self) -> None:
        if self.facts.readout_mixes:
            raise _Skipped("facts.readout_mixes is True")
        rows, opened = self.model.open_rows(self.model.step(self.start, self.context, 1), self.context)
        whole = self.model.readout(rows, opened)
        for unit in range(self.units):
            index = torch.tensor([unit], device=whole.device)
            alone = self.model.readout(*self.model.keep_rows(rows, opened, index))
            _same(f"facts.readout_mixes is False; the readout of unit {unit} alone", whole[index], alone)

    @torch.no_grad()
    def starts(self) -> None:
        model, context = self.model, self.context
        moved = model.step(self.start, context, 1)
        _same("start=STATE is not taken; the start state", moved, model.initial_state(context, moved))
        try:
            zero = flat_state(model.initial_state(context, "zero"))
            _insist(not zero.any(), 'start="zero" is taken, but is not zero')
        except UserError:
            pass
        if self.facts.random_start:
            one = model.initial_state(context, 1)
            _same("start=1 twice", one, model.initial_state(context, 1))
            far = _distance(flat_state(one), flat_state(model.initial_state(context, 2))) > _TOLERANCE
            _insist(far, "facts.random_start is True, yet seeds 1 and 2 give one start state")
            return
        try:
            model.initial_state(context, 1)
        except UserError:
            return
        raise _Broken("facts.random_start is False, yet a seed is taken and ignored; raise ConfigError for start=1")

    @torch.no_grad()
    def signals(self) -> None:
        if self.facts.signal is None:
            raise _Skipped("facts.signal is None")
        low, high = _RANGES[self.facts.signal]
        rows, opened = self.model.open_rows(self.start, self.context)
        for loop in range(1, self.loops + 1):
            rows = self.model.step(rows, opened, loop)
            signal = self.signal_of(rows, opened)
            if signal is None:
                raise _Broken(f"signal() returns None at loop {loop}")
            _insist(
                signal.shape == (self.units,),
                f"shape {tuple(signal.shape)} for {self.units} units in rows; give one number each",
            )
            outside = signal.isnan() | (signal < low) | (signal > high)
            worst = f"{float(signal[outside][0])}" if outside.any() else ""
            _insist(not outside.any(), f"a {self.facts.signal} of {worst} at loop {loop}; allowed is {low} to {high}")
        for dtype in (next((p.dtype for p in self.given.parameters()), torch.float32), torch.bfloat16):
            model = copy.deepcopy(self.given).to(dtype).eval()
            context = model.encode(_cast(self.given_inputs, dtype), **_cast(self.given_options, dtype))
            narrow = self.signal_of(model.step(model.initial_state(context), context, 1), context, model)
            found = None if narrow is None else narrow.dtype
            _insist(found in (torch.float32, torch.float64), f"dtype {found} in a {dtype} model")

    def run(self, exits: Tensor, inputs: Any = None, options: dict[str, Any] | None = None) -> Outcome:
        context = self.encode() if inputs is None else self.model.encode(inputs, **(options or {}))
        return run_until(self.model, context, _Script(tuple(exits.tolist())), max_loops=self.loops)

    def rows_of(self, state: Any) -> Any:
        return self.model.open_rows(state, self.context)[0]

    @torch.no_grad()
    def fixed_depth(self) -> None:
        for loops in range(1, self.loops + 1):
            outcome = self.run(torch.full((self.units,), loops))
            real = outcome.loops > 0
            _insist(bool((outcome.loops[real] == loops).all()), f"open_units does not give back loops={loops}")
            full = unroll(self.model, self.context, loops=loops)
            _same(f"loop {loops}: the state", self.rows_of(full.state), self.rows_of(outcome.state))
            expected = self.model.readout(full.state, self.context)
            _same(f"loop {loops}: the prediction", expected[real], outcome.prediction[real])

    @torch.no_grad()
    def leaving(self) -> None:
        counts: list[int] = []
        step = self.model.step

        def counted(state: Any, context: Any, loop: int) -> Any:
            sizes = {tensor.shape[0] for tensor in leaves(state)}
            _insist(
                len(sizes) == 1, f"the state's tensors have {sorted(sizes)} rows at loop {loop}; keep_rows must cut all"
            )
            counts.append(sizes.pop())
            return step(state, context, loop)

        try:
            object.__setattr__(self.model, "step", counted)
            self.run(self.exits)
        finally:
            object.__delattr__(self.model, "step")
        expected = [int((self.exits >= loop).sum()) for loop in range(1, self.loops + 1)]
        _insist(counts == expected, f"rows run per loop: {counts}; units that had not stopped: {expected}")

    @torch.no_grad()
    def stopped_stay(self) -> None:
        mixed = self.run(self.exits)
        for loops in range(1, self.loops):
            cut = self.run(self.exits.clamp(max=loops))
            stopped = (self.exits <= loops).nonzero().flatten().to(first_tensor(cut.state).device)
            for whole, part in zip(leaves(self.rows_of(mixed.state)), leaves(self.rows_of(cut.state)), strict=True):
                _same(f"the state of units that stopped by loop {loops}", part[stopped], whole[stopped])

    @torch.no_grad()
    def alone(self) -> None:
        outcome = self.run(self.exits)
        batch = first_tensor(self.inputs).shape[0]
        numbers = torch.arange(1, self.units + 1, device=outcome.loops.device)
        place = self.model.open_units(numbers, self.context).cpu()
        _insist(
            len(place) == batch,
            f"open_units gives {len(place)} rows for {batch} inputs; a shared leading axis is needed",
        )
        for sample in range(batch):
            inputs, options = (_pick(tree, sample, batch) for tree in (self.inputs, self.options))
            real = place[sample] > 0
            exits = self.exits[place[sample][real] - 1].reshape(-1)
            found = self.run(exits, inputs, options)
            where = f"input {sample} alone"
            _insist(torch.equal(found.loops[0], outcome.loops[sample]), f"{where} stops at other loops")
            _same(f"{where}: the prediction", outcome.prediction[sample][real], found.prediction[0][real])
            if self.facts.unit == "sample":
                context = self.model.encode(inputs, **options)
                full = unroll(self.model, context, loops=int(exits))
                _same(f"{where}, unrolled: the prediction", found.prediction, self.model.readout(full.state, context))

    @torch.no_grad()
    def by_reference(self, reference: Reference | None) -> None:
        if reference is None:
            raise _Skipped("no reference was given")
        outcome = self.run(self.exits)
        real = outcome.loops > 0
        expected = reference(self.model, self.inputs, outcome.loops)
        _same("the prediction", expected[real], outcome.prediction[real])

    def value(self) -> Tensor:
        """A smooth number that every readout and signal has a part in."""
        out = unroll(self.model, self.encode(), loops=self.loops, collect=("logits", "signals"))
        weights = torch.Generator().manual_seed(1)
        total = torch.zeros((), dtype=torch.float64)
        for part in (out.logits, out.signals):
            if part is not None:
                drawn = torch.randn(part.shape, generator=weights, dtype=torch.float64).to(part.device)
                total = total.to(part.device) + (part.double() * drawn).mean() + (part.double() * drawn).sin().mean()
        return total

    def slopes(self) -> dict[str, Tensor | None]:
        named = dict(self.model.named_parameters())
        found = torch.autograd.grad(self.value(), list(named.values()), allow_unused=True)
        return dict(zip(named, found, strict=True))

    def gradients_reach(self) -> None:
        names = [name for name, slope in self.slopes().items() if slope is None or not slope.any()]
        _insist(not names, f"none reaches {', '.join(names)}")

    def finite_differences(self, wanted: bool) -> None:
        if not wanted:
            raise _Skipped("finite_differences=False")
        slopes = self.slopes()
        named = dict(self.model.named_parameters())
        for number in range(1, _DIRECTIONS + 1):
            direction = {name: self.random_like(p) * (p.detach().abs().mean() + 0.01) for name, p in named.items()}
            along = sum(float((g * direction[name]).sum()) for name, g in slopes.items() if g is not None)
            values = []
            for sign in (1.0, -2.0):
                with torch.no_grad():
                    for name, parameter in named.items():
                        parameter.add_(direction[name], alpha=sign * _STEP)
                    values.append(float(self.value()))
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.add_(direction[name], alpha=_STEP)
            measured = (values[0] - values[1]) / (2 * _STEP)
            close = abs(measured - along) <= 1e-4 * abs(measured) + 1e-6
            _insist(close, f"direction {number}: the gradient says {along:.6g}, a difference {measured:.6g}")

    @torch.no_grad()
    def stored(self) -> None:
        loose = [
            f"{path}.{name}".lstrip(".")
            for path, module in self.model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        ]
        _insist(not loose, f"{', '.join(loose)} is neither parameter nor buffer and would not be stored")
        other = copy.deepcopy(self.model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save_file({name: part.contiguous().clone() for name, part in self.model.state_dict().items()}, path)
            for part in other.state_dict().values():
                part.zero_()
            other.load_state_dict(load_file(path), strict=True)
        answers = []
        for model in (self.model, other):
            context = model.encode(self.inputs, **self.options)
            answers.append(model.readout(unroll(model, context, loops=self.loops).state, context))
        _same("the prediction of the loaded model", *answers)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, tree)


def _pick(tree: Any, sample: int, batch: int) -> Any:
    def pick(tensor: Tensor) -> Tensor:
        return tensor[sample : sample + 1] if tensor.dim() and tensor.shape[0] == batch else tensor

    return tree_map(pick, tree)


def _distance(first: Tensor, second: Tensor) -> float:
    """Largest difference, relative where numbers are large; infinite where one is not a number."""
    if first.shape != second.shape:
        return float("inf")
    if not first.numel():
        return 0.0
    apart = (first.double() - second.double()).abs() / (1 + first.double().abs())
    return float(torch.where(apart.isnan(), float("inf"), apart).max())


def _same(what: str, expected: Any, found: Any) -> None:
    pairs = zip(leaves(expected), leaves(found), strict=True)
    apart = max((_distance(first, second) for first, second in pairs), default=0.0)
    _insist(apart <= _TOLERANCE, f"{what} differs by {apart:.2g}")
