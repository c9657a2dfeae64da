"""Prompt chunks after each loop: who stops, what a prompt leaves behind, and pages that other requests may find."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopwise.engine.depth import PromptDepth
from loopwise.engine.judge import planned_exit
from loopwise.engine.request import Chunk, Exits, Request
from loopwise.engine.runner import Runner
from loopwise.loops.exits import Observation
from loopwise.memory.prefix import PrefixCache


class Prompts:
    """Prompts on their way through the loops.

    Args:
        depth: whether their positions obey the exit rule.
        identity: what changes the numbers of a prompt's pages, beside its tokens.
    """

    def __init__(
        self,
        runner: Runner,
        prefix: PrefixCache | None,
        *,
        depth: PromptDepth,
        identity: Callable[[Request], object],
    ) -> None:
        self._runner = runner
        self._memory = runner.memory
        self._prefix = prefix
        self._exits = depth == "exit"
        self._identity = identity

    def advance(self, chunks: Sequence[tuple[Request, Chunk]]) -> list[tuple[Request, Chunk]]:
        """After a launch: end the chunks that are through; those whose prompt has been read to its end."""
        for (request, chunk), signal in zip(chunks, self._signals(chunks), strict=True):
            if signal is not None and self._notes(request, chunk):
                chunk.signals += signal[-1:].tolist()
            if self._exits and chunk.before is not None and chunk.state is not None:
                self._stop(request, chunk, chunk.before, chunk.state, signal)
        ended = [(request, chunk) for request, chunk in chunks if self._through(request, chunk)]
        if not ended:
            return []
        for _, chunk in ended:
            if chunk.exits is not None:
                # All of them are read, each as it was when it stopped.
                chunk.state, chunk.positions = chunk.exits.state, np.arange(chunk.first, chunk.last + 1)
        self._runner.read_chunks(ended)
        for request, chunk in ended:
            request.cursor, request.chunk = chunk.last + 1, None
            if chunk.exits is None:
                request.left += [request.max_loops] * chunk.rows
            else:
                request.left += chunk.exits.left.tolist()
                self._give_back(request, chunk)
        return [(request, chunk) for request, chunk in ended if request.prompt_done]

    def _signals(self, chunks: Sequence[tuple[Request, Chunk]]) -> list[Float[Tensor, " _"] | None]:
        """The model's signal for the rows of each chunk, asked once for all of them; None where nobody reads it."""
        found: list[Float[Tensor, " _"] | None] = [None] * len(chunks)
        asking = [
            place
            for place, (request, chunk) in enumerate(chunks)
            if self._notes(request, chunk) or (self._exits and "signal" in request.rule.needs)
        ]
        states = [state for place in asking if (state := chunks[place][1].state) is not None]
        signal = self._runner.model.signal(torch.cat(states), None) if states else None
        if signal is not None:
            last = 0
            for place, state in zip(asking, states, strict=True):
                first, last = last, last + len(state)
                found[place] = signal[first:last]
        return found

    def _notes(self, request: Request, chunk: Chunk) -> bool:
        """Whether the chunk's last row will emit the first token, has not stopped, and its signals are to be told."""
        left = chunk.exits is not None and chunk.exits.left[-1] > 0
        return request.signals and chunk.last == len(request.prompt) - 1 and not left

    def _through(self, request: Request, chunk: Chunk) -> bool:
        skips = chunk.exits is not None and not self._memory.policy.fills
        return chunk.rows == 0 if skips else chunk.loop == request.max_loops

    # Prompt depth `exit`

    def _stop(
        self,
        request: Request,
        chunk: Chunk,
        before: Float[Tensor, "rows width"],
        after: Float[Tensor, "rows width"],
        signal: Float[Tensor, " rows"] | None,
    ) -> None:
        """Ask the rule for the positions that have not stopped; those that do now leave the chunk, or only fill."""
        if chunk.exits is None:
            chunk.exits = self._begin(request, chunk, after)
        exits, fills = chunk.exits, self._memory.policy.fills
        if fills:
            mine = torch.from_numpy(exits.open).to(after.device)
            before, after, signal = before[mine], after[mine], None if signal is None else signal[mine]
        fired = self._fired(request, chunk, exits, before, after, signal)
        if not fired.any():
            return
        stopped, stay = exits.open[fired], torch.from_numpy(np.flatnonzero(~fired)).to(after.device)
        exits.left[stopped] = chunk.loop
        exits.state[torch.from_numpy(stopped).to(after.device)] = after[torch.from_numpy(fired).to(after.device)]
        exits.open = exits.open[~fired]
        if exits.tracker is not None:
            exits.tracker.keep(stay)
        if not fills and request.pages is not None and chunk.injected is not None:
            self._memory.settle_many(request.pages, chunk.first + stopped, chunk.loop)
            chunk.positions = chunk.positions[~fired]
            chunk.state, chunk.injected = after[stay], chunk.injected[stay]

    def _begin(self, request: Request, chunk: Chunk, state: Float[Tensor, "rows width"]) -> Exits:
        # A rule knows all of a prompt's exits beforehand, or none.
        known = planned_exit(request, chunk.first) is not None
        loops = [
            planned_exit(request, position) if known else request.max_loops for position in chunk.positions.tolist()
        ]
        return Exits(
            left=np.zeros(chunk.rows, dtype=np.int64),
            open=np.arange(chunk.rows),
            state=torch.empty_like(state),
            tracker=None if known else request.rule.track(chunk.rows, state.device),
            planned=np.array(loops),
        )

    def _fired(
        self,
        request: Request,
        chunk: Chunk,
        exits: Exits,
        before: Float[Tensor, "open width"],
        after: Float[Tensor, "open width"],
        signal: Float[Tensor, " open"] | None,
    ) -> Bool[np.ndarray, " open"]:
        """Which of the open positions stop after this loop."""
        fired: Bool[np.ndarray, " open"] = exits.planned[exits.open] <= chunk.loop
        if exits.tracker is None or not len(fired) or fired.all():
            return fired
        needs = request.rule.needs
        stops = exits.tracker.update(
            Observation(
                loop=chunk.loop,
                state=after if "state" in needs else None,
                previous=before if "state" in needs else None,
                signal=signal if "signal" in needs else None,
                logits=self._runner.read([], after) if "logits" in needs else None,
            )
        )
        return stops.cpu().numpy() if chunk.loop >= request.sampling.min_loops else fired

    def _give_back(self, request: Request, chunk: Chunk) -> None:
        """Pages of planes that no position on them has reached."""
        if self._memory.policy.fills or request.pages is None:
            return
        size = self._memory.layout.page
        for index in range(chunk.first // size, chunk.last // size + 1):
            deepest = max(request.left[index * size : (index + 1) * size])
            for plane in request.pages.planes:
                if plane > deepest:
                    self._memory.give_back(request.pages, plane, index)

    # What others may find

    def close(self, request: Request) -> None:
        """A prompt has been read: others may find its pages, and a policy may keep fewer of them."""
        if self._exits:
            request.answer.prompt_loops = tuple(request.left)
        self.publish(request, len(request.prompt))
        if self._memory.policy.collapses and request.pages is not None:
            self._memory.collapse(request.pages, len(request.prompt), request.max_loops)

    def end(self, request: Request) -> None:
        """A request is over: publish what others may use of it.

        Where prompts run every loop that is an answer that did so too; where they obey the rule, any answer.
        """
        settled = request.settled
        alike = self._exits or all(loops == request.max_loops for loops in request.left[:settled])
        if self._memory.policy.shares_generated and alike:
            self.publish(request, settled)

    def publish(self, request: Request, length: int) -> None:
        """Let others find the first positions, if their numbers are what the identity says."""
        # Weights that changed meanwhile have made pages that fit neither the old identity nor the new.
        if (
            self._prefix is not None
            and request.pages is not None
            and request.identity == (identity := self._identity(request))
        ):
            planes = self._memory.stores(request.max_loops, generated=False)
            left = request.left[:length] if self._exits else ()
            self._prefix.publish(request.pages, identity, request.tokens[:length], planes, left)
