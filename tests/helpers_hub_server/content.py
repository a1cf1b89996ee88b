"""Files of a repository: resolve, preupload, commit, pull requests and the card check."""

import base64
import json
from typing import TYPE_CHECKING, Any

from .accounts import Account, account_of, require_reader, require_writer
from .messages import HttpError, Request, Response, Routes, answer_json
from .repository import Repository, card_data, pointer
from .storage import SIGNATURE

if TYPE_CHECKING:
    from .server import HubServer

CONTENT = Routes()


@CONTENT.add("GET HEAD", "/{ns}/{name}/resolve/{rev}/{path*}")
def resolve(server: "HubServer", request: Request) -> Response:
    """Send a file, or the way to the object store."""
    repository = require_reader(request, server.repositories, content=True)
    commit = repository.head(request.args["rev"])
    entry = repository.entries(commit).get(request.args["path"])
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if entry is None:
        error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return Response(404, b"Entry not found", headers | error)
    if entry.sha256:
        headers |= {"X-Linked-Etag": json.dumps(entry.sha256), "X-Linked-Size": str(entry.size)}
        headers |= {"Location": f"{server.store_endpoint}/{entry.sha256}?{SIGNATURE}", "ETag": json.dumps(entry.oid)}
        if name := server.xet.names.get(entry.sha256):
            token_page = f"{server.endpoint}/api/models/{repository.repo_id}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": name, "Link": f'<{token_page}>; rel="xet-auth"'}
        return Response(302, b"", headers)
    return Response(200, repository.git.read(entry.oid)[1], headers | {"ETag": json.dumps(entry.oid)})


@CONTENT.add("POST", "/api/validate-yaml")
def validate_yaml(server: "HubServer", request: Request) -> Response:
    """Check the front matter of a model card."""
    errors, notes = [], []
    try:
        if not card_data(request.json()["content"]):
            notes.append({"message": "empty or missing yaml metadata in repo card"})
    except ValueError as error:
        errors.append({"message": str(error)})
    return answer_json({"errors": errors, "warnings": notes}, 400 if errors else 200)


@CONTENT.add("POST", "/api/models/{ns}/{name}/preupload/{rev}")
def preupload(server: "HubServer", request: Request) -> Response:
    """Say how each file is to be sent, and what the repository has in its place."""
    repository = require_writer(request, server.repositories, proposal="create_pr" in request.query)
    commit = repository.head(request.args["rev"])
    entries = repository.entries(commit)
    files = []
    for file in request.json()["files"]:
        large = repository.wants_lfs(commit, file["path"], file["size"], base64.b64decode(file["sample"]))
        entry = entries.get(file["path"])
        oid = (entry.sha256 or entry.oid) if entry else None
        mode = "lfs" if large else "regular"
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return answer_json({"files": files})


@CONTENT.add("POST", "/api/models/{ns}/{name}/commit/{rev}")
def commit(server: "HubServer", request: Request) -> Response:
    """Add one commit to a branch or pull request, or open a pull request with it."""
    proposal = "create_pr" in request.query
    repository = require_writer(request, server.repositories, proposal=proposal)
    account = account_of(request)
    assert account is not None  # require_writer refused anonymous requests
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = lines[0]["value"]
    with repository.lock:
        head, ref = repository.head(request.args["rev"]), branch_ref(repository, request.args["rev"])
        parent = header.get("parentCommit")
        if parent and not head.startswith(parent) and not proposal:
            raise HttpError(412, "A commit has happened since. Please refresh and try again.")
        if proposal:
            head, number = repository.head(parent or head), len(repository.git.refs("refs/pr")) + 1
            ref = f"refs/pr/{number}"
        tree = repository.git.files(head)
        for line in lines[1:]:
            apply_line(server, repository, tree, line["key"], line["value"])
        message = "\n\n".join(text for text in (header["summary"], header.get("description")) if text)
        made = repository.commit(ref, tree, account.name, message, head)
    page = f"{server.endpoint}/{repository.repo_id}"
    answer = {"success": True, "commitOid": made, "commitUrl": f"{page}/commit/{made}"}
    if proposal:
        answer["pullRequestUrl"] = f"{page}/discussions/{number}"
    return answer_json(answer)


def branch_ref(repository: Repository, revision: str) -> str:
    """Return the full ref that a commit may move: a branch or a pull request, never a tag or a commit."""
    for ref in (f"refs/heads/{revision}", revision):
        if ref.startswith(("refs/heads/", "refs/pr/")) and repository.git.ref(ref):
            return ref
    raise HttpError(404, f"{revision} is not a branch", "RevisionNotFound")


def apply_line(server: "HubServer", repository: Repository, tree: dict[str, str], key: str, value: Any) -> None:
    """Apply one line of a commit to the tree."""
    path = value["path"]
    if key == "file":
        tree[path] = repository.git.write("blob", base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if not server.objects.has(value["oid"]):
            raise HttpError(400, f"the LFS object of {path} was not uploaded")
        tree[path] = repository.git.write("blob", pointer(value["oid"], len(server.objects.get(value["oid"]))))
    elif key == "deletedFile" and path in tree:
        del tree[path]
    elif key == "deletedFolder" and any(one.startswith(path.rstrip("/") + "/") for one in tree):
        for one in [one for one in tree if one.startswith(path.rstrip("/") + "/")]:
            del tree[one]
    elif key in ("deletedFile", "deletedFolder"):
        raise HttpError(404, "A file with this name doesn't exist", "EntryNotFound")
    else:
        raise HttpError(400, f"unknown operation {key}")


@CONTENT.add("GET", "/api/whoami-v2")
def whoami(server: "HubServer", request: Request) -> Response:
    """Say who the token belongs to."""
    account: Account | None = account_of(request)
    if account is None:
        raise HttpError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name} for name in account.organisations]
    token = {"accessToken": {"displayName": "test", "role": account.role}, "type": "access_token"}
    return answer_json({"type": "user", "name": account.name, "orgs": orgs, "auth": token})
