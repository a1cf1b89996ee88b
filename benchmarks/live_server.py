"""Switching a running vLLM server: masks and patches, reloading the merged checkpoint, starting anew, LoRA hot loading.

    MASKPACK_DATA=… MASKPACK_SMOLLM2=… python -m benchmarks.live_server     a quarter of an hour of one core, resumable
    python -m benchmarks.live_server --write docs/serving.md                the table of what is recorded

SmolLM2-135M in bfloat16 on the CPU; benchmarks/smollm2.py makes its folder. Masks: two that `train` makes in 60 steps,
by its defaults but for smaller batches, and two that remove 5 % of the weights of two layers in each block.
MASKPACK_VLLM is the Python of an environment with vLLM and maskpack, by default that of `make vllm`. Needs the extras
train and lab.
"""

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import torch

from maskpack import MaskSet, Parts, fingerprint, load_backbone, load_mask, save_adapter, unload_mask
from maskpack.backbone.model import named_parameters
from maskpack.mask import PackedMask
from maskpack.runtime.serve import switch_server
from maskpack.training import TrainConfig, load_data, train_mask
from maskpack.training.config import RECIPES

from .measured import record, trial, trials
from .report import NOTHING, command, table, write_between
from .tasks import data_of

NAME = "live-server"
MARK = "python -m benchmarks.live_server --write docs/serving.md"
PYTHON = os.environ.get("MASKPACK_VLLM", ".venv-vllm/bin/python")
TIMES = 9
RELOAD = "reload of the merged checkpoint"
TRAINED = {"mask": "shakespeare", "other mask": "gsm8k"}  # with the data
LARGE = {"large mask": ("o_proj.weight", "down_proj.weight"), "other large mask": ("q_proj.weight", "up_proj.weight")}
KINDS = (*TRAINED, *LARGE, "patch")
MERGED = ("mask", "patch")
WAYS = {"base to mask": "mask", "mask to another mask": "other mask", "mask to base": None}
WAYS |= {"base to large mask": "large mask", "large mask to another": "other large mask", "large mask to base": None}
WAYS |= {"base to patch": "patch", "patch to base": None}
FOLDER = Path("runs/live-server")
QUESTION = "What is 2 + 3?"
WORDS = 24  # tokens after which base, masks and patch have said different things
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


class Running(NamedTuple):
    """A server: its address, the seconds until its first token, and its first process, which leads a session."""

    url: str
    start: float
    session: int

    def spent(self) -> float:
        """Return the processor time of all its processes so far, in seconds."""
        fields = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields.append(stat.read_text().rpartition(")")[2].split())
        ticks = sum(int(one[11]) + int(one[12]) for one in fields if int(one[3]) == self.session)
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Running]:
    """Run a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "base"]
    words += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--dtype", "bfloat16", "--max-model-len", "512"]
    words += ["--enforce-eager", "--gpu-memory-utilization", "0.2", *options]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    settings |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    begun, path = time.perf_counter(), model.parent / f"server-{url.rpartition(':')[2]}.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=log,
            env={**os.environ, **settings, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        while True:
            if process.poll() is not None or time.perf_counter() - begun > 1200:
                raise SystemExit(path.read_text()[-3000:])
            try:
                token(url)
                break
            except OSError:
                time.sleep(0.1)
        yield Running(url, time.perf_counter() - begun, process.pid)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(300)


def prepared() -> dict[str, Path]:
    """Make the adapters: masks, an SFT patch, LoRA, merged folders."""
    names = ("base", *KINDS, "lora", *(f"merged {name}" for name in MERGED))
    paths = {name: FOLDER / name for name in names}
    if paths["lora"].is_dir():
        return paths
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(os.environ["MASKPACK_SMOLLM2"])

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
    for name, data in TRAINED.items():
        backbone = load_backbone(f"hf/{paths['base'].resolve()}", task="text-generation", tokens=65)
        rows = replace(load_data(str(data_of(data)), task="text-generation"), validation=None, test=None)
        own = {**RECIPES["text-generation"], "steps": 60, "batch_size": 4, "precision": "bf16"}
        made = train_mask(backbone, rows, TrainConfig(**own))
        save_adapter(paths[name], made.parts, made.base, made.about)
    for name, ends in LARGE.items():
        weights = {n: p.detach().abs().float() for n, p in model.named_parameters() if n.endswith(ends)}
        masks = MaskSet.from_tensors({n: one > one.quantile(0.05) for n, one in weights.items()})
        save_adapter(paths[name], masks, base, weights=model)
    tuned, tokenizer = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
    )
    ids = tokenizer(f"{QUESTION} It is five, as every child knows.", return_tensors="pt")["input_ids"]
    optimiser = torch.optim.AdamW(tuned.parameters(), lr=1e-5)
    for _ in range(8):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    own, after = named_parameters(model), named_parameters(tuned.bfloat16())  # the embedding under the name of the head
    changes = {n: own[n].detach() == after[n].detach() for n in base.tensors}
    changes = {n: same for n, same in changes.items() if not same.all()}
    values = {n: after[n].detach()[~same] for n, same in changes.items()}
    patch = MaskSet({n: PackedMask.from_tensor(same, "replace") for n, same in changes.items()})
    save_adapter(paths["patch"], Parts(patch, values=values), base, weights=model)
    for name in MERGED:
        load_mask(model, paths[name])
        copy(paths[f"merged {name}"], model.state_dict())
        unload_mask(model)
    lora = get_peft_model(model, LoraConfig(r=8, target_modules=PROJECTIONS, init_lora_weights=False))
    lora.save_pretrained(paths["lora"])
    return paths


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def first_token(url: str) -> float:
    begun = time.perf_counter()
    token(url)
    return time.perf_counter() - begun


def served() -> list[dict[str, Any]]:
    """Switch masks and patches on a server; on another one, in turn, reload merged checkpoints, which is vLLM's way."""
    paths, says = {name: path.resolve() for name, path in prepared().items()}, dict[str | None, str]()
    with serving(paths["base"], *ENGINE) as server, serving(paths["base"], *ENGINE) as other:
        url = server.url
        says[None] = token(url, count=WORDS)
        begun = time.perf_counter()
        post(f"{url}/init_weight_transfer_engine", {"init_info": {}})
        found: list[dict[str, Any]] = [
            {"what": "restart of the server", "pause": server.start, "total": server.start},
            {"what": "look at the server's memory, once", "pause": time.perf_counter() - begun},
        ]

        def once(name: str | None) -> dict[str, Any]:
            begun, spent = time.perf_counter(), server.spent()
            done = switch_server(url, None if name is None else paths[name])
            spent = server.spent() - spent
            first, total = first_token(url), time.perf_counter() - begun
            answer = token(url, count=WORDS)
            if says.setdefault(name, answer) != answer:
                raise SystemExit(f"with {name} the server says {answer!r}, not {says[name]!r}")
            return {
                "prepare": done.prepare_s,
                "pause": done.pause_s,
                "processor": spent,
                "first token": first,
                "total": total,
            }

        for name in KINDS:
            found.append({"what": f"base to {name}, first time", **once(name), "bytes": size(paths[name])})
            once(None)
        order = [None, *WAYS.values()]
        if any(says[one] == says[other] for one, other in pairwise(order)):
            raise SystemExit(f"adapters that say the same show nothing: {says}")

        def reload(name: str) -> dict[str, float]:
            begun, spent = time.perf_counter(), other.spent()
            post(f"{other.url}/pause?mode=wait")
            paused = time.perf_counter()
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(paths[f"merged {name}"].resolve())}}
            post(f"{other.url}/collective_rpc", body)
            post(f"{other.url}/resume")
            pause, spent = time.perf_counter() - paused, other.spent() - spent
            first = first_token(other.url)
            total, answer = time.perf_counter() - begun, token(other.url, count=WORDS)
            if answer != says[name]:
                raise SystemExit(f"the merged checkpoint of {name} says {answer!r}, the server said {says[name]!r}")
            return {"pause": pause, "processor": spent, "first token": first, "total": total}

        rounds = list[dict[str, dict[str, Any]]]()
        for k in range(TIMES):
            rounds.append({what: once(name) for what, name in WAYS.items()})
            rounds[-1][RELOAD] = reload(MERGED[k % len(MERGED)])
        found += [{"what": what, **medians([one[what] for one in rounds])} for what in (*WAYS, RELOAD)]
        found[-1]["bytes"] = size(paths["merged mask"])
        return found


def hot_loaded() -> dict[str, Any]:
    """Load LoRA of rank 8 while a server runs."""
    paths = prepared()
    with serving(paths["base"], *LORA) as server:
        url = server.url

        def once() -> dict[str, float]:
            begun, spent = time.perf_counter(), server.spent()
            post(f"{url}/v1/load_lora_adapter", {"lora_name": "lora", "lora_path": str(paths["lora"].resolve())})
            loaded, spent = time.perf_counter(), server.spent() - spent
            token(url, "lora")
            ended = time.perf_counter()
            post(f"{url}/v1/unload_lora_adapter", {"lora_name": "lora"})
            return {"pause": 0.0, "processor": spent, "first token": ended - loaded, "total": ended - begun}

        once()
        return {**medians([once() for _ in range(TIMES)]), "bytes": size(paths["lora"])}


def measure_server() -> None:
    if not trials(NAME, what="base to mask"):
        for one in served():
            record(NAME, {"what": one.pop("what")}, one)


JOBS: dict[str, Callable[[], object]] = {
    "server": measure_server,
    "lora": lambda: trial(NAME, {"what": "LoRA r = 8, hot loading"}, hot_loaded),
}


def write(page: Path) -> None:
    """Write the table of what is recorded."""
    rows: list[list[object]] = []
    for one in trials(NAME):
        found = one["result"]
        keys = ("prepare", "pause", "first token", "total", "processor")
        cells = [f"{1000 * found[key]:,.0f}" if key in found else "-" for key in keys]
        rows.append([one["what"], *cells, f"{found['bytes']:,}" if "bytes" in found else "-"])
    heads = [
        "milliseconds",
        "prepare, while it answers",
        "pause",
        "first right token after it",
        "in all",
        "processor time of the server, in all",
        "bytes moved",
    ]
    results = {one["what"]: one["result"] for one in trials(NAME)}
    text = table(heads, rows, 1) if rows else NOTHING
    if reload := results.get(RELOAD):
        shares = (f"{what} {results[what]['pause'] / reload['pause']:.3f}" for what in WAYS)
        text += f"\nPauses as shares of the reload's: {', '.join(shares)}.\n"
    write_between(page, MARK, text)


if __name__ == "__main__":
    command(__doc__, JOBS, write)
