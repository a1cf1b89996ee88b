"""A second reader, from docs/format.md alone, for trusted files: python docs/reader.py FILE [BASE] (safetensors)."""

import sys
from json import dumps, loads
from math import prod
from pathlib import Path

import numpy as np
from blake3 import blake3
from safetensors import deserialize
from zstandard import ZstdCompressionDict, ZstdDecompressor
from zstandard import decompress as unframe


def unpack(data): return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype(int)
def varint(stream): return byte if (byte := next(stream)) < 128 else byte - 128 + 128 * varint(stream)

def classes_of(weights):  # section 5
    width = {"F32": 32, "BF16": 16}[weights["dtype"]]
    word = np.frombuffer(weights["data"], f"<u{width // 8}").astype(np.int64) << (32 - width)
    m = np.where(word & 0x7FFFFFFF > 0x7F800000, 0x7F81, (word + 0x7FFF + (word >> 16 & 1)) >> 16 & 0x7FFF)
    have = np.bincount(m)
    return (128 * (2 * (np.cumsum(have) - have) + have) // (2 * m.size))[m] + 128 * (word >> 31) * (m <= 0x7F80)

def decode(data, coding, shape, weights, reference):  # section 6; the bits before the XOR with a reference
    codec, n = coding["codec"], prod(shape)
    if codec in ("raw", "zstd"):
        return unpack(data if codec == "raw" else unframe(data))[:n]
    if codec == "nm":
        patterns = np.array([v for v in range(1 << data[0]) if v.bit_count() == data[1]])
        powers = len(patterns) ** np.arange(max(d for d in range(1, 7) if d == 1 or len(patterns) ** d <= 64))
        numbers = np.frombuffer(unframe(data[2:]), np.uint8)[:, None].astype(int) // powers % len(patterns)
        return (patterns[numbers.reshape(-1, 1)] >> np.arange(data[0]) & 1).ravel()[:n]
    event = np.zeros(n, bool)
    if codec == "gap":
        gaps = np.frombuffer(unframe(data[1:]), np.uint8).astype(int)
        event[(np.cumsum(gaps + (gaps < 255)) - 1)[gaps < 255]] = True
    elif data[0] < 128:
        classes = classes_of(weights) if codec == "logit-base" else None
        logit(event, data, shape, classes, reference if "reference" in coding else None)
    return event == data[0] % 2

STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
HAZARD = np.clip(np.rint(4096 * np.log2(1 + np.exp((np.arange(1024) - 512) / 16))), 1, 32768).astype(int).tolist()
SURVIVAL = np.rint(32768 * 2 ** (-np.arange(40960) / 4096)).astype(int).tolist()
SLOTS = np.array("""
32420 126 8 8 8 8 8 8  31426 623 8 8 8 8 8 8  29024 1824 8 8 8 8 8 8
25450 3609 10 8 8 8 8 8  21616 5450 86 8 8 8 8 8  18184 6883 369 8 8 8 8 8
15282 7705 975 31 8 8 8 8  12842 7927 1842 162 8 8 8 8  10794 7685 2742 492 44 8 8 8
9076 7144 3451 1026 188 21 8 8  7640 6447 3856 1637 494 106 16 8  6432 5699 3964 2165 928 312 83 17
5414 4970 3846 2509 1380 640 250 82  4582 4313 3599 2662 1745 1014 522 238  3924 3762 3311 2676 1986 1353 847 487
""".split(), int).reshape(15, 8).tolist()  # of 0 to 7 in each table

class Lane:  # section 6.2
    def __init__(self, words):
        self.state, self.words = 0, words[::-1]
        self.fill()
        self.fill()

    def fill(self):
        if self.state < 65536 and self.words:
            self.state = 65536 * self.state + self.words.pop()

    def take(self, first, size):
        self.state = size * (self.state // 32768) + self.state % 32768 - first
        self.fill()

    def coefficient(self, slots):
        edges = np.cumsum([0, *slots[:0:-1], *slots]).tolist()
        number = int(np.searchsorted(edges, self.state % 32768, "right")) - 1
        self.take(edges[number], edges[number + 1] - edges[number])
        return number - 7

def logit(event, data, shape, classes, reference):  # section 6.1; sets what is true in `event`
    rows, inputs = (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))
    inputs = shape[1] if len(shape) > 2 and rows * shape[1] <= 1 << 24 else inputs
    positions, units, stream = event.size // (rows * inputs), rows * inputs, iter(data[1:])
    sign = np.ones(event.size, int) if classes is None else np.where(classes > 127, -1, 1)
    sizes = dict(zip("ABDXMF", (rows, inputs, positions, 5 if classes is None else 15, 16, 1), strict=True))
    sizes, offset = {name: sizes[name] for k, name in enumerate(sizes) if data[0] >> k + 1 & 1}, 32 - varint(stream)
    ranks = range(next(stream) if classes is not None and positions == 1 and min(rows, inputs) >= 16 else 0)
    sizes |= {f"{side}{k}": size for k in ranks for side, size in (("U", rows), ("V", inputs))}
    codes, count = {name: next(stream) for name in sizes}, varint(stream)
    lengths = [v // 2 if v % 2 == 0 else -(v + 1) // 2 for v in (varint(stream) for _ in range(count - 1))]
    words = np.split(np.frombuffer(bytes(stream), "<u2"), np.cumsum(np.cumsum(lengths)).astype(int))
    lanes = [Lane(x.tolist()) for x in words]
    tables = [SLOTS[codes[name] % 16 - 1] for name in sizes for _ in range(sizes[name])]
    edges = [len(tables) * k // count for k in range(count + 1)]
    found = [x.coefficient(t) for x, a, b in zip(lanes, edges, edges[1:], strict=False) for t in tables[a:b]]
    arrays = {name: np.zeros(16, int) for name in "MF"}
    for name, own in zip(sizes, np.split(found, np.cumsum([*sizes.values()])[:-1]), strict=False):
        arrays[name] = (np.cumsum(own) if name == "M" else own) * STEPS[codes[name] // 16]
    (unit, p), zero = np.divmod(np.arange(event.size), positions), np.zeros(1 << 24, int)
    r, i = np.divmod(unit, inputs)
    lean = sum(arrays[f"U{k}"][r] * arrays[f"V{k}"][i] for k in ranks)
    level = 512 + offset + (sign * lean >> 4)
    level = level + arrays.get("A", zero)[r] + arrays.get("B", zero)[i] + arrays.get("D", zero)[p]
    level = level + (0 if classes is None else arrays["M"][classes % 128 // 8])
    level = level + (0 if reference is None else arrays["F"][0] * reference)
    starts = [min(8 * (-(-units // 8) * k // count), units) for k in range(count + 1)]
    for lane, first, last in zip(lanes, starts, starts[1:], strict=False):
        v = 0
        for weight in (u * positions + k for k in range(positions) for u in range(first, last)):
            before = slice(weight - weight % positions, weight)
            same = int((event[before] & (sign[before] == sign[weight])).sum())
            x = min(same, 4) + 5 * min(int(event[before].sum()) - same, 2)
            q = level[weight] + (arrays["X"][x] if "X" in arrays else 0)
            slot, u = lane.state % 32768, v + HAZARD[min(max(q, 0), 1023)]
            event[weight] = slot >= SURVIVAL[u]
            if event[weight] or u >= 8192:
                lane.take(SURVIVAL[u] * event[weight], SURVIVAL[v] - SURVIVAL[u] if event[weight] else SURVIVAL[u])
            v = 0 if event[weight] or u >= 8192 else u

def opened(path):  # section 1; the index and the data
    page, content = Path(__file__).with_name("format.md").read_bytes(), dict(deserialize(Path(path).read_bytes()))
    whole = bytes(content["maskpack"]["data"])
    if blake3(whole[8:]).digest()[:8] != whole[:8]:
        raise ValueError(f"{path} is damaged: its digest does not agree")
    words = ZstdCompressionDict(page.split(b"```text\n")[1].split(b"\n```")[0].replace(b"\n", b""), 1)
    end = 12 + int.from_bytes(whole[8:12], "little")
    return loads(ZstdDecompressor(words).decompress(whole[12:end])), whole[end:]

def numbers(data, dtype):  # BF16 as float32
    raw = np.frombuffer(data, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(dtype, "u1"))
    return (raw.astype("<u4") << 16).view("<f4") if dtype == "BF16" else raw

def integers(frame, count):  # section 4.2
    codes = sum(x.astype(int) << 8 * k for k, x in enumerate(numbers(unframe(frame), "U8").reshape(-1, count)))
    return codes >> 1 ^ -(codes & 1)

WEIGHTS = np.array([0, 1, 2, 3, 5, 9, 16, 28, 49, 85, 149, 261, 457, 800, 1400, 2450])

def stepped(data, base, zeros):  # section 4.3; the words of the values at these places
    name, mantissa, width = (("F32", 23, 32), ("BF16", 7, 16), ("F16", 10, 16))[data[4]]
    if base["dtype"] != name:
        raise ValueError(f"values are steps from a base in {name}, the one given is in {base['dtype']}")
    old = np.frombuffer(base["data"], f"<u{width // 8}")[zeros].tolist()
    half, whole, stream, tables, found, bit = 1 << width - 1, 1 << width, iter(data[5:]), [], [], 0
    if not old:
        return np.array([], f"<u{width // 8}")
    top, number = next(stream), lambda word: whole - 1 - word if word >= half else word + half
    for _ in range(next(stream)):
        first = next(stream)
        pairs = [next(stream) for _ in range((first % 16 * 16 + first // 16 + 1) // 2)]
        weights = WEIGHTS[[x for pair in pairs for x in (pair % 16, pair // 16)]]
        slots = np.where(weights > 0, np.maximum(1, 4096 * weights // weights.sum()), 0)
        slots[weights.argmax()] += 4096 - slots.sum()
        tables.append(np.cumsum([0, *slots]).tolist())
    rest = unpack(bytes(next(stream) for _ in range(varint(stream))))
    words, lanes = np.frombuffer(bytes(stream), "<u2").tolist()[::-1], min(128, max(1, len(old) // 4096))
    states = [words.pop() + 65536 * words.pop() for _ in range(lanes)]
    for i, b in enumerate(old):
        edges = tables[min(max(top - (b % half >> mantissa), 0), len(tables) - 1)]
        slot = states[i % lanes] % 4096
        k = int(np.searchsorted(edges, slot, "right")) - 1
        state = (edges[k + 1] - edges[k]) * (states[i % lanes] // 4096) + slot - edges[k]
        states[i % lanes] = 65536 * state + words.pop() if state < 65536 else state
        low, first = max(k // 2 - 1, 0), k if k < 2 else 2 + k % 2
        size = sum(int(x) << j for j, x in enumerate(rest[bit + 1 : bit + 1 + low])) + (first << low)
        step, bit = -size if k and rest[bit] else size, bit + low + (k > 0)
        value = (number(b) + (-step if b >= half else step)) % whole
        found.append(value - half if value >= half else whole - 1 - value)
    found = np.array(found, f"<u{width // 8}")
    if words or states != [65536] * lanes or blake3(found.tobytes()).digest()[:4] != data[:4]:
        raise ValueError("stored values do not follow from the base given")
    return found

def dense(path, base=None):
    """Return {name: array} of all but masks: norms, a head and values that are stored as steps, as what they make."""
    header, data = opened(path)
    weights, found, at = dict(deserialize(Path(base).read_bytes())) if base else {}, {}, len(data)
    old = {name: numbers(x["data"], x["dtype"]).astype(float) for name, x in weights.items()}
    masks = read(path, base) if any("/values/" in name for name in header.get("tensors", {})) else {}
    for name, (dtype, *shape) in sorted(header.get("tensors", {}).items(), reverse=True):  # from the end of the data
        at, end = at - prod(shape) * (4 if dtype == "F32" else 2 if "F16" in dtype else 1), at
        found[name] = numbers(data[at:end], dtype).reshape(shape)
    for name, one in header["sets"].items():
        for key, mask in masks.get(name, {}).items():
            place = f"{name}/values/{key[0]}"
            if place in found and header["tensors"][place][0] == "U8":
                words = stepped(found[place].tobytes(), weights[key[0]], np.flatnonzero(~mask.ravel()))
                found[place] = numbers(words.tobytes(), weights[key[0]]["dtype"])
        if f"{name}/head/steps" in found:
            steps, features = found.pop(f"{name}/head/steps")[:, None], one["head"]["features"]
            counts = integers(found.pop(f"{name}/head/integers"), steps.size * features).reshape(-1, features)
            found[f"{name}/head/weight"] = counts.astype("f4") * steps
        if "norms" in one:
            layers, sizes = one["norms"]["names"].split("\n"), one["norms"]["channels"]
            shifted = [k for k, yes in enumerate(one["norms"].get("shifts", [1] * len(sizes))) if yes]
            ends = np.cumsum([*sizes, *(sizes[k] for k in shifted)])
            steps = np.split(integers(found.pop(f"{name}/norms"), ends[-1]), ends[:-1])
            shifts = dict(zip(shifted, steps[len(sizes) :], strict=True))
            for k, layer in enumerate(layers):
                i, sign = steps[k] >> 1, 1 - 2 * (steps[k] & 1)
                factor = sign * np.ldexp(np.exp2(i % 32 / 32).astype("f4").astype(float), i // 32)
                w, place = old[f"{layer}.weight"], f"{name}/parameters/{layer}"
                found[f"{place}.weight"] = (w * factor).astype("f4")
                if k in shifts:
                    shift = shifts[k] * float(np.float32(np.log(2) / 32)) * np.abs(w)
                    found[f"{place}.bias"] = (old[f"{layer}.bias"] * factor + shift).astype("f4")
    return found

def read(path, base=None, show=lambda *_, **__: None):
    """Return {set: {(parameter, op): mask}}; kept counts, mask_id and the file's digest must agree."""
    header, data = opened(path)
    weights = dict(deserialize(Path(base).read_bytes())) if base else {}
    masks, entries, rows = {}, [], []
    names = {name: one["names"].split("\n") for name, one in sorted(header["sets"].items())}
    at = 6 * len({name for own in names.values() for name in own})
    for name, own in names.items():
        one = header["sets"][name]
        ends = at + np.cumsum(one["size"])
        pieces = [data[end - size : end] for end, size in zip(ends, one["size"], strict=True)]
        codings, shapes = [one["codings"][k] for k in one["coding"]], [one["shapes"][k] for k in one["shape"]]
        entries += [(name, *x) for x in zip(own, codings, shapes, one["kept"], pieces, strict=True)]
        at = ends[-1]
    for name, key, coding, shape, kept, payload in sorted(entries, key=lambda entry: "reference" in entry[2]):
        reference = masks[coding["reference"]][key, coding["op"]].ravel() if "reference" in coding else False
        bits = decode(payload, coding, shape, weights.get(key), reference) != reference
        masks.setdefault(name, {})[key, coding["op"]] = bits.reshape(shape)
        rows.append([name, key, coding["op"], shape, blake3(np.packbits(bits, bitorder="little")).hexdigest()])
        show(name, key, coding["op"], shape, kept, f"{kept / max(bits.size, 1):.4f}")
    if header["mask_id"] != blake3(dumps(sorted(rows), separators=(",", ":")).encode()).hexdigest():
        raise ValueError(f"{path}: its mask_id does not agree")
    show("digest and mask_id agree")
    return masks

if __name__ == "__main__":
    read(*sys.argv[1:], show=print)
