"""Cascades in the adapter format: everything comes back, and nothing else passes."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskpack.adapter.card import render_card
from maskpack.adapter.content import Cascade, Parts, Router, Whitening
from maskpack.adapter.describe import inspect_adapter
from maskpack.adapter.edit import convert_adapter
from maskpack.adapter.read import Adapter, read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.backbone.model import Embedding
from maskpack.errors import AdapterError, CorruptAdapterError, StateError, UnknownNameError
from maskpack.mask import MaskSet
from maskpack.runtime.load import load_mask

from .fuzz.damage import File
from .helpers_adapter import base_of, random_masks, write
from .helpers_cascade import SETS, cascade_parts

SHAPES = {"a.weight": (40, 3), "b.weight": (17,)}
BASE = base_of(SHAPES)
PREFIX = "maskpack.cascade/"


def contents() -> dict[str, Parts]:
    statistics = {"bn.running_mean": torch.rand(3), "bn.running_var": torch.rand(3)}
    return {name: Parts(random_masks(SHAPES, 0.9, seed=7), None, statistics) for name in SETS}


def tensors_of(cascade: Cascade) -> dict[str, Any]:
    """Every value of a cascade, flat."""
    found: dict[str, Any] = {}
    holders: list[tuple[str, Any]] = [("", cascade)]
    for name, holder in holders:
        for field in fields(holder):
            value = getattr(holder, field.name)
            if isinstance(value, Router | Whitening):
                holders.append((f"{name}{field.name}.", value))
            else:
                found[name + field.name] = value
    return found


def same(one: Cascade, other: Cascade) -> bool:
    ours, theirs = tensors_of(one), tensors_of(other)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[k], theirs[k]) if isinstance(ours[k], Tensor) else ours[k] == theirs[k] for k in ours
    )


KINDS: dict[str, Cascade] = {
    "plain": cascade_parts(),
    "head": cascade_parts(classes=4),
    "reduced": cascade_parts(reduced=5, classes=4, combine="unconditional"),
    "encoder": cascade_parts(reduced=5, embedding=Embedding(None, "mean", True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_comes_back(kind: str, tmp_path: Path) -> None:
    sets = contents()
    written = save_adapter(tmp_path, sets, BASE, cascade=KINDS[kind], class_names="wxyz")
    adapter = read_adapter(tmp_path)
    assert adapter.cascade is not None
    assert same(adapter.cascade, KINDS[kind])
    assert adapter.verify()["mask_id"] is True
    for name in SETS:
        parts = adapter.parts(name)
        assert parts.masks == sets[name].masks
        assert torch.equal(parts.statistics["bn.running_var"], sets[name].statistics["bn.running_var"])
    again = convert_adapter(adapter, tmp_path / "again", profile="fast")
    assert again.cascade is not None
    assert same(again.cascade, KINDS[kind])
    assert again.mask_id == written.mask_id
    first = (tmp_path / "maskpack_model.safetensors").read_bytes()
    save_adapter(tmp_path / "twice", contents_as(sets), BASE, cascade=KINDS[kind], class_names="wxyz")
    assert (tmp_path / "twice" / "maskpack_model.safetensors").read_bytes() == first


def contents_as(sets: dict[str, Parts]) -> dict[str, Parts]:
    return dict(reversed(sets.items()))


def test_experts_are_coded_against_the_dispatcher(tmp_path: Path) -> None:
    shape = {"a.weight": (200, 300)}
    sets = {name: random_masks(shape, 0.9, seed=7) for name in SETS}
    sets["expert-1"] = MaskSet.from_tensors(
        {"a.weight": sets["dispatcher"]["a.weight"].tensor() ^ (torch.rand(200, 300) < 0.01)}
    )
    adapter = save_adapter(tmp_path, sets, base_of(shape), cascade=KINDS["plain"])
    found = {name: one.payloads[0].coding.reference for name, one in adapter.header.sets.items()}
    assert found == {"dispatcher": None, "expert-0": "dispatcher", "expert-1": "dispatcher"}
    for name in SETS:
        assert adapter.parts(name).masks == sets[name]


def test_is_described(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path, contents(), BASE, cascade=KINDS["reduced"], class_names="wxyz")
    about = inspect_adapter(adapter)["cascade"]
    assert about == {
        "dispatcher": "dispatcher",
        "experts": ["expert-0", "expert-1"],
        "combine": "unconditional",
        "embedding": {"kind": "linear", "module": "fc"},
        "features": 6,
        "coordinates": 3,
        "bytes": {
            "router": 4 * (6 + 18 + 3 + 2 + 6 + 18),
            "reduction": 4 * (18 + 5 * 18 + 5),
            "head": 4 * (4 * 5 + 4),
        },
    }
    assert inspect_adapter(adapter)["sets"]["expert-1"]["dense_bytes"] == {"statistics": 24}
    assert json.loads((tmp_path / "maskpack_config.json").read_text())["cascade"] == about
    card = render_card(inspect_adapter(adapter), "user/name")
    for text in (
        "from maskpack import load_backbone, load_cascade\n",
        'cascade = load_cascade(model, "user/name")',
        "the embedding by `dispatcher` says which of 2 experts an input is for (unconditional: every expert joins it)",
        "Beside the masks: head 96 bytes, reduction 452 bytes, router 212 bytes.",
    ):
        assert text in card
    assert "load_mask" not in card
    kept = save_adapter(tmp_path / "kept", contents(), BASE, cascade=KINDS["head"])
    assert "(conditional: its block alone joins the dispatcher's)" in render_card(inspect_adapter(kept))
    plain = save_adapter(tmp_path / "plain", random_masks(SHAPES), BASE)
    assert inspect_adapter(plain)["cascade"] is None
    assert plain.cascade is None


def test_is_not_loaded_as_one_mask(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "x", contents(), BASE, cascade=KINDS["head"])
    with pytest.raises(StateError, match="x/maskpack_model.* holds 3 mask sets; it is a cascade: use load_cascade"):
        load_mask(nn.Linear(2, 2), adapter)
    with pytest.raises(UnknownNameError, match="no mask set 'default'; it has: .*cascade, which load_cascade"):
        adapter.parts()
    several = save_adapter(tmp_path / "y", contents(), BASE)
    with pytest.raises(StateError, match="holds 3 mask sets; masks are loaded from adapters of one"):
        load_mask(nn.Linear(2, 2), several)


def wrong(**changes: Any) -> Cascade:
    return replace(KINDS["reduced"], **changes)


def wrong_router(**changes: Any) -> Cascade:
    return wrong(router=replace(KINDS["reduced"].router, **changes))


UNWRITABLE: list[tuple[Cascade, str]] = [
    (wrong(dispatcher="expert-0"), "experts is list, expected to name, with the dispatcher 'expert-0', each"),
    (wrong(dispatcher="nobody"), "with the dispatcher 'nobody', each of the sets once: dispatcher, expert-0, expert-1"),
    (wrong(experts=("expert-0", "expert-0")), "each of the sets once: dispatcher, expert-0, expert-1"),
    (wrong(experts=("expert-1",)), "each of the sets once"),
    (wrong(combine="both"), r"combine is 'both', expected one of conditional, unconditional"),
    (wrong(embedding=Embedding(None, "max", True)), "pooling is 'max'"),  # type: ignore[arg-type]
    (wrong(weight=torch.rand(4, 6)), r"weight' is F32 of .*4, 6\), expected F32 or BF16 or F16 of shape \(4, 5\)"),
    (wrong(weight=torch.rand(3, 5)), r"of shape \(3, 5\), expected .*\(4, 5\)"),
    (wrong(weight=None), "has no tensor 'maskpack.cascade/head/weight'"),
    (wrong(bias=None), "has no tensor 'maskpack.cascade/head/bias'"),
    (wrong(bias=torch.rand(4).long()), "head/bias is torch.int64, expected one of"),
    (wrong_router(means=torch.rand(2, 4)), r"router/means' is F32 of shape \(2, 4\), expected F32 of shape \(2, 3\)"),
    (wrong_router(means=torch.full((2, 3), torch.nan)), "means' has values that are not finite, expected finite"),
    (wrong_router(weights=torch.tensor([0.0, 1.0])), r"weights' has the value 0.0, expected numbers above 0"),
    (wrong_router(weights=torch.tensor([0.6, 0.6])), r"weights' has the sum 1.200000, expected shares that sum"),
    (wrong_router(precisions=torch.ones(2, 3, 3)), "router/precisions' has others, expected upper triangular matrices"),
    (wrong_router(precisions=-torch.eye(3).repeat(2, 1, 1)), "with a diagonal above 0"),
    (wrong(reduction=replace(KINDS["reduced"].reduction, scale=torch.zeros(5))), "reduction/scale' has the value 0.0"),  # type: ignore[type-var]
]  # fmt: skip


@pytest.mark.parametrize(("cascade", "match"), UNWRITABLE, ids=[match[:40] for _, match in UNWRITABLE])
def test_what_no_reader_would_take_is_not_written(cascade: Cascade, match: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=match):
        save_adapter(tmp_path / "x.safetensors", contents(), BASE, cascade=cascade, class_names="wxyz")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "x.safetensors"
    save_adapter(path, contents(), BASE, cascade=KINDS["reduced"], class_names="wxyz")
    return path.read_bytes()


def use(path: Path) -> Adapter:
    adapter = read_adapter(path)
    inspect_adapter(adapter)
    adapter.verify()
    return adapter


def rename(file: File, old: str, new: str) -> None:
    file.entries[new], file.data[new] = file.entries.pop(old), file.data.pop(old)


def drop(file: File, *names: str) -> None:
    for name in names:
        del file.entries[PREFIX + name], file.data[PREFIX + name]


def reshape(file: File, name: str, shape: list[int]) -> None:
    file.entries[PREFIX + name]["shape"] = shape


def cascade(file: File) -> dict[str, Any]:
    found: dict[str, Any] = file.inner["cascade"]
    return found


FORGED: list[tuple[Callable[[File], Any], str]] = [
    (lambda f: f.inner.update(cascade=[]), r"\$\.cascade is list, expected an object"),
    (lambda f: f.inner.pop("cascade"), "'maskpack.cascade/head/bias' is F32 .*expected no such tensor"),
    (lambda f: cascade(f).pop("dispatcher"), r"\$\.cascade\.dispatcher is missing, expected text"),
    (lambda f: cascade(f).update(dispatcher=3), r"cascade\.dispatcher is 3"),
    (lambda f: cascade(f).update(experts="expert-0"), r"experts is 'expert-0', expected an array of non-empty"),
    (lambda f: cascade(f).update(experts=[]), r"cascade\.experts is list, expected to name"),
    (lambda f: cascade(f).update(experts=["expert-1", "expert-2"]), "each of the sets once"),
    (lambda f: cascade(f).update(experts=["expert-0", "expert-1", "expert-1"]), "each of the sets once"),
    (lambda f: cascade(f).update(combine=None), "combine is None, expected one of conditional, unconditional"),
    (lambda f: cascade(f).update(embedding="fc"), r"cascade\.embedding is 'fc', expected an object"),
    (lambda f: cascade(f).update(embedding={"kind": "x"}), r"embedding\.kind is 'x', expected one of linear"),
    (lambda f: cascade(f).update(embedding={"kind": "linear"}), r"embedding\.module is missing"),
    (lambda f: f.inner.update(class_names=["a", "b"]), r"head/bias' is F32 of shape \(4,\), expected .*\(2,\)"),
    (lambda f: drop(f, "router/mean"), r"(has no tensor 'maskpack.cascade/router/mean'|reduction/components' is F32)"),
    (lambda f: drop(f, "router/precisions"), "has no tensor 'maskpack.cascade/router/precisions'"),
    (lambda f: drop(f, "reduction/mean"), "has no tensor 'maskpack.cascade/reduction/mean'"),
    (lambda f: drop(f, "head/weight"), "has no tensor 'maskpack.cascade/head/weight'"),
    (lambda f: drop(f, *(f"reduction/{x}" for x in ("mean", "components", "scale"))), r"head/weight' is F32 of .*4, 5"),
    (lambda f: reshape(f, "router/mean", [2, 3]), r"'maskpack.cascade/\w+/\w+' is F32 of shape"),
    (lambda f: reshape(f, "router/components", [6, 3]), r"components' is F32 of .*6, 3\), expected .*\(3, 6\)"),
    (lambda f: reshape(f, "router/means", [3, 2]), r"means' is F32 of shape \(3, 2\), expected .*\(2, 3\)"),
    (lambda f: reshape(f, "router/weights", [2, 1]), r"weights' is F32 of .*\(2, 1\), expected .*\(2,\)"),
    (lambda f: reshape(f, "router/precisions", [18]), r"expected F32 of shape \(2, 3, 3\)"),
    (lambda f: f.entries[PREFIX + "router/mean"].update(dtype="I32"), r"mean' is I32 of .*, expected F32 of"),
    (lambda f: f.entries[PREFIX + "head/bias"].update(dtype="I32"), r"bias' is I32 of .*, expected F32 or BF16"),
    (lambda f: rename(f, PREFIX + "router/mean", PREFIX + "router/more"), r"cascade/(router|reduction)/"),
    (lambda f: rename(f, "dispatcher/statistics/bn.running_var", PREFIX + "more"), "cascade/more' is F32 .*no such"),
    (lambda f: rename(f, "dispatcher/statistics/bn.running_var", "maskpack.cascade"), "cascade' is F32 .*no such"),
    (lambda f: f.data.update({PREFIX + "router/scale": bytes(12)}), "scale' has the value 0.0, expected numbers"),
    (lambda f: f.data.update({PREFIX + "head/bias": b"\0\0\xc0\x7f" * 4}), "head/bias' has values that are not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), FORGED, ids=[match[:40] for _, match in FORGED])
def test_every_field_and_tensor_is_checked(
    change: Callable[[File], Any], match: str, valid: bytes, tmp_path: Path
) -> None:
    file = File.of(valid)
    assert use(write(tmp_path, file.joined())).cascade is not None
    change(file)
    with pytest.raises(CorruptAdapterError, match=match) as caught:
        use(write(tmp_path, file.joined()))
    assert "spoiled.safetensors" in str(caught.value), "the message must name the file"


def test_unknown_keys_are_ignored(valid: bytes, tmp_path: Path) -> None:
    file = File.of(valid)
    cascade(file)["later"] = {"x": 1}
    assert use(write(tmp_path, file.joined())).cascade is not None
