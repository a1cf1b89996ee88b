"""Search: adapters on the Hub, found by the tags that their cards carry."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..adapter.card import DIGEST, HUB_ID, base_id_tag, base_model, digest_tag
from ..errors import ConfigError, HubError
from ..network import hides_secrets
from .client import Session

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo


MOST = 1000
HEX = re.compile(rf"[0-9a-f]{{{DIGEST},64}}")
TASK = re.compile(r"[a-z0-9-]{1,64}")
# tags as the Hub derives them from `base_model`, and our own; nothing else of a stranger's tag is shown
BASE_TAG = re.compile(rf"(?:base_model:adapter:|maskpack:base-id:)({HUB_ID.pattern})")
DIGEST_TAG = re.compile(rf"maskpack:base:([0-9a-f]{{{DIGEST}}})")


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter on the Hub, as its repository describes it; `pull` verifies it. None is what it does not say.

    Attributes:
        base: Hub id of its base, or torchvision/NAME. task: as in "image-classification".
        downloads: in the last 30 days. updated: date of the last commit, as in "2025-01-31".
        fits: first 12 digits of the float32 digest of its base, for another search.
    """

    repo_id: str
    base: str | None
    task: str | None
    downloads: int | None
    likes: int | None
    updated: str | None
    private: bool
    fits: str | None


@hides_secrets
def search_adapters(
    query: str | None = None,
    *,
    base: str | None = None,
    fits: str | None = None,
    author: str | None = None,
    limit: int = 20,
    token: str | bool | None = None,
) -> list[FoundAdapter]:
    """Find adapters on the Hub, in the Hub's order; none is not an error.

    Args:
        query: text in the name of the repository. author: user or organisation. limit: 1 to 1000.
        base: what they were made for: `timm/NAME`, `hf/USER/NAME`, the Hub id itself, or `torchvision/NAME`.
        fits: digest of the base's weights, 12 to 64 digits of `fingerprint(model, …).digests["float32"]`.
        token: as everywhere on the Hub: None for the login, which also finds private ones; False for none.

    Example:
        for one in search_adapters(base="timm/resnet18.a1_in1k"):
            print(one.repo_id, one.downloads)
    """
    if not 1 <= limit <= MOST:
        raise ConfigError(f"limit must be from 1 to {MOST}, got {limit}")
    tags = ["maskpack"]
    if base is not None:
        tags.append(_base_tag(base))
    if fits is not None:
        if not HEX.fullmatch(fits):
            raise ConfigError(
                f"fits must be {DIGEST} to 64 lower-case hexadecimal digits of a float32 digest, got {fits!r}"
            )
        tags.append(digest_tag(fits))
    session = Session("search the Hub", token)
    if session.offline:
        raise HubError("cannot search the Hub offline; unset HF_HUB_OFFLINE, or see what is cached: maskpack list")

    def ask() -> "list[ModelInfo]":
        # the tags, and not the list of each repository's files
        expand: Any = ["downloads", "lastModified", "likes", "pipeline_tag", "private", "tags"]
        found = session.api.list_models(
            filter=tags, search=query or None, author=author or None, limit=limit, expand=expand
        )
        return list(found)  # pages are asked for while it is walked

    return [_found(info) for info in session.call(ask)]


def _base_tag(base: str) -> str:
    if (own := base_id_tag(base)) is not None:
        return own
    hub = base_model(base) or base
    if not HUB_ID.fullmatch(hub):
        raise ConfigError(
            f"cannot search for adapters of {base!r}; expected timm/NAME, hf/USER/NAME or torchvision/NAME, else "
            "search by fits"
        )
    return f"base_model:adapter:{hub}"


def _found(info: "ModelInfo") -> FoundAdapter:
    tags = [tag for tag in info.tags or [] if isinstance(tag, str)]
    task: Any = info.pipeline_tag
    return FoundAdapter(
        info.id,
        _first(BASE_TAG, tags),
        task if isinstance(task, str) and TASK.fullmatch(task) else None,
        info.downloads,
        info.likes,
        info.last_modified.date().isoformat() if info.last_modified else None,
        bool(info.private),
        _first(DIGEST_TAG, tags),
    )


def _first(pattern: re.Pattern[str], tags: list[str]) -> str | None:
    return next((found[1] for tag in tags if (found := pattern.fullmatch(tag))), None)
