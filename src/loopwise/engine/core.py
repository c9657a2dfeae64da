"""One tick: encode what begins, run one loop of everything that is ready, see who stops, read, confirm.

`docs/life-of-a-row.md` follows one row through this file. Nothing here knows threads, text streams or servers.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from loopwise.engine.answer import Emission
from loopwise.engine.choosing import choose_launched, choose_states, draw
from loopwise.engine.counts import Counts
from loopwise.engine.depth import PromptDepth
from loopwise.engine.judge import Judge, speaking
from loopwise.engine.plan import Plan
from loopwise.engine.prompts import Prompts
from loopwise.engine.request import Choice, Chunk, Request, Row, Stage
from loopwise.engine.runner import Runner
from loopwise.engine.scheduler import Scheduler
from loopwise.engine.solo import Solo
from loopwise.engine.speculation import Speculator
from loopwise.memory.paged import BOUNDARY
from loopwise.memory.prefix import PrefixCache


class Core:
    """Requests in, emissions out, one tick at a time.

    Args:
        emit: called with each request's certain tokens.
        done: called once for each request that is over.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        prefix: PrefixCache | None,
        speculator: Speculator | None,
        *,
        depth: PromptDepth,
        identity: Callable[[Request], object],
        emit: Callable[[Request, list[Emission]], None],
        done: Callable[[Request], None],
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.prefix = prefix
        self.speculator = speculator
        self.counts = Counts()
        self._memory = runner.memory
        self._policy = runner.memory.policy
        self._emit = emit
        self._done = done
        self.judge = Judge(runner)
        self.prompts = Prompts(runner, prefix, depth=depth, identity=identity)
        self.solo: Solo | None = Solo(runner)
        """None to run every tick by itself."""
        self._window = 0
        self._fills = self._policy.fills
        self._has_coda = bool(len(runner.model.coda))

    def tick(self) -> bool:
        """Run everything that is ready for one loop; False when nothing was."""
        began, said = time.perf_counter(), self.counts.tokens
        self.scheduler.admit()
        if self._run_alone():
            if self.speculator is not None:
                self.speculator.pace.took(time.perf_counter() - began, self.counts.tokens - said)
            return True
        plan = self.scheduler.plan(self._choose_window)
        if plan.empty:
            return False
        # Where torch has no part the rest guards itself: a guard takes as long as all the judging.
        bare = self.runner.is_bare(plan.rows, plan.chunks)
        with nullcontext() if bare else torch.inference_mode():
            self._run(plan)
        if self.speculator is not None and not plan.chunks and len(self.scheduler.running) == 1:
            self.speculator.pace.took(time.perf_counter() - began, self.counts.tokens - said)
        return True

    def _run(self, plan: Plan) -> None:
        before, after = self.runner.launch(plan.rows, plan.chunks)
        self.counts.add(ticks=1, rows=plan.total, draft_rows=plan.drafts, prompt_rows=plan.prompt_rows)
        self._stop(self.judge.stopping(plan.rows, before, after), after)
        self._read(plan.rows, after)
        if self._fills:
            self._end_fills(plan.rows)
        if plan.chunks:
            self._end_chunks(plan.chunks)

    def _run_alone(self) -> bool:
        """Several ticks of a request that has the engine to itself; False where they have to run one by one."""
        running = self.scheduler.running
        if self.solo is None or len(running) != 1 or not self.solo.serves(running[0]):
            return False
        request = running[0]
        window = self._choose_window(1) if request.drafts else 0
        stretch = self.solo.run(request, window, None if self.speculator is None else self.speculator.settings)
        if stretch is None:
            return False
        self.counts.add(ticks=stretch.ticks, rows=stretch.rows, draft_rows=stretch.rows - stretch.ticks)
        if self.speculator is not None:
            self.speculator.started += stretch.started
        for said in stretch.said:
            self._learn(request, said.loops, said.settled, said.asked)
            request.left.append(said.loops)
            if not self._say(request, Choice(said.token, said.logprob), said.loops, ()):
                break  # what came after a stop text is forgotten
        return True

    def _learn(self, request: Request, loops: int, settled: int, asked: bool) -> None:
        """A token became certain after `loops` loops, and the next row had started after `settled` of them."""
        if self.speculator is not None and self._window and request.drafts:
            asked = asked or loops <= self.speculator.settings.draft_loop
            self.speculator.learn(loops=loops, settled=settled, asked=asked)

    def _choose_window(self, rows: int) -> int:
        self._window = 0 if self.speculator is None else self.speculator.window(rows)
        return self._window

    def _stop(self, rows: Sequence[tuple[Request, Row]], after: Float[Tensor, "rows width"]) -> None:
        """These rows answer from the loop that they have just run."""
        for request, row in rows:
            row.left = row.loop
            if not self._fills:
                if request.pages is not None:
                    self._memory.settle(request.pages, row.position, row.left, generated=True)
            elif row.loop < request.max_loops and row.position > len(request.left):
                row.left_state = after[row.launched].clone()

    # What rows say

    def _read(self, rows: Sequence[tuple[Request, Row]], after: Float[Tensor, "rows width"]) -> None:
        """Read every row that stopped or that may start the next position; confirm what is certain."""
        drafting = None if self.speculator is None else self.speculator.settings
        jobs = speaking(rows, drafting, self._window)
        if not jobs:
            return
        certain: list[Request] = []
        for (request, row), choice in zip(jobs, choose_launched(self.runner, jobs, after), strict=True):
            if row.seat < 0:
                continue  # dropped meanwhile: an earlier row of its request became certain and disagreed
            if row.left and row.position == len(request.left):
                self._confirm(request, row, choice)
                certain.append(request)
            else:
                self._draft(request, row, choice)
        if certain:
            self._cascade(certain)

    def _draft(self, request: Request, row: Row, choice: Choice) -> None:
        """Start the next position from what a row seems about to say, or anew if it changed its mind."""
        if self.speculator is not None and row.loop == self.speculator.settings.draft_loop:
            row.asked = True
        # With a coda the last word waits until the codas of all earlier positions are final.
        if row.left and not self._has_coda:
            row.spare = choice
        flight = request.flight
        place = row.position - flight[0].position + 1
        if place < len(flight):
            if flight[place].token == choice.token:
                return
            self.drop(request, place)
        if choice.token not in request.answer.ends:
            flight.append(Row(row.position + 1, choice.token))
            if request.provisional:
                guess = request.answer.guess(
                    choice.token, loops=row.loop, logprob=choice.logprob, position=row.position + 1
                )
                self._emit(request, [guess])
            if self.speculator is not None:
                self.speculator.started += 1

    def _confirm(self, request: Request, row: Row, choice: Choice) -> None:
        """The frontier's answer has left for good."""
        place = row.position - request.flight[0].position + 1
        after = request.flight[place] if place < len(request.flight) else None
        kept = after is not None and after.token == choice.token
        self._learn(request, row.left, row.left - after.loop if after is not None and kept else row.left, row.asked)
        request.left.append(row.left)
        if not self._say(request, choice, row.left, row.signals):
            return
        if not kept:
            self.drop(request, place)
            request.flight.append(Row(row.position + 1, choice.token))
        if not self._policy.fills:
            self._leave_flight(request, row)  # others leave when they have filled their planes, in order of position

    def _cascade(self, requests: Sequence[Request]) -> None:
        """A row that had stopped before it was confirmed speaks as soon as it is."""
        while True:
            ready = [
                (request, request.flight[request.frontier])
                for request in dict.fromkeys(requests)
                if request.stage is Stage.RUNNING and request.flight and request.flight[request.frontier].left
            ]
            if not ready:
                return
            known = [(request, row, row.spare) for request, row in ready if row.spare is not None]
            others = [(request, row) for request, row in ready if row.spare is None]
            for request, row, choice in known:
                self._confirm(request, row, choice)
            if others:
                resting = self.runner.seats.state
                states = torch.stack(
                    [resting[row.seat] if row.left_state is None else row.left_state for _, row in others]
                )
                for (request, row), choice in zip(others, choose_states(self.runner, others, states), strict=True):
                    self._confirm(request, row, choice)

    def _say(self, request: Request, choice: Choice, loops: int, signals: Sequence[float]) -> bool:
        """Emit a certain token; whether the request goes on."""
        self.counts.tokens += 1
        self.counts.loops[loops] += 1
        request.tokens.append(choice.token)
        emission = Emission(
            token=choice.token,
            loops=loops,
            logprob=choice.logprob,
            tops=choice.tops,
            signals=tuple(signals),
            index=len(request.answer.made),
        )
        self._emit(request, request.answer.take(emission))
        if request.answer.over:
            self.end(request)
            return False
        return True

    # What ends

    def _leave_flight(self, request: Request, row: Row) -> None:
        request.flight.remove(row)
        self.runner.seats.give(row.seat)
        row.seat = -1

    def _end_fills(self, rows: Sequence[tuple[Request, Row]]) -> None:
        for request, row in rows:
            if row.seat >= 0 and row.loop == request.max_loops and row.position < len(request.left):
                self._leave_flight(request, row)

    def _end_chunks(self, chunks: Sequence[tuple[Request, Chunk]]) -> None:
        whole = self.prompts.advance(chunks)
        if not whole:
            return
        logits = self.runner.prompt_logits([chunk for _, chunk in whole])
        choices = draw([(request, len(request.prompt) - 1) for request, _ in whole], logits)
        for (request, chunk), choice in zip(whole, choices, strict=True):
            self.prompts.close(request)
            if self._say(request, choice, request.left[-1], chunk.signals):
                request.flight.append(Row(len(request.prompt), choice.token))

    def drop(self, request: Request, place: int) -> None:
        """Forget the rows of a request's flight from an index on, and the pages that only they needed."""
        if place >= len(request.flight):
            return
        rows = request.flight[place:]
        del request.flight[place:]
        self.judge.forget([(request, row) for row in rows])
        for row in rows:
            if row.seat >= 0:
                self.runner.seats.give(row.seat)
                row.seat = -1
        if request.pages is not None:
            self._memory.trim(request.pages, rows[0].position, rows[-1].position)

    def end(self, request: Request) -> None:
        """A request is over, or nobody wants it any more: publish what others may use, give back everything."""
        if request.pages is not None:
            pages = request.pages
            request.answer.kv_bytes = self._memory.held_bytes(pages)
            self.prompts.end(request)
        self.drop(request, 0)
        self.scheduler.leave(request)
        self._done(request)

    def check_idle(self) -> None:
        """See that nothing leaked while nothing runs.

        Raises:
            RuntimeError: pages, seats or rows are still held.
        """
        memory, cached = self._memory, {} if self.prefix is None else self.prefix.pages
        core = sum(count for plane, count in cached.items() if plane != BOUNDARY)
        faults = {
            "requests": len(self.scheduler.running) + len(self.scheduler.waiting),
            "rows": self.runner.seats.taken,
            "watched rows": self.judge.watched,
            "core pages": memory.core.pages - memory.core.free - core,
        }
        if memory.boundary is not None:
            faults["boundary pages"] = memory.boundary.pages - memory.boundary.free - cached.get(BOUNDARY, 0)
        leaks = {name: count for name, count in faults.items() if count}
        if leaks:
            raise RuntimeError(f"an idle engine still holds {leaks}")
