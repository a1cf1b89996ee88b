"""Write the golden files of format version 1. Run by hand, once per codec; files that exist are never changed.

python -m tests.golden.make
"""

import json
from pathlib import Path
from typing import Any

import torch
from bitarray import bitarray

from maskpack.adapter.file import Parts, save_adapter
from maskpack.backbone.head import Head
from maskpack.codecs.base import CODECS
from maskpack.mask import MaskSet, PackedMask

from ..helpers_adapter import base_of, random_masks

FOLDER = Path(__file__).parent / "v1"


def contents() -> dict[str, Parts]:
    """Return sets that use every part of the format."""
    shapes = {"conv.weight": (8, 3, 3, 3), "empty.weight": (0, 4), "linear.weight": (10, 33), "scalar": ()}
    signs = PackedMask(bitarray("1100110", endian="little"), (7,), signs=bitarray("1010101", endian="little"))
    replaced = random_masks({"linear.weight": (10, 33)}, 0.95, seed=2, op="replace")
    zeros = replaced.total - replaced.kept
    return {
        "default": Parts(
            random_masks(shapes, 0.9, seed=1, scale=True),
            Head("linear", torch.arange(6.0).reshape(2, 3), torch.tensor([0.5, -0.5]), "fc"),
            {"bn.running_mean": torch.tensor([1.0, 2.0]), "bn.running_var": torch.tensor([3.0, 4.0])},
            {"norm.bias": torch.tensor([1.0, -1.0], dtype=torch.bfloat16)},
        ),
        "flip": Parts(random_masks({"linear.weight": (10, 33)}, 0.99, seed=3, op="flip")),
        "replace": Parts(replaced, values={"linear.weight": torch.arange(zeros, dtype=torch.float16)}),
        "ternary": Parts(
            MaskSet({"vector": signs}),
            Head("pooled-linear", torch.eye(2), pooling="mean", normalize=True),
        ),
    }


def expectation(sets: dict[str, Parts], mask_id: str) -> dict[str, Any]:
    """Return what a reader must find, as JSON: packed bits in hex, tensors as lists."""
    found: dict[str, Any] = {"mask_id": mask_id, "sets": {}}
    for name, parts in sets.items():
        masks = {
            key: {
                "shape": list(mask.shape),
                "alpha": mask.alpha,
                "payloads": [[op, bits.tobytes().hex()] for op, bits in mask.payloads()],
            }
            for key, mask in parts.masks.items()
        }
        tensors = {
            f"{role}/{key}": [str(tensor.dtype), tensor.tolist()]
            for role in ("statistics", "parameters", "values")
            for key, tensor in getattr(parts, role).items()
        }
        head = parts.head
        if head is not None:
            bias = None if head.bias is None else head.bias.tolist()
            tensors["head"] = [head.kind, head.module, head.pooling, head.normalize, head.weight.tolist(), bias]
        found["sets"][name] = {"masks": masks, "tensors": tensors}
    return found


def main() -> None:
    """Write a file for every codec that decodes without the base and has none yet."""
    FOLDER.mkdir(exist_ok=True)
    sets = contents()
    base = base_of({name for parts in sets.values() for name in parts.masks})
    about: dict[str, Any] = {"task": "image-classification", "class_names": ["a", "ü"], "training": {"seed": 0}}
    for cls in CODECS.all():
        path = FOLDER / f"{cls.id}.safetensors"
        if cls.needs_base or path.exists():
            continue
        adapter = save_adapter(path, sets, base, codec=cls.id, preprocess={"kind": "image", "size": 32}, **about)
        text = json.dumps(expectation(sets, adapter.mask_id), sort_keys=True) + "\n"
        path.with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
