"""One model behind HTTP: takes requests in or refuses them, hands them to the engine, and follows their answers."""

import asyncio
import logging
import math
import time
import warnings
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

from loopwise.engine.listening import ListeningEngine
from loopwise.engine.ticket import Ticket
from loopwise.errors import LoopRangeWarning
from loopwise.serve.bridge import Bridge, Inbox, Part
from loopwise.serve.effort import Efforts
from loopwise.serve.errors import ApiError, ClientGone, too_late
from loopwise.serve.metrics import Meters
from loopwise.serve.settings import ServeConfig
from loopwise.serve.thinking import Markers, markers_of
from loopwise.serve.voice import Delta, Voice

_log = logging.getLogger("loopwise.serve")
_FINISH = {"stop": "stop", "length": "length", "context": "length"}


class Service:
    """What all routes share.

    Args:
        name: what clients call the model.

    Raises:
        ConfigError: settings that this model cannot serve.
    """

    def __init__(self, engine: ListeningEngine, settings: ServeConfig, *, name: str) -> None:
        self.engine = engine
        self.settings = settings
        self.name = settings.name or name
        self.created = int(time.time())
        self.efforts = Efforts(engine.model, settings, planes=engine.max_loops)
        self.meters = Meters()
        self.bridge = Bridge(engine, self.meters)
        self.markers: Markers | None = markers_of(engine.model.tokenizer)
        context = engine.model.config.max_positions
        self._told = False
        """Whether the log has why the engine stopped."""
        self.backlog = settings.backlog or 2 * engine.seats * context * engine.max_loops

    def start(self) -> None:
        """Begin to tick; on the event loop."""
        self.bridge.start()
        self.engine.__enter__()

    def stop(self) -> None:
        """Stop ticking; what is still open is aborted."""
        self.engine.__exit__(None, None, None)
        self.bridge.stop()

    def check(self) -> None:
        """See that the engine can answer.

        Raises:
            ApiError: it has stopped at an error.
        """
        try:
            self.engine.raise_failure()
        except RuntimeError as error:
            if not self._told:
                self._told = True
                _log.error("the engine has stopped", exc_info=error)
            raise ApiError(
                "the engine has stopped at an error; the server's log says which, and it has to be started anew",
                status=503,
                type="server_error",
                code="engine_stopped",
            ) from None

    def admit(self, voices: Sequence[Voice]) -> None:
        """Let a request in, if what is promised already leaves room for it.

        Raises:
            ApiError: 429 with Retry-After.
        """
        cost = sum((len(voice.prompt) + voice.rest) * voice.knob.max_loops for voice in voices)
        promised = self.bridge.promised
        crowded = self.bridge.open + len(voices) > self.settings.requests
        # A request that is larger than the whole backlog has to be served at some time: when nothing else is.
        if not crowded and (promised == 0 or promised + cost <= self.backlog):
            return
        self.meters.refused += 1
        rate = self.engine.rows_per_second or 1.0
        excess = max(promised + cost - self.backlog, promised // max(self.bridge.open, 1))
        seconds = min(max(math.ceil(excess / rate), 1), 60)
        raise ApiError(
            f"the server is full: {promised} row-loops are promised to {self.bridge.open} answers; "
            f"ask again in {seconds} s",
            status=429,
            type="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(seconds)},
        )


class Answering:
    """The answers of one HTTP request, from `begin` to the end of the `async with` block; leaving frees their rows.

    Args:
        stream: whether somebody wants them as they grow.
    """

    def __init__(self, service: Service, voices: Sequence[Voice], *, stream: bool) -> None:
        self.voices = voices
        self._service = service
        # A thought over its budget has to be noticed while it grows.
        watched = stream or any(voice.budget is not None for voice in voices)
        self._inbox = Inbox(service.settings.pace if watched else None)
        self._tickets: dict[int, Ticket] = {}
        self._began = time.perf_counter()
        seconds = service.settings.request_seconds
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._inbox.fail, too_late(seconds))

    def begin(self) -> None:
        """Hand everything to the engine.

        Raises:
            ApiError: the server is full.
            UserError: what model or engine cannot serve; then nothing runs.
        """
        try:
            self._service.check()
            self._service.admit(self.voices)
            for voice in self.voices:
                if voice.exhausted:
                    voice.close_thought(Delta(voice.index))
                self._submit(voice)
        except BaseException:
            self.close()
            raise

    def leave(self) -> None:
        """The client has hung up."""
        self._inbox.fail(ClientGone())

    def close(self) -> None:
        """Free every row that is still taken."""
        self._deadline.cancel()
        self._service.bridge.drop(self._tickets.values())
        self._tickets.clear()

    async def __aenter__(self) -> "Answering":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ClientGone):
            self._service.meters.vanished += 1
        self.close()

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is added to each answer, as it comes; of each the last says why it ended.

        Raises:
            ClientGone, ApiError: nobody listens any more, it took too long, or the server is going away.
        """
        while any(voice.finish is None for voice in self.voices):
            for part in await self._inbox.take():
                delta = self._hear(part)
                if delta is not None:
                    yield delta

    def _hear(self, part: Part) -> Delta | None:
        voice = self.voices[part.index]
        if voice.finish is not None:
            return None
        delta = Delta(part.index)
        if part.emissions:
            voice.hear(part.emissions, delta=delta)
        if voice.exhausted:
            self._end_thought(voice, delta)
        elif part.over:
            self._end(voice, delta)
        return delta

    def _submit(self, voice: Voice) -> None:
        engine = self._service.engine
        prompt, sampling = voice.remaining
        with warnings.catch_warnings():
            # Who asks for more loops than were trained has said so in the request.
            warnings.simplefilter("ignore", LoopRangeWarning)
            ticket = engine.submit(
                prompt, sampling, sample=voice.sample, signals=voice.signals, provisional=voice.drafts
            )
        self._tickets[voice.index] = ticket
        self._service.bridge.post(ticket, self._inbox, voice, prompt=len(prompt))

    def _end_thought(self, voice: Voice, delta: Delta) -> None:
        """Drop what was being thought and go on behind a closed thought; the prefix is found in the cache."""
        self._service.bridge.drop([self._tickets.pop(voice.index)])
        voice.close_thought(delta)
        if voice.rest > 0:
            self._submit(voice)
        else:
            self._finish(voice, "length", delta)

    def _end(self, voice: Voice, delta: Delta) -> None:
        done = self._tickets.pop(voice.index).completion
        self._service.check()
        voice.kv_bytes, voice.prompt_loops = done.kv_bytes, done.prompt_loops[: len(voice.prompt)]
        if done.finish_reason not in _FINISH:
            raise ApiError(
                "the server is going away; ask again soon",
                status=503,
                type="server_error",
                headers={"Retry-After": "5"},
            )
        self._finish(voice, _FINISH[done.finish_reason], delta)

    def _finish(self, voice: Voice, reason: str, delta: Delta) -> None:
        voice.end(reason, delta)
        self._service.meters.finished(
            reason, prompt=len(voice.prompt), tokens=len(voice.tokens), seconds=time.perf_counter() - self._began
        )
