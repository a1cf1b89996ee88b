"""Safetensors files, written by us and read by anybody."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskpack.errors import ConfigError, CorruptAdapterError, DataError, StateError
from maskpack.safetensors_io import (
    DTYPES,
    TensorFile,
    lock,
    read_tensors,
    replacing,
    strict_json,
    torch_dtype,
    write_tensors,
)

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
    "a": torch.tensor([True, False, True]),
    "c": torch.zeros(0, 4, dtype=torch.bfloat16),
    "d": torch.tensor(3, dtype=torch.int64),
    "f": torch.tensor(1.5).expand(1),
}


def test_writes_what_the_official_library_reads(tmp_path: Path) -> None:
    for dtype in map(torch_dtype, DTYPES):
        write_tensors(tmp_path / "x", {**TENSORS, "e": torch.ones(3).to(dtype)}, {"k": "v"})
        for read in (load_file, read_tensors):
            found = read(tmp_path / "x")
            assert found.keys() == {*TENSORS, "e"}
            assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
            assert torch.equal(found["e"], torch.ones(3).to(dtype))


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "x")
    found = TensorFile(tmp_path / "x")
    assert found.shapes == {"a": (3,), "b": (3, 2), "c": (0, 4), "d": (), "f": (1,)}
    assert list(found) == sorted(TENSORS)
    assert len(found) == 5
    assert "e" not in found
    with pytest.raises(KeyError):
        found["e"]
    for name, tensor in found.items():
        assert torch.equal(tensor, TENSORS[name])
        assert tensor.dtype is TENSORS[name].dtype
    (tmp_path / "x").write_bytes(b"another")
    with pytest.raises(DataError, match="cannot read .*x as a safetensors file"):
        found["a"]
    (tmp_path / "x").unlink()
    with pytest.raises(DataError, match="no file .*x; expected a .safetensors file"):
        found["a"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="no file .*pipe"):
        TensorFile(tmp_path / "pipe")


def test_what_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {f"{i:02}": torch.ones(1 << 21) for i in range(24)}, {})  # 192 MiB, 8 each
    code = (
        "import resource, sys, torch\n"
        "from maskpack.safetensors_io import TensorFile\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "tensors = TensorFile(sys.argv[1])\n"
        "tensors['00'].sum()\n"
        "before = peak()\n"
        "assert sum(int(t.sum()) for t in tensors.values()) == 24 << 21\n"
        "sys.exit(f'{peak() - before} MiB more' if peak() - before > 60 else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bytes_are_canonical(tmp_path: Path) -> None:
    write_tensors(tmp_path / "1", {"b": torch.ones(1), "a": torch.ones(3, dtype=torch.uint8)}, {"z": "1", "y": "2"})
    write_tensors(tmp_path / "2", {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(1)}, {"y": "2", "z": "1"})
    text = b'{"__metadata__":{"y":"2","z":"1"},"a":{"data_offsets":[4,7],"dtype":"U8","shape":[3]},'
    text += b'"b":{"data_offsets":[0,4],"dtype":"F32","shape":[1]}}'
    text += b" " * (-len(text) % 8)
    expected = len(text).to_bytes(8, "little") + text + b"\0\0\x80?\1\1\1"
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == expected


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        write_tensors(tmp_path / "x", TENSORS, {})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o664


@pytest.mark.parametrize("stage", ["write", "sync", "rename"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_failure_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    (tmp_path / "x").write_text("old")
    if stage == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    if stage == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    caught: BaseException | None = None
    try:
        with replacing(tmp_path / "x", tmp_path / "y") as (first, second):
            first.write_text("new")
            second.write_text("new")
            if stage == "write":
                raise error
    except BaseException as raised:
        caught = raised
    if isinstance(error, OSError):
        assert isinstance(caught, StateError)
        assert "No space left on device; nothing was changed there; free space" in str(caught)
    else:
        assert caught is error
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("shared")
    (tmp_path / "x").symlink_to(tmp_path / "cache")
    write_tensors(tmp_path / "x", TENSORS, {})
    assert (tmp_path / "cache").read_text() == "shared"
    assert not (tmp_path / "x").is_symlink()


def test_refuses_to_write(tmp_path: Path) -> None:
    with pytest.raises(
        StateError, match=r"cannot write .*no/x: No such file or directory.*choose a folder that exists"
    ):
        write_tensors(tmp_path / "no/x", TENSORS, {})
    with pytest.raises(ConfigError, match=r"'a' is torch\.complex64, expected one of"):
        write_tensors(tmp_path / "x", {"a": torch.zeros(1, dtype=torch.complex64)}, {})
    with pytest.raises(ConfigError, match=r"the header would have 94\d+ bytes, at most 8388608 are allowed"):
        write_tensors(tmp_path / "x", {}, {"k": "v" * 9_400_000})
    assert not list(tmp_path.iterdir())


def test_refuses_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*x\.safetensors"):
        read_tensors(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    assert read_tensors(tmp_path).keys() == {"a"}  # the only one in the folder
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"cannot read .*x\.pt as a safetensors file.*if it is a pickle"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
        ("[NaN]", "not valid JSON"),
        ("[1e999]", "the number 1e999 is not finite"),
        ("[" * 33 + "]" * 33, "nested more than 32 deep"),
        ("[" * 100_000, "not valid JSON"),
        ('"\\ud800"', "surrogates not allowed"),
        (b"\xff", "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
    ],
)
def test_strict_json(text: str | bytes, match: str) -> None:
    with pytest.raises(CorruptAdapterError, match=f"the header is not valid JSON.*{match}|{match}"):
        strict_json(text, "the header")
    assert strict_json("[" * 32 + "]" * 32, "x")
    assert strict_json('"\\ud83d\\ude00"', "x") == "😀"


def test_a_lock_says_whether_it_is_held_or_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    with (tmp_path / "x").open("wb") as first, (tmp_path / "x").open("ab") as second:
        assert lock(first.fileno()) is True
        assert lock(second.fileno(), wait=0.05) is False
        first.close()
        assert lock(second.fileno()) is True

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (tmp_path / "x").open("ab") as file:
        assert lock(file.fileno(), wait=10) is None
    left = tmp_path / ".y.safetensors.0123456789ab.tmp"
    left.write_bytes(b"of somebody")
    write_tensors(tmp_path / "y.safetensors", {"a": torch.ones(2)}, {})
    assert left.exists()  # nobody can tell whether its writer lives
