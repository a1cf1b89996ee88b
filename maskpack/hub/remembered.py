"""Backbones on this disk that were used before, by the digest of their weights.

Later verbs find them here when an adapter's base has no name that a library knows. Only what the user named before is
loaded: an adapter says which weights it needs, never which file.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import MaskpackError
from ..safetensors_io import replacing

MOST = 200  # backbones; the oldest are forgotten


def _file() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "maskpack" / "backbones.json"


def _known() -> dict[str, dict[str, str]]:
    with suppress(OSError, ValueError):
        found = json.loads(_file().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {key: one for key, one in found.items() if isinstance(one, dict) and "reference" in one}
    return {}


def remember_backbone(digest: str, reference: str, weights: str | Path | None = None) -> None:
    """Write down the reference and the weights of a backbone with this digest, if they are files of this disk."""
    found: dict[str, str] = {}
    path, _, function = reference.rpartition(":") if ".py:" in reference else (reference.removeprefix("hf/"), "", "")
    if weights is not None:
        found["weights"] = str(Path(weights).resolve())
    if Path(path).exists():
        found["file"] = str(Path(path).resolve())
        reference = f"{found['file']}:{function}" if function else f"hf/{found['file']}"
    if found:
        known = {key: one for key, one in _known().items() if key != digest}
        known[digest] = {"reference": reference, **found}
        with suppress(OSError, MaskpackError):  # without it no verb does less than it says
            _file().parent.mkdir(parents=True, exist_ok=True)
            with replacing(_file()) as (temporary,):
                temporary.write_text(json.dumps(dict(list(known.items())[-MOST:]), indent=1) + "\n", encoding="utf-8")


def remembered_backbone(digest: str) -> dict[str, Any] | None:
    """Return `reference` and `weights` for `load_backbone` of a backbone with this digest, if its files are there."""
    found = _known().get(digest)
    if found is None or not all(Path(found[key]).exists() for key in ("file", "weights") if key in found):
        return None
    return {"reference": found["reference"], "weights": found.get("weights")}
