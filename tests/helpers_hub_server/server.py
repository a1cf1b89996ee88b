"""The loopback Hub: an origin for the API, another one for the store of large files, by LFS and by Xet."""

import json
import os
from pathlib import Path

from .content import CONTENT
from .faults import Fault, Faults
from .messages import Request, Response, Routes
from .repositories import REPOSITORIES
from .repository import Repository, pointer
from .storage import OBJECTS, STORAGE, ObjectStore
from .transport import Origin
from .xet import XET, XET_TOKENS, XetStore

HUB, STORE = Routes(), Routes()
HUB.table = [*REPOSITORIES.table, *STORAGE.table, *XET_TOKENS.table, *CONTENT.table]
STORE.table = [*XET.table, *OBJECTS.table]


# otherwise the Xet client tries again for minutes
XET_IN_A_HURRY = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms"}


class HubServer:
    """A Hub on 127.0.0.1 and its store on `localhost` (another origin, which must never see a token of the Hub).

    Attributes:
        endpoint: what HF_ENDPOINT must be.
        log: every request seen so far, both origins.
        repositories: by id; tests may set `private`, `gated` and `disabled` on them.
        transport: lfs or xet: what `env` tells the client to use, and how `add` stores; the server offers both.
    """

    def __init__(self, root: Path, transport: str = "lfs") -> None:
        self.root, self.transport = root, transport
        self.repositories: dict[str, Repository] = {}
        self.log: list[Request] = []
        self.faults = Faults()
        self.objects = ObjectStore(root / "objects")
        self.xet = XetStore(self.objects)
        self.page_size = 1000
        self.multipart_over = 20_000_000
        self.hub = Origin("hub", self.answer_hub, self.faults, self.log)
        self.store = Origin("store", self.answer_store, self.faults, self.log)
        self.endpoint = f"http://127.0.0.1:{self.hub.server_port}"
        self.store_endpoint = f"http://localhost:{self.store.server_port}"
        self.running = False

    def __enter__(self) -> "HubServer":
        self.hub.start()
        self.store.start()
        self.running = True
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop both origins; the next connection is refused."""
        if self.running:
            self.running = False
            self.hub.stop()
            self.store.stop()

    def answer_hub(self, request: Request) -> Response:
        return HUB.dispatch(self, request)

    def answer_store(self, request: Request) -> Response:
        return STORE.dispatch(self, request)

    def env(self, token: str | None = None) -> dict[str, str]:
        """Return the environment of a client process that talks to this server only."""
        home = self.root / "home"
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": str(int(self.transport == "lfs")),
            "HF_XET_CACHE": str(home / "xet"),
            **XET_IN_A_HURRY,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        # another client than the installed one may lie on the path
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        return kept | variables | ({"HF_TOKEN": token} if token else {})

    def fail(self, kind: str, method: str = "GET", path: str = "", **details: object) -> Fault:
        """Let coming requests go wrong; `path` is matched in `hub:/…` or `store:/…`, see `Fault`."""
        rule = Fault(kind, method, path, **details)  # type: ignore[arg-type]
        self.faults.rules.append(rule)
        return rule

    def requests(self, method: str = "", path: str = "") -> list[str]:
        """Return what was asked so far as `METHOD origin:/path`, where the path holds `path`."""
        seen = [f"{one.method} {one.origin}:{one.target}" for one in self.log]
        return [line for line in seen if line.startswith(method) and path in line]

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False, branch: str = "main") -> str:
        """Commit files directly, as somebody else's push would, and return the commit."""
        if repo_id not in self.repositories:
            self.repositories[repo_id] = Repository(self.root / "git", repo_id, private)
        repository = self.repositories[repo_id]
        with repository.lock:
            head = repository.git.resolve(branch) or repository.head("main")
            tree = repository.git.files(head)
            for path, data in files.items():
                if repository.wants_lfs(head, path, len(data), data[:512]):
                    if self.transport == "xet":
                        self.xet.put_content(data)
                    data = pointer(self.objects.put(data), len(data))
                tree[path] = repository.git.write("blob", data)
            return repository.commit(f"refs/heads/{branch}", tree, repo_id.split("/")[0], "direct", head)

    def file(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Return the content of a file, LFS or not."""
        repository = self.repositories[repo_id]
        entry = repository.entries(repository.head(revision))[path]
        return self.objects.get(entry.sha256) if entry.sha256 else repository.git.read(entry.oid)[1]

    def log_text(self) -> str:
        """Return everything that was sent to the object store, headers included."""
        seen = [one for one in self.log if one.origin == "store"]
        return "\n".join(f"{one.method} {one.target} {json.dumps(one.headers)}" for one in seen)
