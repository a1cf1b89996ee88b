"""Times of loading and undoing a mask with two checkouts, in processes by turns.

    git worktree add ../before COMMIT
    python -m benchmarks.beside ../before --pairs 4        # prints the medians of the ratios, appends beside.jsonl

The other checkout's interface has to be the one that `child` calls.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measured import record

ROUNDS = 12
MODELS = ("ResNet-50", "BERT-base")
OPS = ("zero", "flip")


def child(model: str, op: str) -> dict[str, float]:
    """Return the median seconds of a load without a check of the base and of an undo, of masks of density 0.8."""
    import torch

    from maskpack import MaskSet, load_adapter, load_mask, save_adapter, unload_mask
    from maskpack.adapter.content import Parts
    from maskpack.backbone.fingerprint import fingerprint

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if model == "ResNet-50":
        from torchvision.models import resnet50

        network: Any = resnet50()
    else:
        from transformers import BertConfig, BertModel

        network = BertModel(BertConfig())
    network.eval()
    weights = {n: p for n, p in network.named_parameters() if p.ndim > 1 and "embeddings" not in n}
    masks = MaskSet.from_tensors({n: torch.rand(p.shape) < 0.8 for n, p in weights.items()}, op=op)  # type: ignore[arg-type]
    times: dict[str, list[float]] = {"load": [], "undo": []}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder) / "a", Parts(masks), fingerprint(network, id="random"), profile="fast")
        adapter = load_adapter(Path(folder) / "a")
        for _ in range(ROUNDS):
            began = time.perf_counter()
            load_mask(network, adapter, verify="off")
            times["load"].append(time.perf_counter() - began)
            began = time.perf_counter()
            unload_mask(network)
            times["undo"].append(time.perf_counter() - began)
    return {what: statistics.median(found) for what, found in times.items()}


def measured(checkout: Path, model: str, op: str) -> dict[str, float]:
    """Run `child` in a process that imports maskpack from a checkout."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, str(Path(__file__).resolve()), "--child", model, op]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, env=environment, cwd=checkout)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def commit(checkout: Path) -> str:
    """Return the commit of a checkout."""
    words = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    here, before = Path(__file__).resolve().parents[1], options.before.resolve()
    for model in MODELS:
        for op in OPS:
            pairs = [(measured(before, model, op), measured(here, model, op)) for _ in range(options.pairs)]
            ratios = {what: [new[what] / old[what] for old, new in pairs] for what in ("load", "undo")}
            settings = {"model": model, "op": op, "before": commit(before), "commit": commit(here)}
            record("beside", settings, ratios)
            print(model, op, *(f"{what} {statistics.median(found):.2f}" for what, found in ratios.items()), flush=True)


if __name__ == "__main__":
    main()
