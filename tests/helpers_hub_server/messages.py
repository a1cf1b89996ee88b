"""Requests, answers and routes of the server."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote


class HttpError(Exception):
    """An answer with an error status, and the Hub's error code in a header."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Response:
    """One answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """One request: the path is kept quoted, because a revision may hold a quoted slash. `answer` is the right one."""

    origin: str
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    args: dict[str, str] = field(default_factory=dict)
    answer: Response | None = None

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self.target.partition("?")[2])

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise HttpError(400, "the body is not JSON") from error


def answer_json(value: object, status: int = 200, **headers: str) -> Response:
    """Return a JSON answer."""
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


def answer_error(error: HttpError) -> Response:
    """Return the answer of an error, as the Hub marks it."""
    headers = {"X-Error-Message": error.message}
    if error.code:
        headers["X-Error-Code"] = error.code
    return answer_json({"error": error.message}, error.status, **headers)


Action = Callable[[Any, Request], Response]


class Routes:
    """Path patterns -> actions: `{x}` is one quoted segment, `{x*}` the rest of the path."""

    def __init__(self) -> None:
        self.table: list[tuple[str, re.Pattern[str], Action]] = []

    def add(self, method: str, pattern: str) -> Callable[[Action], Action]:
        expression = re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", pattern)
        expression = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", expression)

        def register(action: Action) -> Action:
            self.table.extend((one, re.compile(expression), action) for one in method.split())
            return action

        return register

    def dispatch(self, server: Any, request: Request) -> Response:
        """Answer a request by the first route that fits."""
        for method, expression, action in self.table:
            match = expression.fullmatch(request.path)
            if match and method == request.method:
                request.args = {name: unquote(value) for name, value in match.groupdict().items()}
                try:
                    return action(server, request)
                except HttpError as error:
                    return answer_error(error)
        return answer_error(HttpError(404, f"no such endpoint: {request.method} {request.path}"))
