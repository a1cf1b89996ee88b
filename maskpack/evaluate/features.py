"""Features of a backbone as it is now, computed once for the same model and data.

The cache is a folder of safetensors files, named by what went in: the model (`backbone/digest.py`), where and how its
features are read, preprocessing and tokenizer, the data and which rows. Labels are not kept: they are the data's. Files
carry their own digest, are written atomically, and the oldest go when the folder exceeds `LIMIT`.
"""

import json
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from ..backbone.classifier import embeddings
from ..backbone.digest import model_digest
from ..backbone.load import Backbone
from ..data.base import Examples
from ..data.batches import loader, readable
from ..errors import DataError, MaskpackError
from ..preprocess import preprocess_to_json
from ..tensorfile import read_tensors, write_tensors
from ..text import escape

VERSION = 1  # of the key and of the files; raise it when the same inputs are to give other features
LIMIT = 5_000_000_000  # bytes that the folder may have
OWN_FILE = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\.[0-9a-f]+\.tmp)?")


class FeatureCacheWarning(UserWarning):
    """Warned when a file of the feature cache is damaged or cannot be written; the features are right all the same."""


def cache_folder() -> Path:
    """Return where features are kept: in `$MASKPACK_CACHE`, else in `maskpack` in the user's cache folder."""
    own = os.environ.get("MASKPACK_CACHE")
    if own:
        return Path(own) / "features"
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache") / "maskpack" / "features"


def embed(backbone: Backbone, examples: Examples, *, batch_size: int = 64, cache: bool = True) -> tuple[Tensor, Tensor]:
    """Return the features of the examples that can be read, (N, D) float32, and their labels, (N,).

    Features are what the head gets, of the model as it is now (a mask loaded or not), in evaluation mode, without
    augmentation. Rows that cannot be read are left out and noted in `examples.unreadable`.

    Args:
        cache: keep the features in `cache_folder()`, and take them from there. Not done for data without a digest, and
            for models with scores attached.

    Raises:
        DataError: if the examples are not what the backbone reads, none can be read, or a feature is not finite.
        BackboneError: if the backbone has no head whose input could be read.
    """
    # made first, so that data of the wrong kind are an error on a hit as well
    batches = loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=batch_size)
    key = _key(backbone, examples) if cache else None
    found = None if key is None else kept_features(key, len(examples))
    if found is None:
        x, y = embeddings(backbone, readable(batches))
        if not torch.isfinite(x).all():
            raise DataError(f"the features of {backbone.id} are not finite; compute them in a wider dtype than its own")
        if key is not None:
            keep_features(key, x, examples)
        return x, y
    x, rows = found
    examples.unreadable.update(set(examples.indices) - set(rows))
    return x, torch.tensor([examples.labels[row] for row in rows])


def kept_features(key: str, most: int) -> tuple[Tensor, list[int]] | None:
    """Return the features that are cached under a digest, and their rows; None, and a warning, if they are damaged.

    Args:
        most: rows that there can be.
    """
    return _read(cache_folder() / f"{key}.safetensors", most)


def keep_features(key: str, features: Tensor, examples: Examples) -> None:
    """Cache the features of the examples that could be read under a digest of all that they follow from."""
    rows = torch.tensor([row for row in examples.indices if row not in examples.unreadable])
    _write(cache_folder() / f"{key}.safetensors", features, rows)


def _key(backbone: Backbone, examples: Examples) -> str | None:
    """What the features follow from, as a digest; None if a part of it cannot be told."""
    model = model_digest(backbone.model, backbone.outside)
    inputs = inputs_content(backbone, examples)
    if model is None or inputs is None:
        return None
    device = next(backbone.model.parameters()).device.type
    return digest_of([VERSION, model, device, [backbone.head, backbone.pooling, backbone.normalize], *inputs])


def inputs_content(backbone: Backbone, examples: Examples) -> list[Any] | None:
    """Return what the inputs of a backbone follow from, JSON values; None if a part of it cannot be told."""
    tokenizer = _tokenizer_digest(backbone.tokenizer)
    if tokenizer is None or not examples.digest:
        return None
    rows = [examples.digest, examples.column, list(examples.indices)]
    return [preprocess_to_json(backbone.preprocess), tokenizer, rows]


def digest_of(content: Any) -> str:
    """Return the hex BLAKE3 of JSON values."""
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str | None:
    """The BLAKE3 of a tokenizer of transformers; None for another object, of which nothing is known."""
    if tokenizer is None:
        return ""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(rules, dict):
        # these follow from the last call, and preprocessing says what they will be
        rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    about = [type(tokenizer).__qualname__, repr(tokenizer), rules]
    return blake3(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _digest(features: Tensor, rows: Tensor) -> Tensor:
    whole = blake3(repr((tuple(features.shape), tuple(rows.shape))).encode())
    for tensor in (features, rows):
        whole.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return torch.tensor(list(whole.digest()), dtype=torch.uint8)


def _read(path: Path, most: int) -> tuple[Tensor, list[int]] | None:
    """Return features and rows from a file of the cache; None, and a warning, if it is damaged."""
    if not path.exists():
        return None
    try:
        found = read_tensors(path)
        features, rows, digest = found["features"], found["rows"], found["digest"]
        if not torch.equal(digest, _digest(features, rows)) or len(features) != len(rows) or len(rows) > most:
            raise DataError("its bytes have not the digest that was stored")
    except (MaskpackError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if path.exists():  # another process may have removed it meanwhile
            _warn(f"the cached features in {path} cannot be used and are computed anew: {error}")
        return None
    with suppress(OSError):
        os.utime(path)  # the files that nobody asks for are the oldest
    return features, rows.tolist()


def _write(path: Path, features: Tensor, rows: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"features": features, "rows": rows, "digest": _digest(features, rows)}, {})
        _shrink(path, features.nbytes)
    except (MaskpackError, OSError) as error:
        _warn(f"the features are not cached: {error}; another folder can be named with the variable MASKPACK_CACHE")


def _shrink(newest: Path, newest_size: int) -> None:
    """Remove the files that were used longest ago until the folder keeps its limit; never the newest, never others'."""
    files = []
    for file in newest.parent.iterdir():
        if OWN_FILE.fullmatch(file.name) and file != newest:
            with suppress(OSError):
                about = file.stat()
                files.append((about.st_mtime_ns, about.st_size, file))
    size = newest_size + sum(size for _, size, _ in files)
    for _, freed, file in sorted(files):
        if size <= LIMIT:
            break
        with suppress(OSError):
            file.unlink()
            size -= freed


def _warn(text: str) -> None:
    warnings.warn(escape(text), FeatureCacheWarning, stacklevel=5)
