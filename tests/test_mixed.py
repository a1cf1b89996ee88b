"""Several adapters in one pass: corrected layers agree with switched ones, and texts are the same."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from maskpack import MaskBank, MaskSet, Parts
from maskpack.errors import ConfigError, DataError, StateError
from maskpack.mask import PackedMask
from maskpack.runtime.mixed import Correction, _add, corrections, mixing

from .helpers_models import bits, same

INTERPRETED = "TRITON_INTERPRET" in os.environ


def llama(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, pad_token_id=0, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()  # type: ignore[no-any-return]


def few(model: nn.Module, op: Any, seed: int, share: float = 0.01) -> Parts:
    """Change few weights, some to great values, of every other linear layer."""
    generator, masks, values = torch.Generator().manual_seed(seed), {}, {}
    for name, weight in list(model.named_parameters())[seed % 2 :: 2]:
        if "_proj" in name:
            kept = torch.rand(weight.shape, generator=generator) >= share
            masks[name] = PackedMask.from_tensor(kept, op)
            if op == "replace":
                values[name] = torch.randn(masks[name].bits.count(0), generator=generator) * 3
    return Parts(MaskSet(masks), values=values)


@pytest.fixture
def bank() -> MaskBank:
    bank = MaskBank(llama())
    for seed, op in enumerate(("replace", "flip", "zero")):
        bank.add(few(bank.model, op, seed), op)
    return bank


MASKS = ["replace", None, "zero", "flip", "replace"]


def test_outputs_of_a_pass(bank: MaskBank) -> None:
    inputs = torch.randint(0, 60, (5, 7))
    wanted = torch.stack(bank(inputs, MASKS))
    found = [None if name is None else bank._correction(name) for name in MASKS]
    base = bits(bank.model)
    with torch.no_grad(), mixing(bank.model, found):
        torch.testing.assert_close(bank.model(inputs).logits, wanted, rtol=1e-4, atol=1e-4)
        with pytest.raises(DataError, match="5 examples came to a layer as 4 rows"):
            bank.model(inputs[:4])
    assert same(bits(bank.model), base)
    assert not any(one._forward_hooks for one in bank.model.modules())
    torch.testing.assert_close(torch.stack(bank(inputs, MASKS)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    with MaskBank(model) as bank:
        for seed, op in enumerate(("replace", "flip", "zero")):
            bank.add(few(model, op, seed), op)
        inputs = {"input_ids": torch.randint(1, 60, (5, 4)), "attention_mask": torch.ones(5, 4, dtype=torch.long)}
        inputs["attention_mask"][2, :2] = 0  # padded on the left
        grouped = bank.generate(inputs, MASKS, mixed=False, max_new_tokens=6, do_sample=False)
        for mixed in (None, True):
            found = bank.generate(inputs, MASKS, mixed=mixed, max_new_tokens=6, do_sample=False)
            assert [one.tolist() for one in found] == [one.tolist() for one in grouped]
        alone = []
        for index, name in enumerate(MASKS):
            with bank.using(name):
                own = {key: value[index : index + 1] for key, value in inputs.items()}
                alone.append(model.generate(**own, max_new_tokens=6, do_sample=False)[0].tolist())  # type: ignore[operator]
        assert [one.tolist() for one in grouped] == alone
        beams = bank.generate(inputs, MASKS, max_new_tokens=3, num_beams=2, num_return_sequences=2, do_sample=False)
        assert [one.shape for one in beams] == [(2, 7)] * 5


def test_what_cannot_be_in_one_pass(bank: MaskBank) -> None:
    model, ids = bank.model, torch.randint(0, 60, (2, 4))
    bank.add(few(model, "flip", 0, share=0.1), "many")
    norm = Parts(MaskSet({}), parameters={"model.norm.weight": torch.ones(32)})
    bank.add(norm, "norm")
    scaled = {name: one.scaled() for name, one in few(model, "zero", 0).masks.items()}
    bank.add(MaskSet(scaled), "scaled")
    for name in ("many", "norm", "scaled"):
        with pytest.raises(ConfigError, match=f"'{name}' cannot be one of several adapters in a pass"):
            bank.generate(ids, [name, None], mixed=True, max_new_tokens=2)
        assert len(bank.generate(ids, [name, None], max_new_tokens=2, do_sample=False)) == 2  # grouped
    with pytest.raises(ConfigError, match="got 1 names for 2 examples"):
        bank.generate(ids, ["flip"])
    with pytest.raises(ConfigError, match="a Sequential does not generate"):
        MaskBank(nn.Sequential(nn.Linear(2, 2))).generate(torch.zeros(1, 2), [None])
    tied = llama(tie_word_embeddings=True)
    embedding = MaskSet.from_tensors({"lm_head.weight": torch.rand(60, 32) > 0.01})
    assert corrections(tied, Parts(embedding)) is None
    model.get_submodule("model.norm").compile()
    with pytest.raises(StateError, match="the model is compiled"), mixing(model, [None]):
        pass


def test_corrections_are_counted_and_dropped() -> None:
    model = llama()
    with MaskBank(model, max_device_bytes=0) as bank:
        bank.add(few(model, "flip", 0), "one")
        assert bank.status().device_bytes == 0
        bank.generate(torch.ones(2, 2, dtype=torch.long), ["one", None], max_new_tokens=1)
        assert bank.status().device_bytes > 0
        bank.use("one")
        bank.disable()
        assert bank.status().device_bytes == 0


def sparse(seed: int, whole: bool) -> tuple[Correction | None, torch.Tensor]:
    """Return changes, and the same as a matrix; whole numbers are added up exactly in any order."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(-4, 5, (37, 50), generator=generator).float()
    dense = torch.where(torch.rand(dense.shape, generator=generator) < 0.1, dense if whole else dense / 7, 0)
    at = dense.flatten().nonzero()[:, 0]
    begin = torch.searchsorted(at, torch.arange(38) * 50)
    return Correction(begin.int(), (at % 50).int(), dense.flatten()[at]), dense


def check(add: Any) -> None:
    for whole in (True, False):
        found = [sparse(seed, whole) for seed in range(3)]
        rows = torch.tensor([2, -1, 0, 0, 2, 3, 2])
        generator = torch.Generator().manual_seed(9)
        inputs = torch.randint(-5, 6, (7, 50), generator=generator).float() if whole else torch.randn(7, 50)
        total = torch.ones(7, 37)
        add([found[0][0], found[1][0], found[2][0], None], inputs, rows, total)
        dense = [*(one[1] for one in found), torch.zeros(37, 50), torch.zeros(37, 50)]
        wanted = [1 + linear(x, dense[row]) for x, row in zip(inputs, rows.tolist(), strict=True)]
        if whole:
            assert torch.equal(total, torch.stack(wanted))
        else:
            torch.testing.assert_close(total, torch.stack(wanted))


def test_sums() -> None:
    check(_add)


def test_sums_by_triton() -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")
    if not INTERPRETED:  # which counts when Triton is imported, hence a process of its own
        words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
        words.append(f"{__file__}::test_sums_by_triton")
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:]
        assert "1 passed" in done.stdout
        return
    from maskpack.runtime.mixed_gpu import Stacked

    check(lambda found, inputs, rows, total: Stacked(found).add(inputs, rows, total))
