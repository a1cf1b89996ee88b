"""HTTP over loopback: one origin, its log, and the faults that happen below HTTP."""

import contextlib
import re
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .faults import Fault, Faults
from .messages import HttpError, Request, Response, answer_error

RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds: close() sends RST


class Origin(ThreadingHTTPServer):
    """One origin: answers every request by `application` and keeps them in `log`."""

    daemon_threads = True

    def __init__(
        self, name: str, application: Callable[[Request], Response], faults: Faults, log: list[Request]
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.application, self.faults, self.log = name, application, faults, log
        self.connections: set[socket.socket] = set()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Stop answering and close every connection, so that clients see a dead server."""
        self.stopping.set()
        self.shutdown()
        self.thread.join()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        # a client that goes away is no news; anything else is a bug of this server
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    """Reads a request whole, then answers it, or fails as the matching fault says."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; the second would wait 40 ms for the first's receipt
    server: Origin

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        return

    def read_body(self) -> bytes:
        # always drained, or the next request on this connection would start in the middle of it
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def respond(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.server.name, self.command, self.path, headers, self.read_body())
        self.server.log.append(request)
        fault = self.server.faults.match(request.method, f"{self.server.name}:{request.target}")
        kind = fault.kind if fault else ""
        if fault and kind == "silent":
            self.hold(fault)
        if kind in ("drop", "silent"):
            self.close_connection = True
            return
        if fault and kind == "status":
            response = answer_error(HttpError(fault.status, fault.message, fault.code))
            response.headers |= fault.headers
        else:
            request.answer = response = self.server.application(request)
        if fault and fault.change and kind == "lie":
            fault.change(response)
        if kind == "lost":
            self.close_connection = True
            return
        self.send(request, response, fault)

    def send(self, request: Request, response: Response, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        status, body = response.status, response.body
        if kind == "corrupt" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        may_be_cut = status == 200 and "Accept-Ranges" in response.headers and request.method == "GET"
        if match and may_be_cut and kind != "norange":
            total, first = len(body), int(match[1])
            last = min(int(match[2] or total - 1), total - 1)
            if first >= total:
                status, body = 416, b""
                response.headers["Content-Range"] = f"bytes */{total}"
            else:
                status, body = 206, body[first : last + 1]
                response.headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        if kind == "short":
            body = body[: len(body) // 2]
        self.send_response(status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in response.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if request.method == "HEAD":
            return
        if fault and kind in ("close", "reset", "stall"):
            self.break_off(body[: len(body) // 2], fault)
        else:
            self.wfile.write(body)

    def hold(self, fault: Fault) -> None:
        """Wait until the client, the server or the rule goes."""
        while fault in self.server.faults.rules and not self.server.stopping.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.02)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                return

    def break_off(self, body: bytes, fault: Fault) -> None:
        self.wfile.write(body)
        self.wfile.flush()
        self.close_connection = True
        if fault.kind == "stall":
            self.hold(fault)
        if fault.kind == "reset":
            time.sleep(0.05)  # a reset discards what the peer has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            # the descriptor stays open while the streams hold it: take it from under them
            socket.socket(fileno=self.connection.detach()).close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond
