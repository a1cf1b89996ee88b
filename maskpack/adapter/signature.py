"""Keys that sign adapters and verify them: P-256 (ECDSA with SHA-256) and Ed25519, from PEM files."""

import base64
import getpass
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..errors import AdapterError, ConfigError, CorruptAdapterError, SignatureError, require
from ..safetensors_io import replacing, strict_json
from .fields import Fields
from .header import canonical_json
from .read import CONFIG_FILE, MODEL_FILE, Adapter, parse_files, read_bytes, read_files

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


SIGNATURE_FILE = "maskpack_model.sig"
MAX_SIGNATURE = 64 << 10  # bytes; two hundred signatures fit
MAX_COUNTER = (1 << 53) - 1  # every JSON reader keeps such integers
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:maskpack:adapter:v1"

Contents = Mapping[str, bytes | memoryview]  # of an adapter's files by name


@dataclass(frozen=True, slots=True)
class Statement:
    """What a signature vouches for.

    Attributes:
        files: bytes and hex BLAKE3 of the model file and, if there is one, of the config file, by name.
        mask_id, base: the adapter's, and the digests of its base by dtype.
        repository: on the Hub that it was signed for; None for any.
        counter: greater for each later version in a repository.
    """

    files: Mapping[str, tuple[int, str]]
    mask_id: str
    base: Mapping[str, str]
    repository: str | None
    counter: int

    @classmethod
    def of(cls, contents: Contents, adapter: Adapter, repository: str | None, counter: int) -> "Statement":
        """Return the statement for the files of an adapter; files that are not signed are left out."""
        if not 0 < counter <= MAX_COUNTER:
            raise ConfigError(f"the counter of a signature must be from 1 to {MAX_COUNTER}, got {counter}")
        base = dict(adapter.header.base.digests)
        return cls(_digests(contents), adapter.mask_id, base, repository, counter)

    def to_bytes(self) -> bytes:
        """Return the statement in canonical JSON, as it is signed."""
        subject = [
            {"annotations": {"size": size}, "digest": {"blake3": digest}, "name": name}
            for name, (size, digest) in sorted(self.files.items())
        ]
        predicate = {
            "base": dict(self.base),
            "counter": self.counter,
            "mask_id": self.mask_id,
            "repository": self.repository,
        }
        kinds = {"_type": STATEMENT_TYPE, "predicateType": PREDICATE_TYPE}
        return canonical_json({**kinds, "predicate": predicate, "subject": subject}).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> "Statement":
        """Parse a statement; one that this release would write in other bytes is refused.

        Raises:
            CorruptAdapterError: if anything in it is missing, unknown or not canonical.
        """
        outer = Fields.of(strict_json(payload, "the signed statement"), "$")
        predicate, files = outer.object("predicate"), {}
        for one in (Fields.of(value, "$.subject") for value in outer.array("subject")):
            size = _integer(one.object("annotations"), "size")
            files[one.one_of("name", (CONFIG_FILE, MODEL_FILE))] = size, one.object("digest").digest("blake3")
        base = predicate.object("base")
        counter = _integer(predicate, "counter")
        repository = predicate.optional_text("repository")
        digests = {dtype: base.digest(dtype) for dtype in base.members}
        found = cls(files, predicate.digest("mask_id"), digests, repository, counter)
        if not counter or MODEL_FILE not in files or found.to_bytes() != payload:
            raise CorruptAdapterError(f"the signed statement is not a canonical one of type {PREDICATE_TYPE}")
        return found

    def covers(self, contents: Contents) -> bool:
        """Tell whether these are the signed files, none more and none less; others of an adapter do not count."""
        return _digests(contents) == self.files


@dataclass(frozen=True, slots=True)
class Envelope:
    """A payload and signatures of it by key id, as DSSE has them."""

    payload: bytes
    signatures: Mapping[str, bytes]

    def to_bytes(self) -> bytes:
        """Return the canonical JSON of the envelope."""
        signatures = [{"keyid": id_, "sig": _text(self.signatures[id_])} for id_ in sorted(self.signatures)]
        envelope = {"payload": _text(self.payload), "payloadType": PAYLOAD_TYPE, "signatures": signatures}
        return canonical_json(envelope).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Envelope":
        """Parse an envelope; nothing is verified. One in other bytes than `to_bytes` gives is refused.

        Raises:
            SignatureError: with what is wrong.
        """
        try:
            if len(content) > MAX_SIGNATURE:
                raise CorruptAdapterError(f"it has {len(content)} bytes, at most {MAX_SIGNATURE} are accepted")
            outer = Fields.of(strict_json(content, "it"), "$")
            outer.one_of("payloadType", (PAYLOAD_TYPE,))
            given = [Fields.of(one, "$.signatures") for one in outer.array("signatures")]
            signatures = {one.digest("keyid"): base64.b64decode(one.text("sig"), validate=True) for one in given}
            # the text of a payload is longer than that of a name may be
            found = cls(base64.b64decode(str(outer.get("payload")), validate=True), signatures)
            if not signatures or found.to_bytes() != content:
                raise CorruptAdapterError("it is not in canonical form: keys sorted, no spaces, base64 as RFC 4648")
        except (CorruptAdapterError, ValueError) as error:
            raise SignatureError(f"{SIGNATURE_FILE} is no signature: {error}; fetch it again, or sign anew") from None
        return found

    def statement(self) -> Statement:
        """Return what the envelope states, verified or not.

        Raises:
            SignatureError: if it is no statement about an adapter.
        """
        try:
            return Statement.from_bytes(self.payload)
        except CorruptAdapterError as error:
            raise SignatureError(f"{SIGNATURE_FILE} has no statement that can be read: {error}; sign anew") from None


@dataclass(frozen=True, slots=True)
class Signed:
    """A statement, and the ids of the trusted keys whose signatures of it were verified."""

    statement: Statement
    by: tuple[str, ...]


def pae(payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's pre-authentication encoding of a payload with its type."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def check_envelope(content: bytes, keys: Keys) -> Signed:
    """Verify the signatures by trusted keys; the statement is parsed after that.

    Raises:
        SignatureError: if there is none by a trusted key, or one that names a trusted key is not by it.
    """
    envelope = Envelope.from_bytes(content)
    by = tuple(id_ for id_ in sorted(envelope.signatures) if id_ in keys)
    if not by:
        raise SignatureError(
            f"it is signed by {', '.join(map(_short, sorted(envelope.signatures)[:5]))} and by none of the trusted "
            f"keys, {', '.join(map(_short, sorted(keys)[:5]))}; ask its owner, or trust that key"
        )
    for id_ in by:
        if not is_signature_of(pae(envelope.payload), envelope.signatures[id_], keys[id_]):
            raise SignatureError(
                f"the signature does not verify with the key {_short(id_)} that it names; it is damaged or forged, "
                "fetch it again"
            )
    return Signed(envelope.statement(), by)


def check_signature(
    content: bytes | None, keys: Keys, contents: Contents, repository: str | None = None, alone: bool = False
) -> Signed:
    """Verify the bytes of an adapter's files, before anything of them is decoded.

    Args:
        content: of the signature file; None if there is none. keys: trusted public keys.
        contents: what the files are, by name.
        repository: that they come from; None for those on a disk, which may be signed for any.
        alone: only the model file was read, so that a config file need not be there.

    Raises:
        SignatureError: if they are not just the files that were signed, by a trusted key, for this repository.
    """
    if content is None:
        raise SignatureError("it is not signed, and a signature is required; ask its owner for a signed one")
    signed = check_envelope(content, keys)
    found, stated = _digests(contents), signed.statement.files
    wrong = [name for name in sorted({*found, *stated}) if found.get(name) != stated.get(name)]
    if wrong and not (alone and wrong == [CONFIG_FILE]):
        raise SignatureError(f"{' and '.join(wrong)}: changed, added or removed since it was signed; fetch it again")
    if repository is not None and signed.statement.repository not in (None, repository):
        raise SignatureError(f"it was signed for {signed.statement.repository}, and this is {repository}")
    return signed


def parse_signed(
    files: Mapping[str, tuple[Path, bytes | memoryview]], keys: Keys | None, repository: str | None, alone: bool = False
) -> tuple[Adapter, Signed | None]:
    """Verify the signature of files, then what they hold; with `keys` None they need no signature.

    Args:
        files: path and bytes of each by name. Others: as of `check_signature`.

    Raises:
        SignatureError: as `check_signature`, or if the statement is not true. Others: as `read_adapter`.
    """
    if keys is None:
        return parse_files(files), None
    contents = {name: one for name, (_, one) in files.items()}
    try:
        content = bytes(contents[SIGNATURE_FILE]) if SIGNATURE_FILE in contents else None
        signed = check_signature(content, keys, contents, repository, alone)
        adapter, one = parse_files(files), signed.statement
        if (one.mask_id, dict(one.base)) != (adapter.mask_id, dict(adapter.header.base.digests)):
            raise SignatureError("the signed statement has another mask_id or base than the adapter; sign it anew")
    except SignatureError as error:
        raise SignatureError(f"{files[MODEL_FILE][0]}: {error}") from None
    return adapter, signed


def signature_path(model: Path) -> Path:
    """Return where the signature of a model file lies."""
    return model.with_suffix(".sig")


def _digests(contents: Contents) -> dict[str, tuple[int, str]]:
    signed = (CONFIG_FILE, MODEL_FILE)
    return {name: (len(one), blake3(one).hexdigest()) for name, one in contents.items() if name in signed}


def _integer(fields: Fields, key: str) -> int:
    value = fields.get(key)
    if type(value) is not int or not 0 <= value <= MAX_COUNTER:
        raise fields.refuse(key, f"an integer from 0 to {MAX_COUNTER}")
    return value


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _short(key_id: str) -> str:
    return key_id[:16]


def renewed(
    content: bytes | None,
    contents: Contents,
    adapter: Adapter,
    keys: Keys,
    repository: str | None,
    counter: int | None = None,
    least: int = 0,
) -> bytes:
    """Return the content of a signature file for an adapter, signed with private keys.

    One that is there and states the same is kept, and gets the signatures that it lacks.

    Args:
        content: of the signature file that is there; None if there is none.
        counter: None for one more than that of the version before, which one of the keys must have signed.
        least: a counter that was seen elsewhere; with `counter` None it is exceeded as well.

    Raises:
        SignatureError: if the version before is signed by other keys only, so that its counter cannot be believed.
    """
    if counter is None:
        counter, before = least, None
        if content is not None:
            try:
                before = check_envelope(content, {id_: key.public_key() for id_, key in keys.items()}).statement
            except SignatureError as error:
                raise SignatureError(
                    f"the counter of the version before cannot be believed: {error}; sign with a key of that version "
                    f"as well, or state the counter: maskpack sign … --counter N"
                ) from None
            counter = max(before.counter, least)
        if before is None or Statement.of(contents, adapter, repository, counter) != before:
            counter += 1
    payload = Statement.of(contents, adapter, repository, counter).to_bytes()
    made: dict[str, bytes] = {}
    try:
        if content is not None and (there := Envelope.from_bytes(content)).payload == payload:
            made = dict(there.signatures)
    except SignatureError:
        pass  # what is there is no signature, and goes
    for id_, key in keys.items():
        if id_ not in made or not is_signature_of(pae(payload), made[id_], key.public_key()):
            made[id_] = signature_of(pae(payload), key)
    return Envelope(payload, made).to_bytes()


def sign_adapter(
    path: str | os.PathLike[str],
    keys: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    repository: str | None = None,
    counter: int | None = None,
) -> Signed:
    """Sign an adapter on this disk with the private keys of PEM files, and write the signature beside its model file.

    Args:
        path: its folder, or a model file alone. repository, counter: as of `Statement` and `renewed`.

    Raises:
        AdapterError: if it is not a whole adapter. ConfigError: if a key cannot be used.
        SignatureError: as `renewed`. StateError: if the file cannot be written.
    """
    private = private_keys(keys)
    files = read_files(Path(path).expanduser())
    target = signature_path(files[MODEL_FILE][0])
    there = read_bytes(target, target, MAX_SIGNATURE) if target.exists() else None
    contents = {name: content for name, (_, content) in files.items()}
    made = renewed(there, contents, parse_files(files), private, repository, counter)
    with replacing(target) as (temporary,):
        temporary.write_bytes(made)
    return check_envelope(made, {id_: key.public_key() for id_, key in private.items()})


def remove_signature(model: Path) -> None:
    """Remove the signature of a model file that is about to be replaced; of a file alone, if it is one of ours."""
    path = signature_path(model)
    if not path.is_file():
        return
    try:
        Envelope.from_bytes(read_bytes(path, path, MAX_SIGNATURE))
    except AdapterError:
        if path.name != SIGNATURE_FILE:
            return
    path.unlink(missing_ok=True)
