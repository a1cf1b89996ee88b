"""What an adapter file holds, as plain values: nothing is decoded and no base is needed."""

import json
from pathlib import Path
from typing import Any

from ..errors import escape
from .header import FORMAT_VERSION, Payload, SetHeader, base_to_json
from .read import Adapter, read_adapter
from .tensors import CASCADE, beginning, dense_names


def inspect_adapter(adapter: Adapter | str | Path) -> dict[str, Any]:
    """Return what an adapter holds, opened or given by its path, as JSON values: what `maskpack inspect --json` prints.

    Bytes are of the file; `weights` and `kept` count a ternary mask once for its zeros. `index_bytes` is all that is
    neither payload nor dense tensor. The two ratios compare with the masked weights in float32 (whole file)
    and with one bit a weight (payloads).
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    header, about = adapter.header, adapter.about
    sets = {name: _set(adapter, name, one) for name, one in header.sets.items()}
    weights = sum(one["weights"] for one in sets.values())
    coded = sum(one["payload_bytes"] for one in sets.values())
    dense = sum(adapter.spans[name].end - adapter.spans[name].start for name in dense_names(adapter.spans))
    return {
        "format_version": FORMAT_VERSION,
        "producer": header.producer,
        "mask_id": header.mask_id,
        "size": adapter.size,
        "blake3": adapter.digest,
        "data_blake3": header.data_digest,
        "index_bytes": adapter.size - coded - dense,
        "base": base_to_json(header.base),
        "task": about.task,
        "class_names": None if about.class_names is None else list(about.class_names),
        "preprocess": about.preprocess,
        "training": about.training,
        "weights": weights,
        "times_smaller_than_float32": 4 * weights / adapter.size,
        "times_smaller_than_one_bit": weights / 8 / coded if coded else None,
        "sets": sets,
        "cascade": _cascade(adapter),
    }


def config_text(description: dict[str, Any], model_file: str) -> str:
    """Return the text of the config file: the description without its rows per parameter."""
    sets = {
        name: {key: value for key, value in one.items() if key != "payloads"}
        for name, one in description["sets"].items()
    }
    config = {**description, "sets": sets, "model_file": model_file}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return escape(text, "json") + "\n"


def _set(adapter: Adapter, name: str, one: SetHeader) -> dict[str, Any]:
    # the signs of a ternary mask come right before its zeros, under the same name
    bases = list({payload.name: payload for payload in one.payloads}.values())
    weights, kept = sum(p.weights for p in bases), sum(p.kept for p in bases)
    payload_bytes = sum(one.tables) + sum(p.size for p in one.payloads)
    return {
        "parameters": len(bases),
        "weights": weights,
        "kept": kept,
        "density": kept / weights if weights else 1.0,
        "payload_bytes": payload_bytes,
        "bits_per_weight": 8 * payload_bytes / weights if weights else 0.0,
        "dense_bytes": _roles(adapter, name),
        "head": one.head,
        "payloads": [_row(payload) for payload in one.payloads],
    }


def _cascade(adapter: Adapter) -> dict[str, Any] | None:
    if adapter.header.cascade is None:
        return None
    features, coordinates = adapter.spans[f"{CASCADE}router/components"].shape[::-1]
    return {
        **adapter.header.cascade,
        "features": features,
        "coordinates": coordinates,
        "bytes": _roles(adapter, CASCADE.rstrip("/")),
    }


def _row(payload: Payload) -> dict[str, Any]:
    return {
        "name": payload.name,
        "shape": list(payload.shape),
        "op": payload.coding.op,
        "codec": payload.coding.codec,
        "density": payload.kept / payload.weights if payload.weights else 1.0,
        "bytes": payload.size,
        "bits_per_weight": 8 * payload.size / payload.weights if payload.weights else 0.0,
    }


def _roles(adapter: Adapter, of: str) -> dict[str, int]:
    """Return bytes of the dense tensors of a set (head, parameters, scale, …), or of the cascade, by role."""
    found: dict[str, int] = {}
    for name in beginning(adapter.names, f"{of}/"):
        role, span = name.split("/", 2)[1], adapter.spans[name]
        if name != f"{of}/payloads":
            found[role] = found.get(role, 0) + span.end - span.start
    return found
