"""Sizes and decoding rates of masks, beside general compressors, entropies, a range coder and LoRA.

    MASKPACK_DATA=… make bench-codec
    MASKPACK_DATA=… python -m benchmarks.codecs --only 'sketch-*' 'drawn-C100'
    MASKPACK_DATA=… python -m benchmarks.codecs --numpy --write docs/results/codecs.md      without the compiled loops

One core: times are the processor's, of all threads together, so that other processes do not count. The codecs are those
that `maskpack list codecs` shows. The sizes of general compressors are remembered in runs/ (xz and brotli are
slow); ours are measured anew every time. Lines of mask sets that a run leaves out stay.
"""

import argparse
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskpack.adapter.decode import base_weight, by_name
from maskpack.adapter.describe import inspect_adapter
from maskpack.adapter.read import Adapter, read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.codecs import native
from maskpack.codecs.base import CODECS, PROFILES, Bits, Codec, Profile, Side, words_of
from maskpack.codecs.choose import rivals
from maskpack.codecs.logit import Head, Logit, decode_together
from maskpack.errors import MaskpackError

from .compression import RangeCoder, Sizes, strong_sizes
from .mask_sets import CORPUS, Case, cases
from .measured import FOLDER, rewrite, trials
from .report import table, write_between
from .tasks import DATA, RUNS

INDEX_BYTES, INDEX_BYTES_EACH = 2000, 64  # an adapter's index and digests may take so much, beside the names
Row = dict[str, Any]
MUST = {"default": 0.90, "max": 0.80}  # of the best general compressor, over the trained masks together
GOAL = {"default": 0.885, "max": 0.77}
EACH_CODEC = ("sketch-1", "banking77-1", "drawn-DTD", "vit-b16-made")  # one mask set of each kind
MUST_DECODE = 200e6  # weights a second
STRUCTURELESS = (1.02, 1000)  # never over this share of the entropy, plus these bytes
COLOURS = {"best general": "tab:red", "constriction": "black", "fast": "tab:olive", "default": "tab:blue"}
MARKERS = {"best general": "s", "constriction": "|"}
COLOURS["max"] = "tab:green"


def seconds(act: Callable[[], object], least: int = 3, most: int = 15, enough: float = 0.7) -> float:
    """Return the median processor time of several calls: at least three, and until some time is spent."""
    spent: list[float] = []
    while len(spent) < least or (len(spent) < most and sum(spent) < enough):
        start = time.process_time()
        act()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


def payloads(adapter: Adapter, case: Case) -> Iterator[tuple[Codec, memoryview, Side]]:
    """Yield codec, bytes and side of every payload of the adapter's one set."""
    weights = None if case.weights is None else by_name(case.weights)
    for payload in adapter.header.sets["default"].payloads:
        codec = CODECS[payload.coding.codec](**payload.coding.config)
        words = None
        if codec.needs_base:
            assert weights is not None
            words = words_of(base_weight(weights, payload.name, payload.shape))
        yield codec, adapter.piece(payload), Side(payload.shape, words)


def ours(case: Case, profile: Profile, codec: str | None, folder: Path) -> Row:
    """Save the masks with a profile, or with one codec, and measure the file and its decoding."""
    path, weights = folder / "case.safetensors", case.weights if profile == "max" else None
    start = time.process_time()
    save_adapter(path, case.masks, case.base, profile=profile, codec=codec, weights=weights)
    saved = time.process_time() - start
    adapter = read_adapter(path)
    assert adapter.parts(base=weights).masks == case.masks
    described = inspect_adapter(adapter)
    one = described["sets"]["default"]
    total, size = case.masks.total, one["payload_bytes"]
    coded = [(used, bytes(data), side) for used, data, side in payloads(adapter, case)]
    masks = [(used.decode(data, side), side) for used, data, side in coded]
    start = time.process_time()
    for competing in rivals(profile, codec, weights is not None) if codec else []:
        for bits, side in masks:
            competing.encode(bits, Side(side.shape, side.weights))
    encoded = time.process_time() - start
    allowed = INDEX_BYTES + sum(INDEX_BYTES_EACH + len(name.encode()) for name in case.masks)
    chosen: dict[str, int] = {}
    for row in one["payloads"]:
        chosen[row["codec"]] = chosen.get(row["codec"], 0) + 1
    return {
        "bytes": size,
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


def decode_all(coded: Sequence[tuple[Codec, bytes, Side]]) -> None:
    """Decode the payloads of a set as `Adapter.parts` does: without the compiled part those of `logit` together."""
    together = native.library() is None
    for base in (False, True) if together else ():
        own = [(data, side) for used, data, side in coded if isinstance(used, Logit) and used.needs_base == base]
        decode_together([data for data, _ in own], [side for _, side in own], base)
    for used, data, side in coded:
        if not (together and isinstance(used, Logit)):
            used.decode(data, side)


@contextmanager
def without_loops() -> Iterator[None]:
    """Code with numpy within the context, as without the compiled part."""
    library = native.library
    native.library = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        native.library = library


def numpy_rates(case: Case) -> Row:
    """Return the rates of decoding with numpy and compiled, and constriction's to show the machine's load.

    `lanes` are those of all payloads together, which numpy decodes side by side.
    """
    found: Row = {"weights": case.masks.total, "constriction": reference(case)["codec_decode_rate"]}
    for profile in ("default", "max") if case.weights is not None else ("default",):
        with tempfile.TemporaryDirectory() as folder:
            path, weights = Path(folder) / "case.safetensors", case.weights if profile == "max" else None
            save_adapter(path, case.masks, case.base, profile=profile, weights=weights)
            coded = [(used, bytes(data), side) for used, data, side in payloads(read_adapter(path), case)]
        heads = [Head.read(data, side, used.needs_base) for used, data, side in coded
                 if isinstance(used, Logit) and len(data) > 1]  # fmt: skip
        rates: Row = {"lanes": sum(len(head.lanes) for head in heads)}
        rates["compiled"] = case.masks.total / seconds(partial(decode_all, coded))
        with without_loops():
            rates["numpy"] = case.masks.total / seconds(partial(decode_all, coded))
        found[profile] = rates
    return found


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


def measure(case: Case, sizes: Sizes, each_codec: bool = True) -> Row:
    """Measure everything about one case, and every codec alone if `each_codec`."""
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
    ways += [(cls.id, "max", cls.id) for cls in CODECS.all() if each_codec]
    with tempfile.TemporaryDirectory() as folder:
        for name, profile, codec in ways:
            try:
                row = ours(case, profile, codec, Path(folder))
            except MaskpackError as error:  # not every codec takes every mask, nor is there always a base
                found["refused"][name] = str(error)
                continue
            found["coded"][name] = {**row, "of_general": row["bytes"] / general[best][how]}
    return found


# --- tables and picture ---------------------------------------------------------------------------------------------


def millions(value: float | None) -> str:
    """Return weights a second in millions: two digits below ten, none behind the point above."""
    if value is None:
        return "-"
    scaled = value / 1e6
    return f"{scaled:,.0f}" if scaled >= 10 else f"{scaled:.2g}"


def summarized(measured: Mapping[str, Row]) -> dict[str, Any]:
    """Return the main figures: trained masks together, decoding, and the bound for structureless masks."""
    trained = [row for row in measured.values() if row["kind"] == "trained"]
    found: dict[str, Any] = {"trained": {}, "structureless": {}, "trained_masks": len(trained)}
    for profile in PROFILES if trained else ():
        rows = [(one["coded"][profile], one) for one in trained]
        found["trained"][profile] = {
            "sum": sum(own["bytes"] for own, _ in rows) / sum(one["best_general"]["bytes"] for _, one in rows),
            "geometric_mean": math.exp(sum(math.log(own["of_general"]) for own, _ in rows) / len(rows)),
            "worst": max(own["of_general"] for own, _ in rows),
            "decode_rate": sum(one["weights"] for _, one in rows)
            / sum(one["weights"] / own["decode_rate"] for own, one in rows),
            "slowest_decode_rate": min(own["decode_rate"] for own, _ in rows),
        }
    share, extra = STRUCTURELESS
    for name, row in measured.items():
        if row["kind"] == "drawn":
            for bounded in MUST:
                size = row["coded"][bounded]["bytes"]
                found["structureless"].setdefault(bounded, {})[name] = {
                    "of_entropy": size / row["entropy_bytes"],
                    "of_limit": size / (share * row["entropy_bytes"] + extra),
                }
    return found


def markdown(measured: Mapping[str, Row], found: Mapping[str, Any]) -> str:
    """Return every table: bits per weight, bytes, the trained masks together, each codec alone."""
    return "\n".join([_bits(measured), _bytes(measured), _together(found), _codecs(measured)])


def _bits(measured: Mapping[str, Row]) -> str:
    head = ("mask set", "weights", "density", "entropy", "best general", "constriction",
            *(f"`{p}`" for p in PROFILES), "`default` / best general", "`max` / best general", "LoRA rank",
            "decode, M weights/s: `fast`, `default`, `max`")  # fmt: skip
    return table(head, [
        (name, f"{row['weights']:,}", f"{row['density']:.3f}", f"{8 * row['entropy_bytes'] / row['weights']:.4f}",
         f"{8 * row['best_general']['bytes'] / row['weights']:.4f} ({row['best_general']['name']})",
         f"{row['constriction']['bits_per_weight']:.4f}",
         *(f"{row['coded'][p]['bits_per_weight']:.4f}" for p in PROFILES),
         *(f"{row['coded'][p]['of_general']:.3f}" for p in ("default", "max")),
         f"{row['coded']['default']['lora_rank']:.2f}",
         "; ".join(millions(row["coded"][p]["decode_rate"]) for p in PROFILES))
        for name, row in measured.items()
    ])  # fmt: skip


def _bytes(measured: Mapping[str, Row]) -> str:
    head = ("mask set", *(f"`{p}` bytes; with index and digests" for p in PROFILES), "index of allowance",
            "bytes / entropy: `default`; `max`", "packing, M weights/s: `fast`; `default`; `max`")  # fmt: skip
    return table(head, [
        (name,
         *(f"{row['coded'][p]['bytes']:,}; {row['coded'][p]['bytes'] + row['coded'][p]['index_bytes']:,}"
           for p in PROFILES),
         f"{row['coded']['default']['index_of_allowance']:.2f}",
         "; ".join(f"{row['coded'][p]['of_entropy']:.3f}" for p in ("default", "max")),
         "; ".join(millions(row["coded"][p]["save_rate"]) for p in PROFILES))
        for name, row in measured.items()
    ])  # fmt: skip


def _together(found: Mapping[str, Any]) -> str:
    together = found["trained"]
    if not together:
        return ""

    def line(what: str, key: str, bounds: tuple[str, str] = ("", "")) -> tuple[str, ...]:
        return (what, *(f"{together[p][key]:.4f}" for p in PROFILES), *bounds)

    must, goal = (", ".join(f"≤ {bound[p]:.3g}" for p in ("default", "max")) for bound in (MUST, GOAL))
    rows = [
        line("bytes / bytes of the best general compressors, sums", "sum", (must, goal)),
        line("the same, geometric mean over the masks", "geometric_mean"),
        line("the worst", "worst"),
        ("decoding, M weights/s, all weights / all time", *(millions(together[p]["decode_rate"]) for p in PROFILES),
         "≥ 200", "≥ 500"),
        ("the slowest", *(millions(together[p]["slowest_decode_rate"]) for p in PROFILES), "", ""),
    ]  # fmt: skip
    head = (f"over the {found['trained_masks']} trained masks", *(f"`{p}`" for p in PROFILES),
            "must (`default`, `max`)", "goal")  # fmt: skip
    return table(head, rows)


def _codecs(measured: Mapping[str, Row]) -> str:
    shown = [name for name in EACH_CODEC if name in measured]

    def cell(row: Row, codec: str) -> str:
        one = row["coded"].get(codec)
        if one is None:
            return "-"
        return f"{one['of_general']:.3f}; {millions(one['codec_encode_rate'])}, {millions(one['codec_decode_rate'])}"

    def reference(row: Row) -> str:
        made = row["constriction"]
        rates = f"{millions(made['codec_encode_rate'])}, {millions(made['codec_decode_rate'])}"
        return f"{made['bytes'] / row['best_general']['bytes']:.3f}; {rates}"

    rows = [(f"`{cls.id}`", *(cell(measured[name], cls.id) for name in shown)) for cls in CODECS.all()]
    rows.append(("constriction", *(reference(measured[name]) for name in shown)))
    return table(("codec alone: bytes / best general; encode, decode, M weights/s", *shown), rows)


def numpy_table(measured: Mapping[str, Row]) -> str:
    """Return the rates without the compiled loops, of each mask set and of the trained ones together."""

    def cells(row: Row, profile: str) -> tuple[str, ...]:
        if profile not in row:
            return ("-", "-", "-")
        own = row[profile]
        return f"{own['lanes']:,}", millions(own["numpy"]), millions(own["compiled"])

    rows = [(name, f"{row['weights']:,}", *cells(row, "default"), *cells(row, "max")) for name, row in measured.items()]
    trained = [row for row in measured.values() if "max" in row]
    weights, together = sum(row["weights"] for row in trained), list[str]()
    for profile in ("default", "max"):
        together.append("")
        for way in ("numpy", "compiled"):
            together.append(millions(weights / max(1e-9, sum(row["weights"] / row[profile][way] for row in trained))))
    rows.append((f"the {len(trained)} trained ones: all weights / all time", f"{weights:,}", *together))
    head = ("mask set", "weights", *(f"`{profile}`: {what}" for profile in ("default", "max")
            for what in ("lanes", "numpy, M weights/s", "compiled")))  # fmt: skip
    return table(head, rows)


def plot(measured: Mapping[str, Row], path: Path) -> None:
    """Draw bytes in shares of the entropy, and decode rates, for every mask set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.6 + 0.4 * len(measured)), sharey=True)
    for place, row in enumerate(measured.values()):
        sizes = {"best general": row["best_general"]["bytes"], "constriction": row["constriction"]["bytes"]}
        sizes.update({profile: row["coded"][profile]["bytes"] for profile in PROFILES})
        rates = {"constriction": row["constriction"]["codec_decode_rate"]}
        rates.update({profile: row["coded"][profile]["decode_rate"] for profile in PROFILES})
        for axis, values, unit in ((left, sizes, row["entropy_bytes"]), (right, rates, 1e6)):
            axis.axhline(place, color="0.92", zorder=0)
            for what, value in values.items():
                # the ring of "max" leaves a dot of "default" in the same place to be seen
                fill = (
                    {"facecolors": "none", "edgecolors": COLOURS[what]} if what == "max" else {"color": COLOURS[what]}
                )
                size = 90 if what == "max" else 36
                axis.scatter(value / unit, place, marker=MARKERS.get(what, "o"), s=size, label=what, zorder=2, **fill)
    left.set_yticks(range(len(measured)), [f"{name} ({row['density']:.3f})" for name, row in measured.items()])
    left.invert_yaxis()
    left.axvline(1, color="0.5", linewidth=0.8, linestyle=":")
    left.set_xlabel("bytes of the masks / entropy of the tensors' densities")
    right.set_xscale("log")
    right.axvline(MUST_DECODE / 1e6, color="0.5", linewidth=0.8, linestyle=":")
    right.set_xlabel("decoding, million weights a second, one core (dotted: 200)")
    left.set_title("mask set (density)", loc="left", fontsize=9)
    handles, labels = left.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="upper center", ncols=len(unique), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=CORPUS, help="folder of ROW-SEED.safetensors")
    parser.add_argument("--only", nargs="+", default=["*"], help="names of mask sets, with wildcards")
    parser.add_argument("--output", type=Path, help="a line for each mask set; default: of benchmarks/measured")
    parser.add_argument("--plot", type=Path, default=Path("runs/codecs.png"))
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    parser.add_argument("--numpy", action="store_true", help="only decode, with the compiled loops and without")
    arguments = parser.parse_args()
    if not (DATA / "weights").is_dir():
        parser.error(f"there is no folder {DATA / 'weights'}; set MASKPACK_DATA, see docs/results/index.md")
    torch.set_num_threads(1)
    output = arguments.output or FOLDER / f"{'codecs-numpy' if arguments.numpy else 'codecs'}.jsonl"
    earlier = {one["set"]: one["result"] for one in trials(output.stem)} if output.parent == FOLDER else {}
    RUNS.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(RUNS / "general-sizes.json")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    measured: dict[str, Row] = {}
    for name, make in cases(arguments.adapters):
        if any(fnmatch(name, pattern) for pattern in arguments.only):
            found = numpy_rates(make()) if arguments.numpy else measure(make(), sizes, name in EACH_CODEC)
            measured[name] = {**found, "versions": versions}
            print(name, flush=True)
        elif name in earlier:
            measured[name] = earlier[name]
    text = numpy_table(measured) if arguments.numpy else markdown(measured, summarized(measured))
    print(text)
    rewrite(output, ({"set": name, **row} for name, row in measured.items()), "set")
    if measured and not arguments.numpy:
        plot(measured, arguments.plot)
    if arguments.write is not None:
        write_between(
            arguments.write, "python -m benchmarks.codecs --numpy" if arguments.numpy else "make bench-codec", text
        )


if __name__ == "__main__":
    main()
