"""Adapters signed by an identity through sigstore, with its own client against servers in this process."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sigstore.models
from maskpack_cli.main import app
from typer.testing import CliRunner

from maskpack import load_adapter
from maskpack.adapter import identity
from maskpack.adapter.edit import convert_adapter
from maskpack.adapter.signature import check_signature, sign_adapter, statement_in
from maskpack.errors import AdapterError, ConfigError, MissingDependencyError, SignatureError
from maskpack.hub.pull import pull
from maskpack.hub.push import push
from maskpack.network import UnreachableError

from .helpers_hub import CONFIG, MODEL, contents, read_folder, saved, write_adapter
from .helpers_hub_fixtures import BIRDS, NoWaiting
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer
from .helpers_signing import SIGNATURE, write_key
from .helpers_sigstore import ALICE, BUNDLE, Sigstore, servers, token

pytestmark = pytest.mark.transport("lfs")
BOB = "bob@example.org@https://accounts.example.org"
WORKFLOW = "https://github.com/a/b/.github/workflows/x.yml@refs/heads/main@https://token.example.org"


@pytest.fixture(autouse=True, name="servers")
def _servers() -> Iterator[Sigstore]:
    """Sigstore's servers, and alice's login."""
    with servers() as made:
        yield made


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter's folder, signed by alice."""
    folder = write_adapter(tmp_path / "adapter", saved())
    sign_adapter(folder, "sigstore", repository=BIRDS, counter=7)
    return folder


def refused(ref: Path, by: str = ALICE) -> str:
    with pytest.raises(SignatureError) as caught:
        load_adapter(ref, require_signature=by)
    return str(caught.value)


def test_signed_and_verified(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(read_folder(adapter)) - set(saved()) == {BUNDLE}
    found = pull(adapter, require_signature=ALICE, output=tmp_path / "copy")
    assert found.signed_by == (ALICE,)
    assert pull(tmp_path / "copy", require_signature=ALICE).signed_by == (ALICE,)
    assert pull(adapter / MODEL, require_signature=ALICE).signed_by == (ALICE,)
    monkeypatch.setenv("MASKPACK_REQUIRE_SIGNATURE", ALICE)
    load_adapter(adapter)
    with pytest.raises(SignatureError, match=BUNDLE):
        load_adapter(write_adapter(tmp_path / "unsigned"))


def test_who_else_signed(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(adapter, BOB)
    assert ALICE in said
    assert BOB in said
    assert BOB.replace("https://accounts", "https://other") in refused(adapter, BOB.replace("accounts", "other"))
    assert SIGNATURE in refused(adapter, str(write_key(tmp_path, "key")[1]))  # a key signed nothing
    monkeypatch.setenv("SIGSTORE_IDENTITY_TOKEN", token(WORKFLOW))
    assert sign_adapter(adapter, "sigstore", counter=1).by == (WORKFLOW,)
    assert pull(adapter, require_signature=WORKFLOW).signed_by == (WORKFLOW,)
    # other servers vouch for alice
    other = Sigstore()
    monkeypatch.setattr(sigstore.models.ClientTrustConfig, "production", lambda offline=False: other)
    monkeypatch.setenv("SIGSTORE_IDENTITY_TOKEN", token())
    sign_adapter(adapter, "sigstore", counter=1)
    assert "does not verify" in refused(adapter)


def test_other_files(adapter: Path, tmp_path: Path) -> None:
    bundle = (adapter / BUNDLE).read_bytes()
    for spoil, words in (
        (lambda folder: write_adapter(folder, contents(1)), MODEL),
        (lambda folder: (folder / CONFIG).unlink(), CONFIG),
        (lambda folder: (folder / "maskpack_more.json").touch(), "maskpack_more.json"),
        (lambda folder: (folder / BUNDLE).unlink(), "not signed"),
    ):
        folder = write_adapter(tmp_path / words, contents() | {BUNDLE: bundle})
        load_adapter(folder, require_signature=ALICE)
        spoil(folder)
        assert words in refused(folder)
        if words != MODEL:
            load_adapter(folder)


def test_every_spoiled_byte(adapter: Path) -> None:
    """Some bytes of a bundle are of no account, such as names in it; no change of one makes another statement good."""
    files = read_folder(adapter)
    trusted = {ALICE: identity.Identity.parse(ALICE)}
    good = check_signature(files, trusted, BIRDS)
    accepted = 0
    for at in range(0, len(files[BUNDLE]), 7):
        spoiled = bytearray(files[BUNDLE])
        spoiled[at] ^= 1 << at % 7
        try:
            assert check_signature(files | {BUNDLE: bytes(spoiled)}, trusted, BIRDS) == good
            accepted += 1
        except SignatureError:
            pass
    assert accepted < len(files[BUNDLE]) / 7 / 20


def _again(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def spoil(content: bytes) -> bytes:
        bundle = json.loads(content)
        change(bundle)
        return json.dumps(bundle).encode()

    return spoil


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "cut off": lambda text: text[:-40],
    "huge": lambda text: text + b" " * (64 << 10),
    "no JSON": lambda text: b"\xff" + text,
    "deep": lambda text: b"[" * 5000 + b"]" * 5000,
    "not an object": lambda text: b"[]",
    "member twice": lambda text: text.replace(b'"payloadType"', b'"payload":"","payloadType"'),
    "nothing in it": lambda text: b"{}",
    "no certificate": _again(lambda one: one["verificationMaterial"].pop("certificate")),
    "certificate of garbage": _again(lambda one: one["verificationMaterial"].update(certificate={"rawBytes": "AAAA"})),
    "no log entry": _again(lambda one: one["verificationMaterial"].update(tlogEntries=[])),
    "no proof": _again(lambda one: one["verificationMaterial"]["tlogEntries"][0].pop("inclusionProof")),
    "no envelope": _again(lambda one: one.pop("dsseEnvelope")),
    "no signature": _again(lambda one: one["dsseEnvelope"].update(signatures=[])),
    "other type": _again(lambda one: one["dsseEnvelope"].update(payloadType="text/x")),
    "other payload": _again(lambda one: one["dsseEnvelope"].update(payload="e30=")),
    "payload of a number": _again(lambda one: one["dsseEnvelope"].update(payload=5)),
    "a message": _again(lambda one: one.update(messageSignature={"signature": one.pop("dsseEnvelope")["payload"]})),
}


@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_bundle(adapter: Path, how: str) -> None:
    spoiled = SPOILED[how]((adapter / BUNDLE).read_bytes())
    assert spoiled != (adapter / BUNDLE).read_bytes()
    (adapter / BUNDLE).write_bytes(spoiled)
    with pytest.raises(AdapterError, match=BUNDLE):
        load_adapter(adapter, require_signature=ALICE)


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one["predicate"].update(counter=0),
        lambda one: one["predicate"].update(more=1),
        lambda one: one["predicate"].update(mask_id="0" * 64),
        lambda one: one["subject"].pop(),
        lambda one: one["subject"][0].update(name="x"),
        lambda one: one["subject"][0].update(digest={"sha512": "0" * 128}),
        lambda one: one.update(predicateType="https://slsa.dev/provenance/v1"),
    ],
)
def test_statement_about_something_else(adapter: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    payload = json.loads(identity.bundle_payload((adapter / BUNDLE).read_bytes()))
    change(payload)
    text = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()
    (adapter / BUNDLE).write_bytes(identity.IdentitySigner().sign(text))
    refused(adapter)


def test_counter_and_what_is_kept(adapter: Path, servers: Sigstore, monkeypatch: pytest.MonkeyPatch) -> None:
    before, entries = (adapter / BUNDLE).read_bytes(), servers.rekor.entries
    assert sign_adapter(adapter, "sigstore", repository=BIRDS).statement.counter == 7
    assert ((adapter / BUNDLE).read_bytes(), servers.rekor.entries) == (before, entries)
    write_adapter(adapter, contents(1))
    assert sign_adapter(adapter, "sigstore", repository=BIRDS).statement.counter == 8
    monkeypatch.setenv("SIGSTORE_IDENTITY_TOKEN", token(BOB))
    with pytest.raises(SignatureError, match="cannot be believed"):
        sign_adapter(adapter, "sigstore")


def test_beside_a_key(adapter: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "key")
    signed = sign_adapter(adapter, [private, "sigstore"], repository=BIRDS)
    assert (signed.statement.counter, len(signed.by)) == (7, 2)
    for who in (ALICE, str(public)):
        assert len(pull(adapter, require_signature=who).signed_by) == 1
    convert_adapter(adapter, adapter, codec="zstd")
    assert not set(read_folder(adapter)) & {SIGNATURE, BUNDLE}
    file = tmp_path / "one.safetensors"
    convert_adapter(adapter, file)
    sign_adapter(file, "sigstore")
    assert pull(file, require_signature=ALICE).signed_by
    (tmp_path / "other.sigstore.json").write_text("{}")
    convert_adapter(adapter, file, codec="raw")
    convert_adapter(adapter, tmp_path / "other.safetensors")
    assert not (tmp_path / "one.sigstore.json").exists()
    assert (tmp_path / "other.sigstore.json").exists()


def test_no_identity(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIGSTORE_IDENTITY_TOKEN")
    for name in ("GITHUB_ACTIONS", "CI", "GITLAB_CI", "BUILDKITE", "CIRCLECI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: None)
    with pytest.raises(SignatureError, match="no identity to sign with"):
        sign_adapter(adapter, "sigstore")
    monkeypatch.setenv("SIGSTORE_IDENTITY_TOKEN", "garbage")
    with pytest.raises(SignatureError, match="Identity token is malformed"):
        sign_adapter(adapter, "sigstore")


def test_no_network(
    adapter: Path, servers: Sigstore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[bool] = []

    def production(offline: bool = False) -> Sigstore:
        asked.append(offline)
        return servers

    @contextmanager
    def offline(url: str) -> Iterator[bool]:
        yield False

    def away(url: str) -> None:
        raise UnreachableError("no route", "sigstore.example.org")

    monkeypatch.setattr(identity, "library_calls", offline)
    monkeypatch.setattr(identity, "reach", away)
    monkeypatch.setattr(sigstore.models.ClientTrustConfig, "production", production)
    with caplog.at_level(logging.WARNING, "maskpack"):
        load_adapter(adapter, require_signature=ALICE)  # what it is verified with is known already
    assert asked == [True]
    assert "keys that are known here" in caplog.text
    with pytest.raises(SignatureError, match=r"sigstore\.example\.org cannot be reached \(no route\)"):
        sign_adapter(adapter, "sigstore")


def test_servers_that_refuse(adapter: Path, servers: Sigstore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(f"bad request with {token()}")

    monkeypatch.setattr(servers.rekor, "create_entry", fail)
    with pytest.raises(SignatureError, match="cannot sign with an identity.*bad request") as caught:
        sign_adapter(adapter, "sigstore", counter=9)
    assert token().split(".")[0] not in str(caught.value)
    before = read_folder(adapter)
    monkeypatch.setattr(servers.fulcio, "post", fail)
    with pytest.raises(SignatureError, match="cannot sign with an identity.*bad request"):
        sign_adapter(adapter, "sigstore", counter=9)
    assert read_folder(adapter) == before


def test_without_sigstore(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sigstore"]:
        monkeypatch.setitem(sys.modules, name, None)
    load_adapter(adapter)
    push(adapter, adapter.parent / "registry")
    for way in (lambda: load_adapter(adapter, require_signature=ALICE), lambda: sign_adapter(adapter, "sigstore")):
        with pytest.raises(MissingDependencyError, match=r'pip install "maskpack\[sigstore\]"'):
            way()


def test_on_the_hub(hub: HubServer, servers: Sigstore, tmp_path: Path, waits: NoWaiting) -> None:
    folder = write_adapter(tmp_path / "adapter")

    def publish(seed: int, **options: Any) -> str:
        return str(push(write_adapter(folder, contents(seed)), BIRDS, token=WRITE_TOKEN, **options).commit)

    def counter() -> int:
        return statement_in(BUNDLE, hub.file(BIRDS, BUNDLE)).counter

    first = publish(0, sign="sigstore")
    found = pull(BIRDS, require_signature=ALICE, output=tmp_path / "copy")
    assert found.signed_by == (ALICE,)
    assert BUNDLE in read_folder(tmp_path / "copy")
    entries = servers.rekor.entries
    assert publish(0, sign="sigstore") == first
    assert servers.rekor.entries == entries
    hub.fail("lost", "POST", "/commit/")
    second = publish(1, sign="sigstore")
    assert (counter(), pull(BIRDS, require_signature=ALICE).commit) == (2, second)
    with pytest.raises(SignatureError, match="is signed, and "):
        publish(2)
    with pytest.raises(ConfigError, match="dry run"):
        publish(2, sign="sigstore", dry_run=True)
    # an older one, put back
    hub.add(BIRDS, {name: hub.file(BIRDS, name, first) for name in (MODEL, CONFIG, BUNDLE)})
    with pytest.raises(SignatureError, match="version 1 now, and 2 was seen"):
        pull(BIRDS, require_signature=ALICE)
    # another repository's
    hub.add("mallory/birds", {name: hub.file(BIRDS, name, first) for name in (MODEL, CONFIG, BUNDLE)})
    with pytest.raises(SignatureError, match=f"signed for {BIRDS}"):
        pull("mallory/birds", require_signature=ALICE)


def test_pushed_beside_the_signature_of_a_key(hub: HubServer, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "key")
    folder = write_adapter(tmp_path / "adapter")
    sign_adapter(folder, private, counter=9)
    assert {SIGNATURE, BUNDLE} <= push(folder, BIRDS, sign="sigstore", token=WRITE_TOKEN).files.keys()
    for who in (ALICE, str(public)):  # each has its own counter
        assert pull(BIRDS, require_signature=who).signed_by
    write_adapter(folder, contents(1))
    (folder / SIGNATURE).unlink()
    with pytest.raises(SignatureError, match=f"has no {SIGNATURE}"):
        push(folder, BIRDS, sign="sigstore", token=WRITE_TOKEN)
    push(folder, BIRDS, sign=[private, "sigstore"], token=WRITE_TOKEN)
    for who in (ALICE, str(public)):
        assert pull(BIRDS, require_signature=who).signed_by


def test_bundle_of_the_folder_goes_with_it(hub: HubServer, adapter: Path) -> None:
    assert BUNDLE in push(adapter, BIRDS, token=WRITE_TOKEN).files
    assert pull(BIRDS, require_signature=ALICE).signed_by
    write_adapter(adapter, contents(1))
    with pytest.raises(SignatureError, match=f"{BUNDLE}, is not of these files"):
        push(adapter, BIRDS, token=WRITE_TOKEN)
    shutil.copy(adapter / MODEL, adapter / BUNDLE)
    with pytest.raises(SignatureError, match="is no bundle"):
        push(adapter, BIRDS, token=WRITE_TOKEN)


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return done.stdout + done.stderr


def test_command_line(adapter: Path) -> None:
    said = json.loads(run("sign", adapter, "--key", "sigstore", "--repository", BIRDS, "--counter", 8, "--json"))
    assert said == {"repository": BIRDS, "counter": 8, "keys": [ALICE]}
    assert "not verified" in run("inspect", adapter)
    assert "verified: yes" in run("inspect", adapter, "--require-signature", ALICE)
    assert f"Signed by: {ALICE}" in run("pull", adapter, "--require-signature", ALICE)
    assert ALICE in run("verify", adapter, "--require-signature", ALICE)
    for words in (("verify", adapter, "--key", BOB), ("pull", adapter, "--require-signature", BOB)):
        assert f"{BOB} is trusted" in run(*words, code=1)
    (adapter / BUNDLE).write_bytes(b"{")
    assert "is no bundle" in run("inspect", adapter)
