"""A live vLLM server on a CPU: `make vllm`, in an environment of its own; the contract with its classes where it is."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from torch import nn

from maskpack import MaskSet, Parts, fingerprint, load_mask, save_adapter
from maskpack.errors import AdapterError, StateError
from maskpack.mask import PackedMask
from maskpack.runtime.serve import switch_server

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; make vllm has an environment with it", allow_module_level=True)

SMOLLM2 = os.environ.get("MASKPACK_SMOLLM2")  # a folder, as benchmarks/smollm2.py makes it
LIVE = pytest.mark.skipif(SMOLLM2 is None, reason="MASKPACK_SMOLLM2 names no model; make vllm does")
QUESTIONS = ("What is the capital of France?", "Name three colours.", "What is 2 + 3?")
ENGINE = ("--weight-transfer-config", '{"backend": "maskpack"}')


def test_contract() -> None:
    # in a process of its own: vLLM changes much when it is imported
    code = """
import inspect
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory
from vllm.model_executor.layers import utils
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.plugins import load_general_plugins
from vllm.v1.worker.worker_base import WorkerBase
load_general_plugins()
from maskpack.integrations.vllm import MaskpackEngine, register
register()  # again
assert Factory._registry["maskpack"]() is MaskpackEngine
assert WeightTransferConfig(backend="maskpack").backend == "maskpack"
assert not MaskpackEngine.__abstractmethods__
named = lambda function: " ".join(inspect.signature(function).parameters)
assert named(WeightTransferEngine.__init__) == "self config vllm_config device model"
assert named(DefaultModelLoader.get_all_weights) == "self model_config model"
assert named(utils.dispatch_cpu_unquantized_gemm) == "layer remove_weight"
assert callable(WorkerBase.maskpack)
engine = object.__new__(MaskpackEngine)
assert engine.parse_init_info({"keep": 2}).keep == 2
assert engine.parse_update_info({"ref": "user/name@main"}).ref == "user/name@main"
try:
    engine.parse_update_info({"path": "x"})
except ValueError as error:
    assert "path" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


class Server:
    """A running server, and how to ask it."""

    def __init__(self, url: str):
        self.url = url

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=300) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def answer(self, question: str, tokens: int = 24) -> str:
        body = {"model": "m", "prompt": question, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
        return str(self.call("/v1/completions", body)["choices"][0]["text"])

    def answers(self) -> list[str]:
        return [self.answer(question) for question in QUESTIONS]


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    words += ["--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager", "--served-model-name", "m"]
    words += ["--gpu-memory-utilization", "0.2", "--host", "127.0.0.1", *options]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    log = model.parent / f"server-{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(map(str, words), stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        until = time.monotonic() + 900
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield Server(f"http://127.0.0.1:{port}")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(300)


def llama(folder: Path) -> Path:
    """A small network with random weights and 4 heads: the 9 of SmolLM2 cannot be shared by two workers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    assert SMOLLM2 is not None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(SMOLLM2, name), folder)
    return folder


def network(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # type: ignore[no-any-return]


def mask(path: Path, model: nn.Module) -> Path:
    """Remove the smallest 40 % of the weights of the layers that go back to the hidden size."""
    weights = {
        n: p.detach().abs() for n, p in model.named_parameters() if n.endswith(("down_proj.weight", "o_proj.weight"))
    }
    masks = MaskSet.from_tensors({name: one > one.float().quantile(0.4) for name, one in weights.items()})
    save_adapter(path, masks, fingerprint(model, id="tests:base"), weights=model)
    return path


def patch(path: Path, model: nn.Module) -> Path:
    """Change a hundredth of all weights of the layers by a quarter, and the last norm."""
    generator, masks, values = torch.Generator().manual_seed(0), {}, {}
    for name, weight in model.named_parameters():
        if "_proj" in name:
            kept = torch.rand(weight.shape, generator=generator) > 0.01
            masks[name] = PackedMask.from_tensor(kept, "replace")
            values[name] = weight.detach()[~kept] * 1.25
    norm = {"model.norm.weight": model.get_parameter("model.norm.weight").detach() * 1.5}
    save_adapter(
        path, Parts(MaskSet(masks), values=values, parameters=norm), fingerprint(model, id="tests:base"), weights=model
    )
    return path


def merged(folder: Path, base: Path, adapter: Path) -> Path:
    from safetensors.torch import save_file

    model = load_mask(network(base), adapter)
    shutil.copytree(base, folder)
    tensors = {name: one.contiguous() for name, one in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@LIVE
@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_a_server(tmp_path: Path) -> None:
    assert SMOLLM2 is not None
    base, model = Path(SMOLLM2), network(Path(SMOLLM2))
    shutil.copytree(base, here := tmp_path / "base")
    adapters = {"mask": mask(tmp_path / "mask", model), "patch": patch(tmp_path / "patch", model)}
    wanted = {}
    for name, path in adapters.items():
        with serving(merged(tmp_path / f"merged-{name}", base, path), *ENGINE) as server:
            wanted[name] = server.answers()
    with serving(here, *ENGINE) as server:
        wanted["base"] = server.answers()
        sums = server.call("/weight_checker", {"action": "checksum"})["checksums"]
        assert len({tuple(one) for one in wanted.values()}) == 3
        for name in ("mask", "patch", "mask", "base", "patch"):
            done = switch_server(server.url, adapters.get(name))
            assert server.answers() == wanted[name], name
            assert server.call("/weight_info")["weight_version"] == (done.ref or "base")
        command = [sys.executable, "-m", "maskpack_cli.main", "serve-switch", server.url]
        said = json.loads(subprocess.check_output([*command, str(adapters["mask"]), "--json"]))
        assert said["changed"] == sum(len(one.bits) - one.kept for one in _masks(adapters["mask"], model).values())
        assert server.answers() == wanted["mask"]
        subprocess.check_output([*command, "--off"])
        assert server.answers() == wanted["base"]
        assert server.call("/weight_checker", {"action": "compare", "baseline": sums}) == {
            "match": True,
            "mismatches": [],
        }
        requests_in_flight(server, adapters, wanted)
        errors(server, adapters, wanted, tmp_path)


def _masks(path: Path, model: nn.Module) -> MaskSet:
    from maskpack import load_adapter

    return load_adapter(path).parts(base=model).masks


def requests_in_flight(server: Server, adapters: dict[str, Path], wanted: dict[str, list[str]]) -> None:
    """What is being answered ends on the old weights, or goes on with the new ones."""
    tokens, question, found = 160, QUESTIONS[0], list[str]()
    whole = server.answer(question, tokens)
    for in_flight in ("finish", "hold"):
        asking = threading.Thread(target=lambda: found.append(server.answer(question, tokens)))
        asking.start()
        time.sleep(1)
        switch_server(server.url, adapters["patch"], in_flight=in_flight)  # type: ignore[arg-type]
        asking.join()
        assert server.answers() == wanted["patch"]
        switch_server(server.url, None)
    assert found[0] == whole
    assert found[1] != whole
    assert found[1][:10] == whole[:10]


def errors(server: Server, adapters: dict[str, Path], wanted: dict[str, list[str]], folder: Path) -> None:
    switch_server(server.url, adapters["patch"])
    other = network(Path(str(SMOLLM2)))
    with torch.no_grad():
        other.get_parameter("model.norm.weight")[3] += 1
    with pytest.raises(AdapterError, match="was made for the weights of tests:base, and the model has others"):
        switch_server(server.url, mask(folder / "other", other))
    with pytest.raises(AdapterError, match="does not exist"):
        switch_server(server.url, folder / "nothing")
    assert server.answers() == wanted["patch"]
    server.call("/start_weight_update", {})
    with pytest.raises(OSError, match="500"):  # an error within: vLLM's own calls, and a digest that nobody prepared
        server.call("/update_weights", {"update_info": {"digest": "0" * 64}})
    assert server.answers() == wanted["base"]
    server.call("/start_weight_update", {})  # of a client that was killed
    switch_server(server.url, adapters["mask"])
    assert server.answers() == wanted["mask"]
    switch_server(server.url, None)
    assert server.answers() == wanted["base"]


@LIVE
@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_two_workers(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    model = network(base)
    adapters = {"mask": mask(tmp_path / "mask", model), "patch": patch(tmp_path / "patch", model)}
    wanted, two = {}, (*ENGINE, "--tensor-parallel-size", "2")
    for name, path in adapters.items():
        with serving(merged(tmp_path / f"merged-{name}", base, path), *two) as server:
            wanted[name] = server.answers()
    with serving(base, *two) as server:
        wanted["base"] = server.answers()
        assert len({tuple(one) for one in wanted.values()}) == 3
        for name in ("mask", "patch", "base", "mask"):
            switch_server(server.url, adapters.get(name))
            assert server.answers() == wanted[name], name


@LIVE
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_another_engine_is_an_error(tmp_path: Path) -> None:
    with serving(llama(tmp_path / "base")) as server:
        with pytest.raises(StateError, match=r"cannot switch adapters .*; start it with VLLM_SERVER_DEV_MODE=1 and"):
            switch_server(server.url, None)
