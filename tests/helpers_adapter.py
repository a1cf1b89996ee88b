"""Small adapters for tests, and ways to spoil their files."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from bitarray import bitarray
from blake3 import blake3
from torch import Tensor, nn

from maskpack.adapter.content import Parts
from maskpack.adapter.read import Adapter
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.model import Embedding, Fingerprint, Head
from maskpack.codecs.base import CODECS, Bits, Bytes, Codec, Profile, Side
from maskpack.codecs.choose import rivals, smallest
from maskpack.codecs.classes import weight_classes
from maskpack.mask import MaskSet, PackedMask, bits_digest, rows_id

from .fuzz.damage import File, sealed, taken

DTYPES = ("float32", "bfloat16", "float16")


def base_of(
    names: Iterable[str], id: str = "timm/resnet18.a1_in1k", weights: Mapping[str, Tensor] | None = None
) -> Fingerprint:
    """Return a fingerprint that has these tensors, with the digests of the weights, if there are any."""
    tensors = {name: blake3(name.encode()).digest()[:6] for name in names}
    for name, weight in (weights or {}).items():
        module = nn.ParameterDict({"x": nn.Parameter(weight, requires_grad=False)})
        tensors[name] = fingerprint(module, id=id).tensors["x"]
    digests = {dtype: blake3(dtype.encode()).hexdigest() for dtype in DTYPES}
    return Fingerprint(id, "a" * 40, "float32", ("fc",), digests, tensors)


def random_masks(shapes: dict[str, tuple[int, ...]], density: float = 0.9, seed: int = 0, **options: Any) -> MaskSet:
    """Return masks with independent bits."""
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}
    return MaskSet.from_tensors(masks, **options)


def random_bits(count: int, density: float, seed: int = 0) -> Bits:
    """Return packed bits, independent."""
    return np.packbits(np.random.default_rng(seed).random(count) < density, bitorder="little")


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the 53 convolutions and the classifier of a ResNet-50, as timm and torchvision do."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}
    inputs = 64
    for layer, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            prefix = f"layer{layer}.{block}"
            shapes[f"{prefix}.conv1.weight"] = (width, inputs, 1, 1)
            shapes[f"{prefix}.conv2.weight"] = (width, width, 3, 3)
            shapes[f"{prefix}.conv3.weight"] = (4 * width, width, 1, 1)
            if block == 0:
                shapes[f"{prefix}.downsample.0.weight"] = (4 * width, inputs, 1, 1)
            inputs = 4 * width
    shapes["fc.weight"] = (1000, 2048)
    return shapes


def split_file(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a file."""
    text, section = taken(data)
    return json.loads(text), section


def join_file(header: Any, data: bytes) -> bytes:
    """Return a file of a header, or of its text, and data, with a good digest."""
    text = header if isinstance(header, bytes) else json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return sealed(text, data)


def with_header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Return a file whose header was changed in place."""
    header, section = split_file(data)
    change(header)
    return join_file(header, section)


def with_payload(data: bytes, payload: bytes, index: int = 0) -> bytes:
    """Return a file of one set with another payload in place of one and a good digest, as a forger would."""
    file = File.of(data)
    one = file.inner["sets"]["default"]
    at, old = sum(one["size"][:index]), file.data["default/payloads"]
    file.data["default/payloads"] = old[:at] + payload + old[at + one["size"][index] :]
    one["size"][index] = len(payload)
    return file.joined()


def many(sets: int = 1, parameters: int = 1, tensors: int = 0, classes: int = 0) -> bytes:
    """Return a file of so many mask sets, with so many masks of 8 weights and stored parameters each, and classes."""
    names = [f"layer{i:07}.weight" for i in range(parameters)]
    counts = {key: [value] * parameters for key, value in (("shape", 0), ("kept", 7), ("size", 1))}
    coding = {"codec": "raw", "op": "zero"}
    one = {"names": "\n".join(names), "shapes": [[8]], **counts}
    one |= {"codings": [coding] * parameters, "coding": list(range(parameters))}
    data, entries = {"maskpack.base": bytes(6 * parameters)}, {}
    for set_name in (each := [f"s{i:07}" for i in range(sets)]):
        data[f"{set_name}/payloads"] = b"\xfd" * parameters
        for name in (f"{set_name}/parameters/n{i:07}" for i in range(tensors)):
            data[name], entries[name] = bytes(4), {"dtype": "F32", "shape": [1]}
    digest = bits_digest(bitarray("10111111", endian="little"))
    header = {
        "format_version": 1,
        "producer": "tests",
        "mask_id": rows_id((set_name, name, "zero", (8,), digest) for set_name in each for name in names),
        "base": {
            "id": "x",
            "revision": None,
            "dtype": "float32",
            "head": [],
            "digests": dict.fromkeys(DTYPES, "0" * 64),
        },
        "sets": dict.fromkeys(each, one),
        **({"class_names": [f"class {i}" for i in range(classes)]} if classes else {}),
    }
    return File(header, entries, data).joined()


def write(folder: Path, data: bytes) -> Path:
    """Write a file and return its path."""
    path = folder / "spoiled.safetensors"
    path.write_bytes(data)
    return path


def encode_smallest(bits: Bits, side: Side, profile: Profile, codec: str | None = None) -> tuple[Codec, bytes]:
    """Code packed bits with every candidate of a profile and return the codec of the smallest payload, and that."""
    best = smallest(rivals(profile, codec, side.weights is not None), [(bits, side)])
    return best.codec, best.payload


def full() -> dict[str, Parts]:
    """Two sets with all that a set may hold."""
    generator = torch.Generator().manual_seed(0)
    signs = bitarray("1010101", endian="little")
    ternary = MaskSet({"a": PackedMask(bitarray("1100110", endian="little"), (7,), signs=signs).scaled()})
    replaced = random_masks({"a": (7,), "b": (2, 3)}, 0.5, op="replace")
    zeros = {name: len(mask.bits) - mask.kept for name, mask in replaced.items()}
    return {
        "default": Parts(
            ternary,
            Head(Embedding("fc"), torch.randn(3, 4, generator=generator), torch.zeros(3)),
            {"bn.running_mean": torch.rand(4), "bn.running_var": torch.rand(4).half()},
            {"ln.bias": torch.rand(4).bfloat16(), "gain": torch.tensor(2.0)},
        ),
        "expert-1": Parts(
            replaced,
            Head(Embedding(None, "mean", True), torch.randn(3, 4)),
            values={name: torch.randn(count).half() for name, count in zeros.items()},
        ),
    }


def assert_same(adapter: Adapter, sets: dict[str, Parts]) -> None:
    assert adapter.sets == tuple(sorted(sets))
    for name, parts in sets.items():
        assert adapter.parts(name).masks == parts.masks
        head = adapter.parts(name, stream=True).head
        assert (head is None) == (parts.head is None)
        if head is not None and parts.head is not None:
            assert torch.equal(head.weight, parts.head.weight)
            assert (head.bias is None) == (parts.head.bias is None)
            assert head.embedding == parts.head.embedding
        for role in ("statistics", "parameters", "values"):
            found, given = getattr(adapter.parts(name, stream=True), role), getattr(parts, role)
            assert found.keys() == given.keys()
            for key, tensor in found.items():
                assert torch.equal(tensor, given[key].float() if role == "statistics" else given[key])
                assert tensor.dtype == (torch.float32 if role == "statistics" else given[key].dtype)
                tensor.add_(1)  # a copy, not the file's bytes
    assert adapter.verify()["mask_id"] is True


@dataclass(frozen=True, slots=True)
class Mixed(Codec):
    """Uses all that a codec may use: bits XOR (class above the median), XOR a setting, XOR the reference."""

    id = "test-mixed"
    needs_base = True
    salt: int = 3

    def _mask(self, side: Side) -> Bits:
        assert side.weights is not None
        mask = np.packbits(weight_classes(side.weights) >= 128, bitorder="little")
        whole = np.full(side.size, self.salt, np.uint8)
        if side.count % 8:
            whole[-1] &= (1 << side.count % 8) - 1
        return mask ^ whole ^ (0 if side.reference is None else side.reference)

    def encode(self, bits: Bits, side: Side) -> bytes:
        return (bits ^ self._mask(side)).tobytes()

    def decode(self, data: Bytes, side: Side) -> Bits:
        found = side.checked(np.frombuffer(data, np.uint8))
        return found ^ self._mask(side)

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [cls()] if profile == "max" else []

    def config(self) -> dict[str, int]:
        return {"salt": self.salt}


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "test-mixed" not in CODECS
    monkeypatch.setitem(CODECS._classes, "test-mixed", Mixed)  # type: ignore[arg-type]
