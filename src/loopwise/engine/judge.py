"""Which rows stop after a launch, and which are read: exit rules asked for many rows of many requests at once."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loopwise.engine.request import Request, Row
from loopwise.engine.runner import Runner
from loopwise.engine.speculation import Speculation
from loopwise.loops.exits import ExitRule, Fixed, Hazard, Observation, Tracker
from loopwise.loops.hazard import widen


def planned_exit(request: Request, position: int) -> int | None:
    """The loop after which a row stops, where that is known before it runs; the device need not be asked then."""
    forced = request.forced_loops(position)
    if forced is not None:
        return forced
    if isinstance(request.rule, Fixed):
        return min(max(request.rule.count, request.sampling.min_loops), request.max_loops)
    return None


def speaking(
    rows: Sequence[tuple[Request, Row]], drafting: Speculation | None, window: int
) -> list[tuple[Request, Row]]:
    """The rows of a launch whose answer is certain now, and those that may start the next position.

    Args:
        drafting: how drafts are made, if at all.
        window: drafts that may run ahead of a request's first row that goes on.
    """
    jobs: list[tuple[Request, Row]] = []
    whose, last = None, -1
    for job in rows:
        request, row = job
        certain = len(request.left)
        if row.position < certain:
            continue  # it has answered and only fills its planes
        if row.left and row.position == certain:
            jobs.append(job)
            continue
        if drafting is None or not window or not request.drafts:
            continue
        if request is not whose:
            whose, last = request, _last_drafting(request, window)
        # Once a row has stopped, later loops only fill planes.
        reads = row.left == row.loop if row.left else drafting.reads(row.loop)
        if reads and row.position <= last:
            jobs.append(job)
    return jobs


def _last_drafting(request: Request, window: int) -> int:
    """The last position whose readout may start the next one."""
    for row in request.flight:
        if not row.left:
            return min(row.position + window, request.last_row) - 1
    return request.last_row - 1


class Bench:
    """All rows that one exit rule watches. Rows come when they finish their first loop and may skip launches."""

    def __init__(self, rule: ExitRule, device: torch.device) -> None:
        self.rule = rule
        self._device = device
        self._rows: list[Row] = []
        self._tracker: Tracker | None = None

    def judge(
        self,
        rows: Sequence[Row],
        *,
        state: Float[Tensor, "launched width"],
        previous: Float[Tensor, "launched width"],
        signal: Float[Tensor, " launched"] | None,
        logits: Float[Tensor, "judged vocab"] | None,
        allowances: Sequence[float] | None,
    ) -> list[bool]:
        """Which of these rows stop after the loop that they have just run; tell `forget` of those that do.

        Args:
            state, previous, signal: of the whole launch, found by `row.launched`.
            logits, allowances: of `rows`, in their order.
        """
        known = {id(row) for row in rows}
        stalled = [place for place, row in enumerate(self._rows) if id(row) not in known]
        running = [place for place, row in enumerate(self._rows) if id(row) in known]
        fresh = [row for row in rows if not row.watched]
        order = [self._rows[place] for place in running] + fresh
        tracker, waiting = self._split(running, stalled)
        if fresh:
            joining = self.rule.track(len(fresh), self._device)
            if tracker is None:
                tracker = joining
            else:
                tracker.join(joining)
        if tracker is None:
            return []
        for row in fresh:
            row.watched = True

        place_in_rows = {id(row): place for place, row in enumerate(rows)}
        places = [place_in_rows[id(row)] for row in order]
        launched = torch.tensor([row.launched for row in order], device=self._device)
        needs = self.rule.needs
        fired = tracker.update(
            Observation(
                loop=torch.tensor([row.loop for row in order], device=self._device),
                state=state[launched] if "state" in needs else None,
                previous=previous[launched] if "state" in needs else None,
                signal=signal[launched] if signal is not None and "signal" in needs else None,
                logits=logits[places] if logits is not None else None,
                allowance=None
                if allowances is None
                else torch.tensor([allowances[place] for place in places], dtype=torch.float64, device=self._device),
            )
        ).tolist()
        self._rows = [self._rows[place] for place in stalled] + order
        if waiting is None:
            self._tracker = tracker
        else:
            waiting.join(tracker)
            self._tracker = waiting
        stops = [False] * len(rows)
        for place, stop in zip(places, fired, strict=True):
            stops[place] = stop
        return stops

    def _split(self, running: list[int], stalled: list[int]) -> tuple[Tracker | None, Tracker | None]:
        """The memory of the rows that ran, and of those that did not."""
        if self._tracker is None or not running:
            return None, self._tracker
        if not stalled:
            if running != list(range(len(running))):
                self._tracker.keep(torch.tensor(running, device=self._device))
            return self._tracker, None
        mine = copy.deepcopy(self._tracker)
        mine.keep(torch.tensor(running, device=self._device))
        self._tracker.keep(torch.tensor(stalled, device=self._device))
        return mine, self._tracker

    def forget(self, rows: Sequence[Row]) -> None:
        """Rows that stopped or were dropped."""
        gone = {id(row) for row in rows if row.watched}
        if not gone:
            return
        for row in rows:
            row.watched = False
        keep = [place for place, row in enumerate(self._rows) if id(row) not in gone]
        self._rows = [self._rows[place] for place in keep]
        if self._tracker is not None:
            self._tracker.keep(torch.tensor(keep, dtype=torch.long, device=self._device))
        if not self._rows:
            self._tracker = None

    def __len__(self) -> int:
        return len(self._rows)


def _ask_hazards(
    rule: Hazard, members: Sequence[tuple[Request, Row]], hazards: Sequence[float]
) -> list[tuple[Request, Row]]:
    """The rule's own arithmetic, in the same float64, on numbers that rows carry: the most common rule asks no bench.

    Args:
        hazards: of the whole launch.
    """
    stopped = []
    for request, row in members:
        going_on = row.survival * (1 - hazards[row.launched])
        if going_on < row.survival:  # not for NaN
            row.survival = going_on
        if rule.threshold < 1 and 1 - going_on >= rule.threshold and row.loop >= request.sampling.min_loops:
            stopped.append((request, row))
    return stopped


class Judge:
    """All benches: one for each rule that somebody runs under."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._benches: dict[ExitRule, Bench] = {}

    def stopping(
        self,
        rows: Sequence[tuple[Request, Row]],
        before: Float[Tensor, "rows width"],
        after: Float[Tensor, "rows width"],
    ) -> list[tuple[Request, Row]]:
        """The rows of a launch that stop after it; signals are noted where they were asked for.

        Args:
            before, after: states around the loop that they have just run.
        """
        open_rows: dict[ExitRule, list[tuple[Request, Row]]] = {}
        stopped: list[tuple[Request, Row]] = []
        noted: list[Row] = []
        for job in rows:
            request, row = job
            if row.left:
                continue
            if request.signals:
                noted.append(row)
            if not row.planned:
                row.planned = planned_exit(request, row.position) or -1
            if row.loop >= (row.planned if row.planned > 0 else request.max_loops):
                stopped.append(job)
            elif row.planned < 0:
                open_rows.setdefault(request.rule, []).append(job)
        values = None
        if noted or (open_rows and any("signal" in rule.needs for rule in open_rows)):
            values = self._runner.signals(after)
        if noted and values is not None:
            for row in noted:
                row.signals.append(values[row.launched])
        # Before the others are judged: a bench is fastest when all its rows have run.
        self.forget(stopped)
        for rule, members in open_rows.items():
            if isinstance(rule, Hazard) and values is not None:
                stopped += _ask_hazards(rule, members, values)
                continue
            signal = None if values is None else torch.tensor(values, dtype=widen(after).dtype, device=after.device)
            leaving = self._ask(rule, members, before, after, signal)
            self.forget(leaving)
            stopped += leaving
        return stopped

    @torch.inference_mode()
    def _ask(
        self,
        rule: ExitRule,
        members: Sequence[tuple[Request, Row]],
        before: Float[Tensor, "rows width"],
        after: Float[Tensor, "rows width"],
        signal: Float[Tensor, " rows"] | None,
    ) -> list[tuple[Request, Row]]:
        """Which of the rows under one rule stop."""
        logits = None
        if "logits" in rule.needs:
            logits = self._runner.read(members, after[[row.launched for _, row in members]])
        allowances = [request.allowance(row) for request, row in members] if "allowance" in rule.needs else []
        bench = self._benches.setdefault(rule, Bench(rule, self._runner.device))
        stops = bench.judge(
            [row for _, row in members],
            state=after,
            previous=before,
            signal=signal,
            logits=logits,
            allowances=[one for one in allowances if one is not None] or None,
        )
        return [
            (request, row)
            for (request, row), stop in zip(members, stops, strict=True)
            if stop and row.loop >= request.sampling.min_loops
        ]

    def forget(self, rows: Sequence[tuple[Request, Row]]) -> None:
        """Rows that stopped or were dropped need no exit rule any more."""
        if not self._benches:
            return
        by_rule: dict[ExitRule, list[Row]] = {}
        for request, row in rows:
            if row.watched:
                by_rule.setdefault(request.rule, []).append(row)
        for rule, watched in by_rule.items():
            self._benches[rule].forget(watched)
            if not len(self._benches[rule]):
                del self._benches[rule]

    @property
    def watched(self) -> int:
        """Rows that some bench keeps memory of."""
        return sum(map(len, self._benches.values()))
