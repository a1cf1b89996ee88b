"""Branches, tags and pull requests of a repository."""

from typing import TYPE_CHECKING

from ..errors import AdapterError, HubError
from .client import Session
from .reference import Reference

if TYPE_CHECKING:
    from huggingface_hub import GitRefs


def read_refs(session: Session, repo_id: str, pull_requests: bool = False) -> "GitRefs":
    """Return what a repository's branches and tags, and if asked its pull requests, point to."""
    return session.call(lambda: session.api.list_repo_refs(repo_id, include_pull_requests=pull_requests))


def check_is_no_branch(session: Session, reference: Reference, offline: bool) -> None:
    """Refuse a reference that may mean other bytes tomorrow: no revision, a branch, a pull request.

    Raises:
        AdapterError: with what to write instead.
    """
    if reference.is_pinned:
        return
    name = reference.revision
    hint = f"give a tag or a commit: {reference.repo_id}@COMMIT, as `maskpack pull {reference.repo_id}` prints it"
    if name is None:
        raise AdapterError(f"{reference} names no revision, and one is required; {hint}")
    if offline:
        raise AdapterError(f"{reference} may be a branch, and the Hub may not be asked; {hint}")
    refs = read_refs(session, str(reference.repo_id))
    if name not in {tag.name for tag in refs.tags} or name in {branch.name for branch in refs.branches}:
        raise AdapterError(f"{reference} is no tag and no commit, so it can change, and a revision is required; {hint}")


def read_tag(session: Session, repo_id: str, tag: str) -> str | None:
    """Return the commit that a tag points to, or None if there is no such tag."""
    return next((one.target_commit for one in read_refs(session, repo_id).tags if one.name == tag), None)


def set_tag(session: Session, repo_id: str, tag: str, commit: str) -> None:
    """Give a commit a tag; a tag that points to another one is never moved.

    Raises:
        HubError: if there is such a tag.
    """
    session.call(lambda: session.api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
    check_tag(repo_id, tag, read_tag(session, repo_id, tag), commit)


def check_tag(repo_id: str, tag: str, found: str | None, wanted: str | None) -> None:
    """Refuse to go on where a tag points to another commit than the wanted one; None means a commit to come.

    Raises:
        HubError: with both commits.
    """
    if found is not None and found != wanted:
        raise HubError(
            f"{repo_id} has a tag {tag!r} at commit {found[:12]} already, and tags are not moved; choose another tag, "
            f"or delete it: hf repos tag delete {repo_id} {tag}"
        )


def pull_requests(session: Session, repo_id: str) -> dict[str, str]:
    """Return the head of every pull request by its number."""
    found = read_refs(session, repo_id, pull_requests=True).pull_requests or []
    return {one.ref.removeprefix("refs/pr/"): one.target_commit for one in found}
