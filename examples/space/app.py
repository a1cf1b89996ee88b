"""A Gradio app that switches masks on one model.

MASKPACK_BACKBONE, MASKPACK_WEIGHTS and MASKPACK_MASKS (NAME=REFERENCE, joined by commas) say which; without them it is
the digits network of `maskpack demo` with two masks, which are made at the first start.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gradio

from maskpack import MaskBank, load_adapter, load_backbone

BACKBONE, WEIGHTS = os.environ.get("MASKPACK_BACKBONE"), os.environ.get("MASKPACK_WEIGHTS")
MASKS = os.environ.get("MASKPACK_MASKS", "digits 5-9=./demo-output/adapter,digits 3-9=./demo-output/digits-3-9")
if not BACKBONE:
    BACKBONE, WEIGHTS = "demo-output/backbone.py:digits_cnn", "demo-output/backbone.safetensors"
    maskpack = [sys.executable, "-m", "maskpack_cli.main"]
    if not Path("demo-output/adapter").is_dir():
        subprocess.run([*maskpack, "demo"], check=True)
    if not Path("demo-output/digits-3-9").is_dir():
        base = ["--backbone", BACKBONE, "--weights", WEIGHTS]
        second = [*base, "--data", "digits:3-9", "--steps", "200", "--output", "demo-output/digits-3-9"]
        subprocess.run([*maskpack, "train", *second], check=True)

bank = MaskBank(load_backbone(BACKBONE, weights=WEIGHTS).model.eval())
adapters = {name: load_adapter(ref) for name, ref in (one.split("=", 1) for one in MASKS.split(","))}
for name, adapter in adapters.items():
    bank.add(adapter, name)


def classify(name: str, image: Any) -> tuple[dict[str, float], str]:
    """Return the five likeliest labels with their scores, and what the switch took."""
    adapter, start = adapters[name], time.perf_counter()
    with bank.using(name) as model:
        switched = time.perf_counter() - start
        scores = adapter.preprocess()(image.convert("RGB"))[None]
        shares = model(scores).softmax(1)[0].tolist()
    best = sorted(zip(adapter.about.class_names, shares, strict=True), key=lambda pair: -pair[1])[:5]
    resident = bank.status().residents[name]
    return dict(best), (
        f"switched in {1000 * switched:.1f} ms; the adapter has {adapter.size:,} bytes and keeps "
        f"{100 * (resident.density or 0):.1f} % of its weights"
    )


app = gradio.Interface(
    classify,
    [
        gradio.Dropdown(list(adapters), value=next(iter(adapters)), label="mask"),
        gradio.Image(type="pil", label="image", height=240),
    ],
    [gradio.Label(label="prediction"), gradio.Textbox(label="what it took")],
    title="One model, many masks",
    api_name="classify",
    flagging_mode="never",
)

if __name__ == "__main__":
    app.launch(server_port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
