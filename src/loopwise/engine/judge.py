"""Which rows stop after a launch: exit rules asked for many rows of many requests at once."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loopwise.engine.request import Request, Row
from loopwise.loops.exits import ExitRule, Fixed, Observation, Tracker


def planned_exit(request: Request, row: Row) -> int | None:
    """The loop after which a row stops, where that is known before it runs; the device need not be asked then."""
    forced = request.forced_loops(row.position)
    if forced is not None:
        return forced
    if isinstance(request.rule, Fixed):
        return min(max(request.rule.count, request.sampling.min_loops), request.max_loops)
    return None


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
