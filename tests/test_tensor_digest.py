"""The digest of a weight tensor (docs/format.md section 3), against a slow reading of its specification."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.parameters import same_size_int
from maskpack.backbone.tensor_digest import sums_by_numpy, sums_on_device, tensor_digest

LARGE = 1 << 18


def raw(tensor: Tensor) -> bytes:
    return same_size_int(tensor.contiguous()).reshape(-1).numpy().tobytes()


def expected(data: bytes) -> bytes:
    """The specification, one number at a time."""
    if len(data) < LARGE:
        return hashlib.sha256(data).digest()
    stream = hashlib.shake_128(b"maskpack base").digest(8192)
    k = [int.from_bytes(stream[at : at + 8], "little") for at in range(0, 8192, 8)]
    padded = data + bytes(-len(data) % 8192)
    sums = b""
    for row in range(0, len(padded), 8192):
        w = [int.from_bytes(padded[row + at : row + at + 8], "little") for at in range(0, 8192, 8)]
        total = sum((w[i] + k[i]) * (w[i + 512] + k[i + 512]) for i in range(512))
        sums += (total % 2**64).to_bytes(8, "little")
    return hashlib.sha256(sums + len(data).to_bytes(8, "little")).digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 1000, 65_535, 65_536, 131_071, 131_072, 133_120, 200_001])
def test_is_what_the_specification_says(count: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count))
    assert tensor_digest(tensor, dtype) == expected(raw(tensor.to(dtype)))


def test_is_that_of_the_test_vector() -> None:
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    for dtype in (torch.float32, torch.bfloat16):
        assert f"`{tensor_digest(torch.arange(70_000.0), dtype).hex()}`" in text


def test_layout_and_place_in_memory_do_not_count() -> None:
    weight = torch.randn(300, 301)
    wanted = tensor_digest(weight, torch.float32)
    assert tensor_digest(weight.t().contiguous().t(), torch.float32) == wanted
    held = torch.cat([torch.zeros(1), weight.flatten()])  # four bytes further: not aligned to a word
    assert tensor_digest(held[1:].view(300, 301), torch.float32) == wanted
    assert tensor_digest(torch.nn.Parameter(weight), torch.float32) == wanted


@pytest.mark.parametrize("offset", [0, 1])
def test_devices_compute_the_same_sums(offset: int) -> None:
    flat = torch.randint(-(2**31), 2**31, (1 + 2048 * 77,), dtype=torch.int32)[offset : offset + 2048 * 77]
    assert (sums_on_device(flat) == sums_by_numpy(flat.numpy().view("u8").reshape(77, 1024))).all()


def differences(weight: Tensor) -> dict[str, Tensor]:
    """Changes by which other weights of the same network differ, and such that leave plain sums as they are."""
    odd, even = slice(1, None, 2), slice(0, None, 2)
    changed = {name: weight.clone() for name in ("bit", "odd signs", "four signs", "swap", "zeros", "ends")}
    same_size_int(changed["bit"])[7, 9] ^= 1
    changed["odd signs"][:, odd] *= -1
    for row in (3, 4):
        for column in (1, 5):
            changed["four signs"][row, column] *= -1
    changed["swap"][:, even], changed["swap"][:, odd] = weight[:, odd], weight[:, even]
    changed["zeros"][weight == 0] = -0.0
    same_size_int(changed["ends"])[-1, -1] ^= 1
    changed |= {"rows": weight.roll(1, 0), "columns": weight.roll(2, 1), "halves": weight.roll(1024, 1)}
    changed |= {"negative": -weight, "transposed": weight.t().contiguous(), "reversed": weight.flip(0)}
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tells_weights_apart(dtype: torch.dtype) -> None:
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.3] = 0  # a pruned base
    found = {name: tensor_digest(one, dtype) for name, one in {"": weight, **differences(weight)}.items()}
    assert len(set(found.values())) == len(found) == 13


def test_a_body_has_the_shape_in_its_digest() -> None:
    """Zeros at the end of a tensor are not its padding, and a shape is not another of as many weights."""
    models = [torch.nn.Linear(512, size, bias=False) for size in (400, 401)] + [torch.nn.Linear(400, 512, bias=False)]
    for model in models:
        torch.nn.init.zeros_(model.weight)
    assert len({fingerprint(model, id="x").digests["float32"] for model in models}) == 3
