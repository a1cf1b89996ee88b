"""Masked random heads: the same values everywhere, stored as seed and mask, rebuilt as an ordinary head."""

import hashlib
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from maskpack.adapter.card import render_card
from maskpack.adapter.content import Parts
from maskpack.adapter.describe import inspect_adapter
from maskpack.adapter.edit import convert_adapter
from maskpack.adapter.read import read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.model import Embedding, Head, RandomWeight, random_weight
from maskpack.errors import AdapterError, CorruptAdapterError
from maskpack.mask import MaskSet, PackedMask
from maskpack.runtime.load import load_mask, unload_mask

from .fuzz.damage import File
from .helpers_adapter import base_of, random_masks, with_header, write

SHAPES = {"a.weight": (40, 3)}
MASKS = random_masks(SHAPES)


def reference(seed: int, classes: int, features: int) -> list[float]:
    """docs/format.md section 4.1, one weight at a time, with Python's numbers."""
    values = []
    for i in range(classes * features):
        block = hashlib.shake_128(b"maskpack head %d %d" % (seed, i // 65536)).digest(262144)
        word = int.from_bytes(block[4 * (i % 65536) : 4 * (i % 65536) + 4], "little")
        value = (2 * (word // 256) + 1 - 2**24) / 2**24 / math.sqrt(features)
        values.append(struct.unpack("<f", struct.pack("<f", value))[0])
    return values


IN_MODEL = Embedding("fc")


def head_of(
    classes: int = 3,
    features: int = 5,
    *,
    seed: int = 7,
    density: float = 0.6,
    scale: bool = False,
    embedding: Embedding = IN_MODEL,
) -> Head:
    bits = torch.rand(classes, features, generator=torch.Generator().manual_seed(seed)) < density
    random = RandomWeight(seed, PackedMask.from_tensor(bits, scale=scale))
    return Head(embedding, random.dense(), random=random)


# --- the values ------------------------------------------------------------------------------------------------------


def test_the_vector_of_the_format_page() -> None:
    values = random_weight(0, 2, 3).numpy().astype("<f4").tobytes().hex()
    assert values == "5525a1be0247d23ef5a703bfb55a9b3e8954f53ea917fc3e"
    assert values in (Path(__file__).parent.parent / "docs" / "format.md").read_text().replace(" ", "")


@pytest.mark.parametrize(("seed", "classes", "features"), [(0, 1, 1), (2**32 - 1, 7, 11), (12, 2, 33), (5, 1, 100)])
def test_values_are_those_of_the_formula(seed: int, classes: int, features: int) -> None:
    assert random_weight(seed, classes, features).flatten().tolist() == reference(seed, classes, features)


def test_values_over_several_blocks() -> None:
    weight = random_weight(3, 3, 50_000).flatten()
    second = hashlib.shake_128(b"maskpack head 3 1").digest(4)
    assert weight[65536] == np.float32((2 * (int.from_bytes(second, "little") >> 8) + 1 - 2**24) / 2**24 / 50_000**0.5)
    bound = 1 / math.sqrt(50_000)
    assert -bound < weight.min() < -0.999 * bound
    assert 0.999 * bound < weight.max() < bound
    assert not (weight == 0).any()
    assert abs(float(weight.mean())) < 0.01 * bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_torchs_generators_have_no_say() -> None:
    state = torch.get_rng_state()
    first = random_weight(1, 4, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(random_weight(1, 4, 4), first)
    assert not torch.equal(random_weight(2, 4, 4), first)


# --- the file --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1), classes=st.integers(1, 9), features=st.integers(1, 9), scale=st.booleans(),
    density=st.sampled_from([0.0, 0.4, 1.0]), pooled=st.booleans(),
)  # fmt: skip
def test_any_masked_head_comes_back(
    tmp_path: Path, seed: int, classes: int, features: int, scale: bool, density: float, pooled: bool
) -> None:
    where = Embedding(None, "cls") if pooled else Embedding("fc")
    head = head_of(classes, features, seed=seed, density=density, scale=scale, embedding=where)
    path = tmp_path / "a.safetensors"
    save_adapter(path, Parts(MASKS, head), base_of(SHAPES))
    adapter = read_adapter(path)
    found = adapter.parts(stream=True).head
    assert found is not None
    assert torch.equal(found.weight.view(torch.int32), head.weight.view(torch.int32))
    assert (found.embedding, found.bias) == (where, None)
    assert found.random is not None
    assert head.random is not None
    assert (found.random.seed, found.random.mask) == (seed, head.random.mask)
    assert adapter.spans["default/head/mask"].shape == ((classes * features + 7) // 8,)
    assert "default/head/weight" not in adapter.spans
    assert adapter.parts().masks == MASKS


def test_the_weight_is_the_formats_formula() -> None:
    head = head_of(10, 12, scale=True)
    assert head.random is not None
    mask = head.random.mask
    alpha = np.float32(math.sqrt(mask.kept / 120))
    values = np.array(reference(7, 10, 12), dtype=np.float32) / alpha
    kept = mask.tensor().flatten().numpy()
    assert head.weight.flatten().tolist() == np.where(kept, values, np.float32(0)).tolist()
    assert math.copysign(1, float(head.weight[~mask.tensor()][0])) == 1


def test_description_convert_and_canonical_bytes(tmp_path: Path) -> None:
    head = head_of(scale=True)
    adapter = save_adapter(tmp_path / "a", Parts(MASKS, head), base_of(SHAPES), class_names=list("xyz"))
    one = inspect_adapter(adapter)["sets"]["default"]
    stored = {"kind": "linear", "module": "fc", "random": {"scale": True, "seed": 7, "shape": [3, 5]}}
    assert one["head"] == stored
    assert one["dense_bytes"] == {"head": 2}
    assert json.loads((tmp_path / "a/maskpack_config.json").read_text())["sets"]["default"]["head"] == stored
    assert render_card(inspect_adapter(adapter))
    again = convert_adapter(adapter, tmp_path / "b", codec="raw")
    found = again.parts(stream=True).head
    assert found is not None
    assert torch.equal(found.weight, head.weight)
    assert bytes(again.bytes_of("default/head/mask")) == bytes(adapter.bytes_of("default/head/mask"))
    twice = save_adapter(tmp_path / "c", Parts(MASKS, head), base_of(SHAPES), class_names=list("xyz"))
    assert bytes(twice.content) == bytes(adapter.content)


def test_heads_that_would_not_come_back_are_refused(tmp_path: Path) -> None:
    good = head_of()
    assert good.random is not None
    mask, dense = good.random.mask, good.weight
    flip = RandomWeight(7, PackedMask(mask.bits, mask.shape, "flip"))
    alpha = RandomWeight(7, PackedMask(mask.bits, mask.shape, alpha=0.5))
    for spoiled in (
        Head(Embedding("fc"), dense + 1, random=good.random),
        Head(Embedding("fc"), dense, torch.zeros(3), good.random),
        Head(Embedding("fc"), flip.dense(), random=flip),
        Head(Embedding("fc"), alpha.dense(), random=alpha),
    ):
        with pytest.raises(AdapterError, match="readers would not get this random head back, expected no bias, a mask"):
            save_adapter(tmp_path / "x.safetensors", Parts(MASKS, spoiled), base_of(SHAPES))
    huge = RandomWeight(2**32, mask)
    spoiled = Head(Embedding("fc"), huge.dense(), random=huge)
    with pytest.raises(AdapterError, match=r"readers would refuse it: .*random\.seed is 4294967296, expected an int"):
        save_adapter(tmp_path / "x.safetensors", Parts(MASKS, spoiled), base_of(SHAPES))
    assert not list(tmp_path.iterdir())


# --- files that a stranger made --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "x.safetensors"
    save_adapter(path, Parts(MASKS, head_of()), base_of(SHAPES))
    return path.read_bytes()


def random_of(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header["sets"]["default"]["head"]["random"]
    return found


FIELDS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda h: h["sets"]["default"]["head"].update(random=3), r"head\.random is 3, expected an object"),
    (lambda h: h["sets"]["default"]["head"].pop("random"), "'default/head/mask' is U8 .*expected no such tensor"),
    (lambda h: h["sets"]["default"].pop("head"), "'default/head/mask' is U8 .*expected no such tensor"),
    (lambda h: random_of(h).pop("seed"), r"random\.seed is missing, expected an integer from 0 to 4294967295"),
    (lambda h: random_of(h).update(seed=-1), r"random\.seed is -1"),
    (lambda h: random_of(h).update(seed=1 << 32), r"random\.seed is 4294967296"),
    (lambda h: random_of(h).update(seed=True), r"random\.seed is True"),
    (lambda h: random_of(h).update(seed=1.0), r"random\.seed is 1\.0"),
    (lambda h: random_of(h).update(scale=1), r"random\.scale is 1, expected true or false"),
    (lambda h: random_of(h).pop("scale"), r"random\.scale is missing"),
    (lambda h: random_of(h).update(shape=[15]), r"random\.shape .*expected two sizes"),
    (lambda h: random_of(h).update(shape=[0, 5]), r"random\.shape .*expected two sizes of at least 1"),
    (lambda h: random_of(h).update(shape=[-3, -5]), r"random\.shape .*expected two sizes"),
    (lambda h: random_of(h).update(shape=[1 << 14, 1 << 14]), r"random\.shape .*at most 134217728 weights"),
    (lambda h: random_of(h).update(shape=[1 << 40, 1]), r"random\.shape .*two sizes of at least 1, at most 134217728"),
    (lambda h: random_of(h).update(shape=[1 << 13, 1 << 14]), r"mask' is U8 of shape \(2,\), expected .*\(16777216,\)"),
    (lambda h: random_of(h).update(shape=[1, 7]), r"'default/head/mask' is U8 of shape \(2,\), expected .*\(1,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), FIELDS, ids=[match[:40] for _, match in FIELDS])
def test_every_field_is_checked(change: Callable[[Any], Any], match: str, valid: bytes, tmp_path: Path) -> None:
    with pytest.raises(CorruptAdapterError, match=match) as caught:
        read_adapter(write(tmp_path, with_header(valid, change)))
    assert "spoiled.safetensors" in str(caught.value)


def test_every_tensor_is_checked(valid: bytes, tmp_path: Path) -> None:
    for change, match in (
        (("dtype", "I8"), "'default/head/mask' is I8 .*expected U8"),
        (("shape", [1, 2]), r"'default/head/mask' is U8 of shape \(1, 2\), expected U8"),
    ):
        file = File.of(valid)
        file.entries["default/head/mask"].update([change])
        with pytest.raises(CorruptAdapterError, match=match):
            read_adapter(write(tmp_path, file.joined()))
    for name in ("default/head/weight", "default/head/bias", "default/head/more"):
        file = File.of(valid)
        for held in (file.entries, file.data):
            held[name] = held.pop("default/head/mask")  # type: ignore[attr-defined]
        with pytest.raises(CorruptAdapterError, match="expected no such tensor|has no tensor 'default/head/mask'"):
            read_adapter(write(tmp_path, file.joined()))


def test_set_bits_in_the_padding_are_refused(valid: bytes, tmp_path: Path) -> None:
    file = File.of(valid)
    first, last = file.data["default/head/mask"]
    file.data["default/head/mask"] = bytes([first, last | 0x80])
    adapter = read_adapter(write(tmp_path, file.joined()))
    for use in (adapter.parts, adapter.verify):
        with pytest.raises(
            CorruptAdapterError, match=r"spoiled\.safetensors: the mask of the head has set bits behind"
        ):
            use()


# --- on a model ------------------------------------------------------------------------------------------------------


def test_it_is_applied_as_any_head(tmp_path: Path, tiny: nn.Module) -> None:
    masks = MaskSet.from_tensors({"conv2.weight": torch.rand(16, 8, 3, 3) < 0.9})
    head = head_of(6, 16)
    save_adapter(tmp_path, Parts(masks, head), fingerprint(tiny, id="tests:tiny", head=["fc"]))
    before, old = tiny.state_dict(), tiny.fc
    images = torch.randn(2, 3, 8, 8)
    plain = tiny(images)
    load_mask(tiny, tmp_path)
    assert torch.equal(tiny.fc.weight, head.weight)
    assert tiny.fc.bias is None
    assert tiny(images).shape == (2, 6)
    unload_mask(tiny)
    assert tiny.fc is old
    assert torch.equal(tiny(images), plain)
    assert tiny.state_dict().keys() == before.keys()
