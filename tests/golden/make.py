"""Write the golden files of format version 1. Run by hand; files that exist are never changed.

python -m tests.golden.make

A codec that needs the base gets the weights in v1/base/weights.safetensors. What a codec declines is left out, and
`nm`-like masks are in for those that take nothing else.
"""

import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitarray import bitarray

from maskpack.adapter.content import About, Cascade, Parts
from maskpack.adapter.steps import Norm, rounded_rows, row_steps
from maskpack.adapter.tensors import cascade_tensors
from maskpack.adapter.write import save_adapter
from maskpack.backbone.model import CASTS, Embedding, Head, RandomWeight, same_size_int
from maskpack.codecs.base import CODECS, Codec, Side
from maskpack.mask import MaskSet, PackedMask, packed_bits
from maskpack.safetensors_io import read_tensors, write_tensors

from ..helpers_adapter import base_of, random_masks
from ..helpers_cascade import cascade_parts

FOLDER = Path(__file__).parent / "v1"


def weights() -> dict[str, torch.Tensor]:
    """Return the weights that base-conditioned masks belong to."""
    path = FOLDER / "base" / "weights.safetensors"
    if not path.exists():
        generator = torch.Generator().manual_seed(0)
        shapes = {"conv.weight": (8, 3, 3, 3), "empty.weight": (0, 4), "linear.weight": (10, 33), "scalar": ()}
        shapes |= {"vector": (7,), "large.weight": (96, 130), "pairs.weight": (6, 16)}
        path.parent.mkdir(exist_ok=True)
        made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        write_tensors(path, made, {"format": "pt"})
    return read_tensors(path)


def large() -> MaskSet:
    """Return masks that follow row, column, magnitude and sign, so that every part of a codec has something to do."""
    generator = torch.Generator().manual_seed(4)
    weight = weights()["large.weight"]
    rows, cols = torch.rand(96, 1, generator=generator), torch.rand(1, 130, generator=generator)
    lean = torch.sign(rows - 0.5) * torch.sign(cols - 0.5) * weight.sign()
    rate = 0.4 * rows * cols * weight.abs() * (1 + 0.9 * lean)
    mask = torch.rand(96, 130, generator=generator) >= rate
    pairs = torch.rand(24, 4, generator=generator).argsort(1).reshape(6, 16) < 2
    return MaskSet.from_tensors({"large.weight": mask, "pairs.weight": pairs})


def near(masks: MaskSet) -> MaskSet:
    """Return masks with every 97th bit changed, to be coded against the others."""
    changed = {}
    for name, mask in masks.items():
        bits = mask.bits.copy()
        bits[::97] = ~bits[::97]
        changed[name] = PackedMask(bits, mask.shape)
    return MaskSet(changed)


def contents() -> dict[str, Parts]:
    """Return sets that use every part of the format."""
    shapes = {"conv.weight": (8, 3, 3, 3), "empty.weight": (0, 4), "linear.weight": (10, 33), "scalar": ()}
    signs = PackedMask(bitarray("1100110", endian="little"), (7,), signs=bitarray("1010101", endian="little"))
    replaced = random_masks({"linear.weight": (10, 33)}, 0.95, seed=2, op="replace")
    zeros = replaced.total - replaced.kept
    return {
        "default": Parts(
            random_masks(shapes, 0.9, seed=1, scale=True),
            Head(Embedding("fc"), torch.arange(6.0).reshape(2, 3), torch.tensor([0.5, -0.5])),
            {"bn.running_mean": torch.tensor([1.0, 2.0]), "bn.running_var": torch.tensor([3.0, 4.0])},
            {"norm.bias": torch.tensor([1.0, -1.0], dtype=torch.bfloat16)},
        ),
        "dispatcher": Parts(large()),
        "expert": Parts(near(large())),
        "flip": Parts(random_masks({"linear.weight": (10, 33)}, 0.99, seed=3, op="flip")),
        "replace": Parts(replaced, values={"linear.weight": torch.arange(zeros, dtype=torch.float16)}),
        "ternary": Parts(
            MaskSet({"vector": signs}),
            Head(Embedding(None, "mean", True), torch.eye(2)),
        ),
    }


def heads() -> dict[str, Parts]:
    """Return sets with the kinds of heads that the others have not."""
    generator = torch.Generator().manual_seed(6)
    masks = MaskSet.from_tensors({"vector": torch.rand(7, generator=generator) < 0.7})
    bits = torch.rand(5, 13, generator=generator) < 0.8
    plain, scaled = (RandomWeight(seed, PackedMask.from_tensor(bits, scale=seed > 0)) for seed in (0, 2**32 - 1))
    return {
        "projection": Parts(masks, Head(Embedding(None, "projection", True), torch.eye(3))),
        "random": Parts(masks, Head(Embedding("fc"), plain.dense(), random=plain)),
        "random-scaled": Parts(masks, Head(Embedding(None, "cls"), scaled.dense(), random=scaled)),
    }


def steps() -> dict[str, Parts]:
    """Return a set with norms and a head in steps."""
    generator = torch.Generator().manual_seed(9)
    masks = MaskSet.from_tensors({"vector": torch.rand(7, generator=generator) < 0.7})
    weight = rounded_rows(torch.randn(3, 50, generator=generator))
    head = Head(Embedding("fc"), weight, torch.arange(3).half(), steps=row_steps(weight))
    numbers = np.random.default_rng(9).integers(-40, 41, 23).astype(np.int32)
    norms = {"bn": Norm(numbers[:8], 30000 * numbers[8:16]), "rms": Norm(numbers[16:])}
    return {"default": Parts(masks, head, norms=norms)}


def patched() -> tuple[dict[str, torch.Tensor], dict[str, Parts]]:
    """Return a base in every dtype of values, and a patch to weights a few steps away, or far."""
    path, generator = FOLDER / "base" / "patch.safetensors", torch.Generator().manual_seed(10)
    shapes = {"bf16.weight": (90, 100), "f16.weight": (20, 31), "f32.weight": (17, 40), "empty.weight": (0, 3)}
    kinds = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "empty": torch.bfloat16}
    base = {n: (0.1 * torch.randn(s, generator=generator)).to(kinds[n.split(".")[0]]) for n, s in shapes.items()}
    if not path.exists():
        write_tensors(path, base, {"format": "pt"})
    base, masks, values = read_tensors(path), dict[str, PackedMask](), dict[str, torch.Tensor]()
    for name, weight in base.items():
        rate = torch.randint(0, 40, weight.shape, generator=generator).double() ** 6 * 1e-11
        rate = rate if name != "f16.weight" else rate + 1.0
        noise = torch.randn(weight.shape, generator=generator).double()
        new = (weight.double() * (1 + rate) + 2e-5 * noise).to(weight.dtype)
        same = same_size_int(new) == same_size_int(weight)
        masks[name], values[name] = PackedMask.from_tensor(same, "replace"), new[~same]
    return base, {"default": Parts(MaskSet(masks), values=values)}


def cascade() -> tuple[dict[str, Parts], Cascade]:
    """Return a cascade with everything that one may have."""
    sets = {"dispatcher": Parts(large()), "expert-0": Parts(near(large())), "expert-1": Parts(near(near(large())))}
    return sets, cascade_parts(reduced=5, classes=2, combine="unconditional")


def taken(parts: Parts, codec: Codec) -> Parts:
    """Return the parts with those masks only that a codec does not decline."""
    kept = {}
    for name, mask in parts.masks.items():
        words = np.zeros(len(mask.bits), dtype=np.uint16) if codec.needs_base else None
        sides = [(packed_bits(bits), Side(mask.shape, words)) for _, bits in mask.payloads()]
        if all(codec.encode(*one) is not None for one in sides):
            kept[name] = mask
    return replace(parts, masks=MaskSet(kept), values={k: v for k, v in parts.values.items() if k in kept})


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
        for key, norm in parts.norms.items():
            shift = None if norm.shift is None else norm.shift.tolist()
            tensors[f"norms/{key}"] = [norm.scale.tolist(), shift]
        head = parts.head
        if head is not None:
            bias = None if head.bias is None else head.bias.tolist()
            kind = "pooled-linear" if head.module is None else "linear"
            tensors["head"] = [kind, *astuple(head.embedding), head.weight.tolist(), bias]
        found["sets"][name] = {"masks": masks, "tensors": tensors}
    return found


def cascade_expectation(one: Cascade) -> dict[str, Any]:
    """Return what a reader must find of a cascade, and where it must route some embeddings."""
    embeddings = torch.randn(8, len(one.router.whitening.mean), generator=torch.Generator().manual_seed(8))
    return {
        "names": [one.dispatcher, list(one.experts), one.combine],
        "embedding": list(astuple(one.embedding)),
        "tensors": {name: tensor.tolist() for name, tensor in cascade_tensors(one).items()},
        "embeddings": embeddings.tolist(),
        "routed": one.router.route(embeddings).tolist(),
    }


def write(
    name: str,
    sets: dict[str, Parts],
    codec: str | None,
    cascade: Cascade | None = None,
    own: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a golden file and what must be found in it; `own` weights are the base of a patch."""
    base = base_of(own or weights(), weights=own or weights())
    about: dict[str, Any] = {"task": "image-classification", "class_names": ["a", "ü"], "training": {"seed": 0}}
    about["preprocess"] = {"kind": "image", "size": 32}
    if own is not None:
        base, about = (
            replace(base, head=()),
            {"about": About(result=dict.fromkeys(CASTS, 64 * "a")), "profile": "max"},
        )
    path = FOLDER / f"{name}.safetensors"
    adapter = save_adapter(path, sets, base, codec=codec, weights=own or weights(), cascade=cascade, **about)
    expected = expectation(sets, adapter.mask_id)
    if cascade is not None:
        expected["cascade"] = cascade_expectation(cascade)
    path.with_suffix(".json").write_text(json.dumps(expected, sort_keys=True) + "\n")


def main() -> None:
    """Write a file for every codec that has none yet, one for heads, for steps, for cascades, for patches."""
    FOLDER.mkdir(exist_ok=True)
    for cls in CODECS.all():
        if not (FOLDER / f"{cls.id}.safetensors").exists():
            (codec,) = (cls.candidates("max") or [cls()])[:1]
            sets = {name: taken(parts, codec) for name, parts in contents().items()}
            write(cls.id, {name: parts for name, parts in sets.items() if parts.masks}, cls.id)
    if not (FOLDER / "heads.safetensors").exists():
        write("heads", heads(), "raw")
    if not (FOLDER / "steps.safetensors").exists():
        write("steps", steps(), "raw")
    if not (FOLDER / "cascade.safetensors").exists():
        sets, parts = cascade()
        write("cascade", sets, "gap", parts)
    if not (FOLDER / "patch.safetensors").exists():
        base, sets = patched()
        write("patch", sets, None, own=base)


if __name__ == "__main__":
    main()
