"""Measured results kept as JSON files: what is there is read back, the rest is measured."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..training.config import TrainConfig
from ..training.run_folder import read_json, write_json


def measured(path: Path, keys: frozenset[str], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the result in a file; if there is none, measure it first."""
    if not path.exists():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return read_json(path, keys, "delete it, and it is measured again")


def shared_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that all trials of a folder have in common; seed and rate are each trial's own."""
    return {name: value for name, value in config.to_json().items() if name not in ("seed", "lr", "workers")}
