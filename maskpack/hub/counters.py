"""The highest counter of a signature that was seen for a name on the Hub, so that an older version is noticed."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from ..adapter.fields import Fields
from ..adapter.keys import Keys
from ..adapter.read import read_bytes
from ..adapter.signature import Signed
from ..errors import AdapterError, MaskpackError, SignatureError, StateError
from ..tensorfile import replacing
from ..tensorheader import strict_json
from .reference import Reference

FILE = "maskpack_counters.json"
LIMIT = 16 << 20  # bytes; a hundred thousand names fit

log = logging.getLogger("maskpack")


def check_newest(signed: Signed, keys: Keys, reference: Reference, commit: str) -> None:
    """Compare a signature's counter with the highest that was seen for this repository and revision; remember it.

    A commit that the reference itself names may be of any age. What was signed by keys that are not trusted any more
    does not count. Where the counter cannot be written down, that is a warning.

    Raises:
        SignatureError: if an older version was put in the place of a newer one.
        StateError: if the file of counters cannot be read.
    """
    if reference.is_pinned:
        return
    name, counter = name_of(reference), signed.statement.counter
    seen = highest(keys, name)
    if counter < seen:
        raise SignatureError(
            f"{name} has the signed version {counter} now, and version {seen} was seen before: an older one was put in "
            f"its place. To use it nevertheless name its commit, {reference.repo_id}@{commit}; to forget what was seen "
            f"delete {_path()}"
        )
    if counter > seen:
        remember(signed.by, name, counter)


def name_of(reference: Reference) -> str:
    """Return the repository with its branch or tag."""
    return f"{reference.repo_id}@{reference.revision or 'main'}"


def highest(keys: Iterable[str], name: str) -> int:
    """Return the highest counter that was seen under a name, signed by one of some keys; 0 if there is none."""
    known = _read()
    return max((known.get(key, {}).get(name, 0) for key in keys), default=0)


def remember(keys: Iterable[str], name: str, counter: int) -> None:
    """Write down that a counter was seen; one process after another, and never a lower one over a higher."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_suffix(".lock"), timeout=10.0):
            known = _read()
            for key in keys:
                names = known.setdefault(key, {})
                names[name] = max(counter, names.get(name, 0))
            with replacing(path) as (temporary,):
                temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    except (OSError, MaskpackError) as error:
        log.warning("cannot remember that %s is at the signed version %s, so an older one will not be noticed: %s",
                    name, counter, error)  # fmt: skip


def _path() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / FILE


def _read() -> dict[str, dict[str, int]]:
    path = _path()
    if not path.exists():
        return {}
    try:
        outer = Fields.of(strict_json(read_bytes(path, path, LIMIT), str(path)), str(path))
        known = {key: dict(outer.object(key).members) for key in outer.members}
        if any(type(counter) is not int for names in known.values() for counter in names.values()):
            raise AdapterError("a counter in it is no integer")
        return known
    except AdapterError as error:
        raise StateError(
            f"cannot read the versions of signed adapters that were seen, {path}: {error}. Mend it, or delete it: then "
            f"the versions that are found next are the first"
        ) from None
