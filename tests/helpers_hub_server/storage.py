"""Large files: the LFS batch on the Hub, and the object store on its own origin."""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .accounts import require_writer
from .git_store import replace_file
from .messages import HttpError, Request, Response, Routes, answer_json

if TYPE_CHECKING:
    from .server import HubServer

STORAGE, OBJECTS = Routes(), Routes()
SIGNATURE = "signature=loopback"
PART_SIZE = 8_000_000


class ObjectStore:
    """Contents by sha256, in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True)

    def path(self, sha256: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise HttpError(400, "not a sha256")
        return self.root / sha256

    def put(self, data: bytes) -> str:
        """Store a content and return its sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        replace_file(self.path(sha256), data)
        return sha256

    def get(self, sha256: str) -> bytes:
        """Return a content, or refuse."""
        if not self.path(sha256).is_file():
            raise HttpError(404, "no such object")
        return self.path(sha256).read_bytes()

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()


@STORAGE.add("POST", "/{ns}/{name}.git/info/lfs/objects/batch")
def batch(server: "HubServer", request: Request) -> Response:
    """Say where each object is to be put; one that is there already gets no action."""
    require_writer(request, server.repositories, proposal=True)
    repo = f"{server.endpoint}/{request.args['ns']}/{request.args['name']}.git/info/lfs"
    answers = []
    for wanted in request.json()["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, object] = {"oid": oid, "size": size}
        if not server.objects.has(oid):
            upload: dict[str, object] = {"href": f"{server.store_endpoint}/{oid}?{SIGNATURE}"}
            if size > server.multipart_over:
                count = -(-size // PART_SIZE)
                parts = {f"{n:05}": f"{server.store_endpoint}/{oid}/part/{n}?{SIGNATURE}" for n in range(1, count + 1)}
                upload = {"href": f"{repo}/complete/{oid}", "header": {"chunk_size": str(PART_SIZE), **parts}}
            answer["actions"] = {"upload": upload, "verify": {"href": f"{repo}/verify"}}
        answers.append(answer)
    return answer_json({"transfer": "basic", "objects": answers})


@STORAGE.add("POST", "/{ns}/{name}.git/info/lfs/verify")
def verify(server: "HubServer", request: Request) -> Response:
    """Confirm that an upload arrived whole."""
    require_writer(request, server.repositories, proposal=True)
    wanted = request.json()
    if len(server.objects.get(wanted["oid"])) != wanted["size"]:
        raise HttpError(422, "the object has another size")
    return answer_json({})


@STORAGE.add("POST", "/{ns}/{name}.git/info/lfs/complete/{oid}")
def complete(server: "HubServer", request: Request) -> Response:
    """Join the parts of a multipart upload; like S3, without the user's token."""
    oid = request.args["oid"]
    parts = []
    for part in request.json()["parts"]:
        file = server.objects.root / f"{oid}.part{part['partNumber']}"
        data = file.read_bytes()
        if hashlib.md5(data).hexdigest() != part["etag"].strip('"'):
            raise HttpError(400, "a part's ETag differs")
        parts.append(data)
        file.unlink()
    if hashlib.sha256(b"".join(parts)).hexdigest() != oid:
        raise HttpError(400, "the content does not have the announced sha256")
    server.objects.put(b"".join(parts))
    return answer_json({})


def require_signature(request: Request) -> None:
    """Let only signed addresses in, and refuse tokens: a leak must fail a test."""
    if "authorization" in request.headers:
        raise HttpError(400, "a token was sent to the object store")
    if SIGNATURE not in request.target:
        raise HttpError(403, "the address is not signed")


@OBJECTS.add("PUT", "/{oid}/part/{number}")
def put_part(server: "HubServer", request: Request) -> Response:
    """Keep one part of a multipart upload."""
    require_signature(request)
    path = server.objects.path(request.args["oid"])
    path.with_name(f"{path.name}.part{int(request.args['number'])}").write_bytes(request.body)
    return Response(200, b"", {"ETag": json.dumps(hashlib.md5(request.body).hexdigest())})


@OBJECTS.add("PUT", "/{oid}")
def put_object(server: "HubServer", request: Request) -> Response:
    """Keep an object whose content has the announced sha256."""
    require_signature(request)
    if hashlib.sha256(request.body).hexdigest() != request.args["oid"]:
        raise HttpError(400, "the content does not have the announced sha256")
    server.objects.put(request.body)
    return Response(200, b"", {"ETag": json.dumps(hashlib.md5(request.body).hexdigest())})


@OBJECTS.add("GET HEAD", "/{oid}")
def get_object(server: "HubServer", request: Request) -> Response:
    """Send an object; ranges are handled below."""
    require_signature(request)
    data = server.objects.get(request.args["oid"])
    return Response(200, data, {"Accept-Ranges": "bytes", "ETag": json.dumps(request.args["oid"])})
