"""What is interrupted in `interruptions.py`: loads, undos, switches, banks, cascades; and what must hold afterwards."""

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from maskpack import MaskBank, fingerprint, load_adapter, load_mask, load_masked, save_adapter, unload_mask
from maskpack.adapter.adapter import Adapter
from maskpack.apply.applied import applied
from maskpack.apply.cascade import Cascade
from maskpack.apply.costs import Costs
from maskpack.backbone.embedding import Embedding
from maskpack.backbone.head import Head
from maskpack.backbone.parameters import same_size_int
from maskpack.backbone.state import export_state
from maskpack.mask import MaskSet, PackedMask
from maskpack.parts import CascadeParts, Parts
from maskpack.router import Router, Whitening

OPS = ("zero", "flip", "replace", "ternary")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Bits = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """One of the cross product; `side` of the weights, and how many places are written in one piece."""

    op: str = "zero"
    scale: bool = False
    dtype: torch.dtype = torch.float32
    contiguous: bool = True
    side: int = 16
    few: int = 50


def settings() -> list[Setting]:
    """Return the whole cross product; signs flip and values replace without a scale."""
    product = itertools.product(OPS, (False, True), DTYPES, (True, False))
    return [Setting(*one) for one in product if one[0] in ("zero", "ternary") or not one[1]]


class Net(nn.Module):
    """Two masked layers, a normalisation, a head."""

    def __init__(self, side: int):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(side, side), nn.BatchNorm1d(side), nn.Linear(side, side)
        self.fc = nn.Linear(side, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, 5)."""
        out: Tensor = self.fc(self.two(self.norm(self.one(x.to(self.fc.weight.dtype)))))
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
        base: is never written; `model` is a copy of it, made by `renew`. wanted: bits by name of the adapter, None: base.
    """

    def __init__(self, setting: Setting, folder: Path):
        torch.manual_seed(0)
        self.setting, self.folder = setting, folder
        self.base = Net(setting.side).to(setting.dtype).eval()
        export_state(folder / "base.safetensors", self.base)
        if not setting.contiguous:
            self.base.two.weight.data = self.base.two.weight.data.t().clone().t()
        self.parts = {"a": self._parts(0, 5), "b": self._parts(1, 7), "c": self._parts(2, None)}
        print_of = fingerprint(self.base, id="net", head=["fc"])
        self.adapters: dict[str, Adapter] = {}
        for name, parts in self.parts.items():
            headed = {} if parts.head is None else {"class_names": tuple("abcdefg"[: len(parts.head.weight)])}
            task = "image-features" if parts.head is None else "image-classification"
            path = folder / f"{name}.safetensors"
            save_adapter(path, parts, print_of, codec="raw", task=task, **headed)
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
        for name in ("one.weight", "two.weight"):
            op: Any = one.op if one.op in ("flip", "replace") else "zero"
            mask = PackedMask.from_tensor(torch.rand(shape, generator=generator) < 0.3, op, scale=one.scale)
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
            head = Head("linear", weight, bias, module="fc")
        statistics = {"norm.running_mean": torch.rand(one.side, generator=generator)}
        return Parts(
            MaskSet(made), head, statistics, {"norm.weight": torch.rand(one.side, generator=generator)}, values
        )

    def renew(self) -> None:
        """Make the model a fresh copy of the base."""
        self.model = copy.deepcopy(self.base)

    def check(self) -> None:
        """Raise AssertionError if the model is not what is said of it, or one more `unload_mask` is not the base."""
        record = applied(self.model)
        if record is None or record.complete:
            name = None if record is None else self.names.get(record.mask_id, record.mask_id)
            assert same(bits_of(self.model), self.wanted[name]), f"damaged: it is said to be {name}"
        if record is not None:
            unload_mask(self.model)
        assert applied(self.model) is None
        assert same(bits_of(self.model), self.wanted[None]), "damaged after unload_mask"


@dataclass(frozen=True)
class Case:
    """An operation: what comes before it, the operation, and the check of what it left."""

    name: str
    before: Callable[[World], object]
    act: Callable[[World], object]
    check: Callable[[World], None] = World.check


def load_c(world: World) -> None:
    """Put an adapter on the model, without a check of the base."""
    load_mask(world.model, world.adapters["c"], verify="off")


def forgetting(world: World) -> None:
    """Load for good."""
    load_mask(world.model, world.adapters["b"], restorable=False)


def check_forgetting(world: World) -> None:
    """As `World.check`, of a mask that cannot be undone."""
    record = applied(world.model)
    assert record is None or record.complete
    assert same(bits_of(world.model), world.wanted[None if record is None else "b"])


def bank_of(world: World, *used: str, tight: bool = False) -> None:
    """Make a bank with three adapters, of which some were used; a tight one has room for the largest."""
    room = max(parts.nbytes for parts in world.parts.values()) if tight else None
    bank = MaskBank(world.model, max_host_bytes=room, max_device_bytes=0 if tight else None, verify="off")
    world.bank = bank  # type: ignore[attr-defined]
    for adapter in world.adapters.values():
        bank.add(adapter, world.names[adapter.mask_id])
    for name in used:
        bank.use(name)


def bank_in(world: World) -> MaskBank:
    """Return the bank of the model."""
    bank: MaskBank = world.bank  # type: ignore[attr-defined]
    return bank


def check_bank(world: World) -> None:
    """Raise AssertionError if the model is not what its bank says, or is not the base once the bank is closed."""
    bank = bank_in(world)
    name = bank.active
    assert same(bits_of(world.model), world.wanted[name]), f"damaged: the bank says {name}"
    for one in bank.names:
        bank.use(one)
        assert same(bits_of(world.model), world.wanted[one]), f"damaged: {one} after {name}"
    bank.close()
    assert applied(world.model) is None
    assert same(bits_of(world.model), world.wanted[None]), "damaged after close"


def by_changes(world: World) -> None:
    """Switch often enough that what differs is noted."""
    with patch("maskpack.apply.switch.measured", lambda *_: Costs(write=1.0, scan=0.0)):
        bank_in(world).use("a")


def cascade(world: World) -> None:
    """Let a dispatcher and an expert embed two inputs."""
    side = world.setting.side
    router = Router(
        Whitening(torch.zeros(side), torch.eye(side)[:2], torch.ones(2)),
        torch.ones(1),
        torch.zeros(1, 2),
        torch.eye(2)[None],
    )
    parts = CascadeParts("c", ("d",), Embedding("fc"), router)
    Cascade(world.model, {"c": world.parts["c"], "d": world.parts["c"]}, parts).embed(torch.ones(2, side))


def check_cascade(world: World) -> None:
    """As `World.check`: between calls no mask is on the model, except where the undo was interrupted twice."""
    record = applied(world.model)
    if record is not None and record.complete:
        record.mask_id = "c"
    world.check()


def on_meta(world: World) -> None:
    """Make a model without weights."""
    with torch.device("meta"):
        world.model = Net(world.setting.side).to(world.setting.dtype).eval()


def masked(world: World) -> None:
    """Load base and mask together."""
    load_masked(world.model, world.folder / "base.safetensors", world.adapters["b"])


def check_masked(world: World) -> None:
    """Raise AssertionError if the model is neither without weights nor has the whole adapter."""
    state = world.model.state_dict()
    if all(tensor.is_meta for tensor in state.values()):
        assert applied(world.model) is None
        masked(world)
    assert same(bits_of(world.model), world.wanted["b"])


CASES = (
    Case("load_mask", World.renew, lambda w: load_mask(w.model, w.adapters["a"])),
    Case("load_mask, a head of another shape", World.renew, lambda w: load_mask(w.model, w.adapters["b"])),
    Case("load_mask over another mask", lambda w: (w.renew(), load_c(w)), lambda w: load_mask(w.model, w.adapters["a"])),
    Case("load_mask, restorable=False", World.renew, forgetting, check_forgetting),
    Case("unload_mask", lambda w: (w.renew(), load_mask(w.model, w.adapters["b"])), lambda w: unload_mask(w.model)),
    Case("bank.add", lambda w: (w.renew(), bank_of(w, "a"), bank_in(w).remove("c")),
         lambda w: bank_in(w).add(w.adapters["c"], "c"), check_bank),
    Case("bank.use, by bits", lambda w: (w.renew(), bank_of(w, "b")), lambda w: bank_in(w).use("a"), check_bank),
    Case("bank.use, by places", lambda w: (w.renew(), bank_of(w, "b", "a")), lambda w: bank_in(w).use("b"), check_bank),
    Case("bank.use, by changes", lambda w: (w.renew(), bank_of(w, "a", "c")), by_changes, check_bank),
    Case("bank.use, after an eviction", lambda w: (w.renew(), bank_of(w, tight=True)),
         lambda w: bank_in(w).use("a"), check_bank),
    Case("bank.remove", lambda w: (w.renew(), bank_of(w, "b")), lambda w: bank_in(w).remove("b"), check_bank),
    Case("bank.close", lambda w: (w.renew(), bank_of(w, "a", "b")), lambda w: bank_in(w).close(), check_bank),
    Case("cascade", World.renew, cascade, check_cascade),
    Case("load_masked", on_meta, masked, check_masked),
)  # fmt: skip
