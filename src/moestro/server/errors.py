"""Errors as the OpenAI protocol has them: {"error": {"message", "type", "param", "code"}}, whatever went wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response

from moestro.config import SamplingParams
from moestro.errors import (
    BudgetError,
    ClosedError,
    MoestroError,
    PlaneReadError,
    QueueFullError,
    RequestError,
    RouteError,
    ServiceError,
    VariantError,
)

_LOG = logging.getLogger("moestro.server")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_FIELDS = {field.name for field in fields(SamplingParams)} | {"priority", "deadline_s"}
_PARAMS = {"guide": "response_format"}
"""Where the API's names are not ours."""


class ApiError(HTTPException):
    """An answer other than 200. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status_code) or ("server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        return json_response(self.body(), status=self.status_code, headers=self.headers)


def json_response(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: what clients sent may come back in it, and not all of that is valid Unicode."""
    return Response(to_json(value), status, headers, media_type="application/json")


def to_json(value: Any) -> bytes:
    """One line. Numbers that JSON does not have (infinite ones) are a bug of ours: ValueError."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def as_api_error(error: MoestroError) -> ApiError:
    """What a room below said, as an answer. A message that begins with a field's name is about that field."""
    message = str(error)
    if isinstance(error, QueueFullError):
        retry = {"Retry-After": str(max(1, round(error.retry_after_s)))}
        return ApiError(429, message, code="queue_full", headers=retry)
    if isinstance(error, ServiceError | ClosedError):
        return ApiError(503, message, code="unavailable", headers={"Retry-After": "5"})
    if isinstance(error, VariantError | RouteError):
        return ApiError(404, message, param="model", code="model_not_found")
    if isinstance(error, BudgetError):
        return ApiError(400, message, param="model", code="model_too_large")
    if isinstance(error, PlaneReadError) or not isinstance(error, RequestError):
        return ApiError(500, message, code="model_error")
    word = message.split(" ", 1)[0].rstrip(":")
    param = _PARAMS.get(word, word if word in _FIELDS else None)
    return ApiError(400, message, param=param, code="context_length_exceeded" if "context" in message else None)


def install_handlers(app: FastAPI) -> None:
    """All that can be raised while a request is answered, and all that Starlette answers by itself."""
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(MoestroError, _on_user_error)
    app.add_exception_handler(Exception, _on_bug)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    where = f"{request.method} {request.url.path}"
    messages = {
        404: f"There is no {where}. The endpoints are listed at /openapi.json.",
        405: f"{where} is not allowed: the address takes {Headers(error.headers).get('allow', 'another method')}.",
        400: "The body could not be read. Expected one JSON object in UTF-8.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [_describe(one) for one in _without_alternatives(error.errors())]
    messages = list(dict.fromkeys(message for _, message in found))
    more = f" ({len(messages) - 5} more)" if len(messages) > 5 else ""
    return ApiError(400, " ".join(messages[:5]) + more, param=found[0][0] or None, code="invalid_value").response()


async def _on_user_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, MoestroError)
    return as_api_error(error).response()


async def _on_bug(_request: Request, error: Exception) -> Response:
    # Starlette raises the exception once more after this answer, and uvicorn writes the traceback.
    return ApiError(500, f"The server has a bug ({type(error).__name__}); its log has the traceback.").response()


def _without_alternatives(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Where a field may be one of several things, pydantic complains once for each. One complaint for each field."""
    by_field: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for one in errors:
        by_field.setdefault(one["loc"][:2], []).append(one)
    kept: list[Mapping[str, Any]] = []
    for place, several in by_field.items():
        known = [one for one in several if one["type"] in ("extra_forbidden", "missing")]
        if len(several) == 1 or known:
            kept.extend(known or several)
        else:
            wanted = " or ".join(dict.fromkeys(_lower(str(one["msg"])) for one in several))
            kept.append({"type": "alternatives", "loc": place, "input": several[0].get("input"), "msg": wanted})
    return kept


def _describe(error: Mapping[str, Any]) -> tuple[str, str]:
    """(field, sentence) of one complaint of pydantic's."""
    kind, path = str(error["type"]), [str(part) for part in error["loc"] if part != "body"]
    name = ".".join(path)
    if kind == "json_invalid":
        return "", f"The body is not valid JSON ({error.get('ctx', {}).get('error', 'unreadable')})."
    if kind == "extra_forbidden":
        return name, f"{name} is not supported: this server does not know the field. Leave it out."
    if not path:
        return "", "The body is not a JSON object. Send one, with the header Content-Type: application/json."
    if kind == "missing":
        return name, f"{name} is missing."
    return name, f"{name} is not valid: {_shown(error.get('input'))}; {_lower(str(error['msg']))}."


def _shown(value: object) -> str:
    text = json.dumps(value, default=lambda _: "...")
    return text if len(text) <= 80 else f"{text[:77]}..."


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:].rstrip(".")
