"""Small adapters to push and pull, made by the real writer once for each seed."""

import json
import tempfile
from functools import cache
from pathlib import Path

from maskpack.adapter.write import save_adapter

from .helpers_adapter import base_of, random_masks

MODEL, CONFIG, CARD = "maskpack_model.safetensors", "maskpack_config.json", "README.md"
NAMES = (CARD, CONFIG, MODEL)
CLASSES = ("finch", "owl")


@cache
def _saved(seed: int, weights: int, small: int) -> dict[str, bytes]:
    shapes: dict[str, tuple[int, ...]] = {"layer.weight": (weights,), "other.weight": (7,)}
    shapes |= {f"small{n}.weight": (32,) for n in range(small)}
    with tempfile.TemporaryDirectory() as folder:
        masks, training = random_masks(shapes, seed=seed), {"seed": seed}
        save_adapter(folder, masks, base_of(shapes), class_names=CLASSES, training=training, codec="raw")
        return read_folder(Path(folder))


def saved(seed: int = 0, weights: int = 12_000, small: int = 0) -> dict[str, bytes]:
    """Return the files of an adapter as it is saved, different for each seed; a weight takes a bit.

    Args:
        small: number of small parameters beside the large one.
    """
    return dict(_saved(seed, weights, small))


def contents(seed: int = 0, weights: int = 12_000, small: int = 0) -> dict[str, bytes]:
    """Return the files of an adapter without its card."""
    return {name: data for name, data in saved(seed, weights, small).items() if name != CARD}


def size(seed: int = 0) -> int:
    """Return the bytes of an adapter's model file."""
    return len(contents(seed)[MODEL])


def with_record(model: bytes) -> dict[str, bytes]:
    """Return a model file and a config file that records just that one."""
    from blake3 import blake3

    record = json.loads(contents()[CONFIG]) | {"size": len(model), "blake3": blake3(model).hexdigest()}
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
