"""Packing and unpacking a set of the size of Llama-2-7B: bytes, rates and peak memory of each process.

    python -m benchmarks.scale                       # 6.7e9 weights, profiles fast and default
    python -m benchmarks.scale --scale 0.1 --profiles fast
    python -m benchmarks.scale --general runs/general-sizes.json      # extra `bench`; some minutes more

Masks are made on the fly from a seed, with densities that vary by tensor, row and column; the time that this takes is
reported beside (`making`) and is part of `seconds`, which are the processor's, of all threads. Packing and reading run
in a fresh process each. Prints JSON, and adds a line for each profile to benchmarks/measured/scale.jsonl.
With `--general` the masks of one layer (all are drawn alike) are compared with general-purpose compressors.
"""

import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
VOCABULARY = (32000, 4096)
LAYERS = 32
LAYER = "model.layers.0."
BLOCK = 1 << 20  # weights made at one time


def shapes(scale: float) -> dict[str, tuple[int, int]]:
    """Return names and shapes: all layers, or a share of them with vocabularies of that share."""
    vocabulary = (round(VOCABULARY[0] * scale), VOCABULARY[1])
    found = {"lm_head.weight": vocabulary, "model.embed_tokens.weight": vocabulary}
    for layer in range(max(1, round(LAYERS * scale))):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
    return found


def peak() -> float:
    """Return the peak resident memory of this process so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def made(name: str, rows: int, columns: int) -> Any:
    """Return the packed bits of one mask, which follow from its name."""
    import numpy as np

    source = np.random.Generator(np.random.SFC64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])))
    middle = source.uniform(235, 250)  # of 256: densities from 0.9 to 0.99
    across = source.normal(middle, 4, (rows, 1)).clip(1, 255)
    along = source.normal(0, 4, (1, columns))
    packed = np.empty(rows * columns // 8, np.uint8)
    step = max(1, BLOCK // columns)
    for row in range(0, rows, step):
        limits = (across[row : row + step] + along).clip(1, 255).astype(np.uint8)
        drawn = np.frombuffer(source.bytes(limits.size), np.uint8).reshape(limits.shape)
        bits = np.packbits(drawn < limits, bitorder="little")
        packed[row * columns // 8 :][: bits.size] = bits
    return packed


def pack(path: Path, scale: float, profile: Any, workers: int | None) -> dict[str, Any]:
    """Pack the set in this process."""
    from blake3 import blake3

    from maskpack import threads
    from maskpack.adapter.write import save_adapter
    from maskpack.backbone.model import Fingerprint
    from maskpack.mask import MaskSet, PackedMask

    threads.WORKERS = workers or threads.WORKERS
    imported, wanted = peak(), shapes(scale)
    making = 0.0

    def make(name: str) -> PackedMask:
        nonlocal making
        started = time.process_time()
        packed = made(name, *wanted[name])
        making += time.process_time() - started
        return PackedMask.from_bytes(packed, wanted[name])

    tensors = {name: blake3(name.encode()).digest()[:6] for name in wanted}
    digests = dict.fromkeys(("float32", "bfloat16", "float16"), "0" * 64)
    base = Fingerprint("hf/meta-llama/Llama-2-7b-hf", None, "bfloat16", (), digests, tensors)
    masks = MaskSet.streamed(wanted, make, wanted)
    started = time.process_time()
    adapter = save_adapter(path, masks, base, profile=profile)
    seconds = time.process_time() - started
    return {
        "weights": masks.total,
        **sizes(adapter),
        "seconds": seconds,
        "making": making,
        "weights_per_second": masks.total / seconds,
        "workers": threads.WORKERS,
        "peak_mb": peak(),
        "peak_after_import_mb": imported,
    }


def sizes(adapter: Any) -> dict[str, Any]:
    """Return bytes with and without index and digests, beside the entropy of the densities and LoRA's matrices."""
    from maskpack.adapter.describe import inspect_adapter

    about = inspect_adapter(adapter)
    one = about["sets"]["default"]
    entropy = sum(
        -share * math.log2(share) * math.prod(row["shape"]) / 8
        for row in one["payloads"]
        for share in (row["density"], 1 - row["density"])
        if share
    )
    coded = one["payload_bytes"]
    return {
        "bytes": adapter.size,
        "index_bytes": about["index_bytes"],
        "mask_bytes": coded,
        "bits_per_weight": 8 * coded / one["weights"],
        "of_entropy": coded / entropy,
        "lora_rank": coded / sum(2 * sum(row["shape"]) for row in one["payloads"]),
        "layer_bytes": sum(row["bytes"] for row in one["payloads"] if row["name"].startswith(LAYER)),
    }


def general(remembered: Path) -> dict[str, int]:
    """Return the bytes of one layer under general-purpose compressors: the better of one stream and each mask alone."""
    from benchmarks.compression import Sizes, strong_sizes

    names = sorted(name for name in shapes(1) if name.startswith(LAYER))
    packed = [made(name, *shapes(1)[name]).tobytes() for name in names]
    return {name: min(ways.values()) for name, ways in strong_sizes(packed, Sizes(remembered)).items()}


def read(path: Path, workers: int | None) -> dict[str, Any]:
    """Read, verify and decode the file in this process."""
    from maskpack import threads
    from maskpack.adapter.read import read_adapter

    threads.WORKERS = workers or threads.WORKERS
    seconds, imported = {}, peak()
    started = time.process_time()
    adapter = read_adapter(path)
    seconds["read"] = time.process_time() - started
    started = time.process_time()
    adapter.verify()
    seconds["verify"] = time.process_time() - started
    started = time.process_time()
    weights = sum(len(mask.bits) for _, mask in adapter.iter_masks())
    seconds["decode"] = time.process_time() - started
    rates = {f"{step}_weights_per_second": weights / taken for step, taken in seconds.items()}
    return {"seconds": seconds, **rates, "peak_mb": peak(), "peak_after_import_mb": imported}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers and of the vocabulary")
    parser.add_argument("--profiles", nargs="+", default=["fast", "default"], choices=["fast", "default"])
    parser.add_argument("--workers", type=int, help="threads; default: as the library chooses")
    parser.add_argument("--general", type=Path, help="compare one layer; where sizes are remembered")
    parser.add_argument("--folder", type=Path, help="where the files are written; default: a temporary folder")
    parser.add_argument("--step", choices=["pack", "read"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    profile = arguments.profiles[0]
    if arguments.step:
        path = arguments.folder / f"{profile}.safetensors"
        packing = arguments.step == "pack"
        done = pack(path, arguments.scale, profile, arguments.workers) if packing else read(path, arguments.workers)
        print(json.dumps(done))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        found: dict[str, dict[str, Any]] = {}
        for profile in arguments.profiles:
            own = ["--scale", str(arguments.scale), "--profiles", profile, "--folder", str(folder)]
            own += ["--workers", str(arguments.workers)] if arguments.workers else []
            for step in ("pack", "read"):
                # this process imports nothing great: what a child starts from would count as its peak
                child = subprocess.run(
                    [sys.executable, __file__, *own, "--step", step],
                    env={"OMP_NUM_THREADS": "1", **os.environ}, stdout=subprocess.PIPE, check=True,
                )  # fmt: skip
                found.setdefault(profile, {})[step] = json.loads(child.stdout)
    from benchmarks.measured import record  # not above: children are scripts, and import as little as they can

    for profile, one in found.items():
        record("scale", {"scale": arguments.scale, "profile": profile, "workers": arguments.workers}, one)
    compared = {"layer": general(arguments.general)} if arguments.general else {}
    print(json.dumps({**found, **compared}, indent=2))


if __name__ == "__main__":
    main()
