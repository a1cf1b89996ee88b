"""A small network with adapters of every kind for it, and the bits that it has with each of them."""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskpack import MaskBank, fingerprint, load_adapter, load_mask, save_adapter, unload_mask
from maskpack.adapter.content import Parts
from maskpack.adapter.read import Adapter
from maskpack.backbone.load import export_state
from maskpack.backbone.model import Embedding, Head, same_size_int
from maskpack.mask import MaskSet, PackedMask
from maskpack.runtime.apply import applied

OPS = ("zero", "flip", "replace", "ternary")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Bits = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """A network and a kind of adapter; weights have this `side`, and `few` places are written at once."""

    op: str = "zero"
    scale: bool = False
    dtype: torch.dtype = torch.float32
    contiguous: bool = True
    side: int = 16
    few: int = 50
    layers: int = 2


def settings() -> list[Setting]:
    """Return all combinations of settings; masks that flip signs or replace values have no scale."""
    product = itertools.product(OPS, (False, True), DTYPES, (True, False))
    return [Setting(*one) for one in product if one[0] in ("zero", "ternary") or not one[1]]


class Net(nn.Module):
    """Masked layers, a normalisation, a head."""

    def __init__(self, one: Setting):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(one.side), nn.Linear(one.side, 5)
        self.layers = nn.Sequential(*(nn.Linear(one.side, one.side) for _ in range(one.layers)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, 5)."""
        out: Tensor = self.fc(self.norm(self.layers(x.to(self.fc.weight.dtype))))
        return out


def bits_of(model: nn.Module) -> Bits:
    """Return copies of all tensors of a model, as integers."""
    return {name: same_size_int(tensor).clone() for name, tensor in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return True if two models have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class World:
    """A base and adapters for it, and the bits that the model has with each of them.

    Attributes:
        base: is never written; `model` is a copy of it, made by `renew`.
        wanted: bits by name of the adapter; None: the base's. bank: of the model, where a case has one.
        twice: the way back is interrupted as well.
    """

    model: Net
    bank: MaskBank
    twice = False

    def __init__(self, setting: Setting, folder: Path):
        torch.manual_seed(0)
        self.setting, self.folder = setting, folder
        self.base = Net(setting).to(setting.dtype).eval()
        export_state(folder / "base.safetensors", self.base)
        if not setting.contiguous:
            weight = self.base.get_parameter("layers.1.weight")
            weight.data = weight.data.t().clone().t()
        self.parts = {"a": self._parts(0, 5), "b": self._parts(1, 7), "c": self._parts(2, None)}
        print_of = fingerprint(self.base, id="net", head=["fc"])
        self.adapters: dict[str, Adapter] = {}
        for name, parts in self.parts.items():
            classes = None if parts.head is None else tuple("abcdefg"[: len(parts.head.weight)])
            task = "image-features" if parts.head is None else "image-classification"
            path = folder / f"{name}.safetensors"
            save_adapter(path, parts, print_of, codec="raw", task=task, class_names=classes)
            self.adapters[name] = load_adapter(path)
        self.wanted: dict[str | None, Bits] = {None: bits_of(self.base)}
        for name, adapter in self.adapters.items():
            self.wanted[name] = bits_of(load_mask(copy.deepcopy(self.base), adapter))
        self.names = {adapter.mask_id: name for name, adapter in self.adapters.items()}

    def _parts(self, seed: int, classes: int | None) -> Parts:
        """Return masks with a tensor of every kind beside them; the head has `classes`, or there is none."""
        one, generator = self.setting, torch.Generator().manual_seed(seed)
        shape = (one.side, one.side)
        made, values = {}, {}
        for name in (f"layers.{i}.weight" for i in range(one.layers)):
            op: Any = one.op if one.op in ("flip", "replace") else "zero"
            mask = PackedMask.from_tensor(torch.rand(shape, generator=generator) < 0.5, op, scale=one.scale)
            signs = PackedMask.from_tensor(torch.rand(shape, generator=generator) < 0.5).bits
            made[name] = PackedMask(mask.bits, shape, op, mask.alpha, signs) if one.op == "ternary" else mask
            if op == "replace":
                values[name] = torch.randn(mask.bits.count(0), generator=generator)
        head = None
        if classes is not None:
            weight, bias = (
                torch.randn(classes, one.side, generator=generator),
                torch.randn(classes, generator=generator),
            )
            head = Head(Embedding("fc"), weight, bias)
        statistics = {"norm.running_mean": torch.rand(one.side, generator=generator)}
        return Parts(
            MaskSet(made), head, statistics, {"norm.weight": torch.rand(one.side, generator=generator)}, values
        )

    def renew(self) -> None:
        """Make the model a fresh copy of the base."""
        self.model = copy.deepcopy(self.base)

    def check_said(self) -> None:
        """Raise AssertionError if the model's bits are not those of the adapter that maskpack says it has."""
        record, name = applied(self.model), None
        if record is not None and record.notes is not None:
            name = self.bank.active
        elif record is not None and record.complete:
            name = self.names.get(record.mask_id, record.mask_id)
        elif record is not None:
            return
        assert same(bits_of(self.model), self.wanted[name]), f"damaged: it is said to be {name}"

    def check(self) -> None:
        """Raise AssertionError if the bits are not those of the adapter on the model, or its undo is not the base."""
        self.check_said()
        if applied(self.model) is not None:
            unload_mask(self.model)
        assert applied(self.model) is None
        assert same(bits_of(self.model), self.wanted[None]), "damaged after unload_mask"
