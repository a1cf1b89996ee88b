"""MaskBank: whatever the order of calls, the model has the bits of the base or of one adapter."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from maskpack import MaskBank, load_adapter, load_mask, unload_mask
from maskpack.adapter.content import Parts
from maskpack.adapter.write import save_adapter
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.model import Embedding, Head
from maskpack.backbone.select import select_parameters
from maskpack.errors import BackboneMismatchError, ConfigError, DataError, StateError, UnknownNameError
from maskpack.mask import MaskSet, PackedMask
from maskpack.runtime.apply import apply_parts, exchange, places
from maskpack.runtime.load import MaskpackWarning

from .helpers_models import KINDS, adapter_of, bits, make_adapter, random_masks, same


def loaded(base: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    return bits(load_mask(copy.deepcopy(base), load_adapter(path)))


@pytest.fixture
def five(tmp_path: Path, tiny: nn.Module) -> dict[str, Path]:
    heads = {"zero": 5, "scaled": 7, "flip": 3, "replace": None, "ternary": 7}
    return {kind: adapter_of(tmp_path / kind, tiny, kind, i, heads[kind]) for i, kind in enumerate(KINDS)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_switch_leads_to_what_loading_gives(tiny: nn.Module, five: dict[str, Path], dtype: torch.dtype) -> None:
    base = copy.deepcopy(tiny).to(dtype)
    wanted = {None: bits(base), **{name: loaded(base, path) for name, path in five.items()}}
    with MaskBank(base) as bank:
        assert [bank.add(path) for path in five.values()] == list(KINDS) == list(bank.names)
        assert same(bits(base), wanted[None])
        names: list[str | None] = [None, *KINDS]
        for one in names:
            for other in names:
                for name in (one, other):
                    assert (bank.disable() if name is None else bank.use(name)) is base
                    assert same(bits(base), wanted[name]), (one, other)
                    assert bank.active == name
    assert same(bits(base), wanted[None])
    load_mask(base, five["zero"])  # the model is free again


def transformer() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    # its decoder is tied to the word embeddings
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return BertForMaskedLM(config)


def vision_transformer() -> nn.Module:
    import timm

    return timm.create_model(  # type: ignore[no-any-return]
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=4
    )


def resnet() -> nn.Module:
    import timm

    return timm.create_model("resnet10t", num_classes=4, stem_width=8, channels=(8, 8, 16, 16))  # type: ignore[no-any-return]


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": transformer, "vit": vision_transformer, "resnet": resnet, "tied": tied,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_keeps_every_bit(model: str, data: st.DataObject) -> None:
    """Add, use, switch, combine, remove, evict, close: always the bits of the base or of the masks that are named."""
    torch.manual_seed(0)
    base = MODELS[model]().to(data.draw(st.sampled_from(list(DTYPES.values())), label="dtype")).eval()
    if model == "resnet" and data.draw(st.booleans(), label="channels last"):
        base = base.to(memory_format=torch.channels_last)
    selected = [n for n in select_parameters(base) if not n.startswith(("head", "fc", "cls"))]
    shapes = {n: p for n, p in base.named_parameters() if n in selected}
    generator = torch.Generator().manual_seed(1)

    def draw_masks(kind: str) -> MaskSet:
        density = data.draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
        made = {n: torch.rand(p.shape, generator=generator) < density for n, p in shapes.items()}
        return MaskSet.from_tensors(made, op="flip" if kind == "flip" else "zero", scale=kind == "scaled")

    pristine, before = copy.deepcopy(base), bits(base)
    storages = {n: p.data_ptr() for n, p in base.named_parameters()}
    known: dict[str, MaskSet] = {}
    limit = data.draw(st.sampled_from([0, None]), label="device limit")
    bank = MaskBank(base, max_device_bytes=limit)
    actions = ("add", "combine", "use", "use", "use", "disable", "remove", "using")
    for step in range(data.draw(st.integers(1, 12), label="steps")):
        action = data.draw(st.sampled_from(actions if known else ("add",)))
        name = data.draw(st.sampled_from(sorted(known))) if known else ""
        if action == "add":
            known[f"m{step}"] = draw_masks(data.draw(st.sampled_from(["zero", "zero", "flip", "scaled"])))
            bank.add(known[f"m{step}"], f"m{step}")
        elif action == "combine":
            other = data.draw(st.sampled_from(sorted(known)))
            a, b = known[name], known[other]
            both = {n: PackedMask(a[n].bits & b[n].bits, a[n].shape) for n in a}
            known[f"m{step}"] = MaskSet(both)
            bank.add(known[f"m{step}"], f"m{step}")
        elif action == "use":
            bank.use(name)
        elif action == "disable":
            bank.disable()
        elif action == "using":
            active = bank.active
            with bank.using(name):
                assert bank.active == name
            assert bank.active == active
        else:
            bank.remove(name)
            del known[name]
        fresh = copy.deepcopy(pristine)
        if bank.active is not None:
            apply_parts(fresh, Parts(known[bank.active]))
        assert same(bits(base), bits(fresh)), action
    bank.close()
    assert same(bits(base), before)
    assert {n: p.data_ptr() for n, p in base.named_parameters()} == storages
    assert all(p.requires_grad for p in base.parameters())


def test_places_are_found_once(tiny: nn.Module) -> None:
    with MaskBank(tiny) as bank:
        for seed, name in enumerate("ab"):
            bank.add(random_masks(tiny, seed), name)
        for step in range(6):
            bank.use("ab"[step % 2])
        assert bank.status().switches == {"bits": 2, "places": 4}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.019, 0.03, 0.09, 0.11, 0.5, 1.0])
@pytest.mark.parametrize("length", [0, 1, 8, 1001, 4096])
def test_places_are_where_zeros_are(share: float, length: int) -> None:
    zeros = torch.rand(length, generator=torch.Generator().manual_seed(length)) < share
    found = places(PackedMask.from_tensor(~zeros).bits, torch.device("cpu"))
    assert found.dtype == torch.int64
    assert found.tolist() == [at for at, zero in enumerate(zeros.tolist()) if zero]


def test_what_was_used_longest_ago_is_dropped_first(tiny: nn.Module) -> None:
    """Places of the active adapter and of one other have room."""
    sets = {name: random_masks(tiny, seed) for seed, name in enumerate("abc")}
    with MaskBank(tiny) as roomy:
        for name, masks in sets.items():
            roomy.use(roomy.add(masks, name))
        room = max(one.device_bytes for one in roomy.status().residents.values())
    with MaskBank(tiny, max_device_bytes=room) as bank:
        for name, masks in sets.items():
            bank.use(bank.add(masks, name))
        assert {name: one.state for name, one in bank.status().residents.items()} == {
            "a": "packed", "b": "ready", "c": "active",
        }  # fmt: skip
        bank.use("b")
        bank.use("a")
        assert [name for name, one in bank.status().residents.items() if one.state == "ready"] == ["b"]


def test_a_switch_that_fails_leaves_the_base(tiny: nn.Module, five: dict[str, Path], monkeypatch: Any) -> None:
    before = bits(tiny)
    with MaskBank(tiny) as bank:
        for path in five.values():
            bank.add(path)
        for first in KINDS:
            for second in KINDS:
                if first == second:
                    continue
                bank.use(first)
                monkeypatch.setattr("maskpack.runtime.apply.changed_bits", fails)
                monkeypatch.setattr("maskpack.runtime.apply.rewritten", fails)
                with pytest.raises(MemoryError):
                    bank.use(second)
                monkeypatch.undo()
                assert bank.active is None
                assert same(bits(tiny), before), (first, second)


def test_places_of_some_parameters_are_not_kept(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def second_fails(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        return fails() if calls == 2 else exchange(*given)

    shapes = {name: p.shape for name, p in tiny.named_parameters() if p.dim() > 1}
    before = bits(tiny)
    with MaskBank(tiny) as bank:
        bank.add(MaskSet.from_tensors({name: torch.rand(shape) < 0.5 for name, shape in shapes.items()}), "a")
        monkeypatch.setattr("maskpack.runtime.apply.exchange", second_fails)
        with pytest.raises(MemoryError):
            bank.use("a")
        assert bank.status().residents["a"].state == "packed"
        assert same(bits(tiny), before)


def fails(*_: object) -> None:
    raise MemoryError


def test_contexts_nest_and_come_back_after_errors(tiny: nn.Module, five: dict[str, Path]) -> None:
    bank = MaskBank(tiny)
    for path in five.values():
        bank.add(path)
    bank.use("zero")
    with bank.using("scaled"), bank.disabled() as model:
        assert model is tiny
        assert bank.active is None
        with bank.using("flip"):
            assert bank.active == "flip"
        assert bank.active is None
    assert bank.active == "zero"
    with pytest.raises(ConfigError, match="got 1 names for 0 examples"), bank.using("scaled"):
        bank({}, masks=["flip"])
    assert bank.active == "zero"
    with bank.using("zero"):
        bank.remove("zero")
    assert bank.active is None
    assert "zero" not in bank
    assert "flip" in bank
    with pytest.raises(
        UnknownNameError, match="this bank has no adapter 'zero'; it has: scaled, flip, replace, ternary"
    ):
        bank.use("zero")
    bank.close()
    bank.close()


def test_memory_is_limited(tmp_path: Path, tiny: nn.Module) -> None:
    paths = {name: adapter_of(tmp_path / name, tiny, "zero", i) for i, name in enumerate("abcd")}
    wanted = {name: loaded(tiny, path) for name, path in paths.items()}
    with MaskBank(tiny) as roomy:
        for path in paths.values():
            roomy.add(path)
        size = roomy.status().residents["a"].host_bytes
        assert size == sum((len(m.bits) + 7) // 8 for m in load_adapter(paths["a"]).parts().masks.values())
    bank = MaskBank(tiny, max_host_bytes=2 * size + 100, max_device_bytes=0)
    for name, path in paths.items():
        bank.add(path, pin=name == "a")
    states = {name: one.state for name, one in bank.status().residents.items()}
    assert states == {"a": "packed", "b": "evicted", "c": "evicted", "d": "packed"}
    for name in "bcbdab":
        bank.use(name)
        assert same(bits(tiny), wanted[name])
        status = bank.status()
        assert status.active == name
        assert status.host_bytes <= 2 * size + 100
        assert status.residents["a"].state != "evicted"
        assert [n for n, one in status.residents.items() if one.device_bytes] == [name]
        assert status.device_bytes == status.residents[name].device_bytes
    # what is active and what is pinned stay
    bank.use("b")
    with pytest.raises(
        StateError,
        match=r"'e' takes \d+ bytes, too many for max_host_bytes=\d+: 'a', 'b' cannot be",
    ):
        bank.add(paths["c"], "e", pin=True)
    assert bank.names == ("a", "b", "c", "d")
    adapter_of(tmp_path / "c", tiny, "zero", 9)
    with pytest.raises(StateError, match="'c' was evicted, and .* has other bytes now; remove it and add it"):
        bank.use("c")
    assert bank.active is None or same(bits(tiny), wanted[bank.active])
    bank.close()
    with pytest.raises(ConfigError, match="max_host_bytes must be 0 or more, or None, got -1"):
        MaskBank(tiny, max_host_bytes=-1)
    unload_mask(load_mask(tiny, paths["a"]))


def test_the_model_belongs_to_the_bank(tmp_path: Path, tiny: nn.Module) -> None:
    path = adapter_of(tmp_path / "a", tiny, "zero", 0)
    load_mask(tiny, path)
    with pytest.raises(StateError, match="has a mask already; call unload_mask"):
        MaskBank(tiny)
    unload_mask(tiny)
    with MaskBank(tiny) as bank:
        for act in (lambda: load_mask(tiny, path), lambda: unload_mask(tiny), lambda: MaskBank(tiny)):
            with pytest.raises(
                StateError, match=r"belongs to a MaskBank; use the bank, or close it first: bank.close\(\)"
            ):
                act()
        bank.add(path)
        tiny.bfloat16()
        with pytest.raises(
            StateError, match=r"conv1.weight' is torch.bfloat16 on cpu now, and was torch.float32 on cpu"
        ):
            bank.use("a")
        tiny.float()


def test_a_closed_bank_leaves_the_model_alone(tmp_path: Path, tiny: nn.Module) -> None:
    path = adapter_of(tmp_path / "a", tiny, "zero", 0)
    bank = MaskBank(tiny)
    bank.add(path)
    bank.close()
    load_mask(tiny, path)
    masked = bits(tiny)
    bank.close()
    assert bank.disable() is tiny
    assert (bank.active, bank.names) == (None, ())
    with pytest.raises(UnknownNameError, match="no adapter 'a'"):
        bank.use("a")
    with pytest.raises(StateError, match="bank is closed"):
        bank.add(path)
    assert same(bits(tiny), masked)
    unload_mask(tiny)


def test_what_is_added_is_checked(tmp_path: Path, tiny: nn.Module, five: dict[str, Path]) -> None:
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.conv1.weight.view(-1)[0] += 1
    with MaskBank(other) as strict, pytest.raises(BackboneMismatchError, match="1 of 2 masked tensors differ"):
        strict.add(five["zero"])
    with MaskBank(other, verify="off") as off:
        off.add(five["zero"])
    with MaskBank(other, verify="warn") as warned, pytest.warns(MaskpackWarning, match="1 of 2 masked tensors differ"):
        warned.add(five["zero"])
    with pytest.raises(ConfigError, match="verify must be one of strict, warn, off, got .no."):
        MaskBank(tiny, verify="no")  # type: ignore[arg-type]
    with MaskBank(tiny) as bank:
        assert bank.add(load_adapter(five["zero"])) == "zero"
        assert bank.add(five["zero"] / "maskpack_model.safetensors", "again") == "again"
        with pytest.raises(
            ConfigError, match=r"has an adapter called 'again' already; give another name, or remove it"
        ):
            bank.add(five["flip"], "again")
        with pytest.raises(ConfigError, match="masks that are no adapter have no name of their own"):
            bank.add(random_masks(tiny))
        with pytest.raises(BackboneMismatchError, match="lacks 1 of the 1 masked parameters"):
            bank.add(MaskSet.from_tensors({"x": torch.ones(2, dtype=torch.bool)}), "x")
        assert bank.names == ("zero", "again")
        # what is added is decoded from the base, also while another mask is on
        bank.use("zero")
        bank.add(five["scaled"])
        assert bank.active == "zero"


def test_a_batch_may_ask_for_several_masks(tmp_path: Path, tiny: nn.Module, five: dict[str, Path]) -> None:
    x = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        single = {name: load_mask(copy.deepcopy(tiny), path)(x) for name, path in five.items()}
        single[None] = copy.deepcopy(tiny)(x)  # type: ignore[index]
        with MaskBank(tiny) as bank:
            for path in five.values():
                bank.add(path)
            bank.use("flip")
            names = ["zero", "scaled", None, "flip", "zero", "replace"]
            outputs = bank(x, masks=names)
            assert bank.active == "flip"
            for index, (name, output) in enumerate(zip(names, outputs, strict=True)):
                torch.testing.assert_close(output, single[name][index])  # type: ignore[index]
            assert [len(output) for output in outputs] == [5, 7, 5, 3, 5, 5]
            switches = sum(bank.status().switches.values())
            with pytest.raises(UnknownNameError, match="no adapter 'nobody'"):
                bank(x, masks=["zero"] * 5 + ["nobody"])
            with pytest.raises(ConfigError, match="got 2 names for 6 examples"):
                bank(x, masks=["zero", "flip"])
            assert sum(bank.status().switches.values()) == switches


def test_texts_by_mask(tmp_path: Path) -> None:
    """A head behind an encoder is the adapter's own; an output without logits is refused."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    model = BertModel(config, add_pooling_layer=False).eval()
    base = fingerprint(model, id="tests:bert")
    heads = {}
    for seed, name in enumerate("ab"):
        heads[name] = Head(Embedding(None, "mean"), torch.randn(3 + seed, 16), torch.randn(3 + seed))
        parts = Parts(random_masks(model, seed), heads[name])
        names = tuple("xyzw"[: 3 + seed])
        save_adapter(tmp_path / name, parts, base, task="text-classification", class_names=names)
    inputs = {"input_ids": torch.randint(40, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    with torch.no_grad(), MaskBank(model) as bank:
        for name in "ab":
            bank.add(tmp_path / name)
        outputs = bank(inputs, masks=["a", "b", "a"])
        assert [tuple(output.shape) for output in outputs] == [(3,), (4,), (3,)]
        with bank.using("b"):
            pooled = model(**inputs).last_hidden_state.mean(1)[1]
        torch.testing.assert_close(outputs[1], heads["b"].weight @ pooled + heads["b"].bias)
        with pytest.raises(
            DataError, match=r"gives a BaseModelOutput\w* without logits, .* inside `with bank.using\(None\)`"
        ):
            bank(inputs, masks=[None] * 3)


def test_threads_have_the_model_one_after_the_other(tiny: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    names = "abc"
    sets = {name: random_masks(tiny, seed) for seed, name in enumerate(names)}
    with torch.no_grad(), MaskBank(tiny) as bank:
        wanted = {}
        for name, masks in sets.items():
            bank.add(masks, name)
            with bank.using(name):
                wanted[name] = tiny(x)
        wrong: list[str] = []

        def work(name: str) -> None:
            with torch.no_grad():
                for _ in range(25):
                    with bank.using(name) as model:
                        if not torch.equal(model(x), wanted[name]):
                            wrong.append(name)
                    if not torch.equal(bank(x, masks=[name, name])[0], wanted[name][0]):
                        wrong.append(f"mixed {name}")

        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_compiled_code_is_not_compiled_anew(tiny: nn.Module, five: dict[str, Path]) -> None:
    compiled = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    x = torch.randn(2, 3, 8, 8)
    plain = copy.deepcopy(tiny)
    model = torch.compile(tiny, backend=backend)
    with torch.no_grad(), MaskBank(model) as bank:
        for name in ("zero", "replace"):
            bank.add(five[name])
        for name in ("zero", "replace", "zero", None, "replace"):
            bank.use(name) if name else bank.disable()
            fresh = load_mask(copy.deepcopy(plain), five[name]) if name else plain
            torch.testing.assert_close(model(x), fresh(x))
        assert compiled == 1
        bank.add(five["scaled"])  # its head has another shape
        bank.use("scaled")
        assert model(x).shape == (2, 7)
        assert compiled == 2
    torch.compiler.reset()


def test_frozen_weights_in_compiled_code_are_refused(tiny: nn.Module, five: dict[str, Path]) -> None:
    import torch._inductor.config as inductor

    message = r"torch._inductor.config.freezing is on: compiled code would go on with its copies"
    with inductor.patch(freezing=True):
        with pytest.raises(StateError, match=message):
            MaskBank(tiny)
        with pytest.raises(StateError, match=message):
            load_mask(tiny, five["zero"])
    with MaskBank(tiny) as bank:
        bank.add(five["zero"])
        with inductor.patch(freezing=True), pytest.raises(StateError, match=message):
            bank.use("zero")


def test_gradients_and_inference_mode(tiny: nn.Module, five: dict[str, Path]) -> None:
    before = bits(tiny)
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        bank = MaskBank(tiny)
        bank.add(five["zero"])
        bank.add(five["scaled"])
        bank.use("zero")
        tiny(x)
    bank.use("scaled")
    tiny(x).sum().backward()
    with torch.inference_mode():
        bank.use("zero")
    bank.close()
    assert same(bits(tiny), before)
    assert all(p.requires_grad for p in tiny.parameters())


def test_adapters_like_those_that_load_mask_takes(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path / "whole", tiny, scale=True)
    wanted = loaded(tiny, tmp_path / "whole")
    with MaskBank(tiny) as bank:
        bank.use(bank.add(tmp_path / "whole"))
        assert same(bits(tiny), wanted)
        assert bank.status().residents["whole"].density == load_adapter(tmp_path / "whole").parts().masks.density
        assert bank.parts("whole").head is not None


def test_weights_of_eight_bits_change_their_sign() -> None:
    model = nn.Linear(4, 4, bias=False).to(torch.float8_e4m3fn)
    before = model.weight.detach().view(torch.uint8).clone()
    mask = PackedMask.from_tensor(torch.zeros(4, 4, dtype=torch.bool), op="flip")
    apply_parts(model, Parts(MaskSet({"weight": mask})))
    assert torch.equal(model.weight.detach().view(torch.uint8), before ^ 0x80)
    unload_mask(model)
    assert torch.equal(model.weight.detach().view(torch.uint8), before)
