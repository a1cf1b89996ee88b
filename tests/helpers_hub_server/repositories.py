"""Repositories: create, delete, describe, list; their trees, refs, commits, branches and tags."""

import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

from .accounts import account_of, require_reader, require_writer
from .git_store import REF_NAME
from .messages import HttpError, Request, Response, Routes, answer_json
from .repository import Entry, Repository

if TYPE_CHECKING:
    from .server import HubServer

REPOSITORIES = Routes()
MODEL = "/api/models/{ns}/{name}"


@REPOSITORIES.add("POST", "/api/repos/create")
def create(server: "HubServer", request: Request) -> Response:
    """Make a repository in the caller's namespace."""
    account = account_of(request)
    if account is None:
        raise HttpError(401, "Invalid username or password.")
    wanted = request.json()
    namespace = wanted.get("organization") or account.name
    repo_id = f"{namespace}/{wanted['name']}"
    if account.role != "write" or not account.owns(namespace):
        raise HttpError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    if repo_id in server.repositories:
        # the client reads `url` from this answer too
        taken = {"error": "You already created this model repo", "url": f"{server.endpoint}/{repo_id}"}
        return answer_json(taken, 409)
    private = wanted.get("visibility") == "private"
    server.repositories[repo_id] = Repository(server.root / "git", repo_id, private)
    return answer_json({"url": f"{server.endpoint}/{repo_id}", "name": repo_id})


@REPOSITORIES.add("DELETE", "/api/repos/delete")
def delete(server: "HubServer", request: Request) -> Response:
    """Remove a repository."""
    wanted = request.json()
    request.args = {"ns": wanted["organization"], "name": wanted["name"]}
    repository = require_writer(request, server.repositories)
    del server.repositories[repository.repo_id]
    shutil.rmtree(repository.git.path)
    return answer_json({})


def describe(repository: Repository, commit: str, blobs: bool = False) -> dict[str, Any]:
    """Return what the Hub says about a repository."""
    siblings = []
    for entry in repository.entries(commit).values():
        sibling: dict[str, Any] = {"rfilename": entry.path}
        if blobs:
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.sha256:
                sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        siblings.append(sibling)
    card = repository.card(commit)
    described = {
        "_id": repository.repo_id,
        "id": repository.repo_id,
        "modelId": repository.repo_id,
        "author": repository.repo_id.split("/")[0],
        "sha": commit,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": repository.disabled,
        "tags": repository.tags(commit),
        "downloads": 0,
        "likes": 0,
        "lastModified": changed_at(repository, commit),
        "cardData": card,
        "siblings": siblings,
    }
    names = ("library_name", "pipeline_tag")
    return described | {name: card[name] for name in names if name in card}


def changed_at(repository: Repository, commit: str) -> str:
    """Return when a commit was made, as the Hub writes it."""
    seconds = int(repository.git.commit_field(commit, "author")[0].split(" ")[-2])
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@REPOSITORIES.add("GET", MODEL)
@REPOSITORIES.add("GET", MODEL + "/revision/{rev}")
def model_info(server: "HubServer", request: Request) -> Response:
    """Describe a model at a revision."""
    repository = require_reader(request, server.repositories)
    commit = repository.head(request.args.get("rev", "main"))
    return answer_json(describe(repository, commit, blobs="blobs" in request.query))


@REPOSITORIES.add("GET", "/api/models")
def list_models(server: "HubServer", request: Request) -> Response:
    """List the models that have all the filters as tags, in pages."""
    account, query = account_of(request), request.query
    listed = []
    for repo_id, repository in sorted(server.repositories.items()):
        mine = account is not None and account.owns(repo_id.split("/")[0])
        described = describe(repository, repository.head("main"))
        wanted = set(query.get("filter", [])) <= set(described["tags"])
        named = query.get("search", [""])[0].lower() in repo_id.lower()
        authored = query.get("author", [described["author"]])[0] == described["author"]
        if wanted and named and authored and (mine or not repository.private):
            asked = {"_id", "id", "modelId", *query.get("expand", described)}
            listed.append({name: value for name, value in described.items() if name in asked})
    size = min(int(query.get("limit", [server.page_size])[0]), server.page_size)
    return paged(server, request, listed, size)


def paged(server: "HubServer", request: Request, items: list[dict[str, Any]], size: int) -> Response:
    """Return one page, and the address of the next in a Link header."""
    start = int(request.query.get("cursor", ["0"])[0])
    headers = {}
    if start + size < len(items):
        query = parse_qs(request.target.partition("?")[2]) | {"cursor": [str(start + size)]}
        headers["Link"] = f'<{server.endpoint}{request.path}?{urlencode(query, doseq=True)}>; rel="next"'
    return answer_json(items[start : start + size], 200, **headers)


def describe_file(server: "HubServer", entry: Entry) -> dict[str, Any]:
    """Return how a file is listed."""
    name = server.xet.names.get(entry.sha256 or "")
    return entry.as_json() | ({"xetHash": name} if name else {})


@REPOSITORIES.add("GET", MODEL + "/tree/{rev}")
@REPOSITORIES.add("GET", MODEL + "/tree/{rev}/{path*}")
def tree(server: "HubServer", request: Request) -> Response:
    """List the files under a folder, with sizes and digests."""
    repository = require_reader(request, server.repositories)
    entries = repository.entries(repository.head(request.args["rev"]))
    folder = request.args["path"].rstrip("/") + "/" if "path" in request.args else ""
    inside = {path: entry for path, entry in entries.items() if path.startswith(folder)}
    if folder and not inside:
        raise HttpError(404, f"{folder} does not exist", "EntryNotFound")
    recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
    listed, folders = [], set()
    for path, entry in inside.items():
        name, slash, _ = path[len(folder) :].partition("/")
        if recursive or not slash:
            listed.append(describe_file(server, entry))
        elif name not in folders:
            folders.add(name)
            listed.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": folder + name})
    return paged(server, request, listed, server.page_size)


@REPOSITORIES.add("POST", MODEL + "/paths-info/{rev}")
def paths_info(server: "HubServer", request: Request) -> Response:
    """Describe the asked paths that exist; asked as a form."""
    repository = require_reader(request, server.repositories)
    entries = repository.entries(repository.head(request.args["rev"]))
    asked = parse_qs(request.body.decode()).get("paths", [])
    found = [describe_file(server, entries[path]) for path in asked if path in entries]
    for path in asked:
        if any(one.startswith(path + "/") for one in entries):
            found.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
    return answer_json(found)


@REPOSITORIES.add("GET", MODEL + "/refs")
def refs(server: "HubServer", request: Request) -> Response:
    """List branches, tags and, if asked, pull requests."""
    repository = require_reader(request, server.repositories)

    def under(prefix: str) -> list[dict[str, str]]:
        found = repository.git.refs(prefix).items()
        return [{"name": name, "ref": f"{prefix}/{name}", "targetCommit": commit} for name, commit in found]

    answer = {"branches": under("refs/heads"), "tags": under("refs/tags"), "converts": []}
    if "include_prs" in request.query:
        answer["pullRequests"] = under("refs/pr")
    return answer_json(answer)


@REPOSITORIES.add("GET", MODEL + "/commits/{rev}")
def commits(server: "HubServer", request: Request) -> Response:
    """List the commits of a revision, newest first."""
    repository = require_reader(request, server.repositories)
    listed = []
    for commit in repository.git.history(repository.head(request.args["rev"])):
        message = repository.git.read(commit)[1].decode().partition("\n\n")[2].strip()
        title, _, rest = message.partition("\n\n")
        author = repository.git.commit_field(commit, "author")[0].split(" ")[0]
        date = "2023-11-14T22:13:20.000Z"
        listed.append({"id": commit, "title": title, "message": rest, "authors": [{"user": author}], "date": date})
    return paged(server, request, listed, server.page_size)


@REPOSITORIES.add("POST", MODEL + "/branch/{branch}")
def create_branch(server: "HubServer", request: Request) -> Response:
    """Start a branch from a revision."""
    repository = require_writer(request, server.repositories)
    return new_ref(repository, "refs/heads/" + request.args["branch"], request.json().get("startingPoint") or "main")


@REPOSITORIES.add("POST", MODEL + "/tag/{rev}")
def create_tag(server: "HubServer", request: Request) -> Response:
    """Name a revision."""
    repository = require_writer(request, server.repositories)
    return new_ref(repository, "refs/tags/" + request.json()["tag"], request.args["rev"])


def new_ref(repository: Repository, ref: str, revision: str) -> Response:
    """Point a new ref at a revision; 409 if there is one of that name."""
    with repository.lock:
        if not REF_NAME.fullmatch(ref) or ".." in ref:
            raise HttpError(400, f"{ref} is not a valid reference name")
        if repository.git.ref(ref):
            raise HttpError(409, f"Reference already exists: {ref}")
        repository.git.set_ref(ref, repository.head(revision))
    return answer_json({})


@REPOSITORIES.add("DELETE", MODEL + "/branch/{branch}")
@REPOSITORIES.add("DELETE", MODEL + "/tag/{tag}")
def delete_ref(server: "HubServer", request: Request) -> Response:
    """Remove a branch or a tag."""
    repository = require_writer(request, server.repositories)
    args = request.args
    ref = f"refs/heads/{args['branch']}" if "branch" in args else f"refs/tags/{args['tag']}"
    if not repository.git.ref(ref):
        raise HttpError(404, f"{ref} does not exist", "RevisionNotFound")
    (repository.git.path / ref).unlink()
    return answer_json({})
