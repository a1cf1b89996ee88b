"""Small adapters to push and pull, and a user's model card."""

import hashlib
import json
from pathlib import Path

MODEL, CONFIG, CARD = "maskpack_model.safetensors", "maskpack_config.json", "README.md"
NAMES = (CARD, CONFIG, MODEL)


def contents(seed: int = 0, size: int = 3000) -> dict[str, bytes]:
    """Return the files of an adapter, different for each seed."""
    model = hashlib.shake_128(str(seed).encode()).digest(size)
    record = {"sha256": hashlib.sha256(model).hexdigest(), "size": len(model), "seed": seed}
    return {MODEL: model, CONFIG: json.dumps(record).encode()}


def write_adapter(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """Write an adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (contents() if files is None else files).items():
        (folder / name).write_bytes(data)
    return folder


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
