"""A live vLLM server on a CPU: `make vllm`, in an environment of its own; the contract with its classes where it is."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from maskpack import load_adapter, push
from maskpack.errors import AdapterError, StateError
from maskpack.runtime.serve import switch_server

from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import HubServer
from .helpers_hub_server.accounts import WRITE_TOKEN
from .helpers_served import call, mask, merged, network, patch, running

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; make vllm has an environment with it", allow_module_level=True)

SMOLLM2 = os.environ.get("MASKPACK_SMOLLM2")  # a folder, as benchmarks/smollm2.py makes it
LIVE = pytest.mark.skipif(SMOLLM2 is None, reason="MASKPACK_SMOLLM2 names no model; make vllm does")
QUESTIONS = ("What is the capital of France?", "Name three colours.", "What is 2 + 3?")
ENGINE = ("--weight-transfer-config", '{"backend": "maskpack"}')
TOKENS, MANY = 24, 160
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


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
        return call(self.url + path, body)

    def choice(self, question: str, tokens: int) -> Any:
        body = {"model": "m", "prompt": question, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
        return self.call("/v1/completions", body)["choices"][0]

    def answers(self) -> list[str]:
        return [str(self.choice(question, TOKENS)["text"]) for question in QUESTIONS]


@contextmanager
def serving(model: Path, *options: str, **settings: str) -> Iterator[Server]:
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    words += ["--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager", "--served-model-name", "m"]
    words += ["--gpu-memory-utilization", "0.2", *options]
    with running(words, model.parent, {**os.environ, **QUIET, **settings}, "/health") as url:
        yield Server(url)


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


@dataclass
class World:
    """SmolLM2 in a folder, adapters of it by name, and what servers of the merged checkpoints answer."""

    base: Path
    adapters: dict[str, Path]
    wanted: dict[str, list[str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    assert SMOLLM2 is not None
    folder, model = tmp_path_factory.mktemp("world"), network(Path(SMOLLM2))
    base = shutil.copytree(SMOLLM2, folder / "base")
    adapters = {"mask": mask(folder / "mask", model), "patch": patch(folder / "patch", model)}
    wanted = {}
    for name, path in adapters.items():
        with serving(merged(folder / f"merged-{name}", base, path)) as server:
            wanted[name] = server.answers()
    return World(base, adapters, wanted)


@LIVE
@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.transport("lfs")
def test_a_server(tmp_path: Path, world: World, hub: HubServer) -> None:
    model = network(world.base)
    commit = push(world.adapters["patch"], "alice/patch", token=WRITE_TOKEN).commit
    refs = {"mask": str(world.adapters["mask"]), "patch": f"alice/patch@{commit}"}
    with serving(world.base, *ENGINE, **hub.env(), HF_HUB_OFFLINE="0") as server:
        wanted = {**world.wanted, "base": server.answers()}
        assert len({tuple(one) for one in wanted.values()}) == 3
        sums = server.call("/weight_checker", {"action": "checksum"})["checksums"]
        for name in ("mask", "patch", "mask", "base", "patch"):
            done = switch_server(server.url, refs.get(name))
            assert server.answers() == wanted[name], name
            assert server.call("/weight_info")["weight_version"] == (done.ref or "base")
        assert done.ref == refs["patch"]
        command = [sys.executable, "-m", "maskpack_cli.main", "serve-switch", server.url]
        said = json.loads(subprocess.check_output([*command, refs["mask"], "--json"]))
        masks = load_adapter(world.adapters["mask"]).parts(base=model).masks
        assert said["changed"] == sum(len(one.bits) - one.kept for one in masks.values())
        assert server.answers() == wanted["mask"]
        subprocess.check_output([*command, "--off"])
        assert server.answers() == wanted["base"]
        compared = server.call("/weight_checker", {"action": "compare", "baseline": sums})
        assert compared == {"match": True, "mismatches": []}
        requests_in_flight(server, refs, wanted)
        errors(server, refs, wanted, tmp_path)
        killed_clients(server, command, refs, wanted)


def requests_in_flight(server: Server, refs: dict[str, str], wanted: dict[str, list[str]]) -> None:
    """What is being answered ends on the old weights, goes on with the new ones, or is ended."""
    question = QUESTIONS[0]
    whole = server.choice(question, MANY)["text"]
    said = {}
    for in_flight in ("finish", "hold", "abort"):
        found = list[Any]()
        asking = threading.Thread(target=lambda to=found: to.append(server.choice(question, MANY)))
        asking.start()
        time.sleep(1)
        switch_server(server.url, refs["patch"], in_flight=in_flight)  # type: ignore[arg-type]
        waiting = asking.is_alive()
        asking.join()
        assert server.answers() == wanted["patch"]
        switch_server(server.url, None)
        said[in_flight] = found[0]
        assert waiting == (in_flight == "hold")
    assert said["finish"]["text"] == whole
    assert said["hold"]["finish_reason"] == "length"  # all of its tokens
    assert said["hold"]["text"] != whole
    assert said["hold"]["text"][:10] == whole[:10]
    assert said["abort"]["finish_reason"] == "abort"
    assert whole.startswith(said["abort"]["text"])


def errors(server: Server, refs: dict[str, str], wanted: dict[str, list[str]], folder: Path) -> None:
    switch_server(server.url, refs["patch"])
    other = network(Path(str(SMOLLM2)))
    with torch.no_grad():
        other.get_parameter("model.norm.weight")[3] += 1
    with pytest.raises(AdapterError, match="was made for the weights of tests:base, and the model has others"):
        switch_server(server.url, mask(folder / "other", other))
    with pytest.raises(AdapterError, match="does not exist"):
        switch_server(server.url, folder / "nothing")
    damaged = Path(shutil.copytree(refs["mask"], folder / "damaged"))
    content = bytearray((damaged / "maskpack_model.safetensors").read_bytes())
    content[-1000] ^= 4
    (damaged / "maskpack_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="damaged"):
        switch_server(server.url, damaged)
    assert server.answers() == wanted["patch"]
    server.call("/start_weight_update", {})
    with pytest.raises(OSError, match="500"):  # an error within: vLLM's own calls, and a digest that nobody prepared
        server.call("/update_weights", {"update_info": {"digest": "0" * 64}})
    assert server.answers() == wanted["base"]


def killed_clients(server: Server, command: list[str], refs: dict[str, str], wanted: dict[str, list[str]]) -> None:
    """A client that is killed at any time leaves the base or a whole adapter, and the next one goes on from there."""
    before = "base"
    for number, name in enumerate(("mask", "patch", "mask", "patch")):
        with subprocess.Popen([*command, refs[name]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as client:
            began = time.monotonic()
            while time.monotonic() - began < 60 and not _paused(server):
                time.sleep(0.002)
            time.sleep(0.05 * number)
            client.kill()
        time.sleep(1)  # what it asked for last comes to its end
        server.call("/resume", {})
        found = server.answers()
        assert found in (wanted[before], wanted[name]), (before, name)
        before = name
        switch_server(server.url, refs[name])
        assert server.answers() == wanted[name]
    switch_server(server.url, None)
    assert server.answers() == wanted["base"]


def _paused(server: Server) -> bool:
    return bool(server.call("/is_paused")["is_paused"])


IN_PROCESS = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from maskpack.integrations.vllm import switch

def fail_at(worker, count):
    from maskpack.runtime import apply
    real, left = apply._apply, iter(range(count))
    def failing(*arguments):
        if next(left, None) is None:
            raise MemoryError("out of luck")
        real(*arguments)
    apply._apply = failing
    worker.mend = lambda: setattr(apply, "_apply", real)

def main():
    base, adapters, questions, tokens, file = json.loads(sys.argv[1])
    llm = LLM(base, dtype="bfloat16", max_model_len=512, enforce_eager=True, gpu_memory_utilization=0.2,
              weight_transfer_config=WeightTransferConfig(backend="maskpack"))
    settings, found = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), []

    def ask(name, pinned):
        said = [llm.generate(one, settings, use_tqdm=False)[0].outputs[0].text for one in questions]
        found.append([name, said, pinned, llm.get_weight_version()])

    ask("base", None)
    for name in ("mask", "patch", "base"):
        ask(name, switch(llm, adapters.get(name)))
    switch(llm, adapters["mask"])
    try:
        switch(llm, "./nothing")
    except Exception as error:
        assert "does not exist" in str(error), error
    ask("mask", None)
    for count in (1, 100):
        llm.collective_rpc(fail_at, args=(count,))
        try:
            switch(llm, adapters["patch"])
        except Exception as error:
            assert "out of luck" in str(error), error
        else:
            raise SystemExit("nothing failed")
        llm.collective_rpc(lambda worker: worker.mend())
        ask("base", None)
        switch(llm, adapters["mask"])
    with open(file, "w") as out:
        json.dump(found, out)

if __name__ == "__main__":
    main()
"""


@LIVE
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_in_the_same_program(tmp_path: Path, world: World) -> None:
    (tmp_path / "run.py").write_text(IN_PROCESS)
    adapters, file = {name: str(path) for name, path in world.adapters.items()}, tmp_path / "found.json"
    given = json.dumps([str(world.base), adapters, QUESTIONS, TOKENS, str(file)])
    environment = {**os.environ, **QUIET, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    words = [sys.executable, "-W", "ignore", str(tmp_path / "run.py"), given]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert [one[0] for one in found] == ["base", "mask", "patch", "base", "mask", "base", "base"]
    wanted = {**world.wanted, "base": found[0][1]}
    for name, said, pinned, version in found[1:]:
        path = None if name == "base" else str(world.adapters[name] / "maskpack_model.safetensors")
        assert said == wanted[name], name
        assert version == (path or "base")
        assert pinned in (path, None)


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
