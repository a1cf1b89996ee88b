"""What a GPU decodes and hashes: by Triton's interpreter here, on a GPU in test_cuda.py."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file
from torch import nn

from maskpack import MaskBank, Parts, fingerprint, load_mask, load_masked, save_adapter, unload_mask
from maskpack import mask as masks_module
from maskpack.adapter.content import About
from maskpack.adapter.read import Adapter
from maskpack.adapter.steps import Norm
from maskpack.adapter.values import Steps
from maskpack.backbone import fingerprint as base_digests
from maskpack.backbone.fingerprint import tensor_digest
from maskpack.codecs import logit, ulps
from maskpack.errors import CorruptAdapterError
from maskpack.mask import MaskSet
from maskpack.runtime.apply import apply_parts

from .fuzz.fuzz_logit import SHAPES, side_of
from .fuzz.fuzz_ulps import words_of
from .helpers_models import bits, same

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")
INTERPRETED = "TRITON_INTERPRET" in os.environ  # which counts when Triton is imported, hence a process of its own


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_by_the_interpreter() -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestInterpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "26 passed" in done.stdout


def job_of(case: int) -> tuple[Any, ...]:
    """Return a payload as the kernels take it, what it decodes to, and a way to decode others alike."""
    side, base, mask = side_of(case)
    weights = None
    if base:
        assert side.weights is not None
        wide = side.weights.itemsize == 4
        words = torch.from_numpy(side.weights.view(np.int32 if wide else np.int16).copy())
        weights = words.view(torch.float32 if wide else torch.bfloat16).reshape(side.shape)
    reference = None if side.reference is None else torch.from_numpy(side.reference)
    job = logit.encode(mask, side, base), side.shape, weights, reference
    return *job, mask, lambda data: logit.decode(data, side, base)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(16, 24, bias=False)).eval()


def packed(path: Path, model: nn.Module, kind: str = "") -> tuple[Adapter, MaskSet]:
    """Pack masks that keep great weights more often than small ones."""
    weights = {name: weight.detach().abs() for name, weight in model.named_parameters()}
    kept = {name: torch.rand(one.shape) < 0.7 + one / one.max() for name, one in weights.items()}
    masks = MaskSet.from_tensors(kept, scale=kind == "scale")
    if kind == "ternary":
        signs = MaskSet.from_tensors({name: torch.rand(one.shape) < 0.8 for name, one in kept.items()})
        masks = MaskSet({name: replace(mask, signs=signs[name].bits) for name, mask in masks.items()})
    base = fingerprint(model, id="tests:net")
    return save_adapter(path, masks, base, codec="logit-base", weights=model), masks


def counts_of_fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the bytes of packed bits are added that come back from the device."""
    counts = list[int]()
    monkeypatch.setattr(masks_module, "fetched", lambda packed: (counts.append(len(packed)), packed.numpy())[1])
    return counts


class TestInterpreted:
    __test__ = INTERPRETED

    def test_gives_the_same_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from maskpack.codecs.native import gpu

        monkeypatch.setattr(logit, "LANE_BYTES", 40)  # several lanes
        small = [number for number, shape in enumerate(SHAPES) if np.prod(shape) < 600]
        made = [job_of(shape + 16 * (5 * shape % 8)) for shape in small]
        found = gpu.decode_events([one[:4] for one in made], torch.device("cpu"))
        for one, (*_, mask, _) in zip(found, made, strict=True):
            assert one is not None
            assert np.array_equal(np.packbits(one[1].numpy() == one[0], bitorder="little"), mask)

    def test_refuses_what_others_refuse(self) -> None:
        from maskpack.codecs.native import gpu

        data, *rest, mask, decode = job_of(4 + 16)
        jobs, expected = [(data, *rest)], [mask]
        for place in (0, 1, 2, 3, 5, len(data) // 2, len(data) - 1):
            spoiled = bytearray(data)
            spoiled[place] ^= 1 << place % 8
            jobs.append((bytes(spoiled), *rest))
            try:
                expected.append(decode(bytes(spoiled)))
            except CorruptAdapterError:
                expected.append(None)
        for one, wanted in zip(gpu.decode_events(jobs, torch.device("cpu")), expected, strict=True):
            assert (one is None) == (wanted is None)
            assert one is None or np.array_equal(np.packbits(one[1].numpy() == one[0], bitorder="little"), wanted)
        assert any(one is None for one in expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_loads(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        from maskpack.codecs.native import gpu

        base, decoded, decode_on = network(), list[int](), gpu.decode_on
        _, masks = packed(tmp_path, base)

        def counted(payloads: Any, needs: bool) -> Any:
            decoded.append(len(payloads))
            return decode_on(payloads, needs)

        monkeypatch.setattr(gpu, "decode_on", counted)
        fetched = counts_of_fetched(monkeypatch)
        model = network().to(dtype)
        before = bits(model)
        wanted = network().to(dtype)
        for name, weight in wanted.named_parameters():
            weight.data[~masks[name].tensor()] = 0
        load_mask(model, tmp_path)
        assert decoded == [2]
        assert same(bits(model), bits(wanted))
        unload_mask(model)
        assert same(bits(model), before)
        assert not fetched  # no bits came back from the device
        file = tmp_path / "base.safetensors"
        save_file({name: tensor.clone() for name, tensor in base.state_dict().items()}, file)
        assert same(bits(load_masked(network().to(dtype), file, tmp_path)), bits(wanted))
        assert decoded == [2, 1, 1]
        assert not fetched
        del decoded[1:]
        with MaskBank(model) as bank:
            bank.use(bank.add(tmp_path))
            assert decoded == [2, 2]
            assert same(bits(model), bits(wanted))
        assert same(bits(model), before)
        assert not fetched

    @pytest.mark.parametrize("kind", ["scale", "ternary"])
    def test_masks_that_change_every_weight(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        base = network()
        _, masks = packed(tmp_path, base, kind)
        file = tmp_path / "base.safetensors"
        save_file({name: tensor.clone() for name, tensor in base.state_dict().items()}, file)
        wanted = network()
        apply_parts(wanted, Parts(masks))  # packed by the CPU
        fetched = counts_of_fetched(monkeypatch)
        model = network()
        assert same(bits(load_mask(model, tmp_path)), bits(wanted))
        assert same(bits(unload_mask(model)), bits(base))
        assert same(bits(load_masked(network(), file, tmp_path)), bits(wanted))
        with MaskBank(model) as bank:
            bank.use(bank.add(tmp_path))
            assert same(bits(model), bits(wanted))
        assert not fetched

    def test_a_bank_keeps_masks_on_the_device(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = network()
        _, masks = packed(tmp_path, model, "ternary")
        size = 2 * sum(mask.total + 7 >> 3 for mask in masks.values())
        fetched = counts_of_fetched(monkeypatch)
        with MaskBank(model, max_device_bytes=size) as bank:
            name = bank.add(tmp_path)
            status = bank.status()
            assert (status.host_bytes, status.device_bytes) == (0, size)
            assert status.residents[name].density == masks.density
            for _ in range(2):
                bank.use(name)
                bank.disable()
            assert not fetched
        with MaskBank(model, max_device_bytes=size - 1) as bank:  # too little: they come to the host, once
            bank.use(bank.add(tmp_path, "mine"))
            assert not fetched  # the active adapter's do not count
            bank.disable()
            assert (bank.status().host_bytes, bank.status().device_bytes) == (size, 0)
            assert len(fetched) == 2 * len(masks)
            assert bank.parts("mine").masks == masks

    def test_the_cpu_decodes_where_triton_does_not_work(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        from maskpack.codecs.native import gpu

        def fail(*_: object) -> None:
            raise RuntimeError("no compiler")

        base = network()
        adapter, masks = packed(tmp_path, base)
        monkeypatch.setattr(gpu, "decode_events", fail)
        assert adapter.parts(base=base).masks == masks
        assert "masks are not decoded on cpu, but on the CPU: no compiler" in caplog.text

    @pytest.mark.parametrize(("size", "block"), [(0, 128), (3, 128), (2049, 4), (3073, 2)])
    def test_hashes(self, monkeypatch: pytest.MonkeyPatch, size: int, block: int) -> None:
        from maskpack.backbone import digest_gpu

        monkeypatch.setattr(digest_gpu, "BLOCK", block)  # of chunks: one, three; of programs: two
        data = torch.randint(256, (size + 1,), dtype=torch.uint8)[1:]
        assert digest_gpu.digest_of(data) == blake3(data.numpy().tobytes()).digest()

    @pytest.mark.parametrize(
        ("kind", "number", "count"), [(1, 1, 5), (0, 0, 5), (3, 2, 5), (2, 1, 4), (1, 0, 1), (0, 2, 0)]
    )
    def test_decodes_values(self, monkeypatch: pytest.MonkeyPatch, kind: int, number: int, count: int) -> None:
        from maskpack.codecs.native import steps_gpu

        monkeypatch.setattr(ulps, "PER_LANE", 64)  # eleven lanes
        name, base, values = words_of(kind + 4 * (number + 3 * count))
        made = ulps.encode(name, base, values)
        own = torch.from_numpy(base.view(f"i{base.itemsize}"))
        assert np.array_equal(steps_gpu.decode(made, own).numpy().view(base.dtype), values)
        for place in (len(made) // 2, len(made) - 1) if kind == 1 and count == 5 else ():
            spoiled = made[:place] + bytes([made[place] ^ 1]) + made[place + 1 :]
            try:
                wanted = ulps.decode(spoiled, base)
            except CorruptAdapterError:
                with pytest.raises(CorruptAdapterError):
                    steps_gpu.decode(spoiled, own)
            else:
                assert np.array_equal(steps_gpu.decode(spoiled, own).numpy().view(base.dtype), wanted)

    def test_a_digest_that_is_not_the_librarys_is_not_used(
        self, remote: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from maskpack.backbone import digest_gpu

        monkeypatch.setattr(digest_gpu, "digest_of", lambda data: bytes(32))
        base_digests._hashes.cache_clear()
        weight = torch.rand(5)
        assert tensor_digest(remote.Remote(weight), torch.bfloat16) == tensor_digest(weight, torch.bfloat16)
        assert "are not hashed there" in caplog.text
        base_digests._hashes.cache_clear()

    @pytest.mark.parametrize("kind", ["", "scale", "ternary"])
    def test_nothing_but_the_file_crosses_the_bus(self, remote: ModuleType, tmp_path: Path, kind: str) -> None:
        adapter, masks = packed(tmp_path, network(), kind)
        wanted, plain, crossed = network(), network(), remote.CROSSED
        apply_parts(wanted, Parts(masks))
        count = len(adapter.header.sets["default"].payloads)
        up = adapter.size + 200 * count  # with what is said of payloads and lanes
        down = 150 * count  # digests, sums, whether lanes came out even

        def crosses(up: int, down: int) -> None:
            assert crossed["to"] <= up
            assert crossed["from"] <= down
            crossed.clear()

        model = remote.moved(network())
        load_mask(model, tmp_path)
        crosses(up, down)
        assert same(remote.bits(model), bits(wanted))
        unload_mask(model)
        crosses(0, 0)
        assert same(remote.bits(model), bits(plain))
        with MaskBank(model) as bank:
            bank.add(tmp_path, "mine")
            crosses(up, down)
            for _ in range(2):
                bank.use("mine")
                assert same(remote.bits(model), bits(wanted))
                bank.disable()
                crosses(16, 0)  # a scale is a number
            assert same(remote.bits(model), bits(plain))
        file, given = tmp_path / "base.safetensors", {n: one.clone() for n, one in plain.state_dict().items()}
        save_file(given, file)
        crossed.clear()
        model = load_masked(remote.moved(network()), file, tmp_path)
        crosses(up + sum(one.nbytes for one in given.values()), down)
        assert same(remote.bits(model), bits(wanted))

    def test_nothing_but_patches_crosses_the_bus(self, remote: ModuleType, tmp_path: Path) -> None:
        states, chain, crossed = [network().bfloat16()], list[Adapter](), remote.CROSSED
        weights = sum(one.nbytes for one in states[0].parameters())
        for number in range(2):
            old, new = states[-1], copy.deepcopy(states[-1])
            for one in new.parameters():
                one.data *= 1 + 0.01 * (torch.rand(one.shape) < 0.1)
            kept = {name: one == dict(old.named_parameters())[name] for name, one in new.named_parameters()}
            values = {name: one.detach()[~kept[name]] for name, one in new.named_parameters()}
            parts = Parts(MaskSet.from_tensors(kept, op="replace"), values=values)
            about, base = About(result=fingerprint(new, id="tests:net").digests), fingerprint(old, id="tests:net")
            chain.append(save_adapter(tmp_path / str(number), parts, base, about, weights=old, profile="max"))
            assert all(isinstance(one, Steps) for one in chain[-1].parts(base=old).values.values())
            states.append(new)
        for links in (chain[:1], chain):
            model = remote.moved(copy.deepcopy(states[0]))
            load_mask(model, links)
            assert same(remote.bits(model), bits(states[len(links)]))
            assert crossed["to"] < sum(one.size for one in links) + 800 * len(links)
            assert crossed["from"] < 500 * len(links) < weights
            crossed.clear()
            unload_mask(model)
            assert same(remote.bits(model), bits(states[0]))
            assert not crossed

    def test_its_benchmark_runs(self) -> None:
        from benchmarks.gpu import rates

        found = rates("cpu", tiny=True)["rows"]
        assert [row["unit"] for row in found] == ["weights", "weights", "values", "bytes", "bytes"]

    def test_norms_are_made_there(self, remote: ModuleType, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(2, 64, bias=False), nn.BatchNorm1d(64)).eval()
        nn.init.normal_(model[1].weight)
        norm = Norm(np.arange(-32, 32, dtype=np.int32), np.arange(64, dtype=np.int32))
        parts = Parts(MaskSet.from_tensors({"0.weight": torch.rand(64, 2) < 0.9}), norms={"1": norm})
        save_adapter(tmp_path, parts, fingerprint(model, id="tests:net"))
        wanted, there = bits(load_mask(copy.deepcopy(model), tmp_path)), remote.moved(copy.deepcopy(model))
        load_mask(there, tmp_path)
        assert same(remote.bits(there), wanted)
        assert remote.CROSSED["from"] < 150 * 6  # of tensors, one has 256 bytes
        remote.CROSSED.clear()
        unload_mask(there)
        assert same(remote.bits(there), bits(model))
        assert not remote.CROSSED

    def test_a_mask_that_is_coded_against_another_set(self, remote: ModuleType, tmp_path: Path) -> None:
        model = network()
        _, masks = packed(tmp_path / "one", model)
        flips = {name: mask.tensor() ^ (torch.rand(mask.shape) < 0.02) for name, mask in masks.items()}
        sets = {"a": masks, "b": MaskSet.from_tensors(flips)}
        base = fingerprint(model, id="tests:net")
        adapter = save_adapter(tmp_path, sets, base, codec="logit-base", weights=model)
        (there,) = {payload.coding.reference for payload in adapter.header.sets["b"].payloads}
        assert there == "a"
        model = remote.moved(model)
        found = dict(adapter.iter_masks("b", base=model, zeros=True))
        assert remote.CROSSED["to"] < adapter.size + 800
        assert all(mask.there is not None for mask in found.values())
        assert {name: mask.kept for name, mask in found.items()} == {n: mask.kept for n, mask in sets["b"].items()}
        assert all(torch.equal(mask.tensor(), flips[name]) for name, mask in found.items())


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module of a device as a GPU is one, on which kernels run one at a time."""
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this release of PyTorch has no devices in Python")
    from maskpack.backbone import digest_gpu
    from maskpack.codecs.native import gpu

    from . import helpers_remote

    def digest_of(data: torch.Tensor) -> bytes:  # what the kernel gives, as is tested above, in less time
        helpers_remote.CROSSED["from"] += 32
        return blake3(helpers_remote.inner_of(data).numpy().tobytes()).digest()

    monkeypatch.setattr(digest_gpu, "digest_of", digest_of)
    monkeypatch.setattr("maskpack.runtime.load.in_thread", lambda work: work)
    gpu._tables(helpers_remote.DEVICE)  # part of the format, sent once
    return helpers_remote


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(capability: int) -> None:
    """Without a GPU at hand."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from maskpack.backbone import digest_gpu
    from maskpack.codecs.native import gpu, steps_gpu

    fixed = {"LANE": gpu.LANE, "FIELDS": len(gpu.FIELDS), "BLOCK": gpu.BLOCK, "LANES": ulps.MOST_LANES}
    for kernel, types, warps in (
        (gpu._coefficients, "*i16 *i32 *i32 *i32 *i32 *i64 *i64", 1),
        (gpu._events, "*i16 *i32 *i64 *i32 *i32 *i32 *i64 *i64 *i32 *i32 *u8 *u8", 1),
        (digest_gpu._chunks, "*i32 *i32 i64", 4),
        (digest_gpu._groups, "*i32 i32", 4),
        (steps_gpu._buckets, "*i16 *i32 *i16 *u8 *i32 i32 i32 i32 i32 i32 i32 i32", 1),
    ):
        own = {name: fixed[name] for name in kernel.arg_names if name in fixed}
        signature = dict(zip(kernel.arg_names, types.split(), strict=False)) | dict.fromkeys(own, "constexpr")
        how = {"num_warps": warps}
        made = compile(ASTSource(kernel, signature, own), GPUTarget("cuda", capability, 32), options=how)
        assert made.asm["cubin"]
