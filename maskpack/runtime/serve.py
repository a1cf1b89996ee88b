"""Switching the adapter of a running vLLM server, by its HTTP calls."""

import json
import os
import time
import uuid
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, Unpack
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from ..errors import AdapterError, ConfigError, HubError, StateError, check_choice
from ..hub.pull import PullOptions

InFlight = Literal["finish", "hold", "abort"]
MODES: dict[InFlight, str] = {"finish": "wait", "hold": "keep", "abort": "abort"}  # as vLLM calls them
START = """start it with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend": "maskpack"}'"""
POLL = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Switched:
    """Result of a switch: the adapter that a server computes with now, and the time it took.

    Attributes:
        ref: the reference that always means these bytes; None: the base. digest: of the adapter's file.
        size: of the adapter's file in bytes. changed: weights that it changes, in all processes of the server.
        prepare_s: seconds that it took to read, verify and decode it, while the server went on.
        drain_s: seconds until requests in flight had ended. pause_s: seconds in which the server did not compute.
    """

    ref: str | None
    digest: str | None
    size: int
    changed: int
    prepare_s: float
    drain_s: float
    pause_s: float


def switch_server(
    url: str,
    ref: str | os.PathLike[str] | None,
    *,
    in_flight: InFlight = "finish",
    timeout: float = 600.0,
    **options: Unpack[PullOptions],
) -> Switched:
    """Have a vLLM server compute with an adapter from now on, or with None as the base.

    The server reads, verifies and decodes the adapter while it goes on; then it pauses, writes, and resumes. If that
    fails, it computes as the base. If it cannot get back to the base, it stays paused, and the error says so.

    Args:
        url: of the server, as in "http://localhost:8000". ref: as of `load_mask`; paths are the server's.
        in_flight: requests that are being answered "finish" on the old weights first, or "hold" and go on with the new
            ones, or are ended ("abort"). New ones wait in each case.
        timeout: seconds for preparing, and for each call. Others: as of `pull`, on the server, which has its own login.

    Raises:
        AdapterError: if the server refuses the adapter. StateError: if the server is not in the state for it.
        HubError: if it does not answer.
    """
    check_choice("in_flight", in_flight, InFlight)
    if options.get("token"):
        raise ConfigError("a token is not sent to a server; log in there: hf auth login, or the variable HF_TOKEN")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"the server is {url!r}, expected its URL, as in http://localhost:8000")
    server = _Server(url.rstrip("/"), timeout)
    begun = time.perf_counter()
    server.post("/init_weight_transfer_engine", {"init_info": {}})
    found: dict[str, Any] = {"pinned": None, "digest": None, "size": 0, "changed": 0}
    if ref is not None:
        given = {key: value if isinstance(value, bool) else str(value) for key, value in options.items() if value}
        found = server.prepared({"ref": ref if isinstance(ref, str) else str(Path(ref).absolute()), **given})
    ready = time.perf_counter()
    server.begin()
    server.post(f"/pause?mode={MODES[in_flight]}")
    paused = time.perf_counter()
    try:
        server.update({} if ref is None else {"digest": found["digest"]})
        if in_flight == "hold":  # what it remembers of their texts comes from the old weights
            server.post("/reset_prefix_cache?reset_running_requests=true")
    except BaseException:
        try:
            server.begin()
            server.update({})
        except BaseException as error:
            raise StateError(
                f"the server at {url} failed to switch and to get back to the base, and is left paused: {error}; "
                f"restart it"
            ) from error
        server.post("/resume")
        server.end("base")
        raise
    server.post("/resume")
    ended = time.perf_counter()
    server.end(found["pinned"] or "base")
    return Switched(
        found["pinned"], found["digest"], found["size"], found["changed"], ready - begun, paused - ready, ended - paused
    )


@dataclass(frozen=True)
class _Server:
    url: str
    timeout: float

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = b"" if body is None else json.dumps(body).encode()
        try:
            request = Request(self.url + path, data, headers, method="POST")
            with urlopen(request, timeout=self.timeout) as answer:
                text = answer.read()
        except HTTPError as error:
            said = _said(error.read())
            if error.code in (404, 405, 501) or "not implemented" in said or "not configured" in said:
                raise StateError(
                    f"the server at {self.url} cannot switch adapters ({said or error}); {START}"
                ) from None
            raise StateError(f"the server at {self.url} answered {path} with {error.code}: {said or error}") from None
        except (URLError, OSError, HTTPException, ValueError) as error:
            why = getattr(error, "reason", None) or error
            raise HubError(f"no answer from the server at {self.url}: {why}; is it running there?") from None
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise StateError(
                f"the server at {self.url} answered {path} with {text[:40]!r}, expected JSON, as of vLLM; {START}"
            ) from None

    def prepared(self, what: dict[str, Any]) -> dict[str, Any]:
        """Have all processes of the server prepare an adapter, and wait; errors are theirs."""
        job, until = uuid.uuid4().hex, time.monotonic() + self.timeout
        body = {"method": "maskpack", "args": [json.dumps({"job": job, "prepare": what})]}
        while True:
            found = self.post("/collective_rpc", body)["results"]
            if failed := [one["error"] for one in found if "error" in one]:
                raise AdapterError(f"the server at {self.url} refuses {what['ref']}: {failed[0]}")
            if all("digest" in one for one in found):
                break
            if time.monotonic() > until:
                raise HubError(f"the server at {self.url} still prepares {what['ref']} after {self.timeout} seconds")
            time.sleep(POLL)
        if len({one["digest"] for one in found}) > 1:
            raise AdapterError(f"the processes of the server read different adapters as {what['ref']}; name a commit")
        return {**found[0], "changed": sum(one["changed"] for one in found)}

    def begin(self) -> None:
        try:
            self.post("/start_weight_update")
        except StateError as error:
            if "already active" not in str(error):
                raise
            self.end("base")  # of a client that was killed
            self.post("/start_weight_update")

    def update(self, what: dict[str, Any]) -> None:
        self.post("/update_weights", {"update_info": what})

    def end(self, version: str) -> None:
        self.post("/finish_weight_update", {"weight_version": version})


def _said(body: bytes) -> str:
    """Return the message in a server's answer, or "" if there is none."""
    try:
        found = json.loads(body)
        error = found.get("error", found.get("detail", ""))
        return str(error.get("message", "") if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return ""
