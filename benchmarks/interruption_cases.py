"""Operations that `interruptions.py` interrupts (loads, undos, switches, banks, cascades), and checks afterwards."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.interruption_world import Net, World, bits_of, same
from maskpack import MaskBank, load_mask, load_masked, unload_mask
from maskpack.adapter.content import Cascade, Router, Whitening
from maskpack.backbone.model import Embedding
from maskpack.runtime.apply import applied, check_free
from maskpack.runtime.cascade import LoadedCascade


@dataclass(frozen=True)
class Case:
    """An operation with its preparation and the check of the state that it left."""

    name: str
    before: Callable[[World], object]
    act: Callable[[World], object]
    check: Callable[[World], None] = World.check


def load_c(world: World) -> None:
    """Put an adapter on a fresh model, without a check of the base."""
    world.renew()
    load_mask(world.model, world.adapters["c"], verify="off")


def load_b(world: World) -> None:
    """Put an adapter with another head on a fresh model."""
    world.renew()
    load_mask(world.model, world.adapters["b"])


def forgetting(world: World) -> None:
    """Load a mask that cannot be undone."""
    load_mask(world.model, world.adapters["b"], restorable=False)


def check_forgetting(world: World) -> None:
    """Check a model after `forgetting`: it has the whole mask, or is in order as `World.check` says."""
    record = applied(world.model)
    if record is None or not record.complete:
        world.check()
    else:
        assert same(bits_of(world.model), world.wanted["b"])


def bank_of(world: World, *used: str, tight: bool = False) -> None:
    """Make a bank of a fresh model with three adapters, some of them used; a tight one has room for the largest."""
    world.renew()
    room = max(parts.nbytes for parts in world.parts.values()) if tight else None
    bank = MaskBank(world.model, max_host_bytes=room, max_device_bytes=0 if tight else None, verify="off")
    world.bank = bank
    for adapter in world.adapters.values():
        bank.add(adapter, world.names[adapter.mask_id])
    for name in used:
        bank.use(name)


def bank_without_c(world: World) -> None:
    """Make a bank that uses one of two adapters."""
    bank_of(world, "a")
    world.bank.remove("c")


def check_bank(world: World) -> None:
    """Raise AssertionError if the model is not what its bank says, or is not the base once the bank is closed."""
    bank, record = world.bank, applied(world.model)
    assert world.twice or record is None or record.complete, "damaged: a part of a mask"
    name = bank.active
    assert same(bits_of(world.model), world.wanted[name]), f"damaged: the bank says {name}"
    for one in bank.names:
        bank.use(one)
        assert same(bits_of(world.model), world.wanted[one]), f"damaged: {one} after {name}"
    bank.close()
    check_free(world.model)
    assert same(bits_of(world.model), world.wanted[None]), "damaged after close"


def cascade(world: World) -> None:
    """Let a dispatcher and an expert embed two inputs."""
    side = world.setting.side
    router = Router(
        Whitening(torch.zeros(side), torch.eye(side)[:2], torch.ones(2)),
        torch.ones(1),
        torch.zeros(1, 2),
        torch.eye(2)[None],
    )
    parts = Cascade("c", ("d",), Embedding("fc"), router)
    LoadedCascade(world.model, {"c": world.parts["c"], "d": world.parts["c"]}, parts).embed(torch.ones(2, side))


def check_cascade(world: World) -> None:
    """Check a cascade's model: between calls it has no mask, unless the undo was interrupted twice."""
    record = applied(world.model)
    if record is not None and record.complete:
        record.mask_id = "c"
    world.check()


def on_meta(world: World) -> None:
    """Make a model without weights."""
    with torch.device("meta"):
        world.model = Net(world.setting).to(world.setting.dtype).eval()


def masked(world: World) -> None:
    """Load base and mask together."""
    load_masked(world.model, world.folder / "base.safetensors", world.adapters["b"])


def check_masked(world: World) -> None:
    """Check that an interrupted `masked` left all weights or none, and that it can be called again."""
    without = [tensor.is_meta for tensor in world.model.state_dict().values()]
    if any(without) or (world.twice and applied(world.model) is None):
        assert all(without) or world.twice, "some weights"
        assert applied(world.model) is None
        masked(world)
    assert same(bits_of(world.model), world.wanted["b"])


CASES = (
    Case("load_mask", World.renew, lambda w: load_mask(w.model, w.adapters["a"])),
    Case("load_mask, a head of another shape", World.renew, lambda w: load_mask(w.model, w.adapters["b"])),
    Case("load_mask over another mask", load_c, lambda w: load_mask(w.model, w.adapters["a"])),
    Case("load_mask, restorable=False", World.renew, forgetting, check_forgetting),
    Case("unload_mask", load_b, lambda w: unload_mask(w.model)),
    Case("bank.add", bank_without_c,
         lambda w: w.bank.add(w.adapters["c"], "c"), check_bank),
    Case("bank.use, by bits", lambda w: bank_of(w, "b"), lambda w: w.bank.use("a"), check_bank),
    Case("bank.use, by places", lambda w: bank_of(w, "a", "c"), lambda w: w.bank.use("a"), check_bank),
    Case("bank.use, a head of another shape", lambda w: bank_of(w, "b", "a"), lambda w: w.bank.use("b"), check_bank),
    Case("bank.use, after an eviction", lambda w: bank_of(w, tight=True),
         lambda w: w.bank.use("a"), check_bank),
    Case("bank.remove", lambda w: bank_of(w, "b"), lambda w: w.bank.remove("b"), check_bank),
    Case("bank.close", lambda w: bank_of(w, "a", "b"), lambda w: w.bank.close(), check_bank),
    Case("cascade", World.renew, cascade, check_cascade),
    Case("load_masked", on_meta, masked, check_masked),
)  # fmt: skip
