"""What a model card may say of a training record: anybody may have written it, and places on a disk are not told."""

import re
from typing import Any

HUGE = 1e300  # a result beyond is none, and a JSON integer may not even fit a float
# what stands for a place on somebody's disk, as a whole text or as a word in one; addresses of the web do not
PATH = re.compile(r"(hf/)?(/\S|~[\w-]*/|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\|file:)|.*\.py:\w")
PATH_WORD = re.compile(
    r"(?<![\w.~/\\*?-])(?:[A-Za-z]:[\\/]|\\\\|~[\w-]*/|\.{1,2}[\\/]|file:/|/(?=[\w.~-])|hf/[/.~]|[\w.-]+\\(?=\w))"
    r"[^\s\"'<>|,;)\]}]*"
)
REPLACED = "(local path)"
DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def without_paths(value: Any) -> Any:
    """Return a JSON value with its local paths replaced, in keys as well."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    if not isinstance(value, str):
        return value
    whole = PATH.match(value) or ("\\" in value and len(value.split()) == 1)
    return REPLACED if whole else PATH_WORD.sub(REPLACED, value)


def member(record: Any, key: str) -> dict[str, Any]:
    """Return a member that is an object; an empty one if it is missing or anything else."""
    found = record.get(key) if isinstance(record, dict) else None
    return found if isinstance(found, dict) else {}


def metrics(record: Any) -> dict[str, float]:
    """Return the numbers among the metrics of a training record, sorted by name."""
    found = without_paths(member(record, "metrics"))
    numbers = {key: value for key, value in found.items() if type(value) in (int, float)}
    return {key: value for key, value in sorted(numbers.items()) if abs(value) < HUGE}


def dataset_name(record: Any) -> str | None:
    """Return the name of the data in a training record, or None."""
    found = record.get("data") if isinstance(record, dict) else None
    name = found.get("id") if isinstance(found, dict) else found
    return without_paths(name) if isinstance(name, str) and name else None


def hub_dataset(record: Any) -> str | None:
    """Return the id of the data if they are a data set of the Hub, as the training record says, or None."""
    found = member(record, "data")
    if found.get("source") != "hub":
        return None
    return name if isinstance(name := found.get("id"), str) and DATASET.fullmatch(name) else None


def rows(record: Any) -> dict[str, int]:
    """Return the number of examples of each split of a training record."""
    counts = member(member(record, "data"), "rows")
    return {without_paths(key): value for key, value in counts.items() if type(value) is int}


def combination(record: Any) -> tuple[str, list[tuple[str, str]]] | None:
    """Return by which operation masks were combined, and (mask_id, reference or "") of each adapter; None if not."""
    found = member(record, "combined")
    parents = found.get("parents")
    if not isinstance(parents, list):
        return None
    rows = [one for one in parents if isinstance(one, dict)]
    of = [tuple(without_paths(str(one.get(key, ""))) for key in ("mask_id", "reference")) for one in rows]
    extra = "".join(f", {key} = {found[key]}" for key in ("k", "weights") if key in found)
    return without_paths(f"{found.get('operation')}{extra}"), [(id_, reference) for id_, reference in of]
