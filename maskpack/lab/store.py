"""Measured results kept as JSON files: what is there is read back, the rest is measured."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import StateError
from ..training.config import TrainConfig
from ..training.run_folder import read_json, write_json


def measured(path: Path, keys: frozenset[str], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the result in a file; if there is none, measure it first.

    Raises:
        StateError: if the file cannot be read, or lacks one of the keys. What `measure` raises.
    """
    if not path.exists():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return read_json(path, keys, "delete it, and it is measured again")


def shared_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that all trials of a folder have in common; seed and rate are each trial's own."""
    return {name: value for name, value in config.to_json().items() if name not in ("seed", "lr", "workers")}


def claim(path: Path, about: Mapping[str, Any]) -> None:
    """Write down what a folder is for, in a JSON file in it; if the file is there, check that it says the same.

    Args:
        about: JSON values; `settings` are those of `shared_settings`.

    Raises:
        StateError: if the folder is for something else.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, about)
        return
    there, here = read_json(path, frozenset(about), "choose another folder"), json.loads(json.dumps(about))
    # a folder of an earlier release lacks settings that came later: they had their default
    there["settings"] = shared_settings(TrainConfig()) | there["settings"]
    differing = []
    for part, value in here.items():
        if isinstance(value, dict):
            changed = sorted(key for key in value if there[part].get(key) != value[key])
            differing += [f"{part} ({', '.join(changed)})"] if changed else []
        elif there[part] != value:
            differing.append(part)
    if differing:
        raise StateError(
            f"{path.parent} holds results of other settings: {', '.join(differing)}; choose another folder, or give "
            f"the settings that it was begun with"
        )
