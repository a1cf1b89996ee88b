"""The Xet store: files as lists of terms, each a range of chunks of a xorb; tokens from the Hub, the rest at the store.

Names (hashes) are taken as the client gives them: recomputing them needs BLAKE3. What is checked is stronger for our
purpose: the bytes of every file are put together and must have the sha256 that the shard announces; then LFS clients
find them under it. What LFS clients uploaded is not known here, so that Xet clients fetch it in their way.
"""

import hashlib
import re
import secrets
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .accounts import require_reader, require_writer
from .chunks import pack_chunk, split_chunks
from .messages import HttpError, Request, Response, Routes, answer_json
from .storage import SIGNATURE, ObjectStore, require_signature

if TYPE_CHECKING:
    from .server import HubServer

XET_TOKENS, XET = Routes(), Routes()
SHARD_TAG = b"HFRepoMetaData"
ENTRY = 48  # bytes of every header and entry of a shard
LAST = b"\xff" * 32
WITH_VERIFICATION, WITH_SHA256 = 1 << 31, 1 << 30
CHUNK = 1 << 16
CHUNKS_OF_XORB = 256
LIFETIME = 3600


@dataclass(frozen=True)
class Xorb:
    """Chunks one after another: the bytes on the wire, where each chunk ends in them, and what it holds."""

    data: bytes
    ends: list[int]
    chunks: list[bytes]


@dataclass(frozen=True)
class Term:
    """A part of a file: the chunks from `start` to before `end` of a xorb."""

    xorb: str
    start: int
    end: int
    size: int


class XetStore:
    """Xorbs and files by name, over the same contents as LFS."""

    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects
        self.xorbs: dict[str, Xorb] = {}
        self.files: dict[str, list[Term]] = {}
        self.names: dict[str, str] = {}  # sha256 -> file name
        self.tokens: dict[str, str] = {}  # access token -> read or write
        self.lock = threading.Lock()

    def new_token(self, scope: str) -> str:
        token = f"xet_{scope}_{secrets.token_hex(8)}"
        self.tokens[token] = scope
        return token

    def put_xorb(self, name: str, data: bytes) -> bool:
        """Keep a xorb; False if it is there."""
        found = split_chunks(data)
        with self.lock:
            known = name in self.xorbs
            self.xorbs[name] = Xorb(data, [end for end, _ in found], [chunk for _, chunk in found])
        return not known

    def put_file(self, name: str, terms: list[Term], sha256: str) -> None:
        """Keep a file after its bytes were put together and compared."""
        data = b"".join(self.content(term) for term in terms)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise HttpError(400, "the file has not the sha256 that the shard announces")
        self.objects.put(data)
        with self.lock:
            self.files[name], self.names[sha256] = terms, name

    def content(self, term: Term) -> bytes:
        """Return the bytes of a term, or refuse."""
        xorb = self.xorbs.get(term.xorb)
        if xorb is None:
            raise HttpError(400, f"the xorb {term.xorb} was not uploaded")
        data = b"".join(xorb.chunks[term.start : term.end])
        if term.end > len(xorb.chunks) or len(data) != term.size:
            raise HttpError(400, f"a term does not fit the xorb {term.xorb}")
        return data

    def put_content(self, data: bytes) -> None:
        """Keep a content that no client cut into chunks; its names are sha256 digests."""
        terms = []
        for start in range(0, len(data), CHUNK * CHUNKS_OF_XORB):
            part = data[start : start + CHUNK * CHUNKS_OF_XORB]
            chunks = [part[at : at + CHUNK] for at in range(0, len(part), CHUNK)]
            xorb = hashlib.sha256(part).hexdigest()
            self.put_xorb(xorb, b"".join(map(pack_chunk, chunks)))
            terms.append(Term(xorb, 0, len(chunks), len(part)))
        sha256 = hashlib.sha256(data).hexdigest()
        self.put_file(sha256, terms, sha256)


def name_of_hash(raw: bytes) -> str:
    """Return the text of a hash: four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def read_shard(data: bytes) -> list[tuple[str, list[Term], str]]:
    """Return name, terms and sha256 of every file of a shard, or refuse it."""
    try:
        return _read_shard(data)
    except struct.error as error:
        raise HttpError(400, "the shard ends before its last file") from error


def _read_shard(data: bytes) -> list[tuple[str, list[Term], str]]:
    if not data.startswith(SHARD_TAG) or struct.unpack_from("<Q", data, 32)[0] != 2:
        raise HttpError(400, "not a shard of version 2")
    files, at = [], ENTRY
    while (raw := data[at : at + 32]) != LAST:
        flags, count = struct.unpack_from("<II", data, at + 32)
        if not flags & WITH_SHA256 or not flags & WITH_VERIFICATION:
            raise HttpError(400, "a file of a git repository needs its verification entries and its sha256")
        terms = []
        for entry in range(at + ENTRY, at + ENTRY * (count + 1), ENTRY):
            size, start, end = struct.unpack_from("<III", data, entry + 36)
            terms.append(Term(name_of_hash(data[entry : entry + 32]), start, end, size))
        at += ENTRY * (2 * count + 1)
        files.append((name_of_hash(raw), terms, name_of_hash(data[at : at + 32])))
        at += ENTRY
    return files


def _grant(server: "HubServer", scope: str) -> Response:
    token, expiry, address = server.xet.new_token(scope), int(time.time()) + LIFETIME, server.store_endpoint
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expiry)}
    return answer_json({"casUrl": address, "accessToken": token, "exp": expiry}, 200, **headers)


@XET_TOKENS.add("GET", "/api/models/{ns}/{name}/xet-read-token/{rev*}")
def read_token(server: "HubServer", request: Request) -> Response:
    """Let a reader of the repository read from the store."""
    require_reader(request, server.repositories, content=True).head(request.args["rev"])
    return _grant(server, "read")


@XET_TOKENS.add("GET", "/api/models/{ns}/{name}/xet-write-token/{rev*}")
def write_token(server: "HubServer", request: Request) -> Response:
    """Let a writer, or somebody who opens a pull request, write to the store."""
    require_writer(request, server.repositories, proposal="create_pr" in request.query)
    return _grant(server, "write")


def require_token(server: "HubServer", request: Request, scope: str) -> None:
    """Let only the store's own tokens in; a token of the Hub here is a leak and must fail a test."""
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    found = server.xet.tokens.get(token)
    if found is None:
        raise HttpError(401, "no access token of this store")
    if scope == "write" and found != "write":
        raise HttpError(403, "the access token is for reading")


@XET.add("POST", "/v1/xorbs/default/{xorb}")
def put_xorb(server: "HubServer", request: Request) -> Response:
    """Keep a xorb."""
    require_token(server, request, "write")
    return answer_json({"was_inserted": server.xet.put_xorb(request.args["xorb"], request.body)})


@XET.add("POST", "/v1/shards")
def put_shard(server: "HubServer", request: Request) -> Response:
    """Register the files of a shard, whose xorbs are all there."""
    require_token(server, request, "write")
    for name, terms, sha256 in read_shard(request.body):
        server.xet.put_file(name, terms, sha256)
    return answer_json({"result": 1})


@XET.add("POST", "/v2/shards")
def put_shard_and_report(server: "HubServer", request: Request) -> Response:
    """The same; the answer is a stream of events, of which this is the last."""
    put_shard(server, request)
    return Response(200, b'{"type": "result"}\n', {"Content-Type": "application/x-ndjson"})


@XET.add("GET", "/{version}/reconstructions/{file}")
def reconstruct(server: "HubServer", request: Request) -> Response:
    """Say which chunks make up a file, or a range of it, and where they are to be had."""
    require_token(server, request, "read")
    terms, version = server.xet.files.get(request.args["file"]), request.args["version"]
    if terms is None or version not in ("v1", "v2"):
        raise HttpError(404, "no such file, or no such version")
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, sum(term.size for term in terms))
    listed: list[Term] = []
    at, skipped = 0, 0
    for term in terms:
        if at <= last and at + term.size > first:
            skipped = skipped if listed else first - at
            listed.append(term)
        at += term.size
    if not listed:
        raise HttpError(416, "the range begins behind the end of the file")
    described = [
        {"hash": term.xorb, "unpacked_length": term.size, "range": {"start": term.start, "end": term.end}}
        for term in listed
    ]
    places = {term.xorb: [_place(server, term.xorb, listed, version)] for term in listed}
    where = "fetch_info" if version == "v1" else "xorbs"
    return answer_json({"offset_into_first_range": skipped, "terms": described, where: places})


def _place(server: "HubServer", xorb: str, terms: list[Term], version: str) -> dict[str, object]:
    """Return where all the chunks of a xorb that the terms need are to be had, those in between included."""
    start = min(term.start for term in terms if term.xorb == xorb)
    end = max(term.end for term in terms if term.xorb == xorb)
    ends = [0, *server.xet.xorbs[xorb].ends]
    url = f"{server.store_endpoint}/xorbs/{xorb}?{SIGNATURE}"
    url_range = {"start": ends[start], "end": ends[end] - 1}  # both included
    chunks = {"start": start, "end": end}
    if version == "v1":
        return {"url": url, "range": chunks, "url_range": url_range}
    return {"url": url, "ranges": [{"chunks": chunks, "bytes": url_range}]}


@XET.add("GET", "/xorbs/{xorb}")
def get_xorb(server: "HubServer", request: Request) -> Response:
    """Send chunks of a xorb; only by range, like the real store."""
    require_signature(request)
    xorb = server.xet.xorbs.get(request.args["xorb"])
    if xorb is None or "range" not in request.headers:
        raise HttpError(404 if xorb is None else 403, "no such xorb, or no range")
    return Response(200, xorb.data, {"Accept-Ranges": "bytes"})
