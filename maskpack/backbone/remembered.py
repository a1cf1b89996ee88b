"""Backbones on this disk that were used before, by the digest of their weights.

Later verbs find them here when an adapter's base has no name that a library knows. Only what the user named before is
loaded: an adapter says which weights it needs, never which file.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import MaskpackError
from ..safetensors_io import replacing

MOST = 200  # backbones; the oldest are forgotten


def cache_folder() -> Path:
    """Return the folder of what can be made anew: $MASKPACK_CACHE, else `maskpack` in the user's cache folder."""
    if own := os.environ.get("MASKPACK_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache") / "maskpack"


def _file() -> Path:
    return cache_folder() / "backbones.json"


def _known() -> dict[str, dict[str, str]]:
    with suppress(OSError, ValueError):
        found = json.loads(_file().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {key: one for key, one in found.items() if isinstance(one, dict) and "reference" in one}
    return {}


def remember_backbone(digest: str, arguments: Mapping[str, Any]) -> None:
    """Write down by which arguments of `load_backbone` a backbone with this digest was loaded, if there is need."""
    found = {name: str(arguments[name]) for name in ("weights", "random_weights") if arguments.get(name) is not None}
    reference = arguments["reference"]
    path, _, function = reference.rpartition(":") if ".py:" in reference else (reference.removeprefix("hf/"), "", "")
    if "weights" in found:
        found["weights"] = str(Path(found["weights"]).resolve())
    if Path(path).exists():
        found["file"] = str(Path(path).resolve())
        reference = f"{found['file']}:{function}" if function else f"hf/{found['file']}"
    if found:  # otherwise the name of the base says all
        known = {key: one for key, one in _known().items() if key != digest}
        known[digest] = {"reference": reference, **found}
        with suppress(OSError, MaskpackError):  # without it no verb does less than it says
            _file().parent.mkdir(parents=True, exist_ok=True)
            with replacing(_file()) as (temporary,):
                temporary.write_text(json.dumps(dict(list(known.items())[-MOST:]), indent=1) + "\n", encoding="utf-8")


def remembered_backbone(digest: str) -> dict[str, Any] | None:
    """Return the arguments of `load_backbone` for a backbone with this digest, if its files are there."""
    found = _known().get(digest)
    if found is None or not all(Path(found[key]).exists() for key in ("file", "weights") if key in found):
        return None
    return {name: found.get(name) for name in ("reference", "weights", "random_weights")}
