"""A second reader, from docs/format.md alone, for trusted files: python docs/reader.py FILE [BASE] (safetensors)."""

import sys
from json import dumps, loads
from math import prod

import numpy as np
from blake3 import blake3
from safetensors import deserialize
from zstandard import decompress as unframe


def unpack(data): return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype(int)
def varint(stream): return byte if (byte := next(stream)) < 128 else byte - 128 + 128 * varint(stream)
def rounded(x, limit): return np.rint(256 * np.clip(x, -limit, limit)) / 256  # Q of section 6.2

def classes_of(weights):  # section 5
    width = {"F32": 32, "BF16": 16}[weights["dtype"]]
    word = np.frombuffer(weights["data"], f"<u{width // 8}").astype(np.int64) << (32 - width)
    m = np.where(word & 0x7FFFFFFF > 0x7F800000, 0x7F81, (word + 0x7FFF + (word >> 16 & 1)) >> 16 & 0x7FFF)
    have = np.bincount(m)
    return (128 * (2 * (np.cumsum(have) - have) + have) // (2 * m.size))[m] + 128 * (word >> 31) * (m <= 0x7F80)

def decode(data, coding, shape, weights, reference, pieces):  # section 6; the bits before the XOR with a reference
    codec, n = coding["codec"], prod(shape)
    if codec in ("raw", "zstd"):
        return unpack(data if codec == "raw" else unframe(data))[:n]
    if codec == "nm":
        patterns = np.array([v for v in range(1 << data[0]) if v.bit_count() == data[1]])
        powers = len(patterns) ** np.arange(max(d for d in range(1, 7) if d == 1 or len(patterns) ** d <= 64))
        numbers = np.frombuffer(unframe(data[2:]), np.uint8)[:, None].astype(int) // powers % len(patterns)
        return (patterns[numbers.reshape(-1, 1)] >> np.arange(data[0]) & 1).ravel()[:n]
    event, stream = np.zeros((shape[0], prod(shape[1:])) if len(shape) > 1 else (1, n), bool), iter(data[2:])
    if codec == "gap":
        gaps = np.frombuffer(unframe(data[1:]), np.uint8).astype(int)
        event.flat[(np.cumsum(gaps + (gaps < 255)) - 1)[gaps < 255]] = True
    elif codec == "density" and data[0] < 128:
        density(event, data, stream)
    elif data[0] < 128:
        classes = classes_of(weights) if codec == "adaptive-base" else np.zeros(n, int)
        prior = np.frombuffer(pieces[coding["table"]], "<u2") / 4096 if "table" in coding else np.ones(16)
        inputs = shape[1] if len(shape) > 2 and shape[0] * shape[1] <= 1 << 24 else event.shape[1]
        order = np.arange(n).reshape(len(event), inputs, -1).swapaxes(1, 2).reshape(event.shape)  # by kernel position
        contexts = [(classes % 128 // 8 + 16 * reference)[order]] * (codec != "adaptive" or "reference" in coding)
        event.flat[order] = adaptive(event.shape, data, stream, classes[order], contexts, prior, inputs, codec)
    return event.ravel() == data[0] % 2

def density(event, data, stream):  # section 6.1; sets what is true in `event`
    unary = np.diff(np.flatnonzero(unpack(bytes(next(stream) for _ in range(varint(stream))))), prepend=-1) - 1
    *folded, highs = np.split(unary, np.cumsum([size * (data[0] >> k & 1) for k, size in enumerate(event.shape, 1)]))
    row, column = (np.resize((v + 1) // 2 * (-1) ** v, size) for v, size in zip(folded, event.shape, strict=True))
    octave = np.add.outer(row, column).ravel()  # where no classes are stored, resize gave zeros
    order = np.lexsort((np.repeat(row, len(column)), octave))  # stable: then rows and columns rise
    octaves, sizes = np.unique(octave, return_counts=True)
    members, counts = np.split(order, np.cumsum(sizes)[:-1]), [varint(stream) for _ in octaves]
    planes = unpack(bytes(stream))
    for width, weights, count in zip((data[1] - octaves).tolist(), members, counts, strict=True):
        (low, planes), (high, highs) = np.split(planes, [width * count]), np.split(highs, [count])
        gaps = (high << width) + (low.reshape(width, count) << np.arange(width)[:, None]).sum(0)
        event.flat[weights[np.cumsum(gaps + 1) - 1]] = True

def adaptive(shape, data, stream, classes, contexts, prior, inputs, codec):  # section 6.2; what is an event
    event, total, coded = np.zeros(shape, bool), varint(stream), bytes(stream)
    state, words = int.from_bytes(coded[:5], "little"), iter(np.frombuffer(coded[5:], "<u2").tolist())
    directions = np.where(np.arange(shape[1]) % np.arange(1, data[0] // 2 + 1)[:, None], -1.0, 1.0)
    (row, column), sign, one, cuts = np.indices(shape), np.where(classes > 127, -1.0, 1.0), np.ones(1), []
    kernels = [2 * (row * inputs + column % inputs) + (sign < 0)] if inputs < shape[1] else []
    lines = [(x, 2.0**k, one) for x, k in zip((row, column), divmod(data[1], 16), strict=True)]  # index, start, prior
    lines += [(x, 1.0 if codec == "adaptive-base" else 3.0, one) for x in kernels] + [(x, 8.0, prior) for x in contexts]
    learned = [np.full((2, x.max() + 1), start) for x, start, _ in lines] + [np.full((2, 32), 16.0)]
    for size, unit in zip(shape, (1, inputs if kernels else 1), strict=True):
        b = min(size // unit, 32, 1 + int(np.sqrt(event.size)) // 16)
        edges = sorted({size // unit * k * (k + b) // (2 * b * b) * unit for k in range(b + 1)})
        cuts.append([slice(*x) for x in zip(edges, edges[1:], strict=False)])
    for band, stripe in ((band, stripe) for band in cuts[0] for stripe in cuts[1]):
        where, ready = [x[band, stripe] for x, _, _ in lines], [v[0] / v[1] for v in learned]
        rate, other, *others = [t[x % len(t)] * v[x] for (_, _, t), x, v in zip(lines, where, ready, strict=False)]
        rate = prod(others, start=rate * (total / event.size * 65536 * other))
        if len(directions):
            pull = channels(directions, event[band], sign[band]).T @ directions[:, stripe]  # exact in any order
            lean = 1 + sign[band, stripe] * np.clip(pull, -0.97, 0.97)
            where.append((16 * lean).astype(int))
            rate = rate * (lean * ready[-1][where[-1]])
        mantissa, e = np.frexp(np.clip(rate, 16, 57344))
        level = 4 * (e - 5) + np.floor(8 * mantissa).astype(int) - 4
        center = ((9 + 2 * (level % 4)) << (4 + level // 4)) // 8
        for one in np.unique(level):
            at, c, done, p = np.argwhere(level == one), [0], 0, ((9 + 2 * (int(one) % 4)) << (4 + int(one) // 4)) // 8
            while c[-1] < 49152:
                c.append(c[-1] + ((65536 - c[-1]) * p + 32768) // 65536)
            while done < len(at):
                m, slot = min(len(c) - 1, len(at) - done), state % 65536
                g = min(int(np.searchsorted(c, slot, "right")) - 1, m)
                event[band, stripe][tuple(at[done : done + m][g : g + 1].T)] = True  # nothing if g = m
                done += min(g + 1, m)
                state = ([*c[: m + 1], 65536][g + 1] - c[g]) * (state // 65536) + slot - c[g]
                state = state if state >= 1 << 24 else 65536 * state + next(words)
        for v, factor, line in zip(learned, ready, where, strict=False):
            x, y = (np.bincount(line.ravel(), z.ravel(), len(factor)) for z in (center, event[band, stripe]))
            v += y, x / 65536 / factor
        if stripe == cuts[1][-1] and event.any():
            channels(directions, event, sign, learn=True)
    return event

def channels(directions, event, sign, learn=False):  # strengths of every row, or better directions
    strengths, (row, column), left = np.zeros((len(directions), len(event))), np.nonzero(event), sign[event]
    for strength, direction in zip(strengths, directions, strict=True):
        x, y = (np.bincount(row, v * direction[column], len(event)) for v in (left, direction[column]))
        strength[:] = rounded(x / (y + 3), 64)
        z = strength[row]
        if learn and z.any():
            x, y = (np.bincount(column, v * z, direction.size) for v in (left, z))
            direction[:] = rounded(x / (y + 4 * np.mean(z * z)), 64)
            if length := np.sqrt(np.mean(direction**2)):
                direction[:], z = rounded(direction / length, 8), rounded(z * length, 64)
        left = left - z * direction[column]
    return strengths

def read(path, base=None, show=lambda *_, **__: None):
    """Return {set: {(parameter, op): mask}}; kept counts, mask_id and digests must agree."""
    data = np.fromfile(path, np.uint8).tobytes()
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    about, tensors = loads(text)["__metadata__"], {key: x["data"] for key, x in deserialize(data)}
    weights, seal = dict(deserialize(np.fromfile(base, np.uint8).tobytes())) if base else {}, about["header_blake3"]
    header, masks, entries, hashed, rows = loads(about["maskpack"]), {}, [], [], []
    for name, one in sorted(header["sets"].items()):
        ends = np.cumsum([*one.get("tables", []), *one["size"]])
        pieces = [x.tobytes() for x in np.split(np.frombuffer(tensors[f"{name}/payloads"], np.uint8), ends[:-1])]
        codings, shapes = [one["codings"][k] for k in one["coding"]], [one["shapes"][k] for k in one["shape"]]
        columns = one["names"].split("\n"), codings, shapes, one["kept"], pieces[-len(codings) :]
        hashed, entries = hashed + pieces, entries + [(name, pieces, *x) for x in zip(*columns, strict=True)]
    for name, pieces, key, coding, shape, kept, payload in sorted(entries, key=lambda entry: "reference" in entry[3]):
        reference = masks[coding["reference"]][key, coding["op"]].ravel() if "reference" in coding else False
        bits = decode(payload, coding, shape, weights.get(key), reference, pieces) != reference
        masks.setdefault(name, {})[key, coding["op"]] = bits.reshape(shape)
        rows.append([name, key, coding["op"], shape, blake3(np.packbits(bits, bitorder="little")).hexdigest()])
        show(name, key, coding["op"], shape, kept, f"{kept / max(bits.size, 1):.4f}")
    hashed += [tensors[key] for key in sorted(tensors) if key.partition("/")[2] not in ("", "payloads")]
    agree = {"mask_id": header["mask_id"] == blake3(dumps(sorted(rows), separators=(",", ":")).encode()).hexdigest()}
    agree["maskpack.digests"] = b"".join(blake3(x).digest()[:16] for x in hashed) == tensors["maskpack.digests"]
    agree["data_blake3"] = header["data_blake3"] == blake3(data[8 + len(text) :]).hexdigest()
    agree["header_blake3"] = seal == blake3(text.replace(seal.encode(), b"0" * 64)).hexdigest()
    show(*(f"{what}: {'agrees' if fits else 'does not agree'}" for what, fits in agree.items()), sep="\n")
    if not all(agree.values()):
        raise ValueError(f"{path}: {agree}")
    return masks

if __name__ == "__main__":
    read(*sys.argv[1:], show=print)
