"""Description of an adapter file as plain values; nothing is decoded and no base is needed."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..errors import escape
from .header import FORMAT_VERSION, SetHeader, base_to_json
from .read import DIGEST_BYTES, SIZE_BYTES, Adapter, read_adapter
from .tensors import BASE, CASCADE


def inspect_adapter(adapter: Adapter | str | Path) -> dict[str, Any]:
    """Return what an adapter holds, opened or given by its path, as JSON values: what `maskpack inspect --json` prints.

    Bytes are of the file; `weights` and `kept` count a ternary mask once for its zeros. `bytes` has those of each part,
    all of the file together; `index_bytes` is all that is neither payload nor dense tensor. The two ratios compare with
    the masked weights in float32 (whole file) and with one bit a weight (payloads).

    Example:
        found = inspect_adapter("./my-mask")
        print(found["base"]["id"], found["sets"]["default"]["density"], found["size"])
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    header, about = adapter.header, adapter.about
    parts = _bytes(adapter)
    roles = _roles(parts)
    sets = {name: _set(one, roles[name]) for name, one in header.sets.items()}
    weights = sum(one["weights"] for one in sets.values())
    coded = sum(one["payload_bytes"] for one in sets.values())
    return {
        "format_version": FORMAT_VERSION,
        "producer": header.producer,
        "mask_id": header.mask_id,
        "size": adapter.size,
        "blake3": adapter.digest,
        "index_bytes": sum(size for part, size in parts.items() if "/" not in part),
        "bytes": parts,
        "base": base_to_json(header.base),
        "task": about.task,
        "class_names": None if about.class_names is None else list(about.class_names),
        "preprocess": about.preprocess,
        "training": about.training,
        **({} if about.result is None else {"result": dict(about.result)}),
        "weights": weights,
        "times_smaller_than_float32": 4 * weights / adapter.size,
        "times_smaller_than_one_bit": weights / 8 / coded if coded else None,
        "sets": sets,
        "cascade": _cascade(adapter, roles[CASCADE.rstrip("/")]),
    }


def config_text(description: dict[str, Any], model_file: str) -> str:
    """Return the text of the config file: the description without its rows per parameter."""
    sets = {name: dict(one) for name, one in description["sets"].items()}
    for one in sets.values():
        del one["payloads"]
    config = {**description, "sets": sets, "model_file": model_file}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return escape(text, "json") + "\n"


def _set(one: SetHeader, dense: dict[str, int]) -> dict[str, Any]:
    # the signs of a ternary mask come right before its zeros, under the same name
    bases = {payload.name: payload for payload in one.payloads}.values()
    weights, kept = sum(payload.weights for payload in bases), sum(payload.kept for payload in bases)
    payload_bytes = sum(payload.size for payload in one.payloads)
    return {
        "parameters": len(bases),
        "weights": weights,
        "kept": kept,
        "density": kept / weights if weights else 1.0,
        "payload_bytes": payload_bytes,
        "bits_per_weight": 8 * payload_bytes / weights if weights else 0.0,
        "dense_bytes": dense,
        "head": one.head,
        "payloads": [
            {
                "name": payload.name,
                "shape": list(payload.shape),
                "op": payload.coding.op,
                "codec": payload.coding.codec,
                "density": payload.kept / payload.weights if payload.weights else 1.0,
                "bytes": payload.size,
                "bits_per_weight": 8 * payload.size / payload.weights if payload.weights else 0.0,
            }
            for payload in one.payloads
        ],
    }


def _bytes(adapter: Adapter) -> dict[str, int]:
    """Return the bytes of each part of the file, in order."""
    data = sum(len(adapter.bytes_of(name)) for name in adapter.spans)
    container = 8 + int.from_bytes(adapter.content[:8], "little") + DIGEST_BYTES + SIZE_BYTES
    found = {"container": container, "index": adapter.size - data - container}
    for name in adapter.spans:
        part = "digests of the base" if name == BASE else "/".join(name.split("/")[:2])
        found[part] = found.get(part, 0) + len(adapter.bytes_of(name))
    return found


def _cascade(adapter: Adapter, dense: dict[str, int]) -> dict[str, Any] | None:
    if adapter.header.cascade is None:
        return None
    coordinates, features = adapter.spans[f"{CASCADE}router/components"].shape
    sizes = {"features": features, "coordinates": coordinates, "bytes": dense}
    return {**adapter.header.cascade, **sizes}


def _roles(parts: dict[str, int]) -> dict[str, dict[str, int]]:
    """Return bytes of the dense tensors (head, parameters, scale, …) of each set, and of the cascade, by role."""
    found = defaultdict[str, dict[str, int]](dict)
    for part, size in parts.items():
        of, _, role = part.partition("/")
        if role and role != "payloads":
            found[of][role] = size
    return found
