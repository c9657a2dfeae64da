"""Refusals as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from loopwise.errors import UserError

_TAGS = ("str", "int", "float", "bool", "none")
"""What pydantic adds to the place of an error to say which part of a union it tried."""


class ApiError(Exception):
    """An answer that is a refusal.

    Args:
        message: one line: what was given, what is allowed, what to do.
        param: the field of the body that is to blame.
        code: a word for programs.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def envelope(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.envelope, status_code=self.status, headers=self.headers)


class ClientGone(Exception):
    """Whoever asked has hung up; nobody is left to answer."""


def server_error(message: str = "the server failed at this request; its log says how") -> ApiError:
    """A bug of ours."""
    return ApiError(message, status=500, type="server_error", code="internal_error")


def too_late(seconds: float) -> ApiError:
    """The answer took longer than an answer may."""
    return ApiError(
        f"the answer was not complete after {seconds:g} seconds; ask for fewer tokens or stream them",
        status=504,
        type="server_error",
        code="timeout",
    )


def from_user_error(error: UserError) -> ApiError:
    """A mistake in a request that model or engine noticed."""
    return ApiError(" ".join(str(error).split()))


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    while len(place) > 1 and _is_tag(place[-1]):
        place.pop()
    param = ".".join(place) or None
    match first["type"]:
        case "extra_forbidden":
            message = f"{param} is not supported here; leave it out"
        case "json_invalid":
            param, message = None, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}"
        case "missing":
            message = f"{param or 'a JSON body'} is missing"
        case _:
            message = f"{param or 'the body'}: {first['msg'].removeprefix('Value error, ')}"
    return ApiError(message, param=param)


def _is_tag(part: str) -> bool:
    """Whether a part of an error's place is no field and no index, but names a part of a union."""
    return part in _TAGS or part[:1].isupper() or not (part.isidentifier() or part.isdecimal())


def install(app: FastAPI) -> None:
    """Let every refusal of this app leave in the one envelope."""

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: UserError) -> JSONResponse:
        return from_user_error(error).response

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        # Nobody reads it; 499 is what web servers call it.
        return Response(status_code=499)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"there is no {request.url.path}; GET /v1/models lists what is served",
            405: f"{request.method} {request.url.path} is not how this is asked; see /openapi.json",
        }.get(error.status_code, str(error.detail))
        return ApiError(message, status=error.status_code, headers=error.headers or {}).response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        # The server closes the connection after a bug, so the client must not use it again.
        return JSONResponse(server_error().envelope, status_code=500, headers={"connection": "close"})
