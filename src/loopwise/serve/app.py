"""The application: one service, its routes, and the guard before them.

app = build_app(service)                    # everything
app.include_router(more)                    # routes added later stand behind the same guard
"""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.responses import Response

import loopwise
from loopwise.serve import chat, completions, errors
from loopwise.serve.errors import ApiError
from loopwise.serve.metrics import CONTENT_TYPE, expose
from loopwise.serve.security import LOCAL, Guard
from loopwise.serve.service import Service
from loopwise.serve.stream import json_response


def build_app(service: Service, *, keys: Collection[str] = (), hosts: Collection[str] = ()) -> FastAPI:
    """The application that serves one model. Its engine ticks while the application runs.

    Args:
        keys: API keys of which every request must carry one; none lets everybody in.
        hosts: names beside localhost that a Host or Origin header may carry.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    # The pages of /docs would fetch their script from elsewhere.
    app = FastAPI(title="Loopwise", version=loopwise.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    fingerprint = f"loopwise-{loopwise.__version__}"
    app.include_router(chat.routes(service, fingerprint))
    app.include_router(completions.routes(service, fingerprint))
    app.include_router(_about(service))
    errors.install(app)
    app.add_middleware(Guard, settings=service.settings, keys=keys, hosts=(*LOCAL, *hosts, *service.settings.hosts))
    return app


def _about(service: Service) -> APIRouter:
    """What is served, and how it is."""
    router = APIRouter()

    @router.get("/v1/models", tags=["openai"])
    async def models() -> Response:
        """The one model, with its ladder of efforts."""
        return json_response({"object": "list", "data": [_card(service)]})

    @router.get("/v1/models/{name:path}", tags=["openai"])
    async def model(name: str) -> Response:
        """The model of this name."""
        if name != service.name:
            raise ApiError(
                f"there is no model {name!r} here; this server has {service.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return json_response(_card(service))

    @router.get("/health", tags=["state"])
    async def health() -> Response:
        """200 while the engine can answer."""
        service.check()
        return json_response({"status": "ok", "model": service.name})

    @router.get("/metrics", tags=["state"])
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(expose(service), media_type=CONTENT_TYPE)

    return router


def _card(service: Service) -> dict[str, Any]:
    engine = service.engine
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "loopwise",
        "max_model_len": engine.model.config.max_positions,
        "chat": service.settings.plain
        or (engine.model.tokenizer is not None and engine.model.tokenizer.chat_template is not None),
        "thinks": service.markers is not None,
        "loop": service.efforts.facts | {"policy": str(engine.policy)},
    }
