"""Keys that sign adapters and verify them: P-256 (ECDSA with SHA-256) and Ed25519, from PEM files."""

import getpass
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, require

PASSPHRASE = "MASKPACK_KEY_PASSPHRASE"
TRUSTED = "MASKPACK_REQUIRE_SIGNATURE"
MAX_KEY = 64 << 10  # bytes of a PEM file

Keys = Mapping[str, Any]  # keys of `cryptography` by key id: hex SHA-256 of the public key's DER SubjectPublicKeyInfo


def public_keys(path: str | os.PathLike[str]) -> Keys:
    """Read the public keys that are trusted: a PEM file of one, or a folder whose `.pem` files are all read.

    Raises:
        ConfigError: if there is none, or one of the files is no public key of a kind that is known.
    """
    place = Path(path).expanduser()
    files = sorted(place.glob("*.pem")) if place.is_dir() else [place]
    if not files:
        raise ConfigError(f"the folder of trusted keys {place} has no .pem file; put the public keys there")
    require("cryptography", "sign", "signatures")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    keys = {}
    for file in files:
        content = _read(file)
        if b"PRIVATE KEY" in content:
            raise ConfigError(f"{file} is a private key, and a public one is expected: openssl pkey -in {file} -pubout")
        try:
            key = load_pem_public_key(content)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{file} is no public key in PEM (BEGIN PUBLIC KEY): {error}") from None
        keys[key_id(_known(key, file))] = key
    return keys


def trusted_keys(given: str | os.PathLike[str] | None) -> Keys | None:
    """Return the trusted keys of a file or folder, else of the one that the environment names; None if neither does.

    Raises:
        ConfigError: as `public_keys`.
    """
    place = os.environ.get(TRUSTED) if given is None else given
    if place is not None and not os.fspath(place):
        raise ConfigError(f"the place of the trusted keys is empty; give a file or folder, or unset {TRUSTED}")
    return None if place is None else public_keys(place)


def private_keys(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Keys:
    """Read the private keys to sign with, PEM files (PKCS #8) of one each.

    The passphrase of an encrypted one is that of the environment variable MASKPACK_KEY_PASSPHRASE, or asked for.

    Raises:
        ConfigError: if one cannot be read or is of no kind that is known, or the passphrase is missing or wrong.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    require("cryptography", "sign", "signatures")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    keys = {}
    for file in (Path(path).expanduser() for path in given):
        content = _read(file)
        secret = _passphrase(file) if b"ENCRYPTED" in content else None
        try:
            key = load_pem_private_key(content, secret)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            what = "cannot be opened with this passphrase, or" if secret else "is"
            raise ConfigError(f"{file} {what} is no private key in PEM (BEGIN PRIVATE KEY): {error}") from None
        keys[key_id(_known(key, file).public_key())] = key
    return keys


def key_id(public: Any) -> str:
    """Return the id of a public key: what `openssl pkey -pubin -outform DER | sha256sum` prints for it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def signature_of(message: bytes, private: Any) -> bytes:
    """Return the signature of a message: 64 bytes by an Ed25519 key, DER by a P-256 key."""
    made: bytes = private.sign(message, *_algorithm(private.public_key()))
    return made


def is_signature_of(message: bytes, signature: bytes, public: Any) -> bool:
    """Return True if a signature of a message is by a public key, whose kind alone says which algorithm is used."""
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, message, *_algorithm(public))
    except InvalidSignature:
        return False
    return True


def _algorithm(public: Any) -> tuple[Any, ...]:
    """Return what `sign` and `verify` of a key take beside message and signature."""
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.hashes import SHA256

    return (ECDSA(SHA256()),) if isinstance(public, EllipticCurvePublicKey) else ()


def _known(key: Any, file: Path) -> Any:
    """Return a private or public key if it is of a kind that is known."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    elliptic = isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey)
    if isinstance(key, ed25519.Ed25519PublicKey | ed25519.Ed25519PrivateKey):
        return key
    if elliptic and isinstance(key.curve, ec.SECP256R1):
        return key
    kind = f"on the curve {key.curve.name}" if elliptic else f"of the kind {type(key).__name__}"
    raise ConfigError(f"{file} is a key {kind}; expected Ed25519 or P-256: openssl genpkey -algorithm ed25519")


def _read(file: Path) -> bytes:
    if not file.is_file():
        raise ConfigError(f"there is no key file {file}; give a PEM file, or a folder of public keys")
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_KEY + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the key {file}: {error.strerror}; check its permissions") from error
    if len(content) > MAX_KEY:
        raise ConfigError(f"{file} has over {MAX_KEY} bytes, which is no key; expected a PEM file of one key")
    return content


def _passphrase(file: Path) -> bytes:
    if (given := os.environ.get(PASSPHRASE)) is not None:
        return given.encode()
    if not sys.stdin.isatty():
        raise ConfigError(f"{file} is encrypted; set the environment variable {PASSPHRASE} to its passphrase")
    return getpass.getpass(f"Passphrase of {file}: ").encode()
