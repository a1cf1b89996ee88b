"""How small masks become and how fast they decode, beside general compressors, entropies, a range coder and LoRA.

    MASKPACK_DATA=… make bench-codec
    MASKPACK_DATA=… python -m benchmarks.codecs --only 'sketch-*' 'drawn-C100'

One core. The codecs are those that `maskpack list codecs` shows. The sizes of general compressors are remembered beside
the output (xz and brotli are slow); ours are measured anew every time.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskpack.adapter.decode import base_classes, by_name
from maskpack.adapter.describe import describe
from maskpack.adapter.read import Adapter, read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.codecs.base import CODECS, PROFILES, Bits, Codec, Profile, Side
from maskpack.codecs.choose import rivals
from maskpack.errors import MaskpackError

from . import codec_tables, report
from .general import RangeCoder, Sizes, strong_sizes
from .mask_sets import CORPUS, Case, cases
from .pages import write_between
from .results import DATA

INDEX_BYTES, INDEX_BYTES_EACH = 2000, 64  # an adapter's index and digests may take so much, beside the names
Row = dict[str, Any]


def seconds(act: Callable[[], object], least: int = 3, most: int = 15, enough: float = 2.0) -> float:
    """Return the median time of several calls: at least three, and until two seconds are spent."""
    spent: list[float] = []
    while len(spent) < least or (len(spent) < most and sum(spent) < enough):
        start = time.perf_counter()
        act()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def payloads(adapter: Adapter, case: Case) -> Iterator[tuple[Codec, memoryview, Side]]:
    """Yield codec, bytes and side of every payload of the adapter's one set."""
    one, pieces = adapter.header.sets["default"], adapter.pieces["default"]
    weights = None if case.weights is None else by_name(case.weights)
    for payload, data in zip(one.payloads, pieces[len(one.tables) :], strict=True):
        codec = CODECS[payload.coding.codec](**payload.coding.config)
        classes = None
        if codec.needs_base:
            assert weights is not None
            classes = base_classes(weights, payload.name, payload.shape)
        table = None if payload.coding.table is None else bytes(pieces[payload.coding.table])
        yield codec, data, Side(payload.shape, classes, None, table)


def ours(case: Case, profile: Profile, codec: str | None, folder: Path) -> Row:
    """Save the masks with a profile, or with one codec, and measure the file and its decoding."""
    path, weights = folder / "case.safetensors", case.weights if profile == "max" else None
    start = time.perf_counter()
    save_adapter(path, case.masks, case.base, profile=profile, codec=codec, weights=weights)
    saved = time.perf_counter() - start
    adapter = read_adapter(path)
    assert adapter.parts(base=weights).masks == case.masks
    described = describe(adapter)
    one = described["sets"]["default"]
    total, size = case.masks.total, one["payload_bytes"] + one["table_bytes"]
    coded = [(used, bytes(data), side) for used, data, side in payloads(adapter, case)]
    masks = [(used.decode(data, side), side) for used, data, side in coded]
    start = time.perf_counter()
    for competing in rivals(profile, codec, weights is not None) if codec else []:
        for bits, side in masks:
            competing.encode(bits, Side(side.shape, side.classes))
    encoded = time.perf_counter() - start
    allowed = INDEX_BYTES + sum(INDEX_BYTES_EACH + len(name.encode()) for name in case.masks)
    chosen: dict[str, int] = {}
    for row in one["payloads"]:
        chosen[row["codec"]] = chosen.get(row["codec"], 0) + 1
    return {
        "bytes": size,
        "table_bytes": one["table_bytes"],
        "index_bytes": described["index_bytes"],
        "index_of_allowance": described["index_bytes"] / allowed,
        "bits_per_weight": 8 * size / total,
        "of_entropy": size / case.entropy,
        "with_base": weights is not None,
        "lora_rank": size / case.lora_rank_bytes,
        "save_rate": total / saved,
        "decode_rate": total / seconds(lambda: adapter.parts(base=weights).masks),
        "codec_encode_rate": total / encoded if codec else None,
        "codec_decode_rate": total / seconds(lambda: [used.decode(data, side) for used, data, side in coded]),
        "chosen": chosen,
    }


def reference(case: Case) -> Row:
    """Measure constriction's range coder with the density of each tensor."""
    masks: list[tuple[Bits, float]] = [
        (np.frombuffer(bits.tobytes(), dtype=np.uint8), bits.count() / max(len(bits), 1))
        for mask in case.masks.values()
        for _, bits in mask.payloads()
    ]
    coder = RangeCoder(masks)
    words = coder.encode()
    for (symbols, _), again in zip(coder.masks, coder.decode(words), strict=True):
        assert np.array_equal(symbols, again)
    size = sum(one.nbytes for one in words)
    return {
        "bytes": size,
        "bits_per_weight": 8 * size / case.masks.total,
        "of_entropy": size / case.entropy,
        "codec_encode_rate": case.masks.total / seconds(coder.encode),
        "codec_decode_rate": case.masks.total / seconds(lambda: coder.decode(words)),
    }


def measure(case: Case, sizes: Sizes) -> Row:
    """Measure everything about one case."""
    general = strong_sizes(case.packed, sizes)
    best, how = min(((name, how) for name in general for how in ("stream", "each")), key=lambda o: general[o[0]][o[1]])
    found: Row = {
        "kind": case.kind,
        "weights": case.masks.total,
        "parameters": len(case.masks),
        "density": case.masks.density,
        "entropy_bytes": case.entropy,
        "floor_bytes": case.floor,
        "lora_rank_bytes": case.lora_rank_bytes,
        "general": general,
        "best_general": {"name": best, "how": how, "bytes": general[best][how]},
        "constriction": reference(case),
        "coded": {},
        "refused": {},
    }
    ways: list[tuple[str, Profile, str | None]] = [(profile, profile, None) for profile in PROFILES]
    ways += [(cls.id, "max", cls.id) for cls in CODECS.all()]
    with tempfile.TemporaryDirectory() as folder:
        for name, profile, codec in ways:
            try:
                row = ours(case, profile, codec, Path(folder))
            except MaskpackError as error:  # not every codec takes every mask, nor is there always a base
                found["refused"][name] = str(error)
                continue
            found["coded"][name] = {**row, "of_general": row["bytes"] / general[best][how]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=CORPUS, help="folder of ROW-SEED.safetensors")
    parser.add_argument("--only", nargs="+", default=["*"], help="names of mask sets, with wildcards")
    parser.add_argument("--output", type=Path, default=Path("runs/codecs.json"))
    parser.add_argument("--plot", type=Path, default=Path("runs/codecs.png"))
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    arguments = parser.parse_args()
    if not (DATA / "weights").is_dir():
        parser.error(f"there is no folder {DATA / 'weights'}; set MASKPACK_DATA, see docs/results.md")
    torch.set_num_threads(1)
    sizes = Sizes(arguments.output.with_name("general-sizes.json"))
    measured: dict[str, Row] = {}
    for name, make in cases(arguments.adapters):
        if any(fnmatch(name, pattern) for pattern in arguments.only):
            measured[name] = measure(make(), sizes)
            print(report.case(name, measured[name]), flush=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    summary = report.summary(measured)
    print(report.overview(measured, summary))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"versions": versions, "cases": measured, "summary": summary}, indent=1))
    if measured:
        report.plot(measured, arguments.plot)
    if arguments.write is not None:
        write_between(arguments.write, "make bench-codec", codec_tables.markdown(measured, summary))


if __name__ == "__main__":
    main()
