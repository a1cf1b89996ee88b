"""The digest of a base (docs/format.md section 3), and when it is not taken again."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from torch import Tensor, nn

from benchmarks.base_bits import calls, digests
from maskpack import Adapter, MaskBank, load_mask, save_adapter, unload_mask
from maskpack.adapter.content import Parts
from maskpack.backbone.fingerprint import PIECE, check_fingerprint, fingerprint, measure_body, stamp, tensor_digest
from maskpack.backbone.model import same_size_int
from maskpack.errors import BackboneMismatchError

from .helpers_adapter import random_masks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor, one number at a time."""
    words = {1: "B", 2: "h", 4: "i"}[tensor.element_size()]
    flat = same_size_int(tensor.contiguous()).flatten().tolist()
    return b"".join(struct.pack(f"<{words}", value) for value in flat)


def test_the_hash_is_blake3() -> None:
    # the first vector of the BLAKE3 specification
    assert blake3(b"").hexdigest() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 1000, 200_001])
def test_is_the_hash_of_the_bytes(count: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count))
    assert tensor_digest(tensor, dtype) == blake3(raw(tensor.to(dtype))).digest()


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_casts_piece_by_piece(extra: int) -> None:
    tensor = torch.randn(PIECE // 2 + extra)
    assert tensor_digest(tensor, torch.bfloat16) == blake3(tensor.bfloat16().view(torch.uint8).numpy()).digest()


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
    assert tensor_digest(torch.tensor(1.5), torch.float32) == blake3(struct.pack("<f", 1.5)).digest()


def test_a_body_has_the_shape_in_its_digest() -> None:
    """Zeros at the end of a tensor are not its padding, and a shape is not another of as many weights."""
    models = [torch.nn.Linear(512, size, bias=False) for size in (400, 401)] + [torch.nn.Linear(400, 512, bias=False)]
    for model in models:
        torch.nn.init.zeros_(model.weight)
    assert len({fingerprint(model, id="x").digests["float32"] for model in models}) == 3


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the size of every tensor that is hashed."""
    hashed: list[int] = []

    def digest(tensor: Tensor, dtype: torch.dtype) -> bytes:
        hashed.append(tensor.numel())
        return tensor_digest(tensor, dtype)

    monkeypatch.setattr("maskpack.backbone.fingerprint.tensor_digest", digest)
    return hashed


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 7))


def test_what_has_not_changed_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hashed = network(), counted(monkeypatch)
    first = measure_body(model, ["2"])
    assert len(hashed) == 6
    hashed.clear()
    assert measure_body(model, ["2"]).digest == first.digest
    assert measure_body(model, ["0"]).digest != first.digest
    assert sorted(hashed) == [7, 210]  # what the other head was
    # a fingerprint, which is taken before and after training, relies on nothing
    hashed.clear()
    fingerprint(model, id="x", head=["2"])
    assert len(hashed) == 18


def of_data(model: nn.Sequential) -> None:
    model[0].weight.data[3, 4] += 1  # not counted by PyTorch


def swapped(model: nn.Sequential) -> None:
    with torch.no_grad():  # the sum of all words stays
        model[0].weight[:2] = model[0].weight[[1, 0]].clone()


def rounded(model: nn.Sequential) -> None:
    model.half().float()  # other memory, perhaps at the same address


def replaced(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))


def trained(model: nn.Sequential) -> None:
    model(torch.randn(8, 20)).square().sum().backward()
    torch.optim.Adam(model.parameters(), fused=True).step()


def loaded(model: nn.Sequential) -> None:
    model.load_state_dict(network().state_dict())


@pytest.mark.parametrize("write", [of_data, swapped, rounded, replaced, trained, loaded])
def test_every_write_makes_a_model_be_hashed_again(write: Callable[[nn.Sequential], None]) -> None:
    model = network()
    before = measure_body(model, [])
    write(model)
    after = measure_body(model, [])
    assert after.digest != before.digest
    assert after.digest == fingerprint(model, id="x").digests["float32"]


def test_a_flipped_bit_changes_a_stamp_of_uncounted_writes() -> None:
    for tensor in (torch.randn(8), torch.randn(9), torch.randn(10)[1:], torch.randn(7).bfloat16()):
        before, bits = stamp(tensor), same_size_int(tensor.data)
        for index in range(len(tensor)):
            for bit in range(8 * tensor.itemsize):
                one = torch.tensor(1, dtype=bits.dtype) << bit
                bits[index] ^= one
                assert stamp(tensor) != before
                bits[index] ^= one
        assert stamp(tensor) == before


def test_an_inference_tensor_has_no_stamp() -> None:
    with torch.inference_mode():
        tensor = torch.randn(3)
    assert stamp(tensor) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    width = 8 * dtype.itemsize
    rows = [*digests(dtype, 2), *calls(dtype, width, tmp_path)]
    assert {row.what for row in rows} > {"load_mask", "load_masked", "MaskBank.add", "load_cascade"}
    assert all(row.noticed == row.flips >= width for row in rows)


def adapter_for(model: nn.Sequential, path: Path) -> Adapter:
    masks = random_masks({"0.weight": (30, 20), "2.weight": (7, 30)}, 0.8)
    statistics = {f"1.running_{which}": torch.ones(30) for which in ("mean", "var")}
    return save_adapter(path, Parts(masks, statistics=statistics), fingerprint(model, id="x"))


def test_a_base_that_was_put_back_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    adapter = adapter_for(model, tmp_path / "a.safetensors")
    load_mask(model, adapter)
    hashed = counted(monkeypatch)
    unload_mask(model)
    load_mask(model, adapter)
    assert hashed == []
    with pytest.raises(BackboneMismatchError):  # a mask on a mask is no base
        check_fingerprint(model, adapter.base)
    unload_mask(model)
    model.train()(torch.randn(8, 20))  # the statistics are others now
    with pytest.raises(BackboneMismatchError):
        load_mask(model, adapter)


@pytest.mark.parametrize("write", [of_data, swapped, trained])
def test_what_others_wrote_under_a_mask_is_noticed(write: Callable[[nn.Sequential], None], tmp_path: Path) -> None:
    model = network()
    adapter = adapter_for(model, tmp_path / "a.safetensors")
    load_mask(model, adapter)
    write(model)
    unload_mask(model, force=True)
    with pytest.raises(BackboneMismatchError):
        load_mask(model, adapter)


def test_a_bank_notices_what_was_written_between_two_adapters(tmp_path: Path) -> None:
    model = network()
    adapter = adapter_for(model, tmp_path / "a.safetensors")
    with MaskBank(model) as bank:
        bank.add(adapter, "first")
        with torch.no_grad():
            model[2].bias[0] += 1
        with pytest.raises(BackboneMismatchError):
            bank.add(adapter, "second")
        assert bank.names == ("first",)
