"""Names on the Hub that are nearest to a name that is not there."""

from contextlib import suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING

from .reference import Reference

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LIMIT = 200  # repositories of an owner that are looked at


def did_you_mean(api: "HfApi", error: BaseException, reference: Reference | None) -> str:
    """Return a clause with the nearest name, for an error that says that a name is not there; else no text.

    A hint must not fail: whatever goes wrong in looking for one means that there is none.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if reference is None or reference.repo_id is None or isinstance(error, GatedRepoError):
        return ""
    with suppress(Exception):
        if isinstance(error, RepositoryNotFoundError):
            return _clause(reference.repo_id, _repositories(api, reference.repo_id))
        if isinstance(error, RevisionNotFoundError):
            refs = api.list_repo_refs(reference.repo_id)
            return _clause(reference.revision or "main", [one.name for one in (*refs.branches, *refs.tags)])
    return ""


def _repositories(api: "HfApi", repo_id: str) -> list[str]:
    owner, _, name = repo_id.partition("/")
    own = [found.id for found in api.list_models(author=owner, limit=LIMIT)]
    # the owner may be what is misspelt
    return own or [found.id for found in api.list_models(search=name, filter="maskpack", limit=LIMIT)]


def _clause(name: str, known: list[str]) -> str:
    nearest = get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""
