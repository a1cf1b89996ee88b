"""Files that a stranger made: only errors of ours come out, and little memory is used to find out."""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from blake3 import blake3

from maskpack.adapter.card import render_card
from maskpack.adapter.content import Parts
from maskpack.adapter.describe import inspect_adapter
from maskpack.adapter.read import CONFIG_FILE, MODEL_FILE, Adapter, opening, read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.backbone.model import Embedding, Head
from maskpack.errors import AdapterError, CorruptAdapterError, UnknownCodecError, UnsupportedVersionError

from .fuzz.damage import File
from .helpers_adapter import base_of, join_file, random_masks, split_file, with_header, with_payload, write

SHAPES = {"a.weight": (40, 3), "b.weight": (17,)}
MASKS = random_masks(SHAPES, 0.9)
Header = dict[str, Any]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "x.safetensors"
    statistics = {"bn.running_mean": torch.rand(3)}
    parts = Parts(MASKS, Head(Embedding("fc"), torch.rand(2, 2), torch.rand(2)), statistics)
    save_adapter(path, parts, base_of(SHAPES), codec="zstd", preprocess={"kind": "image"}, class_names=["x", "y"])
    return path.read_bytes()


def use(path: Path) -> Adapter:
    """Read a file and everything in it."""
    adapter = read_adapter(path)
    adapter.verify()
    for name in adapter.sets:
        adapter.parts(name)
    return adapter


def refuse(folder: Path, data: bytes, match: str, error: type[AdapterError] = CorruptAdapterError) -> None:
    with pytest.raises(error, match=match) as caught:
        use(write(folder, data))
    assert type(caught.value) is error
    assert "spoiled.safetensors" in str(caught.value), "the message must name the file"


def test_the_file_is_good_before_it_is_spoiled(valid: bytes, tmp_path: Path) -> None:
    assert use(write(tmp_path, valid)).parts().masks == MASKS
    assert use(write(tmp_path, with_header(valid, lambda header: header.update(later="?")))).parts().masks == MASKS
    assert use(write(tmp_path, join_file(*split_file(valid)))).parts().masks == MASKS


def test_every_truncation_is_refused(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length in range(0, len(valid), 3):
        path.write_bytes(valid[:length])
        with pytest.raises(AdapterError, match=r"x\.safetensors"):
            read_adapter(path)


def test_every_flipped_bit_is_refused(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for place in range(len(valid)):
        spoiled = bytearray(valid)
        spoiled[place] ^= 1 << place % 8
        path.write_bytes(spoiled)
        with pytest.raises(AdapterError, match=r"x\.safetensors"):
            read_adapter(path)


def test_damage_says_so(valid: bytes, tmp_path: Path) -> None:
    changed = valid[:-1] + bytes([valid[-1] ^ 1])
    refuse(tmp_path, changed, r"its bytes have the digest \w{16}, and it states \w{16}: it is damaged, fetch it again")


def test_trailing_bytes_are_refused(valid: bytes, tmp_path: Path) -> None:
    refuse(tmp_path, valid + b"\0", r"its header describes \d+; it was cut off or added to, fetch it again")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "has 0 bytes and states a header of 0"),
        (b"\0" * 8, "states a header of 0, expected 2 or more within the file; it was cut off or is no safetensors"),
        (struct.pack("<Q", 1 << 63) + b"{}", "states a header of 9223372036854775808, expected 2 or more"),
        (opening(7) + bytes(8), r"has \d+ bytes, its header describes \d+; it was cut off or added to, fetch it again"),
        (opening(7) + bytes(7), "its bytes have the digest .{16}, and it states 00000000000000: it is damaged"),
        (opening(8) + blake3(b"").digest()[:8], "its index has 0 bytes, which are not there"),
        (join_file(b'{"maskpack":1,"maskpack":2}', b""), "the key 'maskpack' comes twice"),
        (join_file([], b""), "is list, expected an object"),
        (join_file({}, b""), "format_version is missing"),
        (join_file(b"[" * 9999, b""), "the adapter header is not valid JSON"),
        (join_file(b'{"a":"\xff"}', b""), "the adapter header is not valid JSON"),
    ],
)  # fmt: skip
def test_containers_that_are_none(data: bytes, match: str, tmp_path: Path) -> None:
    refuse(tmp_path, data, match)


def test_other_safetensors_files_are_told_apart(tmp_path: Path) -> None:
    for other in (
        {},
        {"a": torch.ones(2)},
        {"maskpack": torch.ones(2)},
        {"maskpack": torch.ones(2, dtype=torch.uint8)},
    ):
        data = safetensors.torch.save(other, {"format": "pt"})
        refuse(tmp_path, data, "it is no adapter: it has not the one tensor 'maskpack'", AdapterError)
    refuse(tmp_path, opening(7)[:-1] + bytes(8), "it is no adapter: it has not the one tensor", AdapterError)


def one(header: Header) -> Header:
    found: Header = header["sets"]["default"]
    return found


FIELDS: list[tuple[Callable[[Header], Any], str]] = [
    (lambda h: h.update(format_version=0), "format_version .*is 0, expected an integer from 1"),
    (lambda h: h.update(format_version=True), "format_version .*is True"),
    (lambda h: h.update(format_version="1"), "format_version .*is '1'"),
    (lambda h: h.pop("producer"), r"\$\.producer .*is missing, expected text"),
    (lambda h: h.update(mask_id="ab"), "mask_id .*is 'ab', expected 64 lower-case hex"),
    (lambda h: h.update(mask_id="0" * 64), "the decoded masks have the mask_id .*, the header states 0000"),
    (lambda h: h.update(base=[]), r"\$\.base .*is list, expected an object"),
    (lambda h: h["base"].update(id="/etc/x"), r"base\.id .*is '/etc/x', expected a name as in .*never a local path"),
    (lambda h: h["base"].update(id="x\x1b[31m"), r"base\.id .*expected text without control characters"),
    (lambda h: h["base"].update(revision=3), r"base\.revision .*is 3, expected text"),
    (lambda h: h["base"].update(dtype=None), r"base\.dtype .*is None"),
    (lambda h: h["base"].update(head="fc"), r"base\.head .*is 'fc', expected an array"),
    (lambda h: h["base"]["digests"].pop("float16"), r"base\.digests\.float16 .*is missing"),
    (lambda h: h.update(sets={}), r"the name of a mask set in the adapter header is '', expected"),
    (lambda h: h["sets"].update({"../x": one(h)}), r"name of a mask set .* is '\.\./x', expected"),
    (lambda h: h["sets"].update(more=one(h)), r"it has \d+ bytes of data, and its index describes \d+; fetch"),
    (lambda h: h["sets"].update(default=3), r"sets\.default .*is 3, expected an object"),
    (lambda h: h["sets"].update(other=h["sets"].pop("default")), "'default/head/bias' is .*no such tensor"),
    (lambda h: h.update(task=5), "task .*is 5"),
    (lambda h: h.update(class_names="ab"), "class_names .*expected an array of non-empty texts"),
    (lambda h: h.update(class_names=["a\x00"]), "class_names .*expected an array of non-empty texts"),
    (lambda h: h.update(preprocess=[1]), "preprocess .*is list, expected an object"),
    (lambda h: h.update(preprocess={}), r"preprocess\.kind .*is missing"),
    (lambda h: h.update(training="x"), "training .*is 'x', expected an object"),
    (lambda h: one(h).update(names="a.weight"), r"names .*as there are `kept` \(2\)"),
    (lambda h: one(h).update(names="a.weight\n"), "names .*expected as many plain names"),
    (lambda h: one(h).update(names="b.weight\na.weight"), "names sorted and once for each op, not 'a.weight' after"),
    (lambda h: one(h).update(names="a.weight\na.weight"), "not 'a.weight' after 'a.weight'"),
    (lambda h: one(h).update(names="a.weight\nc.weight"), "the decoded masks have the mask_id"),
    (lambda h: one(h).update(shapes=[[40, 3], 17]), r"shapes .*expected arrays of at most 16 sizes"),
    (lambda h: one(h).update(shapes=[[40, 3], [1 << 35]]), "shapes .*at most 17179869184 weights"),
    (lambda h: one(h).update(shapes=[[40, 3], [0, 1 << 60]]), "shapes .*at most 17179869184 weights"),
    (lambda h: one(h).update(shapes=[[40, 3], [1] * 17]), "shapes .*at most 16 sizes"),
    (lambda h: one(h).update(shapes=[[40, 3], [-17]]), "shapes .*expected arrays"),
    (lambda h: one(h).update(shapes=[[40, 3], [True]]), "shapes .*expected arrays"),
    (lambda h: one(h).update(shapes=[[40, 3], [1 << 27]]), "'b.weight' in set 'default' does not decode: .*declares 3"),
    (lambda h: one(h).update(shapes=[[40, 3], [18]]), "the decoded masks have the mask_id"),
    (lambda h: one(h).update(shapes=[[4, 3], [17]]), "kept .*at most 12 for 'a.weight'"),
    (lambda h: one(h).update(shape=[0]), "shape .*expected an array of 2 integers"),
    (lambda h: one(h).update(shape=[0, 2]), "shape .*integers from 0 to 1"),
    (lambda h: one(h).update(shape=[0, True]), "shape .*integers from 0 to 1"),
    (lambda h: one(h).update(coding=[0, 1]), "coding .*integers from 0 to 0"),
    (lambda h: one(h).update(codings=[3]), r"codings\[0\] .*is 3, expected an object"),
    (lambda h: one(h)["codings"][0].update(op="add"), r"codings\[0\]\.op .*is 'add', expected one of flip, replace"),
    (lambda h: one(h)["codings"][0].update(op="flip"), "the decoded masks have the mask_id"),
    (lambda h: one(h)["codings"][0].update(op="replace"), "has no tensor 'default/values/a.weight'"),
    (lambda h: one(h)["codings"][0].update(op=["zero"]), r"op .*is list, expected one of"),
    (lambda h: one(h)["codings"][0].update(codec=1), r"codec .*is 1, expected text"),
    (lambda h: one(h)["codings"][0].update(extra=1), "has settings {'extra': 1} that the codec 'zstd' refuses"),
    (lambda h: one(h)["codings"][0].update(table=0), "has settings {'table': 0} that the codec 'zstd'"),
    (lambda h: one(h)["codings"][0].update(reference="default"), "against the set 'default', which has no such mask"),
    (lambda h: one(h)["codings"][0].update(reference="x"), "against the set 'x', which has no such mask"),
    (lambda h: one(h).update(kept=[1, 2]), "does not decode: it has .* true bits, the header states 1"),
    (lambda h: one(h).update(kept=[-1, 2]), "kept .*integers from 0"),
    (lambda h: one(h).update(kept=[1 << 70, 2]), "kept .*integers from 0"),
    (lambda h: one(h).update(kept=7), "kept .*is 7, expected an array"),
    (lambda h: one(h).update(size=[1, 1]), r"it has \d+ bytes of data, and its index describes \d+; fetch"),
    (lambda h: one(h)["size"].reverse(), "'a.weight' in set 'default' does not decode"),
    (lambda h: one(h).update(head={"kind": "mlp"}), r"head\.kind .*is 'mlp', expected one of linear, pooled-linear"),
    (lambda h: one(h).update(head={"kind": "linear"}), r"head\.module .*is missing"),
    (lambda h: one(h).update(head={"kind": "pooled-linear", "pooling": "max", "normalize": True}), "pooling .*'max'"),
    (lambda h: one(h).update(head={"kind": "pooled-linear", "pooling": "cls"}), "normalize .*expected true or false"),
    (lambda h: one(h).pop("head"), "'default/head/bias' is F32 .*expected no such tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), FIELDS, ids=[match[:40] for _, match in FIELDS])
def test_every_field_is_checked(change: Callable[[Header], Any], match: str, valid: bytes, tmp_path: Path) -> None:
    refuse(tmp_path, with_header(valid, change), match)


def test_later_versions_and_unknown_codecs_have_their_own_errors(valid: bytes, tmp_path: Path) -> None:
    later = with_header(valid, lambda header: header.update(format_version=2, sets="?"))
    refuse(tmp_path, later, "has format version 2, this release reads up to 1; upgrade with", UnsupportedVersionError)
    unknown = with_header(valid, lambda header: one(header)["codings"][0].update(codec="brotli"))
    expected = r"'a.weight' is packed with the codec 'brotli', which is not installed \(installed: .*raw, .*zstd\)"
    refuse(tmp_path, unknown, expected, UnknownCodecError)
    assert read_adapter(write(tmp_path, unknown)).sets == ("default",), "inspecting it is possible"


TENSORS: list[tuple[Callable[[Header], Any], str]] = [
    (lambda t: t["default/head/bias"].update(dtype="I32"), "'default/head/bias' is I32 .*expected F32 or BF16"),
    (lambda t: t["default/head/bias"].update(dtype="X"), r"tensors.default/head/bias is list, expected a dtype and at"),
    (lambda t: t["default/head/bias"].update(shape=[-2]), r"bias is list, expected a dtype and at"),
    (lambda t: t["default/head/bias"].update(shape=[1 << 49]), r"is list, expected a dtype and at"),
    (lambda t: t["default/head/bias"].update(shape=[1] * 17), r"is list, expected a dtype and at"),
    (lambda t: t["default/head/bias"].update(shape=[3]), r"it has \d+ bytes of data, and its index describes \d+"),
    (lambda t: t.update({"default/scale": t.pop("default/statistics/bn.running_mean")}), r"\(3,\), expected .*\(2,\)"),
    (lambda t: t.update({"maskpack.base": t.pop("default/head/bias")}), "tensors lists 'maskpack.base', which follows"),
    (lambda t: t.update({"default/payloads": t.pop("default/head/bias")}), "lists 'default/payloads', which follows"),
    (lambda t: t.update({"more": t.pop("default/head/bias")}), "'more' is F32 .*expected no such tensor"),
    (lambda t: t.update({"default/values/a.weight": t.pop("default/head/bias")}), "expected no such tensor"),
    (lambda t: t.update({"other/head/bias": t.pop("default/head/bias")}), "expected no such tensor"),
    (lambda t: t.update({"default/statistics/x": t.pop("default/statistics/bn.running_mean")}), "no such tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), TENSORS, ids=[match[:40] for _, match in TENSORS])
def test_every_tensor_is_checked(change: Callable[[Header], Any], match: str, valid: bytes, tmp_path: Path) -> None:
    file = File.of(valid)
    change(file.entries)
    for name in file.entries.keys() - file.data.keys():
        file.data[name] = bytes(4 * math.prod(file.entries[name]["shape"]))
    refuse(tmp_path, file.joined(), match)


def test_what_fuzzing_found(valid: bytes, tmp_path: Path) -> None:
    training = {"data": 5, "metrics": {"accuracy": 10**400, "f1": 0.5}}  # the card broke on both
    adapter = use(write(tmp_path, with_header(valid, lambda header: header.update(training=training))))
    assert "| f1 | 0.5000 |" in render_card(inspect_adapter(adapter)).replace("\\", "")
    bomb = with_payload(valid, b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 25))  # room for 32 MiB would be made
    bomb = with_header(bomb, lambda header: one(header).update(shapes=[[1 << 28], [17]]))
    refuse(tmp_path, bomb, "a zstd payload of 13 bytes declares 33554432 bytes as its size; no frame that short")


def test_config_that_is_no_file(valid: bytes, tmp_path: Path) -> None:
    write(tmp_path, valid).rename(tmp_path / MODEL_FILE)
    (tmp_path / CONFIG_FILE).mkdir()
    with pytest.raises(AdapterError, match=r"maskpack_config\.json is not a regular file; delete it"):
        read_adapter(tmp_path)
