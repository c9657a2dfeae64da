"""Prompt chunks after each loop: what ends, what a prompt leaves behind, and pages that other requests may find."""

from collections.abc import Callable, Sequence

from loopwise.engine.request import Chunk, Request
from loopwise.engine.runner import Runner
from loopwise.memory.prefix import PrefixCache


class Prompts:
    """Prompts on their way through the loops.

    Args:
        identity: what changes the numbers of a prompt's pages, beside its tokens.
    """

    def __init__(self, runner: Runner, prefix: PrefixCache | None, *, identity: Callable[[Request], object]) -> None:
        self._runner = runner
        self._memory = runner.memory
        self._prefix = prefix
        self._identity = identity

    def advance(self, chunks: Sequence[tuple[Request, Chunk]]) -> list[tuple[Request, Chunk]]:
        """After a launch: end the chunks that have run every loop; those whose prompt has been read to its end."""
        for request, chunk in chunks:
            if request.signals and chunk.state is not None and chunk.last == len(request.prompt) - 1:
                signal = self._runner.model.signal(chunk.state[-1:], None)
                chunk.signals += [] if signal is None else signal.tolist()
        ended = [(request, chunk) for request, chunk in chunks if chunk.loop == request.max_loops]
        if not ended:
            return []
        self._runner.read_chunks(ended)
        for request, chunk in ended:
            request.cursor, request.chunk = chunk.last + 1, None
            request.left += [request.max_loops] * chunk.rows
        return [(request, chunk) for request, chunk in ended if request.prompt_done]

    def close(self, request: Request) -> None:
        """A prompt has been read: others may find its pages, and a policy may keep fewer of them."""
        self.publish(request, len(request.prompt))
        if self._memory.policy.collapses and request.pages is not None:
            self._memory.collapse(request.pages, len(request.prompt), request.max_loops)

    def end(self, request: Request) -> None:
        """A request is over: publish what others may use of it."""
        settled = request.settled
        if self._memory.policy.shares_generated and all(loops == request.max_loops for loops in request.left[:settled]):
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
            self._prefix.publish(request.pages, identity, request.tokens[:length], planes)
