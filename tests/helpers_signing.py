"""Keys that tests sign with, and signatures that were spoiled."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

KINDS = ("ed25519", "p256")
SIGNATURE = "maskpack_model.sig"


def new_key(kind: str = "ed25519") -> Any:
    """Return a private key."""
    return ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP256R1())


def write_key(folder: Path, name: str, key: Any = None, passphrase: bytes | None = None) -> tuple[Path, Path]:
    """Write a key and return the files of its private and its public part."""
    folder.mkdir(parents=True, exist_ok=True)
    key = key or new_key()
    lock = forms.BestAvailableEncryption(passphrase) if passphrase else forms.NoEncryption()
    private, public = folder / f"{name}-private.pem", folder / f"{name}.pem"
    private.write_bytes(key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, lock))
    public.write_bytes(key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def rewritten(signature: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Return an envelope that was changed as JSON, in canonical form."""
    envelope = json.loads(signature)
    change(envelope)
    return json.dumps(envelope, sort_keys=True, separators=(",", ":")).encode()


def restated(signature: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Return an envelope whose statement was changed; its signatures stay, and so are of another one."""

    def change_payload(envelope: dict[str, Any]) -> None:
        statement = json.loads(base64.b64decode(envelope["payload"]))
        change(statement)
        text = json.dumps(statement, sort_keys=True, separators=(",", ":"))
        envelope["payload"] = base64.b64encode(text.encode()).decode()

    return rewritten(signature, change_payload)
