"""load_mask and unload_mask: exact, in place, refused on the wrong base."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskpack.adapter.content import About, Parts
from maskpack.adapter.predict import predict
from maskpack.adapter.write import save_adapter
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.load import export_state
from maskpack.backbone.model import same_size_int
from maskpack.errors import AdapterError, BackboneMismatchError, ConfigError, CorruptAdapterError, DataError, StateError
from maskpack.mask import MaskSet, PackedMask
from maskpack.runtime.apply import applied, apply_parts, unload_mask
from maskpack.runtime.load import MaskpackWarning, load_adapter, load_mask
from maskpack.safetensors_io import read_tensors

from .conftest import TinyNet
from .helpers_models import CLASSES, bits, make_adapter, random_masks, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected_weight(weight: torch.Tensor, mask: PackedMask) -> torch.Tensor:
    """The definition, weight by weight, in Python numbers."""
    kept = mask.tensor().flatten().tolist()
    flat = []
    for value, keep in zip(weight.flatten(), kept, strict=True):
        if not keep:
            flat.append(torch.zeros((), dtype=weight.dtype))
        elif mask.alpha is None:
            flat.append(value)
        else:
            flat.append((value.float() / torch.tensor(mask.alpha, dtype=torch.float32)).to(weight.dtype))
    return torch.stack(flat).reshape(weight.shape)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_load_and_unload(tmp_path: Path, tiny: nn.Module, dtype: torch.dtype, scale: bool) -> None:
    adapter = make_adapter(tmp_path, tiny, scale=scale)
    base = copy.deepcopy(tiny).to(dtype)
    model = copy.deepcopy(base)
    before = bits(model)
    pointers = {n: p.data_ptr() for n, p in model.named_parameters() if not n.startswith("fc")}
    assert load_mask(model, tmp_path) is model
    for name, mask in adapter.parts().masks.items():
        wanted = expected_weight(base.get_parameter(name).detach(), mask)
        assert torch.equal(same_size_int(model.get_parameter(name).detach()), same_size_int(wanted))
    assert torch.equal(model.bn1.running_var, adapter.parts(stream=True).statistics["bn1.running_var"].to(dtype))
    stored = adapter.parts(stream=True).head
    assert stored is not None
    assert torch.equal(model.fc.weight, stored.weight.to(dtype))
    assert type(model) is TinyNet
    assert list(model.state_dict()) == list(base.state_dict())
    assert {n: p.data_ptr() for n, p in model.named_parameters() if not n.startswith("fc")} == pointers
    assert all(p.requires_grad for p in model.parameters())
    assert model(torch.zeros(2, 3, 8, 8, dtype=dtype)).shape == (2, 7)
    assert unload_mask(model) is model
    assert same(bits(model), before)


def test_loading_twice_equals_loading_once(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path / "a", tiny, seed=1, scale=True)
    make_adapter(tmp_path / "b", tiny, seed=2)
    before = bits(tiny)
    once = bits(load_mask(copy.deepcopy(tiny), tmp_path / "a"))
    load_mask(tiny, tmp_path / "a")
    load_mask(tiny, tmp_path / "b")
    load_mask(tiny, tmp_path / "a")
    assert same(bits(load_mask(tiny, tmp_path / "a")), once)
    unload_mask(tiny)
    assert same(bits(tiny), before)


values = st.sampled_from([float("inf"), float("-inf"), float("nan"), -0.0, 0.0, 1e-40, -3.5, 65504.0])


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(values, min_size=1, max_size=40),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["zero", "scaled", "flip", "replace", "ternary", "ternary scaled"]),
)
def test_any_values_come_back_to_the_bit(weights: list[float], data: Any, dtype: torch.dtype, kind: str) -> None:
    count = len(weights)
    model = nn.Linear(count, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weights)[None].to(dtype))
    before = bits(model)
    drawn = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    signs = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    op = kind if kind in ("flip", "replace") else "zero"
    mask = PackedMask.from_tensor(torch.tensor(drawn)[None], op, scale="scaled" in kind)  # type: ignore[arg-type]
    if "ternary" in kind:
        other = PackedMask.from_tensor(torch.tensor(signs)[None]).bits
        mask = PackedMask(mask.bits, mask.shape, "zero", mask.alpha, other)
    replacement = {"weight": torch.full((drawn.count(False),), 7.0)}
    apply_parts(model, Parts(MaskSet({"weight": mask}), values=replacement))
    for now, was, keep, sign in zip(model.weight[0].tolist(), weights, drawn, signs, strict=True):
        cast = torch.tensor(was).to(dtype).item()
        if not keep:
            wanted = {"flip": -cast, "replace": 7.0}.get(kind, 0.0)
        else:
            wanted = -cast if "ternary" in kind and not sign else cast
        if mask.alpha is None or not keep:
            assert now == wanted or (now != now and wanted != wanted)
    unload_mask(model)
    assert same(bits(model), before)


def test_tied_weights_and_attention(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)
            self.two.weight = self.one.weight
            self.attention = nn.MultiheadAttention(4, 2)

    model = Net()
    before = bits(model)
    masks = random_masks(model)
    assert list(masks) == ["attention.in_proj_weight", "attention.out_proj.weight", "one.weight"]
    save_adapter(tmp_path, masks, fingerprint(model, id="x"))
    load_mask(model, tmp_path)
    assert model.two.weight is model.one.weight
    unload_mask(model)
    assert same(bits(model), before)


def test_compiled_and_wrapped_models(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path, tiny)
    plain = bits(load_mask(copy.deepcopy(tiny), tmp_path))
    before = bits(tiny)
    load_mask(torch.compile(tiny), tmp_path)
    assert same(bits(tiny), plain)
    unload_mask(nn.DataParallel(tiny))
    assert same(bits(tiny), before)


def test_moved_and_cast_after_loading(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path, tiny)
    wanted = bits(copy.deepcopy(tiny).to(torch.bfloat16))
    load_mask(tiny, tmp_path)
    tiny.to(torch.bfloat16)
    unload_mask(tiny)
    assert same(bits(tiny), wanted)


def test_head_of_the_same_shape_is_written_in_place(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path, tiny, classes=5)
    before, head = bits(tiny), tiny.fc
    load_mask(tiny, tmp_path)
    assert tiny.fc is head
    unload_mask(tiny)
    assert same(bits(tiny), before)


def test_head_keep_leaves_the_models_head(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path, tiny)
    weight = tiny.fc.weight.clone()
    load_mask(tiny, tmp_path, head="keep")
    assert torch.equal(tiny.fc.weight, weight)
    del tiny.fc
    with pytest.raises(BackboneMismatchError, match="no 'fc' for the adapter's head; pass head='keep'"):
        load_mask(tiny, tmp_path)
    load_mask(tiny, tmp_path, head="keep")


def test_not_restorable_keeps_nothing(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path, tiny)
    load_mask(tiny, tmp_path, restorable=False)
    with pytest.raises(StateError, match="loaded with restorable=False and cannot be undone; load the base again"):
        unload_mask(tiny)
    with pytest.raises(StateError, match="restorable=False"):
        load_mask(tiny, tmp_path)


# --- the right base or a clear error ---------------------------------------------------------------------------------


def test_a_wrong_base_of_the_same_shapes_is_refused(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path, tiny)
    other = TinyNet()
    before = bits(other)
    with pytest.raises(
        BackboneMismatchError, match=r"2 of 2 masked tensors differ, first 'conv1.weight' .compared as f"
    ):
        load_mask(other, tmp_path)
    assert same(bits(other), before)
    with pytest.warns(MaskpackWarning, match="2 of 2 masked tensors differ"):
        load_mask(other, tmp_path, verify="warn")
    unload_mask(other)
    load_mask(other, tmp_path, verify="off")
    unload_mask(other)
    assert same(bits(other), before)


def test_names_and_shapes_are_checked_always(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path, tiny)
    with pytest.raises(BackboneMismatchError, match="lacks 2 of the 2 masked parameters, first 'conv1.weight'"):
        load_mask(nn.Linear(2, 2), tmp_path, verify="off")
    tiny.conv2 = nn.Conv2d(8, 4, 3)
    with pytest.raises(BackboneMismatchError, match=r"mask of 'conv2.weight' has shape \(16, 8, 3, 3\), the model's"):
        load_mask(tiny, tmp_path, verify="off")
    with pytest.raises(BackboneMismatchError, match=r"'conv1.weight' is on the meta device and has no data"):
        load_mask(TinyNet().to("meta"), tmp_path, verify="off")
    tiny.conv1.weight = nn.Parameter(torch.zeros(8, 3, 3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(BackboneMismatchError, match="'conv1.weight' is of torch.int8 and cannot be masked"):
        load_mask(tiny, tmp_path, verify="off")


def test_statistics_must_have_a_place(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path, tiny)
    before = bits(tiny)
    tiny.bn2 = nn.Identity()
    with pytest.raises(BackboneMismatchError, match=r"has no 'bn2.running_mean' of shape \(16,\)"):
        load_mask(tiny, tmp_path, verify="off")
    assert all(torch.equal(t, before[n]) for n, t in bits(tiny).items())


def test_a_failure_midway_puts_everything_back(tiny: nn.Module) -> None:
    masks = random_masks(tiny)
    before = bits(tiny)

    def broken() -> Any:
        yield "conv1.weight", masks["conv1.weight"]
        raise CorruptAdapterError("flipped bit")

    with pytest.raises(CorruptAdapterError, match="flipped bit"):
        apply_parts(tiny, Parts(masks), masks=broken(), restorable=False)
    assert same(bits(tiny), before)
    apply_parts(tiny, Parts(masks))
    with pytest.raises(StateError, match="this model has a mask already; call unload_mask"):
        apply_parts(tiny, Parts(masks))


def test_wrong_calls(tmp_path: Path, tiny: nn.Module) -> None:
    with pytest.raises(StateError, match="this model has no mask to unload; load one with load_mask"):
        unload_mask(tiny)
    with pytest.raises(ConfigError, match="verify must be one of strict, warn, off, got 'x'"):
        load_mask(tiny, tmp_path, verify="x")  # type: ignore[arg-type]
    adapter = save_adapter(
        tmp_path, {"one": random_masks(tiny), "two": random_masks(tiny, 1)}, fingerprint(tiny, id="x")
    )
    with pytest.raises(StateError, match="holds 2 mask sets; masks are loaded from adapters of one"):
        load_mask(tiny, adapter)


def test_nothing_is_left_behind(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path, tiny)
    attributes = set(vars(tiny))
    load_mask(tiny, tmp_path)
    assert set(vars(tiny)) == attributes
    copied = copy.deepcopy(tiny)
    with pytest.raises(StateError, match="no mask to unload"):
        unload_mask(copied)


# --- predictions and export ------------------------------------------------------------------------------------------


def test_a_model_that_does_not_know_its_tokenizer() -> None:
    text = {"kind": "text", "max_length": 8}
    words = r"the model does not say where its tokenizer is; pass it: predict\(model, texts, tokenizer=…\)"
    with pytest.raises(DataError, match=words):
        predict(TinyNet(), ["x"], About(None, ("a", "b"), text), None, 1, lambda batches: [])


def test_predict(tmp_path: Path, tiny: nn.Module) -> None:
    from PIL import Image

    adapter = make_adapter(tmp_path, tiny)
    load_mask(tiny, adapter)
    image = Image.new("L", (9, 12), 80)
    image.save(tmp_path / "x.png")
    found = adapter.predict(tiny, [image, tmp_path / "x.png", str(tmp_path / "x.png")])
    assert found[0] == found[1] == found[2]
    prepare = adapter.preprocess()
    assert prepare is not None
    scores = tiny(prepare(image)[None]).detach().softmax(-1)[0]
    assert found[0].label == CLASSES[int(scores.argmax())]
    assert found[0].score == pytest.approx(float(scores.max()), rel=1e-5)
    assert adapter.predict(tiny, torch.zeros(2, 3, 8, 8))[0].label in CLASSES
    assert adapter.predict(tiny, []) == []
    with pytest.raises(ConfigError, match=r"inputs are 'x.png', expected a list .*; of one input give \[input\]"):
        adapter.predict(tiny, "x.png")
    with pytest.raises(DataError, match=r"cannot read the image '.*none.png': .*No such file"):
        adapter.predict(tiny, [tmp_path / "none.png"])
    unload_mask(tiny)
    with pytest.raises(StateError, match="the model gives 5 logits, the adapter has 7 classes; load the adapter"):
        adapter.predict(tiny, [image])
    with pytest.raises(StateError):
        adapter.predict(nn.Linear(3, 7), [image])
    bare = save_adapter(tmp_path / "bare", random_masks(tiny), fingerprint(tiny, id="x"))
    with pytest.raises(AdapterError, match="has no .*, so it cannot predict by itself"):
        bare.predict(tiny, [image])


def test_an_image_too_large_to_be_honest_is_refused(
    tmp_path: Path, tiny: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image = pytest.importorskip("PIL.Image")
    adapter = make_adapter(tmp_path, tiny)
    load_mask(tiny, adapter)
    Image.new("L", (9, 12)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match=r"cannot read the image '.*x.png': Image size \(108 pixels\) exceeds limit"):
        adapter.predict(tiny, [tmp_path / "x.png"])


def test_export_is_the_masked_dense_model(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path / "adapter", tiny)
    load_mask(tiny, tmp_path / "adapter")
    assert export_state(tmp_path / "dense.safetensors", tiny) == len(tiny.state_dict())
    other = TinyNet()
    other.fc = nn.Linear(16, 7)
    other.load_state_dict(read_tensors(tmp_path / "dense.safetensors"), strict=True)
    assert same(bits(other), bits(tiny))


def test_load_adapter_reads_folders_and_files(tmp_path: Path, tiny: nn.Module) -> None:
    made = make_adapter(tmp_path, tiny)
    assert (
        load_adapter(tmp_path).mask_id == load_adapter(tmp_path / "maskpack_model.safetensors").mask_id == made.mask_id
    )
    with warnings.catch_warnings(), pytest.raises(AdapterError, match="nowhere"):
        load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_backward_pass_sees_that_weights_changed(contiguous: bool) -> None:
    model = nn.Linear(30, 20)
    if not contiguous:
        model.weight.data = torch.randn(30, 20).t()
    mask = PackedMask.from_tensor(torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) < 0.5)
    loss = model(torch.ones(2, 30, requires_grad=True)).sum()
    apply_parts(model, Parts(MaskSet({"weight": mask})))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("scale", [False, True])
def test_what_is_kept_of_an_applied_mask_has_no_positions(tiny: nn.Module, scale: bool) -> None:
    masks = random_masks(tiny, scale=scale, density=0.9)
    found = {name: replace(mask, zeros=(~mask.tensor()).flatten().nonzero()[:, 0]) for name, mask in masks.items()}
    apply_parts(tiny, Parts(MaskSet(found)))
    record = applied(tiny)
    assert record is not None
    assert record.changed
    assert all(changed.mask is None or changed.mask.zeros is None for _, changed in record.changed)
