"""General-purpose compressors and a range coder from elsewhere, to compare with; sizes of slow ones are remembered."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import brotli
import constriction
import lz4.frame
import numpy as np
import snappy
import zstandard
from blake3 import blake3

from maskpack.codecs.base import Bits

Compressor = Callable[[bytes], bytes]

STRONG: dict[str, Compressor] = {
    "gzip -9": lambda data: gzip.compress(data, 9, mtime=0),
    "bz2 -9": lambda data: bz2.compress(data, 9),
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "lz4 high": lambda data: lz4.frame.compress(data, compression_level=lz4.frame.COMPRESSIONLEVEL_MAX),
    "snappy": snappy.compress,
    "zstd -19": lambda data: zstandard.ZstdCompressor(level=19).compress(data),
    "brotli -11": lambda data: brotli.compress(data, quality=11, lgwin=24),
}

# the five of the published experiment, as their Python libraries compress when nothing is said
PLAIN: dict[str, Compressor] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "lzma": lzma.compress,
    "lz4": lz4.frame.compress,
    "snappy": snappy.compress,
}


@dataclass
class Sizes:
    """Compressed sizes, kept in a JSON file under compressor and sha256 of the input."""

    path: Path
    known: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.known = json.loads(self.path.read_text())

    def of(self, name: str, compress: Compressor, pieces: Sequence[bytes]) -> int:
        """Return the sum of the compressed sizes of these pieces, each compressed alone."""
        digests = b"".join(blake3(piece).digest() for piece in pieces)
        key = f"{name} {blake3(digests).hexdigest()}"
        if key not in self.known:
            self.known[key] = sum(len(compress(piece)) for piece in pieces)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.known, indent=0, sort_keys=True))
        return self.known[key]


def strong_sizes(packed: Sequence[bytes], sizes: Sizes) -> dict[str, dict[str, int]]:
    """Return compressor -> bytes of packed masks, as one "stream" and as "each" parameter alone."""
    return {
        name: {"stream": sizes.of(name, compress, [b"".join(packed)]), "each": sizes.of(name, compress, packed)}
        for name, compress in STRONG.items()
    }


class RangeCoder:
    """The range coder of the library `constriction`, as reference: bytes of eight independent bits of one density.

    The densities are taken as known (an adapter's header has the number of true bits), so no bytes are counted for
    them; a constant tensor costs nothing.
    """

    def __init__(self, masks: Iterable[tuple[Bits, float]]):
        self.masks = [(packed.astype(np.int32), density) for packed, density in masks if 0 < density < 1]
        ones = np.array([value.bit_count() for value in range(256)])
        self.models = [
            constriction.stream.model.Categorical(p**ones * (1 - p) ** (8 - ones), perfect=False) for _, p in self.masks
        ]

    def encode(self) -> list[np.ndarray]:
        """Return the words of every mask."""
        made = []
        for (symbols, _), model in zip(self.masks, self.models, strict=True):
            coder = constriction.stream.queue.RangeEncoder()
            coder.encode(symbols, model)
            made.append(coder.get_compressed())
        return made

    def decode(self, made: list[np.ndarray]) -> list[Bits]:
        """Return the packed bits again."""
        return [
            constriction.stream.queue.RangeDecoder(words).decode(model, symbols.size).astype(np.uint8)
            for words, (symbols, _), model in zip(made, self.masks, self.models, strict=True)
        ]
