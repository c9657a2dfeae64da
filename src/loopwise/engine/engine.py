"""The engine's public face: many prompts at once, or one by one from other threads.

    engine = Engine(model, policy="last_exited")
    done = engine.generate(prompts, Sampling(max_tokens=64, exit="hazard:0.6"))

    with Engine(model) as engine:                # a thread of its own drives it
        for emission in engine.submit("Once"):   # tokens as they come
            ...

Every answer is that of the readable generator (`reference.py`): same tokens, same loops, same log-probabilities up to
rounding, whatever else runs. `core.py` has the tick.
"""

import queue
import threading
import weakref
from collections.abc import Sequence
from types import TracebackType

from loopwise.engine.answer import Completion, Emission
from loopwise.engine.request import Replay, Request, Stage
from loopwise.engine.sampling import Sampling
from loopwise.engine.setup import Options, assemble
from loopwise.engine.speculation import Speculation
from loopwise.engine.ticket import Ticket
from loopwise.errors import ConfigError, InputError
from loopwise.loops.drivers import check_loops
from loopwise.loops.planes import PlanePolicy
from loopwise.models.looped_lm import LoopedLM


class Engine:
    """Runs one model for many requests.

    Args:
        policy: the plane policy: "per_loop" (as trained; who leaves early fills its planes afterwards), "last_exited"
            (who leaves early does no more work), or one of the shared ones (`loops/planes.py`).
        speculate: "auto" (as measured for this checkpoint and kept in its generation_config.json, where it pays in this
            tick), "off", a draft loop such as "2", or "2:once".
        memory: bytes for keys and values, as a number or a text such as "4GiB".
        chunk: prompt positions of one tick at most; None takes whole prompts.
        prefix_cache: whether prompts that begin alike share what was computed.
        seats: requests that may run at once.
        rows: rows of one tick at most.
        max_loops: most loops that a request may ask for; None means what the model was trained with.
        prompt_depth: "full" (prompts run every loop) or "exit" (a prompt's positions stop where the request's rule
            stops them; `engine/depth.py` says what that changes).

    Raises:
        ConfigError: an option that is not allowed, two that exclude each other, or a model that is no language model.
    """

    def __init__(
        self,
        model: LoopedLM,
        policy: str | PlanePolicy = "per_loop",
        *,
        speculate: str | Speculation | None = "auto",
        memory: int | str = "4GiB",
        chunk: int | None = 256,
        prefix_cache: bool = True,
        seats: int = 64,
        rows: int = 1024,
        max_loops: int | None = None,
        prompt_depth: str = "full",
    ) -> None:
        options = Options.check(
            *(model, policy),
            speculate=speculate,
            memory=memory,
            chunk=chunk,
            prefix_cache=prefix_cache,
            seats=seats,
            rows=rows,
            max_loops=max_loops,
            prompt_depth=prompt_depth,
        )
        self.model = model
        self.policy = options.policy
        self.max_loops = options.max_loops
        self.seats = seats
        self.budget = options.budget
        self.prompt_depth = options.prompt_depth
        self._core, self._admission = assemble(model, options, emit=self._deliver, done=self._close)
        # Not kept alive by the engine: an answer that nobody can see any more ends (`Ticket.__del__`).
        self._tickets: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()
        self._inbox: queue.SimpleQueue[tuple[str, Request]] = queue.SimpleQueue()
        self._work = threading.Condition()
        self._ticking = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failure: BaseException | None = None

    # Requests

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        sample: int = 0,
        replay: Replay | None = None,
        signals: bool = False,
        provisional: bool = False,
    ) -> Ticket:
        """Ask for one answer; from any thread.

        Args:
            sample: which of several answers to the same prompt this is; each draws its own noise.
            replay: a recorded answer to follow.
            signals: note the model's signal (a hazard) after each loop of each row that emits a token.
            provisional: tell drafts too, marked as such, as soon as the next position starts from them.

        Raises:
            ConfigError: settings that this model or engine cannot serve.
            InputError: an empty or too long prompt, ids outside the vocabulary, or an answer that memory cannot hold.
        """
        sampling = sampling or Sampling()
        if sampling.n != 1:
            raise ConfigError(f"n={sampling.n}: a ticket is one answer; submit with sample=0, 1, ..., or use generate")
        check_loops(self.model, sampling.max_loops or self.model.config.loops)
        return self._open(
            self._admission.request(
                prompt, sampling, sample=sample, replay=replay, signals=signals, provisional=provisional
            )
        )

    def abort(self, ticket: Ticket) -> None:
        """End a request now; its completion keeps what there is, and says "abort"."""
        self.leave(ticket._request)

    def kv_bytes(self, ticket: Ticket) -> int:
        """Bytes of keys and values that a request holds now, or held when it ended."""
        request = ticket._request
        return request.answer.kv_bytes if request.pages is None else self._core.runner.memory.held_bytes(request.pages)

    def leave(self, request: Request) -> None:
        """End a request that nobody waits for any more."""
        self._send("abort", request)

    def _open(self, request: Request) -> Ticket:
        self.raise_failure()
        ticket = self._tickets[request.number] = Ticket(self, request)
        self._send("submit", request)
        if self._failure is not None:
            ticket.close()  # the thread may have stopped before it could see this one
        return ticket

    # Driving

    @property
    def driven(self) -> bool:
        """Whether a thread of the engine's own drives it."""
        return self._thread is not None

    def tick(self) -> bool:
        """Run everything that is ready for one loop, or one request alone for some milliseconds; False when nothing is.

        Not while a thread drives.
        """
        with self._ticking:  # without a thread of the engine's own, several waiting threads may drive it in turn
            while not self._inbox.empty():  # nobody else takes anything out
                kind, request = self._inbox.get_nowait()
                if request.stage is Stage.DONE:
                    continue
                if kind == "submit":
                    self._core.scheduler.waiting.append(request)
                else:
                    self._core.end(request)
            try:
                return self._core.tick()
            except BaseException as error:
                # Half a tick has run: going on from here would give wrong answers.
                self._failure = error
                raise

    def __enter__(self) -> "Engine":
        """Start a thread that ticks whenever there is work."""
        if self._thread is not None:
            raise RuntimeError("this engine is already driven by a thread")
        self._stopping = False
        self._thread = threading.Thread(target=self._drive, name="loopwise-engine", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the thread; requests that are still open are aborted."""
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread is not None:
            self._thread.join()
            # From here on whoever waits for an answer drives; so nobody is left waiting for a thread that is gone.
            self._thread = None
        if self._failure is None:
            for ticket in list(self._tickets.values()):
                self.abort(ticket)
            self.tick()

    def _drive(self) -> None:
        try:
            while True:
                busy = self.tick()
                with self._work:
                    if not busy and self._inbox.empty() and not self._stopping:
                        self._work.wait()
                    if self._stopping:
                        return
        except BaseException as error:
            # Whoever waits for an answer must hear of it.
            self._failure = error
            for ticket in list(self._tickets.values()):
                ticket.close()

    @property
    def failed(self) -> bool:
        """Whether an error, or an interrupt, has stopped it within a tick; then it serves nobody any more."""
        return self._failure is not None

    def raise_failure(self) -> None:
        """Pass on what stopped the engine's thread."""
        if self._failure is not None:
            raise RuntimeError("the engine stopped at an error; make a new one") from self._failure

    def _send(self, kind: str, request: Request) -> None:
        self._inbox.put((kind, request))
        with self._work:
            self._work.notify()

    def _deliver(self, request: Request, emissions: list[Emission]) -> None:
        ticket = self._tickets.get(request.number)
        if emissions and ticket is not None:
            ticket.deliver(emissions)

    def _close(self, request: Request) -> None:
        ticket = self._tickets.pop(request.number, None)
        if ticket is not None:
            ticket.close()

    # All at once

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        replays: Sequence[Replay | None] | None = None,
        signals: bool = False,
        progress: bool = False,
    ) -> list[Completion]:
        """Answer many prompts together; `n` answers to each stand side by side.

        Args:
            sampling: one for all, or one for each prompt.
            replays: recorded answers to follow, one for each prompt.
            signals: note the model's signal (a hazard) after each loop of each row that emits a token.
            progress: show a bar.

        Raises:
            ConfigError, InputError: as `submit`, before anything runs.
        """
        if isinstance(prompts, str):
            raise InputError("prompts is one text; give a list of them: engine.generate([text])")
        settings = list(sampling) if isinstance(sampling, Sequence) else [sampling or Sampling()] * len(prompts)
        followed = list(replays) if replays is not None else [None] * len(prompts)
        for name, given in (("sampling", settings), ("replays", followed)):
            if len(given) != len(prompts):
                raise InputError(f"{len(given)} {name} for {len(prompts)} prompts; give one for each")
        for most in {one.max_loops or self.model.config.loops for one in settings}:
            check_loops(self.model, most)
        requests = [
            self._admission.request(prompt, one, sample=sample, replay=replay, signals=signals)
            for prompt, one, replay in zip(prompts, settings, followed, strict=True)
            for sample in range(one.n)
        ]
        tickets = [self._open(request) for request in requests]
        if not progress:
            return [ticket.wait() for ticket in tickets]
        from rich.progress import track

        return [ticket.wait() for ticket in track(tickets, description="answers")]

    # Looking in

    def check_idle(self) -> None:
        """See that nothing leaked; call it while no request is open.

        Raises:
            RuntimeError: something is still held.
        """
        self._core.check_idle()
