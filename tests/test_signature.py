"""Signatures of adapters on this disk: what they cover, who may make them, and what is refused."""

import base64
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from maskpack_cli.main import app
from torch import nn
from typer.testing import CliRunner

from maskpack import (
    MaskBank,
    MaskSet,
    fingerprint,
    load_adapter,
    load_cascade,
    load_mask,
    load_masked,
    save_adapter,
    unload_mask,
)
from maskpack.adapter import read
from maskpack.adapter.edit import convert_adapter
from maskpack.adapter.read import parse_files, read_files
from maskpack.adapter.signature import (
    Envelope,
    Statement,
    check_signature,
    key_id,
    pae,
    private_keys,
    public_keys,
    sign_adapter,
    signature_of,
)
from maskpack.errors import AdapterError, ConfigError, MaskpackError, MissingDependencyError, SignatureError
from maskpack.hub.pull import pull
from maskpack.hub.push import push
from maskpack.safetensors_io import write_tensors

from .helpers_hub import CARD, CONFIG, MODEL, contents, read_folder, saved, write_adapter
from .helpers_signing import KINDS, SIGNATURE, new_key, restated, rewritten, write_key

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def key(tmp_path: Path, kind: str) -> tuple[Path, Path]:
    return write_key(tmp_path / "keys", "alice", new_key(kind))


@pytest.fixture
def adapter(tmp_path: Path, key: tuple[Path, Path]) -> Path:
    """An adapter's folder, signed."""
    folder = write_adapter(tmp_path / "adapter", saved())
    sign_adapter(folder, key[0], repository="alice/birds", counter=7)
    return folder


def refused(ref: Path, public: Path) -> str:
    """Return why an adapter is refused, as a signature's error, and see that without a requirement it is not."""
    with pytest.raises(SignatureError) as caught:
        load_adapter(ref, require_signature=public)
    return str(caught.value)


def test_signed_and_verified(adapter: Path, key: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = key
    found = pull(adapter, require_signature=public, output=tmp_path / "copy")
    (id_,) = public_keys(public)
    assert found.signed_by == (id_,) == tuple(private_keys(private))
    assert pull(tmp_path / "copy", require_signature=public).signed_by == (id_,)
    trusted = tmp_path / "trusted"
    write_key(trusted, "other")
    (trusted / "other-private.pem").unlink()
    (trusted / "notes.txt").write_text("not a key")
    assert refused(adapter, trusted)
    shutil.copy(public, trusted)
    assert pull(adapter, require_signature=trusted).signed_by == (id_,)
    assert pull(adapter / MODEL, require_signature=public).signed_by == (id_,)
    (adapter / CARD).write_text("another card")
    (adapter / "mine.safetensors").write_bytes(b"never read")
    assert pull(adapter, require_signature=public).signed_by == (id_,)


def test_nothing_is_parsed_before(adapter: Path, key: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("parsed")

    for name in ("from_frame", "parse_adapter", "check_config"):
        monkeypatch.setattr(read, name, fail)
    with pytest.raises(AssertionError):
        load_adapter(adapter, require_signature=key[1])
    data = bytearray((adapter / MODEL).read_bytes())
    data[-1] ^= 1
    (adapter / MODEL).write_bytes(data)
    assert MODEL in refused(adapter, key[1])


def test_every_flipped_bit_is_noticed(adapter: Path, key: tuple[Path, Path]) -> None:
    files: dict[str, bytes] = read_folder(adapter)
    keys, generator = public_keys(key[1]), random.Random(0)
    check_signature(files, keys, "alice/birds")
    for name in (SIGNATURE, CONFIG, MODEL):
        for at in range(0, len(files[name]), 1 if name == SIGNATURE else 5):
            spoiled = bytearray(files[name])
            spoiled[at] ^= 1 << generator.randrange(8)
            given = files | {name: bytes(spoiled)}
            with pytest.raises(SignatureError):
                check_signature(given, keys, "alice/birds")


def _other_adapter(folder: Path, files: dict[str, bytes]) -> None:
    write_adapter(folder, contents(1))


def _no_config(folder: Path, files: dict[str, bytes]) -> None:
    (folder / CONFIG).unlink()


def _unknown_file(folder: Path, files: dict[str, bytes]) -> None:
    (folder / "maskpack_more.safetensors").write_bytes(files[MODEL])


def _no_signature(folder: Path, files: dict[str, bytes]) -> None:
    (folder / SIGNATURE).unlink()


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (_other_adapter, MODEL),
        (_no_config, f"{CONFIG}: changed, added or removed"),
        (_unknown_file, "maskpack_more.safetensors"),
        (_no_signature, "not signed"),
    ],
)
@pytest.mark.parametrize("kind", ["ed25519"], indirect=True)
def test_other_files(
    adapter: Path, key: tuple[Path, Path], attack: Callable[[Path, dict[str, bytes]], None], words: str
) -> None:
    attack(adapter, read_folder(adapter))
    assert words in refused(adapter, key[1])
    load_adapter(adapter)  # signatures are not looked at where none is required


def test_added_config(tmp_path: Path, key: tuple[Path, Path]) -> None:
    folder = write_adapter(tmp_path / "alone", {MODEL: contents()[MODEL]})
    sign_adapter(folder, key[0])
    load_adapter(folder, require_signature=key[1])
    (folder / CONFIG).write_bytes(contents()[CONFIG])
    assert CONFIG in refused(folder, key[1])


def test_other_signers(adapter: Path, key: tuple[Path, Path], tmp_path: Path) -> None:
    other, other_public = write_key(tmp_path / "keys", "mallory")
    (adapter / SIGNATURE).unlink()
    sign_adapter(adapter, other, repository="alice/birds")
    assert "by none of the trusted keys" in refused(adapter, key[1])
    whole = write_adapter(tmp_path / "other", contents(1))
    sign_adapter(whole, other)
    load_adapter(whole, require_signature=other_public)
    assert "by none of the trusted keys" in refused(whole, key[1])
    # a signature that names the trusted key and is by another
    (id_,), (forged,) = public_keys(key[1]), public_keys(other_public)
    text = (whole / SIGNATURE).read_bytes()
    (whole / SIGNATURE).write_bytes(text.replace(forged.encode(), id_.encode()))
    assert "does not verify" in refused(whole, key[1])


def _again(text: bytes, key: Any, payload: bytes) -> bytes:
    """An envelope with another payload, signed in earnest."""
    return Envelope(payload, {key_id(key.public_key()): signature_of(pae(payload), key)}).to_bytes()


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "cut off": lambda text: text[:-40],
    "huge": lambda text: text + b" " * (64 << 10),
    "no JSON": lambda text: b"\xff" + text,
    "deep": lambda text: b"[" * 5000 + b"]" * 5000,
    "not an object": lambda text: b"[]",
    "space": lambda text: text.replace(b",", b", ", 1),
    "line end": lambda text: text + b"\n",
    "member twice": lambda text: text.replace(b'"payloadType"', b'"payload":"","payloadType"'),
    "signatures twice": lambda text: rewritten(text, lambda one: one.update(signatures=one["signatures"] * 2)),
    "no signatures": lambda text: rewritten(text, lambda one: one.update(signatures=[])),
    "signature of no object": lambda text: rewritten(text, lambda one: one.update(signatures=["x"])),
    "unknown member": lambda text: rewritten(text, lambda one: one.update(more=1)),
    "unknown member beside sig": lambda text: rewritten(text, lambda one: one["signatures"][0].update(cert="")),
    "other type": lambda text: rewritten(text, lambda one: one.update(payloadType="application/json")),
    "no payload": lambda text: rewritten(text, lambda one: one.pop("payload")),
    "payload of a number": lambda text: rewritten(text, lambda one: one.update(payload=5)),
    "base64 with a line end": lambda text: rewritten(text, lambda one: one.update(payload=one["payload"] + "\n")),
    "base64 of URLs": lambda text: rewritten(
        text, lambda one: one["signatures"][0].update(sig=one["signatures"][0]["sig"].replace("+", "-") + "=")
    ),
    "base64 with spare bits": lambda text: rewritten(
        text, lambda one: one["signatures"][0].update(sig=_spare_bits(one["signatures"][0]["sig"]))
    ),
    "keyid in capitals": lambda text: rewritten(
        text, lambda one: one["signatures"][0].update(keyid=one["signatures"][0]["keyid"].upper())
    ),
    "longer signature": lambda text: rewritten(
        text, lambda one: one["signatures"][0].update(sig=_longer(one["signatures"][0]["sig"]))
    ),
    "other counter": lambda text: restated(text, lambda one: one["predicate"].update(counter=8)),
    "other repository": lambda text: restated(text, lambda one: one["predicate"].update(repository="bob/birds")),
    "other predicate": lambda text: restated(text, lambda one: one.update(predicateType="x")),
}


def _spare_bits(text: str) -> str:
    """Base64 whose last character has other bits than those that are decoded."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    end = text.rstrip("=")
    if end == text:
        return text + "===="
    return end[:-1] + letters[letters.index(end[-1]) ^ 1] + "=" * (len(text) - len(end))


def _longer(text: str) -> str:
    return base64.b64encode(base64.b64decode(text) + b"\0").decode()


@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_signature(adapter: Path, key: tuple[Path, Path], how: str) -> None:
    path = adapter / SIGNATURE
    spoiled = SPOILED[how](path.read_bytes())
    assert spoiled != path.read_bytes()
    path.write_bytes(spoiled)
    with pytest.raises(AdapterError):
        load_adapter(adapter, require_signature=key[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one["predicate"].update(mask_id="0" * 64),
        lambda one: one["predicate"]["base"].update(float32="0" * 64),
        lambda one: one["predicate"].update(counter=0),
        lambda one: one["predicate"].update(counter=True),
        lambda one: one["predicate"].update(counter=7.0),
        lambda one: one["predicate"].update(counter=1 << 53),
        lambda one: one["predicate"].update(more=1),
        lambda one: one["predicate"].update(repository=["alice/birds"]),
        lambda one: one["subject"].pop(),
        lambda one: one["subject"].reverse(),
        lambda one: one["subject"].append(one["subject"][0]),
        lambda one: one["subject"][0].update(name="../x"),
        lambda one: one["subject"][0]["digest"].update(sha256="0" * 64),
        lambda one: one["subject"][0]["annotations"].update(size=-1),
        lambda one: one.update(_type="https://in-toto.io/Statement/v0.1"),
    ],
)
@pytest.mark.parametrize("kind", ["ed25519"], indirect=True)
def test_signer_who_states_what_is_not_so(
    adapter: Path, key: tuple[Path, Path], change: Callable[[dict[str, Any]], Any]
) -> None:
    path = adapter / SIGNATURE
    (private,) = private_keys(key[0]).values()
    payload = Envelope.from_bytes(restated(path.read_bytes(), change)).payload
    path.write_bytes(_again(path.read_bytes(), private, payload))
    assert refused(adapter, key[1])


def test_a_key_says_which_algorithm(adapter: Path, tmp_path: Path) -> None:
    keys = {kind: new_key(kind) for kind in KINDS}
    payload = Envelope.from_bytes((adapter / SIGNATURE).read_bytes()).payload
    for one, other in (KINDS, KINDS[::-1]):
        public = write_key(tmp_path / "confused", one, keys[one])[1]
        signature = signature_of(pae(payload), keys[other])
        (adapter / SIGNATURE).write_bytes(Envelope(payload, {key_id(keys[one].public_key()): signature}).to_bytes())
        assert "does not verify" in refused(adapter, public)


def test_several_signatures(adapter: Path, key: tuple[Path, Path], tmp_path: Path) -> None:
    second, second_public = write_key(tmp_path / "keys", "bob")
    before = (adapter / SIGNATURE).read_bytes()
    sign_adapter(adapter, second, repository="alice/birds", counter=7)
    for public in (key[1], second_public):
        assert len(pull(adapter, require_signature=public).signed_by) == 1
    (tmp_path / "both").mkdir()
    for public in (key[1], second_public):
        shutil.copy(public, tmp_path / "both")
    assert len(pull(adapter, require_signature=tmp_path / "both").signed_by) == 2
    # one that is broken is noticed, although the other is good
    (id_,) = public_keys(second_public)
    envelope = json.loads((adapter / SIGNATURE).read_bytes())
    broken = rewritten((adapter / SIGNATURE).read_bytes(), lambda one: [
        signature.update(sig=_longer(signature["sig"])) for signature in one["signatures"] if signature["keyid"] == id_
    ])  # fmt: skip
    assert len(envelope["signatures"]) == 2
    (adapter / SIGNATURE).write_bytes(broken)
    assert "does not verify" in refused(adapter, tmp_path / "both")
    # another statement: signatures of the one before go
    sign_adapter(adapter, [key[0]], repository="alice/birds", counter=8)
    assert len(json.loads((adapter / SIGNATURE).read_bytes())["signatures"]) == 1
    assert before != (adapter / SIGNATURE).read_bytes()


def test_counters(adapter: Path, key: tuple[Path, Path], tmp_path: Path) -> None:
    same = (adapter / SIGNATURE).read_bytes()
    assert sign_adapter(adapter, key[0], repository="alice/birds").statement.counter == 7
    assert (adapter / SIGNATURE).read_bytes() == same
    write_adapter(adapter, contents(1))
    assert sign_adapter(adapter, key[0], repository="alice/birds").statement.counter == 8
    other, _ = write_key(tmp_path / "keys", "bob")
    with pytest.raises(SignatureError, match="--counter"):
        sign_adapter(adapter, other)
    assert sign_adapter(adapter, [other, key[0]]).statement.counter == 9
    assert sign_adapter(adapter, other, counter=3).statement.counter == 3
    for counter in (0, -1, 1 << 53):
        with pytest.raises(ConfigError, match="counter"):
            sign_adapter(adapter, other, counter=counter)


@pytest.mark.parametrize("kind", ["ed25519"], indirect=True)
def test_an_adapter_that_is_written_anew_is_not_signed(adapter: Path, key: tuple[Path, Path], tmp_path: Path) -> None:
    convert_adapter(adapter, adapter, codec="zstd")
    assert "not signed" in refused(adapter, key[1])
    sign_adapter(adapter, key[0])
    file = tmp_path / "one.safetensors"
    convert_adapter(adapter, file)
    (tmp_path / "one.sig").write_bytes(b"of somebody else's tool")
    convert_adapter(adapter, file)
    assert (tmp_path / "one.sig").read_bytes() == b"of somebody else's tool"
    with pytest.raises(SignatureError, match="the version before"):
        sign_adapter(file, key[0])
    sign_adapter(file, key[0], counter=1)
    assert pull(file, require_signature=key[1], output=tmp_path / "out").signed_by
    assert pull(tmp_path / "out", require_signature=key[1]).signed_by
    convert_adapter(adapter, file, codec="raw")
    assert not (tmp_path / "one.sig").exists()
    # nor where another adapter is copied over one that was
    pull(file, output=adapter)
    assert not (adapter / SIGNATURE).exists()


@pytest.mark.parametrize("kind", ["ed25519"], indirect=True)
def test_folder_as_registry(adapter: Path, key: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "registry"
    assert SIGNATURE in push(adapter, target).files
    assert push(adapter, target).unchanged
    assert pull(target, require_signature=key[1]).signed_by
    (adapter / SIGNATURE).unlink()
    assert push(adapter, target).unchanged  # the same adapter: its signature stays
    assert pull(target, require_signature=key[1]).signed_by
    other = write_adapter(tmp_path / "other", contents(1))
    with pytest.raises(SignatureError, match="is signed, and "):
        push(other, target)
    push(other, target, sign=key[0])
    assert pull(target, require_signature=key[1]).signed_by
    assert json.loads(CliRunner().invoke(app, ["inspect", str(target), "--json"]).stdout)["signature"]["counter"] == 8
    write_adapter(adapter, {SIGNATURE: (target / SIGNATURE).read_bytes()})
    with pytest.raises(SignatureError, match="is not of these files"):
        push(adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# keys
def test_keys_that_are_none(tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    weak = write_key(tmp_path, "rsa", rsa.generate_private_key(65537, 1024))
    curve = write_key(tmp_path, "p384", ec.generate_private_key(ec.SECP384R1()))
    for private, public in (weak, curve):
        for read_key, path in ((private_keys, private), (public_keys, public)):
            with pytest.raises(ConfigError, match="expected Ed25519 or P-256"):
                read_key(path)
    good = write_key(tmp_path, "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    shutil.copy(good[0], tmp_path / "mixed")
    for path, words in (
        (good[0], "is a private key, and a public one"),
        (tmp_path / "mixed", "is a private key, and a public one"),
        (tmp_path / "empty", "has no .pem file"),
        (tmp_path / "none.pem", "none.pem.*Give a PEM file"),
        (write("text.pem", b"hello"), "is no public key in PEM"),
        (write("cut.pem", good[1].read_bytes()[:60]), "is no public key in PEM"),
        (write("huge.pem", b"x" * (65 << 10)), "huge.pem.*65536"),
    ):
        with pytest.raises(ConfigError, match=words):
            public_keys(path)
    with pytest.raises(ConfigError, match="is no private key in PEM"):
        private_keys(good[1])


def test_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = write_key(tmp_path, "locked", passphrase=b"open sesame")
    with pytest.raises(ConfigError, match="MASKPACK_KEY_PASSPHRASE"):
        private_keys(private)
    monkeypatch.setenv("MASKPACK_KEY_PASSPHRASE", "wrong")
    with pytest.raises(ConfigError, match="cannot be opened with this passphrase") as caught:
        private_keys(private)
    assert "wrong" not in str(caught.value).replace("wrong password", "")
    monkeypatch.setenv("MASKPACK_KEY_PASSPHRASE", "open sesame")
    assert private_keys(private).keys() == public_keys(public).keys()


@needs_openssl
def test_openssl_verifies_and_signs(adapter: Path, key: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    private, public = key

    def openssl(*words: object, data: bytes = b"") -> bytes:
        return subprocess.run(["openssl", *map(str, words)], input=data, capture_output=True, check=True).stdout

    def files(**given: bytes) -> list[Path]:
        for name, content in given.items():
            (tmp_path / name).write_bytes(content)
        return [tmp_path / name for name in given]

    envelope = json.loads((adapter / SIGNATURE).read_bytes())
    payload = base64.b64decode(envelope["payload"])
    type_ = envelope["payloadType"].encode()
    whole = b"DSSEv1 " + str(len(type_)).encode() + b" " + type_ + b" " + str(len(payload)).encode() + b" " + payload
    message, ours = files(message=whole, ours=base64.b64decode(envelope["signatures"][0]["sig"]))
    theirs = tmp_path / "theirs"
    if kind == "ed25519":
        openssl("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", message, "-sigfile", ours)
        openssl("pkeyutl", "-sign", "-inkey", private, "-rawin", "-in", message, "-out", theirs)
    else:
        openssl("dgst", "-sha256", "-verify", public, "-signature", ours, message)
        openssl("dgst", "-sha256", "-sign", private, "-out", theirs, message)
    envelope["signatures"][0]["sig"] = base64.b64encode(theirs.read_bytes()).decode()
    der = openssl("pkey", "-pubin", "-in", public, "-outform", "DER")
    assert openssl("dgst", "-sha256", "-r", data=der).split()[0].decode() == envelope["signatures"][0]["keyid"]
    (adapter / SIGNATURE).write_text(json.dumps(envelope, sort_keys=True, separators=(",", ":")))
    assert pull(adapter, require_signature=public).signed_by == (envelope["signatures"][0]["keyid"],)


# every way to read
@pytest.fixture
def linear(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = nn.Sequential(nn.Linear(8, 4))
    masks = MaskSet.from_tensors({"0.weight": torch.rand(4, 8) < 0.5})
    save_adapter(tmp_path / "linear", masks, fingerprint(model, id="linear"))
    write_tensors(tmp_path / "base.safetensors", model.state_dict(), {"format": "pt"})
    return model, tmp_path / "linear"


def test_every_way_to_read(linear: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = linear
    private, public = write_key(tmp_path / "keys", "alice")
    ways: list[Callable[..., Any]] = [
        lambda **given: load_adapter(folder, **given),
        lambda **given: unload_mask(load_mask(model, folder, **given)),
        lambda **given: load_masked(model, tmp_path / "base.safetensors", folder, **given),
        lambda **given: pull(folder, **given),
        lambda **given: pull(folder / MODEL, **given),
    ]
    with MaskBank(nn.Sequential(nn.Linear(8, 4)), verify="off") as bank:
        for way in (
            *ways,
            lambda **given: bank.add(folder, **given),
            lambda **given: load_cascade(model, folder, **given),
        ):
            with pytest.raises(SignatureError, match="not signed"):
                way(require_signature=public)
            with monkeypatch.context() as patch:
                patch.setenv("MASKPACK_REQUIRE_SIGNATURE", str(tmp_path / "keys" / "alice.pem"))
                with pytest.raises(SignatureError, match="not signed"):
                    way()
                patch.setenv("MASKPACK_REQUIRE_SIGNATURE", "")
                with pytest.raises(ConfigError, match="empty"):
                    way()
        sign_adapter(folder, private)
        # an adapter that was evicted is read and verified again
        bank.add(folder, "one", require_signature=public)
        bank._residents["one"].parts = None
        bank.use("one")
        bank.disable()
        bank._residents["one"].parts = None
        (folder / SIGNATURE).unlink()
        with pytest.raises(SignatureError):
            bank.use("one")
    sign_adapter(folder, private)
    for way in ways:
        way(require_signature=public)
    with pytest.raises(AdapterError, match="is no cascade"):
        load_cascade(model, folder, require_signature=public)


def test_without_cryptography(adapter: Path, key: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.setitem(sys.modules, name, None)
    push(adapter, adapter.parent / "registry")  # it is needed only where something is to be signed or verified
    load_adapter(adapter.parent / "registry")
    for way in (lambda: load_adapter(adapter, require_signature=key[1]), lambda: sign_adapter(adapter, key[0])):
        with pytest.raises(MissingDependencyError, match=r'pip install "maskpack\[sign\]"'):
            way()


# command line
def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["ed25519"], indirect=True)
def test_command_line(adapter: Path, key: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = key
    (id_,) = public_keys(public)
    (adapter / SIGNATURE).unlink()
    assert '"signature": null' in run("inspect", adapter, "--json")
    said = json.loads(run("sign", adapter, "--key", private, "--repository", "alice/birds", "--counter", 3, "--json"))
    assert said == {"repository": "alice/birds", "counter": 3, "keys": [id_]}
    run("sign", adapter, "--key", private, "--repository", "birds", code=1)
    run("sign", adapter, "--key", private, "--repository", "alice/birds@v1", code=1)
    run("sign", adapter, "--key", public, code=2)
    run("sign", adapter, "--key", private, "--counter", 0, code=2)
    assert json.loads(run("verify", adapter, "--key", public, "--json"))["signature"]["verified"] is True
    assert id_ in run("verify", adapter, "--key", public)
    assert "not verified" in run("inspect", adapter)
    assert "verified: yes" in run("inspect", adapter, "--require-signature", public)
    assert f"Signed by: {id_}" in run("pull", adapter, "--require-signature", public)
    other = write_key(tmp_path / "keys", "bob")[1]
    for words in (
        ("verify", adapter, "--key", other),
        ("pull", adapter, "--require-signature", other),
        ("inspect", adapter, "--require-signature", other),
        ("convert", adapter, tmp_path / "new", "--require-signature", other),
        ("combine", "not", adapter, "--output", tmp_path / "new", "--require-signature", other),
        ("diff", adapter, adapter, "--require-signature", other),
        ("predict", adapter, "x.png", "--require-signature", other),
        ("export", adapter, "--output", tmp_path / "x.safetensors", "--require-signature", other),
        ("eval", adapter, "--data", "digits:0-4", "--require-signature", other),
        ("cascade", "eval", adapter, "--data", "digits:0-4", "--require-signature", other),
        ("analyze", "mistakes", adapter, "--data", "digits:0-4", "--require-signature", other),
    ):
        said = run(*words, code=1)
        assert "none of the trusted keys" in said, words
        assert "Traceback" not in said
    assert not (tmp_path / "new").exists()
    write_adapter(adapter, contents(1))
    assert "of other files" in run("inspect", adapter)
    (adapter / SIGNATURE).write_bytes(b"{")
    assert "is no signature" in run("inspect", adapter)
    run("verify", adapter, "--key", public, code=1)


def test_statement_is_readable(adapter: Path, key: tuple[Path, Path]) -> None:
    """The signature file says what docs/format.md says that it does."""
    envelope = json.loads((adapter / SIGNATURE).read_bytes())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    files = read_files(adapter)
    header = parse_files(files).header
    assert statement["predicate"] == {
        "base": dict(header.base.digests),
        "counter": 7,
        "mask_id": header.mask_id,
        "repository": "alice/birds",
    }
    assert {one["name"]: one["annotations"]["size"] for one in statement["subject"]} == {
        name: len(content) for name, (_, content) in files.items()
    }
    assert issubclass(SignatureError, MaskpackError)


@pytest.mark.parametrize(
    "content", [b"", b"x" * 7, b"\xff" * 40, b"\x02" + b"\0" * 7 + b"{}", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_signed_file_that_is_no_adapter(content: bytes, tmp_path: Path) -> None:
    key = new_key()
    folder = write_adapter(tmp_path / "signed", {MODEL: content})
    statement = Statement({MODEL: (len(content), blake3(content).hexdigest())}, "0" * 64, {}, None, 1)
    (folder / SIGNATURE).write_bytes(_again(b"", key, statement.to_bytes()))
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, require_signature=write_key(tmp_path / "keys", "alice", key)[1])
    assert not isinstance(caught.value, SignatureError)
