"""Faults and lies on demand: counted rules that say which request goes wrong, how and how often."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from .messages import Response

KINDS = {
    "status": "answer with an error status",
    "drop": "close the connection without doing or saying anything",
    "lost": "do the work, then close without an answer",
    "close": "send half of the body, then close the connection cleanly",
    "reset": "send half of the body, then reset the connection",
    "short": "send half of the body and declare only that",
    "norange": "ignore the Range header",
    "corrupt": "flip one bit of the body",
    "silent": "do nothing, say nothing and hold the connection until the client or the server goes",
    "stall": "send half of the body and hold the connection until the client or the server goes",
    "lie": "answer what `change` makes of the right answer",
}


@dataclass
class Fault:
    """The next `times` requests after `skip` that fit `method` and `path` (a regular expression) go wrong."""

    kind: str
    method: str = "GET"
    path: str = ""
    times: int = 1
    skip: int = 0
    status: int = 503
    message: str = "injected fault"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    change: Callable[[Response], None] | None = None
    met: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no fault kind {self.kind!r}; there are {', '.join(KINDS)}")


class Faults:
    """The rules of one server."""

    def __init__(self) -> None:
        self.rules: list[Fault] = []
        self.lock = threading.Lock()

    def match(self, method: str, target: str) -> Fault | None:
        """Return the rule that this request meets now, counting it."""
        with self.lock:
            for rule in self.rules:
                if rule.method == method and re.search(rule.path, target):
                    rule.met += 1
                    if rule.skip < rule.met <= rule.skip + rule.times:
                        return rule
        return None
