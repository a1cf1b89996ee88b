"""On a GPU: the bits that a CPU gives, one storage for all masks, graphs that stay valid. Skipped where none is."""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from maskpack_cli.main import app
from torch import nn
from typer.testing import CliRunner

from maskpack import MaskBank, fingerprint, load_mask, load_masked, unload_mask
from maskpack.backbone.fingerprint import _hashes
from maskpack.backbone.load import export_state
from maskpack.training import attach_scores, extract_masks
from maskpack.training.scores import scored_weights

from .conftest import TinyNet
from .helpers_cli import BACKBONE, TRAIN
from .helpers_models import KINDS, adapter_of, bits, patch, same, stepped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_cpu(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in bits(model).items()}


@pytest.fixture
def paths(tmp_path: Path, tiny: nn.Module) -> dict[str, Path]:
    return {kind: adapter_of(tmp_path / kind, tiny, kind, seed, 5) for seed, kind in enumerate(KINDS)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_load_and_unload(tiny: nn.Module, paths: dict[str, Path], dtype: torch.dtype) -> None:
    tiny.to(dtype)
    for path in paths.values():
        model = copy.deepcopy(tiny).cuda()
        where = {name: p.data_ptr() for name, p in model.named_parameters()}
        load_mask(model, path)
        assert same(on_cpu(model), bits(load_mask(copy.deepcopy(tiny), path))), path
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == where
        assert same(on_cpu(unload_mask(model)), bits(tiny))


def test_fingerprint(tiny: nn.Module) -> None:
    assert fingerprint(copy.deepcopy(tiny).cuda(), id="x", head=["fc"]) == fingerprint(tiny, id="x", head=["fc"])
    large = nn.Sequential(nn.Linear(1000, 777), nn.Linear(777, 9000))  # of many chunks, an odd number of words in half
    assert fingerprint(copy.deepcopy(large).cuda(), id="x") == fingerprint(large, id="x")
    assert _hashes(torch.device("cuda", 0))  # there


def test_patches(tiny: nn.Module, tmp_path: Path) -> None:
    states = [tiny.bfloat16()]
    for buffer in tiny.buffers():
        buffer.data = buffer.float() if buffer.is_floating_point() else buffer
    for seed in (1, 2):
        states.append(stepped(states[-1], seed))
    chain = [patch(tmp_path / str(k), *states[k : k + 2]) for k in range(2)]
    model = copy.deepcopy(states[0]).cuda()
    for links in (chain[:1], chain):
        load_mask(model, links)
        assert same(on_cpu(model), bits(states[len(links)]))
        assert same(on_cpu(unload_mask(model)), bits(states[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_masks_together(
    tiny: nn.Module, paths: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    weights = tmp_path / "base.safetensors"
    export_state(weights, tiny)
    for path in paths.values():
        with torch.device("meta"):
            model = TinyNet().eval().to(dtype)
        load_masked(model, weights, path, device="cuda")
        assert all(p.is_cuda for p in model.parameters())
        assert same(on_cpu(model), bits(load_mask(copy.deepcopy(tiny).to(dtype), path))), path


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bank(tiny: nn.Module, paths: dict[str, Path], dtype: torch.dtype) -> None:
    tiny.to(dtype)
    wanted = {None: bits(tiny), **{k: bits(load_mask(copy.deepcopy(tiny), path)) for k, path in paths.items()}}
    model, draw = copy.deepcopy(tiny).cuda(), random.Random(0)
    with MaskBank(model) as bank:
        for path in paths.values():
            bank.add(path)
        for _ in range(60):
            name = draw.choice([None, *KINDS])
            if name is None:
                bank.disable()
            else:
                bank.use(name)
            assert same(on_cpu(model), wanted[name])
    assert same(on_cpu(model), wanted[None])


def test_a_captured_graph_sees_the_switch(tiny: nn.Module, paths: dict[str, Path]) -> None:
    model = tiny.cuda()
    x = torch.randn(4, 3, 8, 8, device="cuda")
    with MaskBank(model) as bank, torch.no_grad():
        for path in paths.values():
            bank.add(path)
        bank.use("zero")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        seen = []
        for name in KINDS:
            bank.use(name)
            graph.replay()
            seen.append(captured.clone())
            assert torch.allclose(captured, model(x), atol=1e-5)
        assert all(not torch.allclose(seen[0], other, atol=1e-3) for other in seen[1:])


def test_a_mixed_batch(tiny: nn.Module, paths: dict[str, Path]) -> None:
    x = torch.randn(6, 3, 8, 8, device="cuda")
    with MaskBank(tiny.cuda()) as bank, torch.no_grad():
        for path in paths.values():
            bank.add(path)
        names = [KINDS[at % 3] for at in range(6)]
        mixed = bank(x, masks=names)
        for at, name in enumerate(names):
            with bank.using(name):
                assert torch.allclose(mixed[at], bank.model(x[at : at + 1])[0], atol=1e-4)


@pytest.mark.parametrize("scale", [False, True])
def test_what_training_sees_is_what_loading_gives(tiny: nn.Module, scale: bool) -> None:
    model = tiny.cuda()
    scores = attach_scores(model, "threshold", scale=scale)
    optimizer = torch.optim.Adam(scores.values(), lr=0.5)
    x, y = torch.randn(32, 3, 8, 8, device="cuda"), torch.randint(5, (32,), device="cuda")
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    seen = {name: model.get_submodule(name.rpartition(".")[0]).weight.detach().clone() for name in scores}
    assert set(scored_weights(model)) == set(scores)
    masks = extract_masks(model)
    for name, weight in seen.items():
        mask, own = masks[name], dict(model.named_parameters())[name].detach()
        divided = own if mask.alpha is None else own / torch.tensor(mask.alpha, device="cuda")
        assert torch.equal(weight, torch.where(mask.tensor().cuda(), divided, 0.0))
        assert 0 < mask.kept < len(mask.bits)


@pytest.mark.parametrize("verb", ["eval", "analyze mistakes"])
def test_the_command_line_computes_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    adapters = [str(tmp_path / "mask")] * (1 if verb == "eval" else 2)
    words = [*verb.split(), *adapters, *BACKBONE, "--data", "digits:5-9", "--json", "--quiet"]
    assert CliRunner().invoke(app, [*TRAIN, "--output", str(tmp_path / "mask")]).exit_code == 0
    found = []
    for on_cpu in ("false", "true"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", on_cpu)
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved()
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.stderr
        assert (torch.cuda.memory_reserved() > reserved) == (on_cpu == "false")
        answer = json.loads(done.stdout)
        found.append(answer["accuracy"] if verb == "eval" else answer["networks"][0]["accuracy"])
    assert found[0] == pytest.approx(found[1], abs=0.02)


@pytest.mark.parametrize("on_cpu", ["true", "false"])
def test_training_may_be_kept_from_it(tmp_path: Path, on_cpu: str) -> None:
    words = [*TRAIN, "--output", str(tmp_path / "mask")]
    code = f"from maskpack_cli.main import app; app({words!r}, standalone_mode=False); import torch; "
    code += "print(torch.cuda.is_initialized() and torch.cuda.max_memory_allocated() > 0)"
    environment = {**os.environ, "ACCELERATE_USE_CPU": on_cpu}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == [str(on_cpu == "false")], done.stderr
