"""The codec logit as a GPU decodes it: by Triton's interpreter here, on a GPU in test_cuda.py."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from maskpack import MaskBank, Parts, fingerprint, load_mask, load_masked, save_adapter, unload_mask
from maskpack import mask as masks_module
from maskpack.adapter.read import Adapter
from maskpack.codecs import logit
from maskpack.errors import CorruptAdapterError
from maskpack.mask import MaskSet
from maskpack.runtime.apply import apply_parts

from .fuzz.fuzz_logit import SHAPES, side_of
from .helpers_models import bits, same

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")
INTERPRETED = "TRITON_INTERPRET" in os.environ  # which counts when Triton is imported, hence a process of its own


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_by_the_interpreter() -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestInterpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "8 passed" in done.stdout


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


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(capability: int) -> None:
    """Without a GPU at hand."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from maskpack.codecs.native import gpu

    fixed = {"FIELDS": len(gpu.FIELDS), "BLOCK": gpu.BLOCK}
    for kernel, types in (
        (gpu._coefficients, "*i16 *i64 *i32 *u8 *i32 *i64 *i64"),
        (gpu._events, "*i16 *i64 *i32 *i32 *i32 *i64 *i64 *i32 *i32 *u8 *u8"),
    ):
        own = {name: fixed[name] for name in kernel.arg_names if name in fixed}
        signature = dict(zip(kernel.arg_names, types.split(), strict=False)) | dict.fromkeys(own, "constexpr")
        made = compile(ASTSource(kernel, signature, own), GPUTarget("cuda", capability, 32), options={"num_warps": 1})
        assert made.asm["cubin"]
