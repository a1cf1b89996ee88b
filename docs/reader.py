"""A second reader of maskpack's masks, written from docs/format.md alone: short, not fast, for trusted files.

python docs/reader.py FILE.safetensors [BASE.safetensors]    (adaptive-base needs the base's weights)"""

import json
import sys
from hashlib import sha256

import numpy as np
import zstandard
from safetensors import deserialize

unframe = zstandard.ZstdDecompressor().decompress

def unpack(data): return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype(int)
def rounded(x, limit): return np.rint(256 * np.clip(x, -limit, limit)) / 256  # Q of section 6.2

def varint(stream):
    byte = next(stream)
    return byte if byte < 128 else byte - 128 + 128 * varint(stream)

def classes_of(weights):  # section 5
    width = {"F32": 32, "BF16": 16}[weights["dtype"]]
    word = np.frombuffer(weights["data"], f"<u{width // 8}").astype(np.int64) << (32 - width)
    m = np.where(word & 0x7FFFFFFF > 0x7F800000, 0x7F81, (word + 0x7FFF + (word >> 16 & 1)) >> 16 & 0x7FFF)
    have = np.bincount(m)
    return (128 * (2 * (np.cumsum(have) - have) + have) // (2 * m.size))[m] + 128 * (word >> 31)

def decode(data, coding, shape, weights, reference, pieces):  # section 6; the bits before the XOR with a reference
    codec, n = coding["codec"], int(np.prod(shape))
    if codec in ("raw", "zstd"):
        return unpack(data if codec == "raw" else unframe(data))[:n]
    if codec == "nm":
        patterns = np.array([v for v in range(1 << data[0]) if v.bit_count() == data[1]])
        powers = len(patterns) ** np.arange(max(d for d in range(1, 7) if d == 1 or len(patterns) ** d <= 64))
        numbers = np.frombuffer(unframe(data[2:]), np.uint8)[:, None].astype(int) // powers % len(patterns)
        return (patterns[numbers.reshape(-1, 1)] >> np.arange(data[0]) & 1).ravel()[:n]
    event, stream = np.zeros((shape[0], int(np.prod(shape[1:]))) if len(shape) > 1 else (1, n), bool), iter(data[2:])
    if codec == "gap":
        gaps = np.frombuffer(unframe(data[1:]), np.uint8).astype(int)
        event.flat[(np.cumsum(gaps + (gaps < 255)) - 1)[gaps < 255]] = True
    elif codec == "density" and data[0] < 128:
        density(event, data, stream)
    elif data[0] < 128:
        classes = classes_of(weights) if codec == "adaptive-base" else np.zeros(n, int)
        prior = np.frombuffer(pieces[coding["table"]], "<u2") / 4096 if "table" in coding else np.ones(16)
        contexts = [classes % 128 // 8 + 16 * reference] if codec == "adaptive-base" or "reference" in coding else []
        adaptive(event, data, stream, np.where(classes < 128, 1.0, -1.0).reshape(event.shape), contexts, prior)
    return event.ravel() == data[0] % 2

def density(event, data, stream):  # section 6.1; sets what is true in `event`
    unary = np.diff(np.flatnonzero(unpack(bytes(next(stream) for _ in range(varint(stream))))), prepend=-1) - 1
    *folded, highs = np.split(unary, np.cumsum([size * (data[0] >> k & 1) for k, size in enumerate(event.shape, 1)]))
    row, column = (np.resize((v + 1) // 2 * (-1) ** v, size) for v, size in zip(folded, event.shape, strict=True))
    octave = np.add.outer(row, column).ravel()  # where no classes are stored, resize gave zeros
    order = np.lexsort((np.repeat(row, len(column)), octave))  # stable: then rows and columns rise
    octaves, sizes = np.unique(octave, return_counts=True)
    counts, members = [varint(stream) for _ in octaves], np.split(order, np.cumsum(sizes)[:-1])
    planes = unpack(bytes(stream))
    for width, weights, count in zip((data[1] - octaves).tolist(), members, counts, strict=True):
        (low, planes), (high, highs) = np.split(planes, [width * count]), np.split(highs, [count])
        gaps = (high << width) + (low.reshape(width, count) << np.arange(width)[:, None]).sum(0)
        event.flat[weights[np.cumsum(gaps + 1) - 1]] = True

def adaptive(event, data, stream, sign, contexts, prior):  # section 6.2; sets what is true in `event`
    total, coded = varint(stream), bytes(stream)
    state, words = int.from_bytes(coded[:5], "little"), iter(np.frombuffer(coded[5:], "<u2").tolist())
    directions = np.repeat([[1.0], [0.0]], event.shape[1], axis=1)[: data[0] // 2]
    learned = [np.full((2, n), 2.0**k) for n, k in zip((*event.shape, 32), (*divmod(data[1], 16), 3), strict=True)]
    parts = [min(x, 16, 1 + int(np.sqrt(event.size)) // 24) for x in event.shape]
    cuts = [[slice(x * k // b, x * (k + 1) // b) for k in range(b)] for x, b in zip(event.shape, parts, strict=True)]
    for band, stripe in ((band, stripe) for band in cuts[0] for stripe in cuts[1]):
        where = [x.reshape(event.shape)[band, stripe] for x in (*np.indices(event.shape), *contexts)]
        factors = [(seen / expected)[line] for (seen, expected), line in zip(learned, where, strict=False)]
        rate = factors[0] * (total / event.size * 65536 * factors[1])
        rate = rate * (prior[where[2] % 16] * factors[2]) if contexts else rate
        at = np.nonzero(event[band])
        pull = channels(directions, *at, sign[band][at], len(rate)).T @ directions[:, stripe]
        rate = np.clip(rate * (np.clip(pull, -0.97, 0.97) * sign[band, stripe] + 1), 16, 57344)
        e = np.frexp(rate)[1] - 1
        level = 4 * (e - 4) + np.floor(4 * rate / 2.0**e).astype(int) - 4
        center = ((9 + 2 * (level % 4)) << (4 + level // 4)) // 8
        for one in np.unique(level):
            at, step, c, done = np.argwhere(level == one), int(center[level == one][0]), [0], 0
            while c[-1] < 49152:
                c.append(c[-1] + ((65536 - c[-1]) * step + 32768) // 65536)
            while done < len(at):
                m, slot = min(len(c) - 1, len(at) - done), state % 65536
                g = next((g for g in range(m) if slot < c[g + 1]), m)
                event[band, stripe][tuple(at[done : done + m][g : g + 1].T)] = True  # nothing if g = m
                done += min(g + 1, m)
                state = ((c[g + 1] if g < m else 65536) - c[g]) * (state // 65536) + slot - c[g]
                state = state if state >= 1 << 24 else 65536 * state + next(words)
        for v, line in zip(learned, where, strict=False):
            x, y = (np.bincount(line.ravel(), z.ravel(), v.shape[1]) for z in (center, event[band, stripe]))
            v += y, x / 65536 / (v[0] / v[1])
        if stripe == cuts[1][-1]:
            channels(directions, *np.nonzero(event), sign[event], len(event), learn=True)

def channels(directions, row, column, left, rows, learn=False):  # strengths of every row, or better directions
    strengths = np.zeros((len(directions), rows))
    for strength, direction in zip(strengths, directions, strict=True):
        if learn and not direction.any():
            most = row == np.bincount(row, minlength=rows).argmax()
            direction[:] = rounded(np.bincount(column[most], left[most], direction.size), 64)
        for step in range(1 + learn):
            along = direction[column]
            strength[:] = rounded(np.bincount(row, left * along, rows) / (np.bincount(row, along**2, rows) + 4), 64)
            z = strength[row]
            if step < learn and z.any():
                x, y = (np.bincount(column, v * z, direction.size) for v in (left, z))
                direction[:] = rounded(x / (y + 4 * np.mean(z * z)), 64)
                direction[:] = rounded(direction / (np.sqrt(np.mean(direction**2)) or 1), 8)
        left = left - z * along
    return strengths

def read(path, base=None, show=lambda *_, **__: None):
    """Return {set: {(parameter, op): mask}}; kept counts, mask_id and digests must agree."""
    data = np.fromfile(path, np.uint8).tobytes()
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    about, tensors = json.loads(text)["__metadata__"], {key: x["data"] for key, x in deserialize(data)}
    weights, seal = dict(deserialize(np.fromfile(base, np.uint8).tobytes())) if base else {}, about["header_sha256"]
    header, masks, entries, hashed, rows, agree = json.loads(about["maskpack"]), {}, [], [], [], {"kept": True}
    for name, one in sorted(header["sets"].items()):
        ends = np.cumsum([*one.get("tables", []), *one["size"]])
        pieces = [x.tobytes() for x in np.split(np.frombuffer(tensors[f"{name}/payloads"], np.uint8), ends[:-1])]
        hashed += pieces
        codings, shapes = [one["codings"][k] for k in one["coding"]], [one["shapes"][k] for k in one["shape"]]
        columns = one["names"].split("\n"), codings, shapes, one["kept"], pieces[-len(codings) :]
        entries += [(name, pieces, *entry) for entry in zip(*columns, strict=True)]
    for name, pieces, key, coding, shape, kept, payload in sorted(entries, key=lambda entry: "reference" in entry[3]):
        reference = masks[coding["reference"]][key, coding["op"]].ravel() if "reference" in coding else False
        bits = decode(payload, coding, shape, weights.get(key), reference, pieces) != reference
        masks.setdefault(name, {})[key, coding["op"]] = bits.reshape(shape)
        rows.append([name, key, coding["op"], shape, sha256(np.packbits(bits, bitorder="little")).hexdigest()])
        agree["kept"] &= int(bits.sum()) == kept
        show(name, key, coding["op"], shape, kept, f"{kept / max(bits.size, 1):.4f}")
    hashed += [tensors[key] for key in sorted(tensors) if key.partition("/")[2] not in ("", "payloads")]
    agree["mask_id"] = header["mask_id"] == sha256(json.dumps(sorted(rows), separators=(",", ":")).encode()).hexdigest()
    agree["maskpack.digests"] = b"".join(sha256(x).digest()[:16] for x in hashed) == tensors["maskpack.digests"]
    agree["data_sha256"] = header["data_sha256"] == sha256(data[8 + len(text) :]).hexdigest()
    agree["header_sha256"] = seal == sha256(text.replace(seal.encode(), b"0" * 64)).hexdigest()
    show(*(f"{what}: {'agrees' if fits else 'does not agree'}" for what, fits in agree.items()), sep="\n")
    if not all(agree.values()):
        raise ValueError(f"{path}: {agree}")
    return masks

if __name__ == "__main__":
    read(*sys.argv[1:], show=print)
