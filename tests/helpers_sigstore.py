"""Sigstore without a network: a certificate authority, logs and a login, for the real client of the library."""

import base64
import hashlib
import json
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import jwt
import sigstore.models
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from sigstore._internal.rekor.client import RekorClient
from sigstore.models import TransparencyLogEntry, TrustedRoot
from sigstore_models.trustroot.v1 import TrustedRoot as RawRoot

from maskpack.adapter import identity

BUNDLE = "maskpack_model.sigstore.json"
ALICE = "alice@example.org@https://accounts.example.org"


def _spki(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _sign(key: Any, message: bytes) -> bytes:
    return bytes(key.sign(message, ec.ECDSA(hashes.SHA256())))


def _usage(*, leaf: bool) -> x509.KeyUsage:
    return x509.KeyUsage(leaf, False, False, False, False, not leaf, not leaf, False, False)


class Fulcio:
    """Gives out certificates for whatever identity a token names, with a time stamp of the certificates' log."""

    def __init__(self) -> None:
        self.key, self.log = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
        self.began = datetime.now(UTC) - timedelta(days=1)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(1)
            .not_valid_before(self.began)
            .not_valid_after(self.began + timedelta(days=9))
            .add_extension(x509.BasicConstraints(True, 0), True)
            .add_extension(_usage(leaf=False), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False)
            .sign(self.key, hashes.SHA256())
        )
        self.signing_cert = self

    def post(self, request: x509.CertificateSigningRequest, identity: Any) -> Any:
        now = datetime.now(UTC)
        issuer = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
        if identity.identity.startswith("https://"):
            name: x509.GeneralName = x509.UniformResourceIdentifier(identity.identity)
        else:
            name = x509.RFC822Name(identity.identity)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(request.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(minutes=9))
            .add_extension(x509.SubjectAlternativeName([name]), True)
            .add_extension(_usage(leaf=True), True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)
            .add_extension(x509.UnrecognizedExtension(issuer, identity.issuer.encode()), False)
        )
        bare = builder.sign(self.key, hashes.SHA256()).tbs_certificate_bytes
        moment = struct.pack("!Q", int(now.timestamp() * 1000))
        entry = hashlib.sha256(_spki(self.key)).digest() + struct.pack("!I", len(bare))[1:] + bare
        signature = _sign(self.log, b"\0\0" + moment + b"\0\1" + entry + b"\0\0")
        stamp = b"\0" + hashlib.sha256(_spki(self.log)).digest() + moment + b"\0\0\4\3"
        stamp += struct.pack("!H", len(signature)) + signature
        stamps = struct.pack("!HH", len(stamp) + 2, len(stamp)) + stamp
        length = bytes([len(stamps)]) if len(stamps) < 128 else bytes([129, len(stamps)])
        extension = x509.UnrecognizedExtension(
            x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2"), b"\4" + length + stamps
        )
        return SimpleNamespace(
            cert=builder.add_extension(extension, False).sign(self.key, hashes.SHA256()), chain=[self.certificate]
        )


class Rekor(RekorClient):
    """A log that has one entry, whatever is sent to it; `entries` counts what was."""

    def __init__(self) -> None:
        super().__init__("https://rekor.example.org")
        self.key, self.entries = ec.generate_private_key(ec.SECP256R1()), 0

    def create_entry(self, request: Any) -> TransparencyLogEntry:
        self.entries += 1
        proposed = request["spec"]["proposedContent"]
        envelope = json.loads(proposed["envelope"])

        def digest(content: bytes) -> dict[str, str]:
            return {"algorithm": "sha256", "value": hashlib.sha256(content).hexdigest()}

        spec = {
            "envelopeHash": digest(proposed["envelope"].encode()),
            "payloadHash": digest(base64.b64decode(envelope["payload"])),
            "signatures": [{"signature": envelope["signatures"][0]["sig"], "verifier": proposed["verifiers"][0]}],
        }
        body = json.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec}).encode()
        root, key_id = hashlib.sha256(b"\0" + body).digest(), hashlib.sha256(_spki(self.key)).digest()
        facts = {"body": _text(body), "integratedTime": int(time.time()), "logID": key_id.hex(), "logIndex": 0}
        promise = _sign(self.key, json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())
        note = f"rekor.example.org - 1\n1\n{_text(root)}\n"
        checkpoint = f"{note}\n\u2014 rekor.example.org {_text(key_id[:4] + _sign(self.key, note.encode()))}\n"
        proof = {"logIndex": 0, "rootHash": root.hex(), "treeSize": 1, "hashes": [], "checkpoint": checkpoint}
        verification = {"signedEntryTimestamp": _text(promise), "inclusionProof": proof}
        return TransparencyLogEntry._from_v1_response({"x": {**facts, "verification": verification}})


class Sigstore:
    """What `ClientTrustConfig.production` returns: whom to trust, and the servers to sign with."""

    def __init__(self) -> None:
        self.fulcio, self.rekor = Fulcio(), Rekor()
        self.signing_config = SimpleNamespace(
            get_fulcio=lambda: self.fulcio, get_tlogs=lambda: [self.rekor], get_tsas=lambda: []
        )

    @property
    def trusted_root(self) -> TrustedRoot:
        since = {"start": self.fulcio.began.strftime("%Y-%m-%dT%H:%M:%SZ")}

        def log(key: Any) -> dict[str, Any]:
            public = {"rawBytes": _text(_spki(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": since}
            key_id = {"keyId": _text(hashlib.sha256(_spki(key)).digest())}
            return {"baseUrl": "https://x", "hashAlgorithm": "SHA2_256", "publicKey": public, "logId": key_id}

        authority = {
            "subject": {"organization": "test", "commonName": "test"},
            "uri": "https://x",
            "certChain": {"certificates": [{"rawBytes": _text(self.fulcio.certificate.public_bytes(Encoding.DER))}]},
            "validFor": since,
        }
        root = {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.rekor.key)],
            "ctlogs": [log(self.fulcio.log)],
            "certificateAuthorities": [authority],
            "timestampAuthorities": [],
        }
        return TrustedRoot(RawRoot.from_json(json.dumps(root)))


def token(of: str = ALICE) -> str:
    """Return the token of a login."""
    name, _, issuer = of.rpartition("@https://")
    now = int(time.time())
    claims = {"aud": "sigstore", "sub": name, "iss": f"https://{issuer}", "iat": now, "exp": now + 600}
    return jwt.encode(claims, "x" * 32, algorithm="HS256")


@contextmanager
def servers(login: str = ALICE) -> Iterator[Sigstore]:
    """Sigstore's servers, made anew, and somebody's login."""
    made = Sigstore()
    identity._verifier.cache_clear()
    with (
        patch.object(sigstore.models.ClientTrustConfig, "production", lambda offline=False: made),
        patch.object(identity, "reach", lambda url: None),
        patch.object(identity, "library_calls", lambda url: nullcontext(True)),
        patch.dict("os.environ", {identity.TOKEN: token(login)}),
    ):
        yield made
    identity._verifier.cache_clear()
