"""Errors in the form that OpenAI's clients understand."""

import json
from typing import Any

from starlette.responses import Response

KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
KINDS[503] = "server_error"


class ApiError(Exception):
    """A request that is refused: the status, a message for people, and what the fault is about."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = KINDS.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class JSON(Response):
    """A value as JSON in ASCII: half a surrogate pair that a client sent can be sent back."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def refusal(error: ApiError) -> JSON:
    return JSON(error.body, error.status, error.headers)
