"""The JSON files that pictures are drawn from."""

import json
from pathlib import Path
from typing import Any


def content(file: Path, expected: str) -> Any:
    """Return what is in a JSON file.

    Raises:
        DataError: if it cannot be read; the message says what was expected.
    """
    from maskpack.errors import DataError

    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {file} as JSON: {error}; expected {expected}") from None


def members(file: Path, *keys: str) -> list[Any]:
    """Return these members, all of them lists, of the JSON object in a file."""
    from maskpack.errors import DataError

    found = content(file, f"an object with {' and '.join(keys)}")
    if isinstance(found, dict) and "confusion" in keys and "confusion" not in found:
        match found.get("features"):  # of `maskpack eval --json` with k-NN or a probe
            case [{"confusion": counts}]:
                found["confusion"] = counts
            case [_, _, *_]:
                raise DataError(f"{file} has several measures; print it with --knn or --probe alone, of one share")
    for key in keys:
        if not isinstance(found, dict) or not isinstance(found.get(key), list):
            has = ", ".join(sorted(found)[:10]) if isinstance(found, dict) else f"a {type(found).__name__}"
            raise DataError(f"{file} has no list {key!r}, it has: {has}; expected an object with {' and '.join(keys)}")
    return [found[key] for key in keys]


def curves_of(file: Path, key: str, most_labels: bool = False) -> dict[str, list[tuple[float, float, float | None]]]:
    """Return (key, accuracy, deviation) of the rows, or of each method's rows with most labels, by method."""
    from maskpack.errors import DataError

    curves: dict[str, list[tuple[float, float, float | None]]] = {}
    most: dict[str, Any] = {}
    [rows] = members(file, "rows")
    for number, row in enumerate(rows, 1):
        found: dict[str, Any] = row if isinstance(row, dict) else {}
        point: list[Any] = [found.get(key), found.get("accuracy"), found.get("deviation")]
        share = found.get("labels_fraction", 1) if most_labels else 1
        are_numbers = all(isinstance(one, int | float) for one in (*point[:2], point[2] or 0, share))
        if not are_numbers or not isinstance(found.get("method"), str):
            raise DataError(
                f"row {number} of {file} is {row!r:.200}; expected an object with a text under 'method' and numbers "
                f"under {key!r}, 'accuracy' and perhaps 'deviation'"
            )
        method = found["method"]
        if method not in curves or share > most[method]:
            most[method], curves[method] = share, []
        if share == most[method]:
            curves[method].append((point[0], point[1], point[2]))
    return curves
