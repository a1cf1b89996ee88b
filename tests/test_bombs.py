"""Files that claim much: found out before memory is spent; and payloads forged with all digests right."""

import gc
import math
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from blake3 import blake3

from maskpack.adapter.card import render_card
from maskpack.adapter.describe import config_text, inspect_adapter
from maskpack.adapter.read import Adapter, opening, read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.codecs.base import Side, plausible
from maskpack.errors import CorruptAdapterError

from .fuzz.damage import sealed, taken
from .helpers_adapter import (
    base_of,
    encode_smallest,
    join_file,
    many,
    random_masks,
    split_file,
    with_header,
    with_payload,
    write,
)

SHAPES = {"a.weight": (40, 3), "b.weight": (17,)}
MASKS = random_masks(SHAPES, 0.9)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "x.safetensors"
    save_adapter(path, MASKS, base_of(SHAPES), codec="zstd")
    return path.read_bytes()


def refuse(folder: Path, data: bytes, match: str) -> None:
    path = write(folder, data)
    with pytest.raises(CorruptAdapterError, match=match):
        read_adapter(path).parts()


def peak_of(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_forged_payloads(valid: bytes, tmp_path: Path) -> None:
    frame = zstandard.ZstdCompressor(write_checksum=False).compress
    good = bytes(MASKS["a.weight"].bits.tobytes())
    assert read_adapter(write(tmp_path, with_payload(valid, frame(good)))).parts().masks == MASKS
    more = bytes([good[0] ^ 1]) + good[1:]
    refuse(tmp_path, with_payload(valid, frame(more)), "does not decode: it has .* true bits, the header states")
    refuse(tmp_path, with_payload(valid, frame(good) + b"\0"), "does not decode: .*unused data")
    refuse(tmp_path, with_payload(valid, frame(good + b"\0")), "declares 16 as its size, expected 15 bytes")
    refuse(tmp_path, with_payload(valid, b""), "does not decode: a zstd payload begins with , expected")
    last = MASKS["b.weight"].bits.tobytes()
    refuse(tmp_path, with_payload(valid, frame(last[:2] + b"\xff"), 1), "its padding is not zero")


def test_bombs_take_little_memory(valid: bytes, tmp_path: Path) -> None:
    blocks = b"".join(struct.pack("<I", (i == 999) | 2 | (131072 << 3))[:3] + b"\0" for i in range(1000))
    for claimed in (15, 131072 * 1000, 1 << 40):
        bomb = with_payload(valid, b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", claimed) + blocks)
        assert peak_of(lambda bomb=bomb: refuse(tmp_path, bomb, "does not decode: a zstd payload")) < 4 << 20  # type: ignore[misc]
    shape = with_header(valid, lambda header: header["sets"]["default"].update(shapes=[[1 << 17, 1 << 17], [17]]))
    assert peak_of(lambda: refuse(tmp_path, shape, "17179869184 weights in a payload of 24 bytes, which")) < 4 << 20
    shape = with_header(valid, lambda header: header["sets"]["default"].update(shapes=[[1 << 14, 1 << 14], [17]]))
    assert peak_of(lambda: refuse(tmp_path, shape, "declares 15 as its size, expected 33554432")) < 4 << 20
    names = with_header(valid, lambda header: header["sets"]["default"].update(names="\n" * (2 << 20)))
    assert peak_of(lambda: refuse(tmp_path, names, "as there are `kept`")) < 64 << 20


@pytest.mark.parametrize("codec", ["gap", "logit"])
def test_a_byte_does_not_stand_for_billions_of_weights(valid: bytes, codec: str, tmp_path: Path) -> None:
    def claim(header: dict[str, Any]) -> None:
        one = header["sets"]["default"]
        one["shapes"], one["codings"] = [[1 << 17, 1 << 17], [17]], [{"codec": codec, "op": "zero"}]

    forged = with_header(with_payload(valid, b"\x80"), claim)
    assert (
        peak_of(lambda: refuse(tmp_path, forged, "17179869184 weights in a payload of 1 bytes, which is too")) < 4 << 20
    )


def test_writers_leave_out_what_readers_would_refuse() -> None:
    side = Side((1 << 15, 1 << 14))
    codec, payload = encode_smallest(np.zeros(side.size, dtype=np.uint8), side, "default")
    assert (codec.id, plausible(payload, side.count)) == ("zstd", True)


def test_huge_headers_take_bounded_memory(tmp_path: Path) -> None:
    header, _ = split_file(many())
    data = join_file({**header, "sets": {"default": {"kept": [[]] * 500_000}}}, b"")
    assert peak_of(lambda: refuse(tmp_path, data, "names is missing, expected text")) < 150 << 20


def test_the_index_is_bounded_before_it_is_unpacked(valid: bytes, tmp_path: Path) -> None:
    for text, match in (
        (b" " * (9 << 20), "declares 9437184 as its size, expected 2 to 8388608 bytes"),
        (b"{" + b" " * (8 << 20), "declares 8388609 as its size"),
    ):
        data = join_file(text, b"")
        assert len(data) < 4096
        assert peak_of(lambda data=data, match=match: refuse(tmp_path, data, match)) < 1 << 20  # type: ignore[misc]
    frame = zstandard.ZstdCompressor(write_checksum=False, write_content_size=False).compress(b"{}")
    refuse(tmp_path, sealed(b"", b"", frame), "declares nothing as its size")
    text, section = taken(valid)
    plain = zstandard.ZstdCompressor(write_checksum=False).compress(text)  # as with the dictionary, but for its bytes
    assert read_adapter(write(tmp_path, sealed(b"", section, plain))).parts().masks == MASKS
    refuse(tmp_path, sealed(b"", section, plain + b"\0"), "a zstd payload cannot be decoded")
    rest = b"\xff\xff\xff\xff" + plain
    claim = opening(8 + len(rest)) + blake3(rest).digest()[:8] + rest
    refuse(tmp_path, claim, "its index has 4294967295 bytes, which are not there")


ACTIONS: dict[str, Callable[[Adapter], object]] = {
    "inspect": inspect_adapter,
    "config": lambda adapter: config_text(inspect_adapter(adapter), "x"),
    "card": lambda adapter: render_card(inspect_adapter(adapter)),
    "verify": lambda adapter: adapter.verify(),
    "decode": lambda adapter: [list(adapter.iter_masks(set=name)) for name in adapter.sets],
    "tensors": lambda adapter: [adapter.parts(name, stream=True) for name in adapter.sets],
}


@pytest.mark.parametrize("what", ["sets", "parameters", "tensors", "classes"])
def test_time_is_linear(what: str, tmp_path: Path) -> None:
    """Eight times as many of anything take less than 28 times as long, where quadratic time would be 64."""

    def seconds(count: int) -> dict[str, float]:
        path = write(tmp_path, many(**{what: count}))
        found = dict.fromkeys(["read", *ACTIONS], math.inf)
        for _ in range(3):
            began = time.process_time()
            adapter = read_adapter(path)
            found["read"] = min(found["read"], time.process_time() - began)
            for name, action in ACTIONS.items():
                began = time.process_time()
                action(adapter)
                found[name] = min(found[name], time.process_time() - began)
        assert adapter.verify()["mask_id"]
        return found

    gc.disable()  # a collection takes as long as all that is imported is large
    try:
        few, more = seconds(250), seconds(2000)
    finally:
        gc.enable()
    assert {name: one for name, one in more.items() if one > 28 * max(few[name], 0.004)} == {}
