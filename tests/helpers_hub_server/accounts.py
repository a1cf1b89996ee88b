"""Who may do what: fixed users, and the answers that the real Hub gives to the others."""

from dataclasses import dataclass

from .messages import HttpError, Request
from .repository import Repository

WRITE_TOKEN = "hf_aliceMayWrite"
READ_TOKEN = "hf_aliceMayOnlyRead"
STRANGER_TOKEN = "hf_bobMayWrite"


@dataclass(frozen=True)
class Account:
    """The user behind a token."""

    name: str
    role: str
    organisations: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organisations


ACCOUNTS = {
    WRITE_TOKEN: Account("alice", "write", ("team",)),
    READ_TOKEN: Account("alice", "read", ("team",)),
    STRANGER_TOKEN: Account("bob", "write"),
}


def account_of(request: Request) -> Account | None:
    """Return who asks, or None for an anonymous request; a wrong token is refused."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    account = ACCOUNTS.get(header.removeprefix("Bearer "))
    if account is None:
        raise HttpError(401, "Invalid credentials in Authorization header")
    return account


def require_reader(request: Request, repositories: dict[str, Repository], content: bool = False) -> Repository:
    """Return the repository that the request names, if it may read it (and with `content`, its files)."""
    account = account_of(request)
    repo_id = f"{request.args['ns']}/{request.args['name']}"
    repository = repositories.get(repo_id)
    mine = account is not None and account.owns(request.args["ns"])
    if repository is None or (repository.private and not mine):
        # anonymous callers must not learn whether a private repository exists
        if account is None:
            raise HttpError(401, "Invalid username or password.", "RepoNotFound")
        raise HttpError(404, "Repository not found", "RepoNotFound")
    if repository.disabled:
        raise HttpError(403, "Access to this resource is disabled.")
    if content and repository.gated and not mine:
        text = f"Access to model {repo_id} is restricted."
        raise HttpError(401 if account is None else 403, text, "GatedRepo")
    return repository


def require_writer(request: Request, repositories: dict[str, Repository], proposal: bool = False) -> Repository:
    """Return the repository that the request names, if it may be written (or with `proposal`, proposed to)."""
    repository = require_reader(request, repositories)
    account = account_of(request)
    if account is None:
        raise HttpError(401, "Invalid username or password.")
    if account.role != "write" or not (proposal or account.owns(request.args["ns"])):
        raise HttpError(403, "You don't have the rights to write to this repository")
    return repository
