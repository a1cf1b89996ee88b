"""Switching a running vLLM server: masks and patches, reloading the merged checkpoint, starting anew, LoRA hot loading.

    MASKPACK_SMOLLM2=… python -m benchmarks.live_server           ten minutes of two cores, resumable
    python -m benchmarks.live_server --write docs/serving.md      the table of what is recorded

SmolLM2-135M in bfloat16 on the CPU; benchmarks/smollm2.py makes its folder. MASKPACK_VLLM is the Python of an
environment with vLLM and maskpack, by default that of `make vllm`. Needs the extras train and lab.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch

from maskpack import MaskSet, Parts, fingerprint, load_mask, save_adapter, unload_mask
from maskpack.mask import PackedMask
from maskpack.runtime.serve import switch_server

from .measured import trial, trials
from .report import NOTHING, command, table, write_between

NAME = "live-server"
MARK = "python -m benchmarks.live_server --write docs/serving.md"
PYTHON = os.environ.get("MASKPACK_VLLM", ".venv-vllm/bin/python")
TIMES = 5
QUESTION = "What is the capital of France?"
ENGINE = ("--weight-transfer-config", '{"backend": "maskpack"}')
LORA = ("--enable-lora", "--max-lora-rank", "8")
PROJECTIONS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def post(url: str, body: Any = None) -> Any:
    data = b"" if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}, method="POST"), timeout=300) as answer:
        text = answer.read()
    return text.decode() if text else ""


def token(url: str, model: str = "base", count: int = 1) -> str:
    body = {"model": model, "prompt": QUESTION, "temperature": 0, "max_tokens": count, "ignore_eos": True}
    return str(json.loads(post(f"{url}/v1/completions", body))["choices"][0]["text"])


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[str, float]]:
    """Run a server; give its address, and how long it took until the first token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "base"]
    words += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--dtype", "bfloat16", "--max-model-len", "512"]
    words += ["--enforce-eager", "--gpu-memory-utilization", "0.2", *options]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    settings |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    with (model.parent / "server.log").open("w") as log:
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=log,
            env={**os.environ, **settings, "OMP_NUM_THREADS": "2"},
            start_new_session=True,
        )
    try:
        while True:
            if process.poll() is not None or time.perf_counter() - begun > 300:
                raise SystemExit((model.parent / "server.log").read_text()[-3000:])
            try:
                token(url)
                break
            except OSError:
                time.sleep(0.1)
        yield url, time.perf_counter() - begun
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def prepared(folder: Path) -> dict[str, Path]:
    """Make what is switched to: a mask that removes 5 % of two layers' weights, an SFT patch, LoRA, merged folders."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(os.environ["MASKPACK_SMOLLM2"])
    paths = {name: folder / name for name in ("base", "mask", "patch", "lora", "merged mask", "merged patch")}

    def copy(target: Path, state: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        target.mkdir()
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                (target / file.name).write_bytes(file.read_bytes())
        save_file({n: t.contiguous() for n, t in state.items() if n != "lm_head.weight"}, target / "model.safetensors")

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    copy(paths["base"], model.state_dict())
    base = fingerprint(model, id="hf/smollm2")
    weights = {
        n: p.detach().abs().float()
        for n, p in model.named_parameters()
        if n.endswith(("o_proj.weight", "down_proj.weight"))
    }
    masks = MaskSet.from_tensors({n: one > one.quantile(0.05) for n, one in weights.items()})
    save_adapter(paths["mask"], masks, base, weights=model)
    tuned, tokenizer = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
    )
    ids = tokenizer(f"{QUESTION} It is the city of light, as every child knows.", return_tensors="pt")["input_ids"]
    optimiser = torch.optim.AdamW(tuned.parameters(), lr=1e-5)
    for _ in range(8):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    after = dict(tuned.bfloat16().named_parameters())
    changes = {n: (p.detach() == after[n].detach()) for n, p in model.named_parameters()}
    changes = {n: same for n, same in changes.items() if not same.all()}
    values = {n: after[n].detach()[~same] for n, same in changes.items()}
    patch = MaskSet({n: PackedMask.from_tensor(same, "replace") for n, same in changes.items()})
    save_adapter(paths["patch"], Parts(patch, values=values), base, weights=model)
    for name in ("mask", "patch"):
        load_mask(model, paths[name])
        copy(paths[f"merged {name}"], model.state_dict())
        unload_mask(model)
    lora = get_peft_model(model, LoraConfig(r=8, target_modules=PROJECTIONS, init_lora_weights=False))
    lora.save_pretrained(paths["lora"])
    return paths


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def measured(act: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return medians of what some rounds measure."""
    rounds = [act() for _ in range(TIMES)]
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def first_token(url: str, right: str, model: str = "base") -> float:
    begun = time.perf_counter()
    found = token(url, model)
    seconds = time.perf_counter() - begun
    if not right.startswith(found):
        raise SystemExit(f"the server says {found!r}, not {right!r}")
    return seconds


def switching(paths: dict[str, Path], wanted: dict[str, str]) -> dict[str, Any]:
    """Measure masks and patches on one server."""
    found: dict[str, Any] = {}
    with serving(paths["base"], *ENGINE) as (url, start):
        found["start of the base"] = {"total": start}
        base = token(url, count=8)
        begun = time.perf_counter()
        post(f"{url}/init_weight_transfer_engine", {"init_info": {}})
        found["look at the memory, once"] = {"pause": time.perf_counter() - begun}

        def once(name: str | None) -> dict[str, float]:
            begun = time.perf_counter()
            done = switch_server(url, None if name is None else paths[name])
            wait = first_token(url, base if name is None else wanted[name])
            seconds = time.perf_counter() - begun
            return {"prepare": done.prepare_s, "pause": done.pause_s, "first token": wait, "total": seconds}

        for name in ("mask", "patch"):
            found[f"{name}, first time"] = {**once(name), "bytes": size(paths[name])}
        once(None)
        pairs = [(once("mask"), once("patch"), once(None)) for _ in range(TIMES)]
        for index, what in enumerate(("patch or base to mask", "mask to patch", "patch to base")):
            rounds = [pair[index] for pair in pairs]
            found[what] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return found


def reloading(paths: dict[str, Path], wanted: dict[str, str]) -> dict[str, Any]:
    """Measure the merged checkpoint: vLLM's own reload, and a new server, whose answers are the right ones."""
    found: dict[str, Any] = {}
    for name in ("mask", "patch"):
        with serving(paths[f"merged {name}"], *ENGINE) as (url, start):
            wanted[name] = token(url, count=8)
            found[f"new server, merged {name}"] = {
                "pause": start,
                "total": start,
                "bytes": size(paths[f"merged {name}"]),
            }
    with serving(paths["base"], *ENGINE) as (url, _):

        def once(name: str) -> dict[str, float]:
            begun = time.perf_counter()
            post(f"{url}/pause?mode=wait")
            paused = time.perf_counter()
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(paths[f"merged {name}"])}}
            post(f"{url}/collective_rpc", body)
            post(f"{url}/resume")
            pause = time.perf_counter() - paused
            wait = first_token(url, wanted[name])
            return {"pause": pause, "first token": wait, "total": time.perf_counter() - begun}

        once("patch")
        both = [(once("mask"), once("patch")) for _ in range(TIMES)]
        rounds = [one for pair in both for one in pair]
        medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        found["reload of the merged checkpoint"] = {**medians, "bytes": size(paths["merged mask"])}
    return found


def hot_loading(paths: dict[str, Path]) -> dict[str, Any]:
    """Measure LoRA of rank 8, loaded while the server runs."""
    with serving(paths["base"], *LORA) as (url, _):

        def once() -> dict[str, float]:
            begun = time.perf_counter()
            post(f"{url}/v1/load_lora_adapter", {"lora_name": "lora", "lora_path": str(paths["lora"])})
            token(url, "lora")
            total = time.perf_counter() - begun
            again = time.perf_counter()
            token(url, "lora")
            again = time.perf_counter() - again
            post(f"{url}/v1/unload_lora_adapter", {"lora_name": "lora"})
            return {"pause": 0.0, "first token": again, "total": total}

        once()
        return {"LoRA r = 8, hot loading": {**measured(once), "bytes": size(paths["lora"])}}


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        paths, wanted = prepared(Path(folder)), dict[str, str]()
        found = reloading(paths, wanted)
        found |= switching(paths, wanted)
        return found | hot_loading(paths)


def write(page: Path) -> None:
    """Write the table of what is recorded."""
    rows: list[list[object]] = []
    for one in trials(NAME):
        for what, found in one["result"].items():
            cells = [f"{1000 * found[key]:,.0f}" if key in found else "-" for key in ("pause", "first token", "total")]
            rows.append([what, *cells, f"{found['bytes']:,}" if "bytes" in found else "-"])
    heads = [
        "SmolLM2-135M, two CPU cores; milliseconds",
        "pause",
        "first right token after it",
        "in all",
        "bytes moved",
    ]
    write_between(page, MARK, table(heads, rows, 1) if rows else NOTHING)


if __name__ == "__main__":
    command(__doc__, {"server": lambda: trial(NAME, {"model": "SmolLM2-135M", "device": "cpu"}, run)}, write)
