"""Masks from files that other tools wrote, and files that are not what they should be."""

import copy
import io
import pickle
import random
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from maskpack.errors import BackboneMismatchError, ConfigError, DataError, MaskpackError, UnknownNameError
from maskpack.importers.base import IMPORTERS, Importer, import_masks
from maskpack.importers.masks import compare
from maskpack.mask import MaskSet, PackedMask

ALL = IMPORTERS.all()
MASKED = ("conv1.weight", "conv2.weight", "fc.weight")


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write with the official library, which wants storages of their own."""
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def masks_of(model: nn.Module, density: float = 0.6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(model.get_parameter(name).shape, generator=generator) < density for name in MASKED}


def zeroed(model: nn.Module, masks: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict of the pruned network, as a tool that stores zeros leaves it."""
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    return {name: torch.where(masks[name], t, 0) if name in masks else t.clone() for name, t in state.items()}


def bitmask(mask: Tensor) -> Tensor:
    """Bits as compressed-tensors packs them: each row alone, first bit lowest; written without numpy."""
    width = mask.shape[-1]
    rows = mask.reshape(-1, width).tolist()
    packed = [[sum(row[at + i] << i for i in range(min(8, width - at))) for at in range(0, width, 8)] for row in rows]
    return torch.tensor(packed, dtype=torch.uint8).reshape(*mask.shape[:-1], (width + 7) // 8)


def compressed(state: Mapping[str, Tensor], two_four: bool = False, old_names: bool = False) -> dict[str, Tensor]:
    """A state dict in the format sparse-bitmask, or the one for two of four."""
    found = {}
    for name, weight in state.items():
        if not name.endswith(".weight"):
            found[name] = weight
            continue
        stem, kept = name if old_names else name.removesuffix(".weight"), weight != 0
        found[f"{stem}.bitmask"], shape = bitmask(kept), torch.tensor(weight.shape)
        if two_four:
            found |= {f"{stem}.compressed": weight[kept].reshape(len(weight), -1), f"{stem}.shape": shape[:, None]}
        else:
            offsets = kept.sum(-1).flatten().cumsum(0)
            found |= {f"{stem}.compressed": weight[kept], f"{stem}.shape": shape, f"{stem}.row_offsets": offsets}
    return found


def packed_npz(path: Path, masks: Mapping[str, Tensor], prefix: str = "") -> Path:
    """As MaskLLM's tool writes its release: numpy's packbits, first bit highest, without the shape."""
    np.savez_compressed(path, **{f"{prefix}{name}.mask": np.packbits(mask.numpy()) for name, mask in masks.items()})
    return path


def imported(path: Path, model: nn.Module, format: str = "masks") -> dict[str, PackedMask]:
    """All masks of a file: what is wrong with one is found when it is asked for."""
    return dict(import_masks(path, model, format))


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.id)
def test_contract(cls: type[Importer], tiny: nn.Module, tmp_path: Path) -> None:
    assert cls.__doc__
    assert cls.reference == "" or cls.reference.startswith("https://")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"conv1.weight": [1]}))
    torch.save(tiny.state_dict(), tmp_path / "state.pt")
    noise = random.Random(0)
    (tmp_path / "noise").write_bytes(noise.randbytes(4000))
    saved(tmp_path / "other", {"some.tensor": torch.ones(3)})
    saved(tmp_path / "nothing", {})
    before = sorted(tmp_path.iterdir())
    if cls.id == "masks":  # it may hold any names, or none: `pack` compares them with the backbone
        before = [path for path in before if path.name != "nothing"]
    for name in ("missing", "", *(path.name for path in before)):
        with pytest.raises(MaskpackError) as caught:
            imported(tmp_path / name, tiny, cls.id)
        assert str(tmp_path) in str(caught.value)
    assert len(list(tmp_path.iterdir())) == 6


def test_unknown_format_and_scale(tiny: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown importer 'zero'; known: .*did you mean 'zeros'"):
        import_masks(tmp_path, tiny, "zero")
    with pytest.raises(ConfigError, match="scale is for masks trained with it, and 'zeros' files hold none"):
        import_masks(tmp_path, tiny, "zeros", scale=True)
    masks = masks_of(tiny)
    assert import_masks(saved(tmp_path / "m", masks), tiny, scale=True) == MaskSet.from_tensors(masks, scale=True)


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "module.model.", "_orig_mod."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zeros(tiny: nn.Module, tmp_path: Path, dtype: torch.dtype, wrapper: str) -> None:
    masks = masks_of(tiny)
    state = zeroed(tiny, masks, dtype)
    state["conv1.weight"][~masks["conv1.weight"]] = -0.0
    state["unknown"] = torch.zeros(2, 2)
    file = saved(tmp_path / "m", {f"{wrapper}{name}": tensor for name, tensor in state.items()})
    assert import_masks(file, tiny, "zeros") == MaskSet.from_tensors(masks)


def test_zeros_of_the_base_are_no_mask(tiny: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny.get_parameter("conv2.weight")[0] = 0.0
        tiny.get_parameter("fc.bias").zero_()
        tiny.get_parameter("fc.weight")[1, 2] = float("nan")
        tiny.get_parameter("fc.weight")[1, 3] = float("inf")
    state = zeroed(tiny, {})
    with pytest.raises(DataError, match="no parameter has a zero where the backbone has none.*the base before it"):
        import_masks(saved(tmp_path / "m", state), tiny, "zeros")
    state["bn1.weight"][1] = 0.0  # one dimension, but pruned all the same
    found = import_masks(saved(tmp_path / "m", state), tiny, "zeros")
    assert list(found) == ["bn1.weight"]
    assert found["bn1.weight"].kept == 7


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.decode = nn.Linear(4, 6, bias=False)
            self.decode.weight = self.embed.weight

    model = Tied()
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    one = saved(tmp_path / "one", {"embed.weight": torch.where(mask, model.embed.weight.detach(), 0)})
    assert import_masks(one, model, "zeros") == MaskSet.from_tensors({"decode.weight": mask})
    both = saved(tmp_path / "both", {"embed.weight": mask, "decode.weight": mask})
    assert import_masks(both, model) == MaskSet.from_tensors({"decode.weight": mask})
    saved(both, {"embed.weight": mask, "decode.weight": ~mask})
    with pytest.raises(DataError, match="'decode.weight' and 'embed.weight' are one tensor .* have different masks"):
        import_masks(both, model)


@pytest.mark.parametrize("what", ["whole", "masks only", "with a prefix"])
def test_prune(tiny: nn.Module, tmp_path: Path, what: str) -> None:
    pruned = copy.deepcopy(tiny)
    prune.ln_structured(pruned.get_submodule("conv1"), "weight", amount=0.25, n=2, dim=0)
    prune.random_unstructured(pruned.get_submodule("conv2"), "weight", amount=0.3)
    prune.l1_unstructured(pruned.get_submodule("fc"), "bias", amount=2)
    state = pruned.state_dict()
    expected = MaskSet.from_tensors({n.removesuffix("_mask"): t == 1 for n, t in state.items() if n.endswith("_mask")})
    assert len(expected) == 3
    if what == "masks only":
        state = {name: tensor.to(torch.uint8) for name, tensor in state.items() if name.endswith("_mask")}
    prefix = "module." if what == "with a prefix" else ""
    file = saved(tmp_path / "m", {prefix + name: tensor for name, tensor in state.items()})
    assert import_masks(file, tiny, "prune") == expected
    with_values = {**zeroed(pruned, {}), "fc.bias": pruned.get_submodule("fc").bias}  # some tools keep both
    assert import_masks(saved(file, with_values), tiny, "prune") == expected


@pytest.mark.parametrize("prefix", ["", "model."])
def test_maskllm(tiny: nn.Module, tmp_path: Path, prefix: str) -> None:
    masks = {**masks_of(tiny), "bn1.bias": torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]) == 1}
    masks["fc.bias"] = torch.tensor([True, False, True, False, False])  # fewer than eight: padded
    assert import_masks(packed_npz(tmp_path / "m.npz", masks, prefix), tiny, "maskllm-npz") == MaskSet.from_tensors(
        masks
    )


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors(tiny: nn.Module, tmp_path: Path, dtype: torch.dtype, old_names: bool) -> None:
    masks = masks_of(tiny)
    state = compressed(zeroed(tiny, masks, dtype), old_names=old_names)
    assert import_masks(saved(tmp_path / "m", state), tiny, "compressed-tensors") == MaskSet.from_tensors(masks)


def test_two_of_four(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 6))
    weight = model[0].weight.detach()
    order = torch.rand(18, 4, generator=torch.Generator().manual_seed(0)).argsort(1)
    mask = (order < 2).reshape(6, 12)
    state = compressed({"0.weight": torch.where(mask, weight, 0), "0.bias": model[0].bias}, two_four=True)
    assert state["0.shape"].shape == (2, 1)
    found = import_masks(saved(tmp_path / "m", state), model, "compressed-tensors")
    assert found == MaskSet.from_tensors({"0.weight": mask})


def test_bytes_of_compressed_tensors(tmp_path: Path) -> None:
    """What compressed-tensors 0.9.4 and 0.12.2 store for a weight of 2 x 10, checked by hand."""
    model = nn.Sequential(nn.Linear(10, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 21.0).reshape(2, 10))
    state = {
        "0.bitmask": torch.tensor([[0b10000001, 0b10], [0b00000110, 0b01]], dtype=torch.uint8),
        "0.compressed": torch.tensor([1.0, 8.0, 10.0, 12.0, 13.0, 19.0]),
        "0.row_offsets": torch.tensor([0, 3]),
        "0.shape": torch.tensor([2, 10]),
    }
    found = import_masks(saved(tmp_path / "m", state), model, "compressed-tensors")
    expected = [[1, 0, 0, 0, 0, 0, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0, 0, 0, 1, 0]]
    assert found["0.weight"].tensor().int().tolist() == expected


# --- files that are not what they should be --------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["zeros", "prune", "compressed-tensors"])
def test_a_network_that_was_trained_further_is_no_mask(tiny: nn.Module, tmp_path: Path, format: str) -> None:
    trained = copy.deepcopy(tiny)
    with torch.no_grad():
        weight = trained.get_parameter("conv2.weight")
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        trained.get_buffer("bn1.running_mean")[2] = 0.0
        trained.get_parameter("fc.bias")[0] += 1
    masks = {name: torch.ones_like(mask) for name, mask in masks_of(tiny).items()}
    masks["conv1.weight"][0] = False
    state = zeroed(trained, masks)
    if format == "compressed-tensors":
        state = compressed(state)
    if format == "prune":
        state = {**zeroed(trained, {}), "conv2.weight_mask": masks["conv2.weight"]}
        state["conv2.weight_orig"] = state.pop("conv2.weight")
    assert sum(tensor.is_floating_point() for tensor in tiny.state_dict().values()) == 13
    with pytest.raises(BackboneMismatchError) as caught:
        import_masks(saved(tmp_path / "m", state), tiny, format)
    assert f"{tmp_path / 'm'}: 11 kept weights in 3 of 13 tensors are not the base's, first 'bn1.running_mean' (1 " in (
        str(caught.value)
    )
    assert "If it was trained after that, train a mask instead" in str(caught.value)


def test_comparison_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskpack.importers.masks.STEP", 7)
    base = torch.arange(1.0, 51.0).reshape(5, 10)
    found = base.clone()
    found[4, 9], found[0, 0], found[2] = 1.0, 0.0, 0.0
    assert compare(found, base, found != 0) == (1, 11)
    assert compare(found.bfloat16(), base.bfloat16().float(), found != 0) == (1, 11)


def spoil(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Replace or (None) leave out members of the compressed weight `fc`."""
    full = {**state, **{f"fc.{member}": value for member, value in changes.items()}}
    return {name: tensor for name, tensor in full.items() if tensor is not None}


WIDE = torch.full((5, 2), 0xFF, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": torch.tensor([16, 5])}, "'fc' has shape (16, 5), the backbone's parameter (5, 16)"),
        ({"shape": torch.tensor([5])}, "'fc' states (1,) sizes, expected those of (5, 16)"),
        ({"shape": None}, "'fc' has a bitmask and no 'shape', expected both"),
        ({"compressed": None}, "'fc' has a bitmask and no 'compressed', expected both"),
        ({"compressed": torch.ones(7)}, "'fc' has 7 values for "),
        ({"bitmask": WIDE.view(torch.int8)}, "'fc' has a bitmask of torch.int8, expected torch.uint8"),
        ({"bitmask": WIDE[:, :1]}, "'fc.bitmask' has shape (5, 1), expected (5, 2)"),
        ({"bitmask": WIDE, "compressed": torch.ones(80, dtype=torch.int8)}, "'fc.compressed' is torch.int8, expected "),
        ({"bitmask": WIDE, "compressed": torch.ones(80).to(torch.float8_e4m3fn)}, "before they are quantised"),
        ({"weight": torch.ones(5, 16)}, "holds the weight 'fc.weight' twice, expected it once"),
        ({"weight.bitmask": WIDE}, "holds the weight 'fc.weight' twice"),
    ],
)
def test_spoiled_compressed_tensors(tiny: nn.Module, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    state = compressed(zeroed(tiny, masks_of(tiny)))
    with pytest.raises(MaskpackError) as caught:
        import_masks(saved(tmp_path / "m", spoil(state, **changes)), tiny, "compressed-tensors")
    assert str(tmp_path / "m") in str(caught.value)
    assert words in str(caught.value)


def test_bits_beyond_a_row(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(10, 2, bias=False))
    state = compressed({"0.weight": model[0].weight.detach()})
    state["0.bitmask"] = torch.full((2, 2), 0xFF, dtype=torch.uint8)
    with pytest.raises(DataError, match="'0' has bits beyond the 10 columns of a row, expected zeros there"):
        import_masks(saved(tmp_path / "m", state), model, "compressed-tensors")


@pytest.mark.parametrize(
    ("format", "state", "words"),
    [
        ("masks", {"conv1.weight": torch.ones(8, 3, 3, 3)}, "mask 'conv1.weight': a mask must be bool, or uint8 of zero"
         "s and ones; got torch.float32; if another tool wrote "),
        ("zeros", {"layer": torch.ones(3)}, "has no tensor of the backbone's, "),
        ("zeros", {"conv1.weight": torch.zeros(3)}, "'conv1.weight' has shape (3,), expected"),
        ("zeros", {"conv1.weight": torch.zeros(8, 3, 3, 3, dtype=torch.int8)}, "'conv1.weight' is torch.int8, "),
        ("zeros", {"fc.bias": torch.zeros(5), "_orig_mod.fc.bias": torch.zeros(5)},
         "'_orig_mod.fc.bias' and 'fc.bias' both stand for 'fc.bias'; leave one of them out"),
        ("prune", {"conv1.weight": torch.ones(8, 3, 3, 3)}, "has no tensor X_mask, it has "),
        ("prune", {"fc.bias_mask": torch.tensor([0.0, 1, 1, 0.5, 1])}, "'fc.bias_mask' holds 0.5, expected zeros"),
        ("prune", {"fc.bias_mask": torch.ones(4)}, "'fc.bias_mask' has shape (4,), expected"),
        ("prune", {"fc.bias_mask": torch.ones(5), "fc.wait_mask": torch.ones(5)},
         "lacks 1 of them, first 'fc.wait'; give the backbone"),
        ("compressed-tensors", {"conv1.weight": torch.ones(8, 3, 3, 3)}, "has no tensor X.bitmask, it has "),
    ],
)  # fmt: skip
def test_wrong_tensors(tiny: nn.Module, tmp_path: Path, format: str, state: dict[str, Tensor], words: str) -> None:
    with pytest.raises(MaskpackError) as caught:
        imported(saved(tmp_path / "m", state), tiny, format)
    assert str(tmp_path / "m") in str(caught.value)
    assert words in str(caught.value)


def entries(path: Path, contents: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


ONES = np.array([0b10100000], np.uint8)  # for the five weights of fc.bias


def forged(shape: int) -> bytes:
    """An array that says it is larger than it is."""
    return npy(ONES).replace(b"(1,), }" + b" " * 10, f"({shape},), }}".encode().ljust(17))


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"fc.bias.mask.npy": npy(np.zeros(10**7, np.uint8))}, "the mask of 'fc.bias' has 10000128 bytes, expected 1"),
        ({"fc.bias.mask.npy": forged(10**9)}, "'shape': (1000000000,), }\" of 1 bytes, expected uint8 of shape (1,)"),
        ({"fc.bias.mask.npy": npy(np.array([0b00000100], np.uint8))}, "without bits beyond 5; fetch it again"),
        ({"fc.bias.mask.npy": npy(np.array([True]))}, "an array b\"{'descr': '|b1'"),
        ({"fc.bias.mask.npy": npy(np.array([{}], dtype=object))}, "an array b\"{'descr': '|O'"),
        ({"fc.bias.mask.npy": npy(np.array([1, 1], np.uint8))}, "expected uint8 of shape (1,)"),
        ({"fc.bias.mask.npy": b"not an array"}, "the mask of 'fc.bias' is an array b'ay' of 0 bytes"),
        ({"fc.bais.mask.npy": npy(ONES)}, "has masks for 1 parameters, and the backbone, with "),
        ({"fc.bias.mask.npy": npy(ONES), "fc.bias.npy": npy(ONES)}, "has a name that comes twice, expected an .npz"),
        ({"model/data.pkl": b"x"}, "has 'model/data.pkl', expected an .npz of arrays, each under its own name"),
        ({}, "has no entry, expected an .npz of arrays"),
    ],
)  # fmt: skip
def test_wrong_archives(tiny: nn.Module, tmp_path: Path, contents: dict[str, bytes], words: str) -> None:
    entries(tmp_path / "m.npz", contents)
    with pytest.raises(MaskpackError) as caught:
        imported(tmp_path / "m.npz", tiny, "maskllm-npz")
    assert str(tmp_path / "m.npz") in str(caught.value)
    assert words in str(caught.value)


def test_what_is_no_archive(tiny: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file .*none.npz; expected the .npz of masks that MaskLLM releases"):
        import_masks(tmp_path / "none.npz", tiny, "maskllm-npz")
    saved(tmp_path / "m.npz", masks_of(tiny))
    with pytest.raises(DataError, match="cannot read .*m.npz as an .npz file: File is not a zip file; fetch it again"):
        import_masks(tmp_path / "m.npz", tiny, "maskllm-npz")
    torch.save(tiny.state_dict(), tmp_path / "m.pt")
    for format in ("prune", "zeros", "compressed-tensors"):
        with pytest.raises(DataError, match="if it is a pickle .*, convert it with safetensors.torch.save_file"):
            import_masks(tmp_path / "m.pt", tiny, format)


def test_other_compressions_are_refused(tiny: nn.Module, tmp_path: Path) -> None:
    entries(tmp_path / "m.npz", {"fc.bias.mask.npy": npy(ONES)}, zipfile.ZIP_LZMA)
    with pytest.raises(
        DataError, match="'fc.bias.mask.npy' has the compression 14; save it with numpy.savez_compressed"
    ):
        import_masks(tmp_path / "m.npz", tiny, "maskllm-npz")
    entries(tmp_path / "m.npz", {"fc.bias.mask.npy": npy(ONES)}, zipfile.ZIP_STORED)
    assert import_masks(tmp_path / "m.npz", tiny, "maskllm-npz")["fc.bias"].tensor().tolist() == [
        True, False, True, False, False,
    ]  # fmt: skip


def test_declared_sizes_that_lie(tiny: nn.Module, tmp_path: Path) -> None:
    """A bomb whose directory states a small size: no more is unpacked than the mask needs."""
    bomb = npy(ONES) + bytes(50_000_000)
    entries(tmp_path / "m.npz", {"fc.bias.mask.npy": bomb})
    data = (tmp_path / "m.npz").read_bytes().replace(len(bomb).to_bytes(4, "little"), (129).to_bytes(4, "little"))
    (tmp_path / "m.npz").write_bytes(data)
    with pytest.raises(DataError, match="cannot read .* as an .npz file: Bad CRC-32"):
        imported(tmp_path / "m.npz", tiny, "maskllm-npz")


FORMATS: dict[str, Callable[[Path, nn.Module], object]] = {
    "zeros": lambda path, model: saved(path, zeroed(model, masks_of(model))),
    "compressed-tensors": lambda path, model: saved(path, compressed(zeroed(model, masks_of(model)))),
    "prune": lambda path, model: saved(path, {f"{name}_mask": mask for name, mask in masks_of(model).items()}),
    "maskllm-npz": lambda path, model: packed_npz(path, masks_of(model)),
    "masks": lambda path, model: saved(path, masks_of(model)),
}


@pytest.mark.parametrize("format", FORMATS)
def test_masks_are_read_when_they_are_asked_for(tiny: nn.Module, tmp_path: Path, format: str) -> None:
    FORMATS[format](tmp_path / "m.npz", tiny)
    found, expected = import_masks(tmp_path / "m.npz", tiny, format), MaskSet.from_tensors(masks_of(tiny))
    assert found == expected == MaskSet(dict(found))
    (tmp_path / "m.npz").unlink()
    assert list(found) == list(MASKED)
    assert found.shapes == expected.shapes
    assert found.total == expected.total
    with pytest.raises(DataError, match=r"no file .*m\.npz; expected"):
        found["fc.weight"]


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_give_our_errors(tiny: nn.Module, tmp_path: Path, format: str) -> None:
    file, noise = tmp_path / "m.npz", random.Random(1)
    FORMATS[format](file, tiny)
    assert set(import_masks(file, tiny, format)) == set(MASKED)
    good = file.read_bytes()
    messages = []
    for _ in range(150):
        data = bytearray(good)
        for _ in range(noise.choice((1, 3, 30))):
            # the front and the end are where the headers are
            at = noise.choice((noise.randrange(len(data)), noise.randrange(600), len(data) - 1 - noise.randrange(300)))
            data[at] = noise.randrange(256)
        file.write_bytes(bytes(data[: noise.randrange(len(data))] if noise.random() < 0.2 else data))
        try:
            imported(file, tiny, format)
        except MaskpackError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(str(file) in message for message in messages)
