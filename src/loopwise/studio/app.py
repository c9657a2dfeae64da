"""The studio's server: one page, its files, and a few routes that speak JSON.

    GET  /                      the page; /web/NAME its files, plotly.js from plotly's own wheel
    GET  /api/library           what is open
    POST /api/generate          an answer as server-sent events: token, token, ..., and then the key of its trace
    POST /api/read              the trace of a text that is only read
    GET  /api/traces/KEY        a trace as the page draws it
    GET  /api/traces/KEY/page   the same as one offline HTML page
    GET  /api/runs/NAME         the metrics of a training run
    GET  /api/grids/NAME        a maze, a sudoku, a parity, tick by tick

It serves one person on the machine it runs on. Requests for another host, or from another page, are refused.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware

from loopwise.engine.answer import Emission
from loopwise.engine.ticket import Ticket
from loopwise.errors import ConfigError, InputError, NotFoundError, UserError
from loopwise.serve.security import LOCAL, hostname
from loopwise.studio.library import Library, finite, parse_sampling
from loopwise.studio.page import render_page
from loopwise.studio.run_view import run_view

MOST_BYTES = 1_000_000
"""Of a request's body."""
_KINDS = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        # Plotly writes styles into the page.
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def build_studio(library: Library, *, hosts: Collection[str] = LOCAL) -> FastAPI:
    """The app over a library.

    Args:
        hosts: names under which it may be asked for; every other Host, and every foreign Origin, is refused.
    """
    app = FastAPI(title="Loopwise studio", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(GZipMiddleware, minimum_size=10_000, compresslevel=5)

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        if hostname(f"//{request.headers.get('host', '')}") not in hosts:
            return _refusal(421, "this studio answers to its own address alone; open the address it printed")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return _refusal(403, "this request comes from another page")
        if request.method == "POST" and request.headers.get("content-type", "").split(";")[0] != "application/json":
            return _refusal(415, "send application/json")
        response = await call(request)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-cache"
        return response

    @app.exception_handler(UserError)
    async def refuse(request: Request, error: UserError) -> Response:
        return _refusal(404 if isinstance(error, NotFoundError) else 400, str(error))

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(_asset("index.html"))

    @app.get("/web/{name}")
    async def web(name: str) -> Response:
        if name == "plotly.min.js":
            return Response(await run_in_threadpool(_plotly), media_type="text/javascript")
        return Response(_asset(name), media_type=_KINDS[Path(name).suffix])

    @app.get("/api/library")
    def contents() -> Response:
        models = [model.facts() for model in library.models.values()]
        found = {"models": models, "traces": library.traces(), "runs": [*library.runs], "grids": [*library.grids]}
        return JSONResponse(finite(found))

    @app.post("/api/generate")
    async def generate(request: Request) -> Response:
        body = await _body(request)
        name, prompt = _text(body, "model"), _text(body, "prompt")
        opened = library.model(name)
        sampling = await run_in_threadpool(parse_sampling, _settings(body), opened)
        ticket = await run_in_threadpool(library.submit, name, prompt, sampling)

        async def events() -> AsyncIterator[bytes]:
            given = await run_in_threadpool(_pieces, opened.model, ticket.prompt)
            most = sampling.max_loops or opened.model.config.loops
            yield _event(
                {"given": given, "max": most, "policy": opened.policy, "rule": sampling.exit or f"fixed:{most}"}
            )
            try:
                async for emission in _emissions(ticket):
                    yield _event({"token": _told(emission)})
            finally:
                # A page that went away wants no more tokens.
                if not ticket.over:
                    opened.engine.abort(ticket)
            done = ticket.completion
            key = await run_in_threadpool(library.record_answer, name, sampling, done)
            yield _event(
                {
                    "done": key,
                    "finish_reason": done.finish_reason,
                    "mean_loops": done.mean_loops,
                    "kv_bytes": done.kv_bytes,
                    "seconds": done.seconds,
                    "tokens_per_second": done.tokens_per_second,
                }
            )

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/api/read")
    async def read(request: Request) -> Response:
        body = await _body(request)
        name, text = _text(body, "model"), _text(body, "text")
        sampling = await run_in_threadpool(parse_sampling, _settings(body), library.model(name))
        return JSONResponse({"key": await run_in_threadpool(library.record_text, name, text, sampling)})

    @app.get("/api/traces/{key}")
    def trace(key: str) -> Response:
        return Response(library.wire(key), media_type="application/json")

    @app.get("/api/traces/{key}/page")
    def page(key: str) -> Response:
        shown = library.shown(key).trace
        content = render_page([shown], title=shown.title or shown.model)
        named = {"Content-Disposition": f'attachment; filename="loopwise-trace-{int(key)}.html"'}
        return Response(content, media_type="text/html", headers=named)

    @app.get("/api/runs/{name}")
    def run(name: str) -> Response:
        if name not in library.runs:
            raise NotFoundError(f"no run {name!r} is open; open are: {', '.join(library.runs) or 'none'}")
        return JSONResponse(finite(run_view(library.runs[name])))

    @app.get("/api/grids/{name}")
    def grid(name: str) -> Response:
        return JSONResponse(finite(library.grid(name)))

    return app


async def _emissions(ticket: Ticket) -> AsyncIterator[Emission]:
    """A ticket's tokens without blocking the event loop: a thread of its own waits for them."""
    told: asyncio.Queue[Emission | BaseException | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        end: BaseException | None = None
        try:
            for emission in ticket:
                loop.call_soon_threadsafe(told.put_nowait, emission)
        except BaseException as error:  # handed over, so that the response fails as the engine did
            end = error
        loop.call_soon_threadsafe(told.put_nowait, end)

    waiting = loop.run_in_executor(None, wait)
    while isinstance(one := await told.get(), Emission):
        yield one
    await waiting
    if one is not None:
        raise one


def _told(emission: Emission) -> dict[str, Any]:
    return {
        "index": emission.index,
        "id": emission.token,
        "text": str(emission.token) if emission.text is None else emission.text,
        "loops": emission.loops,
        "logprob": round(emission.logprob, 4),
        "signals": [round(signal, 4) for signal in emission.signals],
        "provisional": emission.provisional,
    }


def _pieces(model: Any, tokens: tuple[int, ...]) -> list[str]:
    return [str(token) for token in tokens] if model.tokenizer is None else model.tokenizer.pieces(list(tokens))


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(finite(data), separators=(",", ":")).encode() + b"\n\n"


async def _body(request: Request) -> dict[str, Any]:
    whole = bytearray()
    async for part in request.stream():
        whole += part
        if len(whole) > MOST_BYTES:
            raise InputError(f"the request is larger than {MOST_BYTES} bytes; give a shorter text")
    try:
        value = json.loads(whole)
    except (ValueError, RecursionError):
        raise InputError("the request's body is not JSON") from None
    if not isinstance(value, dict):
        raise InputError("the request's body is not a JSON object")
    return value


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise InputError(f"{name} is missing; give a text")
    return value


def _settings(body: dict[str, Any]) -> dict[str, Any]:
    value = body.get("settings", {})
    if not isinstance(value, dict):
        raise ConfigError("settings is an object of names and values")
    return value


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)


def _asset(name: str) -> str:
    file = resources.files("loopwise.studio").joinpath("web", name)
    if Path(name).suffix not in _KINDS or Path(name).name != name or not file.is_file():
        raise NotFoundError(f"there is no {name} here")
    return file.read_text(encoding="utf-8")


def _plotly() -> bytes:
    return resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
