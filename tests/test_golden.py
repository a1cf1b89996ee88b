"""Files that a release wrote are read by every later one. Nothing here writes."""

import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskpack.adapter.read import Adapter, read_adapter
from maskpack.adapter.tensors import cascade_tensors
from maskpack.adapter.values import Steps, at_zeros
from maskpack.codecs.base import CODECS
from maskpack.mask import mask_id
from maskpack.safetensors_io import read_tensors

GOLDEN = sorted((Path(__file__).parent / "golden").glob("v*/*.safetensors"))


def base_beside(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path.parent / "base" / f"{'patch' if path.stem == 'patch' else 'weights'}.safetensors")


def tensors_of(adapter: Adapter, name: str, base: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    parts = adapter.parts(name, base, stream=True)
    if any(isinstance(one, Steps) for one in parts.values.values()):
        assert base is not None
        stored = {key: at_zeros(base[key], mask) for key, mask in parts.masks.items()}
        values = {k: one.values(stored[k]) if isinstance(one, Steps) else one for k, one in parts.values.items()}
        parts = replace(parts, values=values)
    found: dict[str, Any] = {
        f"{role}/{key}": [str(tensor.dtype), tensor.tolist()]
        for role in ("statistics", "parameters", "values")
        for key, tensor in getattr(parts, role).items()
    }
    for key, norm in parts.norms.items():
        found[f"norms/{key}"] = [norm.scale.tolist(), None if norm.shift is None else norm.shift.tolist()]
    head = parts.head
    if head is not None:
        bias = None if head.bias is None else head.bias.tolist()
        kind = "pooled-linear" if head.module is None else "linear"
        found["head"] = [kind, *astuple(head.embedding), head.weight.tolist(), bias]
    return found


def test_there_is_one_for_every_codec() -> None:
    assert {path.stem for path in GOLDEN} >= {cls.id for cls in CODECS.all()}, (
        "write the missing ones with: python -m tests.golden.make"
    )


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_decodes_to_what_was_written(path: Path) -> None:
    expected = json.loads(path.with_suffix(".json").read_text())
    adapter = read_adapter(path)
    needs_base = bool(adapter.verify()["needs_base"])
    base = base_beside(path) if needs_base else None
    assert mask_id({name: adapter.parts(name, base).masks for name in adapter.sets}) == expected["mask_id"]
    assert adapter.mask_id == expected["mask_id"]
    assert set(adapter.sets) == set(expected["sets"])
    for name, one in expected["sets"].items():
        masks = adapter.parts(name, base).masks
        found = {
            key: {
                "shape": list(mask.shape),
                "alpha": mask.alpha,
                "payloads": [[op, bits.tobytes().hex()] for op, bits in mask.payloads()],
            }
            for key, mask in masks.items()
        }
        assert found == one["masks"]
        assert tensors_of(adapter, name, base) == one["tensors"]
    assert (adapter.cascade is None) == ("cascade" not in expected)
    if adapter.cascade is not None:
        one, found = adapter.cascade, expected["cascade"]
        assert [one.dispatcher, list(one.experts), one.combine] == found["names"]
        assert list(astuple(one.embedding)) == found["embedding"]
        assert {name: tensor.tolist() for name, tensor in cascade_tensors(one).items()} == found["tensors"]
        assert one.router.route(torch.tensor(found["embeddings"])).tolist() == found["routed"]
        assert len(set(found["routed"])) > 1
