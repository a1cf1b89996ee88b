"""Client process of the fault benchmark: makes the call that each line of its input names.

    {"call": "pull", "args": ["alice/r1"], "options": {"cache_dir": "…"}}

Its environment says which Hub and which transport. Back-off does not sleep, and every time limit that is set is cut to
a second; a request without a limit stays without.
"""

import hashlib
import importlib
import json
import os
import sys
import time
from typing import Any

LONGEST_SLEEP, LIMIT = 0.01, 1.0
real_sleep = time.sleep


def shorten_waits() -> None:
    """Shorten sleeps and time limits in this process; what the library decides is left alone."""
    time.sleep = lambda seconds: real_sleep(min(float(seconds), LONGEST_SLEEP))
    for name in ("httpx", "httpx2"):  # the client's HTTP library depends on its version
        try:
            transport = importlib.import_module(name).HTTPTransport
        except ModuleNotFoundError:
            continue
        transport.handle_request = limited(transport.handle_request)


def limited(handle: Any) -> Any:
    """Return the transport's method with every finite time limit cut short."""

    def handle_request(self: Any, request: Any) -> Any:
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {name: one and min(one, LIMIT) for name, one in limits.items()}
        return handle(self, request)

    return handle_request


def answer(command: dict[str, Any]) -> dict[str, Any]:
    """Make one call; return its result or its error."""
    import maskpack

    try:
        if command["call"] == "load_mask":
            return {"weights": masked_weights(*command["args"], **command["options"])}
        found = getattr(maskpack, command["call"])(*command["args"], **command["options"])
    except Exception as error:
        ours = isinstance(error, maskpack.MaskpackError)
        return {"error": type(error).__name__, "ours": ours, "text": str(error)}
    if isinstance(found, list):
        return {"found": [one.repo_id for one in found]}
    return {name: None if value is None else str(value) for name, value in vars(found).items()}


def masked_weights(ref: str, weights: int, small: int, **options: Any) -> str:
    """Load an adapter onto a model of ones, made for it, and return the digest of the weights."""
    from torch import nn, ones

    import maskpack

    shapes = {"layer": weights, "other": 7} | {f"small{n}": 32 for n in range(small)}
    model = nn.ModuleDict({name: nn.ParameterDict({"weight": ones(size)}) for name, size in shapes.items()})
    maskpack.load_mask(model, ref, verify="off", head="keep", **options)
    return hashlib.sha256(b"".join(one.detach().numpy().tobytes() for one in model.parameters())).hexdigest()


def main() -> None:
    """Answer every line of the standard input with one of the standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    if "--real-time" not in sys.argv:
        shorten_waits()
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
