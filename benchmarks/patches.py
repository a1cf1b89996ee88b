"""Bytes and rates of exact patches between real checkpoints, beside other tools on the same pairs.

    python -m benchmarks.patches        half an hour of one core, resumable; the pairs are made by patch_pairs.py
    python -m benchmarks.patches --write docs/results/patches.md

Every coder gets base and tuned weights in memory, one tensor at a time, and its decoder must give the tuned weights to
the bit. Seconds are of the processor, all threads of the process together, so that other processes hardly matter:
medians of five runs, or of as many as begin within three seconds. The whole model is coded where that takes minutes;
three of its 30 layers (10.6 of 134.5 million weights) by all coders.
"""

import gc
import importlib
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from zstandard import ZstdCompressor, ZstdDecompressor

from maskpack import MaskSet, Parts, fingerprint, load_backbone, load_mask, save_adapter, threads, unload_mask
from maskpack.adapter.content import About
from maskpack.adapter.values import Steps, at_zeros, put_at_zeros
from maskpack.backbone.fingerprint import fingerprint_of
from maskpack.backbone.model import body
from maskpack.codecs import logit, ulps
from maskpack.codecs.base import Side
from maskpack.importers.base import Imported, exact, import_file
from maskpack.importers.checkpoint import Largest
from maskpack.mask import PackedMask, packed_bits
from maskpack.safetensors_io import Made, TensorFile

from .measured import trial, trials
from .patch_pairs import PAIRS, weights_path
from .report import NOTHING, command, table, write_between

NAME = "patches"
MARK = "python -m benchmarks.patches --write docs/results/patches.md"
BASE, FOLDER = Path("runs/smollm2"), Path("runs/pairs")
VALUES, USED, LOSSY = "values", "as used", "lossy"
SCOPES = ("three layers", "whole")
LAYERS = tuple(f"model.layers.{k}." for k in (0, 14, 29))
RATED = ("grpo-1e-6, steps 1", "grpo-1e-6, steps 10", "sft-1e-5, steps 1", "sft-1e-5, steps 10")  # measured together
RUNS, LONG = 5, 3.0  # of which the median is taken; seconds, after which there is no other one
Weights = Mapping[str, Tensor]


class Coder(NamedTuple):
    """A way to code the tuned words of a tensor as bytes, given the base's, and to decode them."""

    encode: Callable[[Any, Any], bytes]
    decode: Callable[[bytes, Any], Any]


def words(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.int16).numpy().view(np.uint16)


def zstd(level: int, data: bytes) -> bytes:
    return ZstdCompressor(level).compress(data)


def unzstd(data: bytes) -> Any:
    return np.frombuffer(ZstdDecompressor().decompress(data), np.uint16)


def indexed(base: Any, tuned: Any) -> bytes:
    """Return int32 places and values, as vLLM's sparse weight transfer has them."""
    at = np.flatnonzero(base != tuned)
    return bytes(at.astype(np.int32).tobytes() + tuned[at].tobytes())


def unindexed(data: bytes, base: Any) -> Any:
    count = len(data) // 6
    found = base.copy()
    found[np.frombuffer(data, np.int32, count)] = np.frombuffer(data, np.uint16, count, 4 * count)
    return found


def gaps(base: Any, tuned: Any) -> bytes:
    """Return 16-bit distances and values; a distance of 65535 goes on without a value of its own."""
    at = np.flatnonzero(base != tuned)
    distance = np.diff(at, prepend=-1) - 1
    more = distance // 65535
    ends = np.cumsum(more + 1) - 1
    kept = np.full(int((more + 1).sum()), 65535, np.uint16)
    kept[ends] = distance - 65535 * more
    return bytes(np.int64(len(kept)).tobytes() + kept.tobytes() + tuned[at].tobytes())


def ungaps(data: bytes, base: Any) -> Any:
    (count,) = np.frombuffer(data, np.int64, 1)
    kept = np.frombuffer(data, np.uint16, int(count), 8).astype(np.int64)
    at = (np.cumsum(kept + (kept < 65535)) - 1)[kept < 65535]
    found = base.copy()
    found[at] = np.frombuffer(data, np.uint16, len(at), 8 + 2 * int(count))
    return found


def arc(name: str) -> Coder:
    arcs: Any = importlib.import_module("fireworks_delta_compression")
    arc3: Any = importlib.import_module("fireworks_delta_compression.backends.arc3")
    arc3._CANDIDATE_WAIT_MULTIPLIER = 1e9  # it may try all that it has, however long that takes

    def tensor(own: Any) -> Tensor:
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)

    def encode(base: Any, tuned: Any) -> bytes:
        found, checksum = arcs.delta_compress(src=tensor(base), dst=tensor(tuned), compression_format=name)
        return bytes(len(checksum).to_bytes(1, "little") + checksum.encode() + found.numpy().tobytes())

    def decode(data: bytes, base: Any) -> Any:
        at = 1 + data[0]
        diff = torch.frombuffer(bytearray(data[at:]), dtype=torch.uint8)
        found = arcs.delta_decompress(
            src=tensor(base), compressed_diff=diff, checksum=data[1:at].decode(), compression_format=name
        )
        return words(found)

    return Coder(encode, decode)


def bsdiff(library: Any) -> Coder:
    def decode(data: bytes, base: Any) -> Any:
        return np.frombuffer(library.patch(base.tobytes(), data), np.uint16)

    return Coder(lambda base, tuned: bytes(library.diff(base.tobytes(), tuned.tobytes())), decode)


CODERS: dict[str, Callable[[], Coder]] = {
    "arc_v3": lambda: arc("arc_v3"),
    "arc_v2": lambda: arc("arc_v2"),
    "XOR, zstd -19": lambda: Coder(lambda b, t: zstd(19, (b ^ t).tobytes()), lambda data, b: unzstd(data) ^ b),
    "int32 index, value": lambda: Coder(indexed, unindexed),
    "16-bit gap, value": lambda: Coder(gaps, ungaps),
    "bsdiff": lambda: bsdiff(importlib.import_module("bsdiff4")),
    "tuned weights, zstd -3": lambda: Coder(lambda b, t: zstd(3, t.tobytes()), lambda data, b: unzstd(data)),
}
OURS = {"maskpack": "max", "maskpack, profile default": "default"}
QUICK = ("maskpack", "arc_v3", "arc_v2", "int32 index, value")  # of the whole model


def pair_of(pair: str, scope: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run, before, after = PAIRS[pair]
    both = []
    for step in (before, after):
        file = TensorFile(weights_path(FOLDER, BASE, run, step))
        both.append({name: file[name].clone() for name in file if scope == "whole" or name.startswith(LAYERS)})
    return both[0], both[1]


def by_tensor(name: str, base: Weights, tuned: Weights) -> dict[str, Any]:
    coder, size, seconds = CODERS[name](), 0, [0.0, 0.0]
    for key, weight in base.items():
        before, after = words(weight), words(tuned[key])
        start = time.process_time()
        data = coder.encode(before, after)
        middle = time.process_time()
        found = coder.decode(data, before)
        seconds = [seconds[0] + middle - start, seconds[1] + time.process_time() - middle]
        assert np.array_equal(found, after), key
        size += len(data)
    return {"bytes": size, "encode": seconds[0], "decode": seconds[1]}


def whole_file(name: str, base: Weights, tuned: Weights) -> dict[str, Any]:
    """Measure our own file with all that is in it; fingerprints of base and result are timed on their own."""
    start = time.process_time()
    own = fingerprint_of(base, "benchmark", None, ())
    hashed = time.process_time() - start
    same = {key: words(weight) == words(tuned[key]) for key, weight in base.items()}
    changed = [key for key, one in same.items() if not one.all()]
    shapes = {key: tuple(base[key].shape) for key in changed}

    @lru_cache(1)  # as an importer does
    def mask(key: str) -> PackedMask:
        return PackedMask.from_tensor(
            torch.from_numpy(words(base[key]) == words(tuned[key])).reshape(shapes[key]), "replace"
        )

    def values(key: str) -> Tensor:
        return at_zeros(tuned[key], mask(key))

    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        parts = Parts(MaskSet.streamed(shapes, mask, shapes), values=Made(shapes, values))
        adapter = save_adapter(
            Path(folder) / "patch.safetensors",
            parts,
            own,
            weights=base,
            profile=OURS[name],  # type: ignore[arg-type]
        )
        encode = time.process_time() - start
        start = time.process_time()
        parts = adapter.parts(base=base, stream=True)
        for key in changed:
            back, one, new = base[key].reshape(-1).clone(), parts.masks[key], parts.values[key]
            put_at_zeros(back, one, new.values(at_zeros(back, one)) if isinstance(new, Steps) else new)
            assert np.array_equal(words(back), words(tuned[key])), key
        decode = time.process_time() - start
        stored = sum(len(adapter.bytes_of(one)) for one in adapter.names if "/values/" in one)
    return {"bytes": adapter.size, "values": stored, "encode": encode, "decode": decode, "fingerprint": hashed}


def one_core() -> None:
    torch.set_num_threads(1)
    threads.WORKERS = 1


def measure(pair: str, scope: str, coder: str) -> dict[str, Any]:
    one_core()
    base, tuned = pair_of(pair, scope)
    changed = sum(int((words(weight) != words(tuned[key])).sum()) for key, weight in base.items())
    runs, start = list[dict[str, Any]](), time.process_time()
    while len(runs) < RUNS and (not runs or time.process_time() - start < LONG):
        gc.collect()
        runs.append((whole_file if coder in OURS else by_tensor)(coder, base, tuned))
    own = {key: float(np.median([one[key] for one in runs])) for key in runs[0]}
    own |= {key: runs[0][key] for key in ("bytes", "values") if key in own}
    weights = sum(weight.numel() for weight in base.values())
    return {"weights": weights, "changed": changed, "changed_bytes": 2 * changed, **own}


def run(pair: str, scope: str) -> None:
    run_name, before, after = PAIRS[pair]
    if not all(weights_path(FOLDER, BASE, run_name, step).exists() for step in (before, after)):
        first = f"python -m benchmarks.patch_pairs {BASE} {FOLDER}"
        raise SystemExit(f"{pair}: there are no such checkpoints; first: {first}")
    for coder in QUICK if scope == "whole" else (*OURS, *CODERS):
        trial(NAME, {"pair": pair, "scope": scope, "coder": coder}, partial(measure, pair, scope, coder))


def simulated() -> dict[str, Any]:
    """Code and decode values of a simulated optimiser step that changes all weights by as much, without positions."""
    rng, runs = np.random.default_rng(0), list[tuple[float, float]]()
    masters = (rng.standard_normal(8_000_000) * 0.02).astype(np.float32)
    base = (masters.view(np.uint32) >> 16).astype(np.uint16)
    moved = masters + rng.standard_normal(masters.size).astype(np.float32) * np.float32(2e-5)
    values = ((moved.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    base, values = base[values != base], values[values != base]
    for _ in range(9):
        start = time.process_time()
        data = ulps.encode("BF16", base, values)
        middle = time.process_time()
        found = ulps.decode(data, base)
        runs.append((middle - start, time.process_time() - middle))
        assert np.array_equal(found, values)
    encode, decode = np.median(np.array(runs), 0).tolist()
    return {"changed": base.size, "bytes": len(data), "encode": encode, "decode": decode}


def used(pair: str) -> dict[str, Any]:
    """Measure a user's way: pack a checkpoint from its files, and load the patch with all checks."""
    from transformers import AutoModelForCausalLM

    one_core()
    run_name, _, step = PAIRS[pair]
    found, start = dict[str, float](), time.process_time()

    def stage(name: str) -> None:
        nonlocal start
        now = time.process_time()
        found[name], start = now - start, now

    tuned = weights_path(FOLDER, BASE, run_name, step)
    model = load_backbone(f"hf/./{BASE}", mapped=True, task="text-generation").model
    stage("open")
    imported = import_file(tuned, model, "checkpoint")
    stage("compare")
    base = fingerprint(model, id="benchmark")
    after = {name: imported.after.get(name, one) for name, one in body(model, ()).items()}
    result = fingerprint_of(after, base.id, None, base.head).digests
    stage("fingerprints")
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(imported.masks, values=imported.values)
        file = Path(folder) / "patch.safetensors"
        adapter = save_adapter(file, parts, base, About(result=result), weights=model, profile="max")
        stage("code")
        whole = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
        stage("model")
        load_mask(whole, file)
        stage("load")
        tensors = TensorFile(tuned)
        assert all(np.array_equal(words(p.detach()), words(tensors[name])) for name, p in whole.named_parameters())
        stage("check")
        unload_mask(whole)
        stage("unload")
    sizes = {"weights": imported.masks.total, "changed": imported.masks.total - imported.masks.kept}
    return {**sizes, "bytes": adapter.size, **found}


def lossy(pair: str, share: float) -> dict[str, Any]:
    """Measure the largest changes alone, exact and ternary, as `maskpack pack --keep SHARE` chooses them."""
    base, tuned = pair_of(pair, SCOPES[0])
    change, found = exact(Path(pair), base, tuned.__getitem__, base), dict[str, Any]()
    assert change.values is not None
    masks = MaskSet.streamed(change.shapes, change.make, change.shapes)
    whole = Imported(masks, Made(change.shapes, change.values), {}, {})
    for way in ("exact", "ternary"):
        taken, error, kept = Largest(whole, base, way == "ternary").take(share)
        size = 0
        for name, mask in taken.masks.items():
            side = Side(mask.shape, words(base[name]), lean=False)
            values = ulps.encode("BF16", words(at_zeros(base[name], mask)), words(taken.values[name]))
            size += len(logit.encode(packed_bits(mask.bits), side, True)) + len(values)
        found[way] = {"bytes": size, "kept": kept, "error": error}
    return found


def page(path: Path) -> None:
    found = trials(NAME)
    by_pair = {(one["pair"], one["scope"], one["coder"]): one["result"] for one in found}
    text = ""
    for scope, coders in zip(SCOPES, ((*OURS, *CODERS), QUICK), strict=True):
        rows = []
        for pair in PAIRS:
            ours = by_pair.get((pair, scope, "maskpack"))
            if ours is not None:
                sizes = [by_pair.get((pair, scope, coder)) for coder in coders]
                bits = ["" if one is None else f"{8 * one['bytes'] / ours['changed']:.2f}" for one in sizes]
                share = f"{100 * ours['changed'] / ours['weights']:.2f} %"
                rows.append([pair, share, f"{8 * ours['values'] / ours['changed']:.2f}", *bits])
        if rows:
            text += f"Bits for each weight that changed, {'the whole model' if scope == 'whole' else scope}:\n\n"
            text += table(("pair", "changed", "values in maskpack's", *coders), rows, 1) + "\n"
    ratios = []
    for rival in ("arc_v3", "XOR, zstd -19"):
        own = [
            one["bytes"] / other["bytes"]
            for (pair, scope, coder), one in by_pair.items()
            if coder == "maskpack" and (other := by_pair.get((pair, scope, rival))) is not None
        ]
        if own:
            ratios.append(f"{min(own):.2f} to {max(own):.2f} of those of {rival}, median {np.median(own):.2f}")
    text += f"maskpack's bytes are {', and '.join(ratios)}.\n\n" if ratios else ""
    rows = []
    for coder in (*OURS, *CODERS):
        own_rows = [by_pair[pair, SCOPES[0], coder] for pair in RATED if (pair, SCOPES[0], coder) in by_pair]
        if own_rows:
            cells = [coder]
            for count in ("weights", "changed"):
                for key in ("encode", "decode"):
                    rates = [2 * one[count] / max(one[key], 1e-9) / 1e6 for one in own_rows]
                    cells.append(
                        " to ".join(f"{one:,.0f}" if one > 99 else f"{one:.2g}" for one in (min(rates), max(rates)))
                    )
            rows.append(cells)
    if rows:
        columns = ("coder", "coding: tensors", "decoding: tensors", "coding: changed", "decoding: changed")
        text += f"MB a second of one core, three layers, of {', '.join(RATED)}:\n\n"
        text += table(columns, rows, 1)
    for one in (one["result"] for one in found if one["scope"] == VALUES):
        coded, decoded = (f"{2 * one['changed'] / one[key] / 1e6:.0f}" for key in ("encode", "decode"))
        each = f"{8 * one['bytes'] / one['changed']:.2f}"
        text += f"\nValues alone, without positions, of a simulated step ({one['changed']:,} changed weights): "
        text += f"coded at {coded} and decoded at {decoded} MB of them a second, {each} bits each.\n"
    for one in (each for each in found if each["scope"] == USED):
        took, size = one["result"], 2 * one["result"]["weights"] / 1e6
        names = ("compare", "fingerprints", "code", "load", "unload")
        seconds = ", ".join(f"{name} {took[name]:.2f}" for name in names)
        made = took["compare"] + took["fingerprints"] + took["code"]
        text += (
            f"\nAs it is used, the whole model, {one['pair']} ({took['bytes']:,} bytes), seconds: {seconds}. So it is "
        )
        text += f"packed and loaded at {size / made:.0f} and {size / took['load']:.0f} MB of tensors a second, all "
        text += "digests included.\n"
    rows = []
    for one in (each for each in found if each["scope"] == LOSSY):
        for way, made in one["result"].items():
            rows.append([one["share"], way, f"{made['kept']:,}", f"{made['bytes']:,}", f"{made['error']:.3f}"])
    if rows:
        text += "\nThe largest changes alone, as they are, and as the sign times one number for a row "
        text += f"({RATED[-1]}, three layers, without index and digests):\n\n"
        text += table(("share asked for", "values", "changes", "bytes", "error"), rows, 2)
    write_between(path, MARK, text or NOTHING)


if __name__ == "__main__":
    jobs = {f"{pair}, {scope}": partial(run, pair, scope) for scope in SCOPES for pair in PAIRS}
    about = {"pair": "simulated step", "scope": VALUES, "coder": "maskpack"}
    for share in (0.05, 0.3, 1.0):
        settings = {"pair": RATED[-1], "scope": LOSSY, "coder": "maskpack", "share": share}
        jobs[f"{LOSSY}, {share}"] = partial(trial, NAME, settings, partial(lossy, RATED[-1], share))
    for pair in (RATED[0], RATED[-1]):
        settings = {"pair": pair, "scope": USED, "coder": "maskpack"}
        jobs[f"{USED}, {pair}"] = partial(trial, NAME, settings, partial(used, pair))
    command(__doc__, {VALUES: partial(trial, NAME, about, simulated), **jobs}, page)
