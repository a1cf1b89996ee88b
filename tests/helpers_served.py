"""Inference servers in processes of their own, adapters for the language models that they hold, merged checkpoints."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from torch import nn

from maskpack import MaskSet, Parts, fingerprint, load_mask, save_adapter
from maskpack.mask import PackedMask


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


def call(url: str, body: Any = None) -> Any:
    """Return what a server answers, from JSON; without a body the call is a GET."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=300) as answer:
        text = answer.read()
    return json.loads(text) if text else None


@contextmanager
def running(words: Sequence[object], folder: Path, environment: Mapping[str, str], ready: str) -> Iterator[str]:
    """Start a server by these words and a port of its own, and give its URL when it answers at the path `ready`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, url = folder / f"server-{port}.log", f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*map(str, words), "--port", str(port)], stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        until = time.monotonic() + 900
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            try:
                with urlopen(url + ready, timeout=60):
                    break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(300)
