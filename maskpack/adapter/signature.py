"""Signatures of adapters: what they state, who may make them, and what is checked before anything signed is parsed.

A signature is a file beside the model file: `maskpack_model.sig` is made with key pairs (PEM files, P-256 or Ed25519),
`maskpack_model.sigstore.json` by an identity. Both hold a statement about the bytes of model and config.
"""

import base64
import getpass
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..errors import AdapterError, ConfigError, CorruptAdapterError, SignatureError, require
from ..network import hides_secrets
from ..safetensors_io import replacing, strict_json
from .fields import DIGEST, TEXT, TEXT_OR_NULL, integer, items, one_of, record, values
from .header import canonical_json
from .identity import (
    BUNDLE_FILE,
    ENVELOPE,
    MAX_SIGNATURE,
    PAYLOAD_TYPE,
    Identity,
    IdentitySigner,
    bundle_payload,
    parsing,
    verified_payload,
)
from .read import CONFIG_FILE, MODEL_FILE, Adapter, Files, located, parse_files, read_bytes, read_files

SIGNATURE_FILE = "maskpack_model.sig"
DIGESTS = {BUNDLE_FILE: "sha256", SIGNATURE_FILE: "blake3"}  # signature files, and how each names the signed files
SIGSTORE = "sigstore"  # in the place of a private key's file: sign with an identity
PASSPHRASE = "MASKPACK_KEY_PASSPHRASE"
TRUSTED = "MASKPACK_REQUIRE_SIGNATURE"
MAX_KEY = 64 << 10  # bytes of a PEM file
MAX_COUNTER = (1 << 53) - 1  # every JSON reader keeps such integers
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:maskpack:adapter:v1"

Contents = Mapping[str, bytes | memoryview]  # of an adapter's files by name
# Who signs or is trusted, by id: keys of `cryptography` by the hex SHA-256 of the public key's DER
# SubjectPublicKeyInfo, and an Identity or IdentitySigner by NAME@ISSUER.
Keys = Mapping[str, Any]


def trusted_keys(given: str | os.PathLike[str] | None) -> Keys | None:
    """Return who is trusted: the public keys of a PEM file or folder, or an identity NAME@https://ISSUER.

    None stands for what MASKPACK_REQUIRE_SIGNATURE names; if it names nothing, None is returned.
    """
    place = os.environ.get(TRUSTED) if given is None else given
    if place is None:
        return None
    text = os.fspath(place)
    if not text:
        raise ConfigError(f"the place of the trusted keys is empty; give a file or folder, or unset {TRUSTED}")
    identity = Identity.parse(text)
    return public_keys(text) if identity is None else {str(identity): identity}


def public_keys(path: str | os.PathLike[str]) -> Keys:
    """Read the public key of a PEM file, or those of all `.pem` files of a folder; ConfigError if there is none."""
    place = Path(path).expanduser()
    files = sorted(place.glob("*.pem")) if place.is_dir() else [place]
    if not files:
        raise ConfigError(f"the folder of trusted keys {place} has no .pem file; put the public keys there")
    return {key_id(key): key for key in (_read_key(file, private=False) for file in files)}


def private_keys(given: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Keys:
    """Read the private keys to sign with, PEM files (PKCS #8) of one each; the word "sigstore" means an identity.

    The passphrase of an encrypted key is that of the environment variable MASKPACK_KEY_PASSPHRASE, or asked for.
    """
    keys: dict[str, Any] = {}
    for one in [given] if isinstance(given, str | os.PathLike) else given:
        if os.fspath(one) == SIGSTORE:
            signer = IdentitySigner()
            keys[str(signer.identity)] = signer
        else:
            key = _read_key(Path(one).expanduser(), private=True)
            keys[key_id(key.public_key())] = key
    return keys


def _read_key(file: Path, private: bool) -> Any:
    require("cryptography", "sign", "signatures")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    try:
        content = read_bytes(file, file, MAX_KEY)
    except AdapterError as error:
        raise ConfigError(
            f"cannot read a key: {error}. Give a PEM file, a folder of public keys, or an identity NAME@https://ISSUER"
        ) from None
    if not private and b"PRIVATE KEY" in content:
        raise ConfigError(f"{file} is a private key, and a public one is expected: openssl pkey -in {file} -pubout")
    secret = _passphrase(file) if private and b"ENCRYPTED" in content else None
    try:
        key = load_pem_private_key(content, secret) if private else load_pem_public_key(content)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        kind = "private" if private else "public"
        what = "cannot be opened with this passphrase, or is" if secret else "is"
        raise ConfigError(f"{file} {what} no {kind} key in PEM (BEGIN {kind.upper()} KEY): {error}") from None
    if isinstance(key, ed25519.Ed25519PublicKey | ed25519.Ed25519PrivateKey):
        return key
    kind = type(key).__name__
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        if isinstance(key.curve, ec.SECP256R1):
            return key
        kind = f"on the curve {key.curve.name}"
    raise ConfigError(f"{file} is a key {kind}; expected Ed25519 or P-256: openssl genpkey -algorithm ed25519")


def _passphrase(file: Path) -> bytes:
    if (given := os.environ.get(PASSPHRASE)) is not None:
        return given.encode()
    if not sys.stdin.isatty():
        raise ConfigError(f"{file} is encrypted; set the environment variable {PASSPHRASE} to its passphrase")
    return getpass.getpass(f"Passphrase of {file}: ").encode()


def key_id(public: Any) -> str:
    """Return the id of a public key: what `openssl pkey -pubin -outform DER | sha256sum` prints for it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def signature_of(message: bytes, private: Any) -> bytes:
    """Return the signature of a message: 64 bytes by an Ed25519 key, DER by a P-256 key."""
    return bytes(private.sign(message, *_algorithm(private.public_key())))


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


SUBJECT = {
    "annotations": record({"size": integer(0, MAX_COUNTER)}),
    "digest": values(DIGEST),
    "name": one_of(CONFIG_FILE, MODEL_FILE),
}
PREDICATE = {
    "base": values(DIGEST),
    "counter": integer(1, MAX_COUNTER),
    "mask_id": DIGEST,
    "repository": TEXT_OR_NULL,
}
STATEMENT = {"predicate": record(PREDICATE), "subject": items(record(SUBJECT))}


@dataclass(frozen=True, slots=True)
class Statement:
    """The statement that is signed: digests of an adapter's files, its masks, its base, its repository and version.

    Attributes:
        files: bytes and hex digest of the model file and, if there is one, of the config file, by name.
        mask_id, base: the adapter's, and the digests of its base by dtype.
        repository: on the Hub that it was signed for; None for any.
        counter: greater for each later version in a repository.
        algorithm: of the digests of the files, "blake3" or "sha256".
    """

    files: Mapping[str, tuple[int, str]]
    mask_id: str
    base: Mapping[str, str]
    repository: str | None
    counter: int
    algorithm: str = "blake3"

    def to_bytes(self) -> bytes:
        """Return the statement in canonical JSON, as it is signed."""
        subject = [
            {"annotations": {"size": size}, "digest": {self.algorithm: digest}, "name": name}
            for name, (size, digest) in sorted(self.files.items())
        ]
        predicate = {key: getattr(self, key) for key in PREDICATE}
        kinds = {"_type": STATEMENT_TYPE, "predicateType": PREDICATE_TYPE}
        return canonical_json({**kinds, "predicate": predicate, "subject": subject}).encode()

    @classmethod
    def from_bytes(cls, payload: bytes, algorithm: str = "blake3") -> "Statement":
        """Parse a statement; SignatureError if this release would not write it in the same bytes."""
        try:
            value = record(STATEMENT)(strict_json(payload, "it"), "$")
            subject = value["subject"]
            files = {one["name"]: (one["annotations"]["size"], one["digest"].get(algorithm)) for one in subject}
            found = cls(files, **value["predicate"], algorithm=algorithm)
            if MODEL_FILE not in files or found.to_bytes() != payload:
                raise CorruptAdapterError(f"it is not a canonical one of type {PREDICATE_TYPE}")
        except CorruptAdapterError as error:
            raise SignatureError(f"the signed statement cannot be read: {error}; sign anew") from None
        return found

    def covers(self, contents: Contents) -> bool:
        """Return True if these are the signed files, none more and none less; others of an adapter do not count."""
        return _digests(contents, self.algorithm) == self.files


def _digests(contents: Contents, algorithm: str) -> dict[str, tuple[int, str]]:
    hashed = blake3 if algorithm == "blake3" else hashlib.sha256
    signed = (CONFIG_FILE, MODEL_FILE)
    return {name: (len(one), hashed(one).hexdigest()) for name, one in contents.items() if name in signed}


@dataclass(frozen=True, slots=True)
class Envelope:
    """A payload and signatures of it by key id, as DSSE has them: the content of `maskpack_model.sig`."""

    payload: bytes
    signatures: Mapping[str, bytes]

    def to_bytes(self) -> bytes:
        """Return the canonical JSON of the envelope."""
        coded = {id_: base64.b64encode(one).decode() for id_, one in sorted(self.signatures.items())}
        signatures = [{"keyid": id_, "sig": one} for id_, one in coded.items()]
        payload = base64.b64encode(self.payload).decode()
        envelope = {"payload": payload, "payloadType": PAYLOAD_TYPE, "signatures": signatures}
        return canonical_json(envelope).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Envelope":
        """Parse an envelope, unverified; SignatureError if it is none, or in other bytes than `to_bytes` gives."""
        with parsing(content, f"{SIGNATURE_FILE} is no signature"):
            signatures = items(record({"keyid": DIGEST, "sig": TEXT}))
            value = record({**ENVELOPE, "signatures": signatures})(strict_json(content, "it"), "$")
            made = {one["keyid"]: base64.b64decode(one["sig"], validate=True) for one in value["signatures"]}
            found = cls(base64.b64decode(value["payload"], validate=True), made)
            if not made or found.to_bytes() != content:
                raise CorruptAdapterError("it is not in canonical form: keys sorted, no spaces, base64 as RFC 4648")
        return found


def pae(payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's pre-authentication encoding of a payload with its type."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


@dataclass(frozen=True, slots=True)
class Signed:
    """A statement, and the ids of the trusted keys, or the identity, whose signatures of it were verified."""

    statement: Statement
    by: tuple[str, ...]


def statement_in(file: str, content: bytes) -> Statement:
    """Return what a signature file of a name states; nothing is verified. Raises SignatureError if it is none."""
    payload = bundle_payload(content) if file == BUNDLE_FILE else Envelope.from_bytes(content).payload
    return Statement.from_bytes(payload, DIGESTS[file])


def verified(file: str, content: bytes, keys: Keys) -> Signed:
    """Verify the signatures by trusted keys in a signature file of a name; the statement is parsed after that."""
    if file == BUNDLE_FILE:
        ((id_, identity),) = keys.items()
        return Signed(Statement.from_bytes(verified_payload(content, identity), DIGESTS[file]), (id_,))
    envelope = Envelope.from_bytes(content)
    by = tuple(id_ for id_ in sorted(envelope.signatures) if id_ in keys)
    if not by:
        signers, trusted = (", ".join(id_[:16] for id_ in sorted(ids)[:5]) for ids in (envelope.signatures, keys))
        raise SignatureError(
            f"it is signed by {signers} and by none of the trusted keys, {trusted}; ask its owner, or trust that key"
        )
    for id_ in by:
        if not is_signature_of(pae(envelope.payload), envelope.signatures[id_], keys[id_]):
            raise SignatureError(
                f"the signature does not verify with the key {id_[:16]} that it names; it is damaged or forged, "
                "fetch it again"
            )
    return Signed(Statement.from_bytes(envelope.payload), by)


def check_signature(contents: Contents, keys: Keys, repository: str | None = None, alone: bool = False) -> Signed:
    """Verify the bytes of an adapter's files, before anything of them is decoded.

    Args:
        contents: the files, the signature's among them. keys: trusted public keys, or one identity.
        repository: that they come from; None for those on a disk, which may be signed for any.
        alone: only the model file was read, so that a config file need not be there.
    """
    file = BUNDLE_FILE if any(isinstance(key, Identity) for key in keys.values()) else SIGNATURE_FILE
    if file not in contents:
        raise SignatureError(f"it is not signed, and a signature is required: there is no {file}; ask its owner for it")
    signed = verified(file, bytes(contents[file]), keys)
    found, stated = _digests(contents, DIGESTS[file]), signed.statement.files
    wrong = [name for name in sorted({*found, *stated}) if found.get(name) != stated.get(name)]
    if wrong and not (alone and wrong == [CONFIG_FILE]):
        raise SignatureError(f"{' and '.join(wrong)}: changed, added or removed since it was signed; fetch it again")
    if repository is not None and signed.statement.repository not in (None, repository):
        raise SignatureError(f"it was signed for {signed.statement.repository}, and this is {repository}")
    return signed


def parse_signed(
    files: Files, keys: Keys | None, repository: str | None, alone: bool = False
) -> tuple[Adapter, Signed | None]:
    """Verify the signature of files, as `check_signature`, then what they hold; with `keys` None they need none."""
    if keys is None:
        return parse_files(files), None
    model = files[MODEL_FILE][0]
    with located(model):
        signed = check_signature({name: one for name, (_, one) in files.items()}, keys, repository, alone)
    one = signed.statement
    adapter = parse_files(files, one.files[MODEL_FILE][1] if one.algorithm == "blake3" else None)
    if (one.mask_id, dict(one.base)) != (adapter.mask_id, dict(adapter.header.base.digests)):
        raise SignatureError(f"{model}: the signed statement has another mask_id or base than the adapter; sign anew")
    return adapter, signed


def describe_signature(contents: Contents, signed: Signed | None) -> dict[str, Any] | None:
    """Return what the signature among an adapter's files says, as JSON values; None if there is none.

    `verified` is True only if trusted keys or an identity were given, which `signed` is the result of.
    """
    file = next((file for file in (SIGNATURE_FILE, BUNDLE_FILE) if file in contents), None)
    if file is None:
        return None
    found: dict[str, Any] = {"keys": [], "repository": None, "counter": None, "verified": signed is not None}
    try:
        statement = signed.statement if signed else statement_in(file, bytes(contents[file]))
        by = signed.by if signed else ()
        if not signed and file == SIGNATURE_FILE:
            by = tuple(sorted(Envelope.from_bytes(bytes(contents[file])).signatures))
    except SignatureError as error:
        return {**found, "state": str(error)}
    fits = "not verified: no key was given" if statement.covers(contents) else "of other files than these"
    found |= {"keys": list(by), "repository": statement.repository, "counter": statement.counter}
    return {**found, "state": "verified" if signed else fits}


def files_by(keys: Keys) -> dict[str, Keys]:
    """Return the signature files that private keys and identities make, each with those that make it."""
    kinds: dict[str, dict[str, Any]] = {file: {} for file in DIGESTS}
    for id_, key in keys.items():
        kinds[BUNDLE_FILE if isinstance(key, IdentitySigner) else SIGNATURE_FILE][id_] = key
    return {file: own for file, own in kinds.items() if own}


def renewed(
    there: Contents,
    contents: Contents,
    adapter: Adapter,
    keys: Keys,
    repository: str | None,
    counter: int | None = None,
    least: int = 0,
) -> dict[str, bytes]:
    """Return the signature files of an adapter by name, signed with private keys or an identity.

    One that is there and states the same is kept, and gets the signatures that it lacks.

    Args:
        there: the signature files that are there, by name. contents: the adapter's files.
        counter: None for one more than that of the version before, which one of the keys must have signed: else its
            counter cannot be believed, which is a SignatureError.
        least: a counter that was seen elsewhere; with `counter` None it is exceeded as well.
    """
    makers = files_by(keys)

    def stated(file: str, counter: int) -> Statement:
        files, base = _digests(contents, DIGESTS[file]), dict(adapter.header.base.digests)
        return Statement(files, adapter.mask_id, base, repository, counter, DIGESTS[file])

    if counter is None:
        before = {file: _believed(file, bytes(there[file]), own) for file, own in makers.items() if file in there}
        counter = max([least, *(one.counter for one in before.values())])
        if not before or any(stated(file, counter) != one for file, one in before.items()):
            counter += 1
    if not 0 < counter <= MAX_COUNTER:
        raise ConfigError(f"the counter of a signature must be from 1 to {MAX_COUNTER}, got {counter}")
    return {
        file: _sign(file, bytes(there.get(file, b"")), stated(file, counter).to_bytes(), own)
        for file, own in makers.items()
    }


def _believed(file: str, content: bytes, own: Keys) -> Statement:
    """Return what a version before states, if one of those who sign signed it."""
    public = {id_: key.identity if isinstance(key, IdentitySigner) else key.public_key() for id_, key in own.items()}
    try:
        return verified(file, content, public).statement
    except SignatureError as error:
        raise SignatureError(
            f"the counter of the version before cannot be believed: {error}; sign with a key of that version as well, "
            "or state the counter: maskpack sign … --counter N"
        ) from None


def _sign(file: str, there: bytes, payload: bytes, own: Keys) -> bytes:
    if file == BUNDLE_FILE:
        (signer,) = own.values()
        return bytes(signer.sign(payload, there or None))
    made: dict[str, bytes] = {}
    with suppress(SignatureError):  # what is there may be no signature
        made = dict(envelope.signatures) if (envelope := Envelope.from_bytes(there)).payload == payload else {}
    for id_, key in own.items():
        if id_ not in made or not is_signature_of(pae(payload), made[id_], key.public_key()):
            made[id_] = signature_of(pae(payload), key)
    return Envelope(payload, made).to_bytes()


@hides_secrets
def sign_adapter(
    path: str | os.PathLike[str],
    keys: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    repository: str | None = None,
    counter: int | None = None,
) -> Signed:
    """Sign an adapter on this disk, a folder or a model file alone, and write the signature beside its model file.

    See `private_keys` for keys, `Statement` and `renewed` for repository and counter.
    """
    files = read_files(Path(path).expanduser())
    model, contents = files[MODEL_FILE][0], {name: content for name, (_, content) in files.items()}
    adapter, private = parse_files(files), private_keys(keys)
    made = renewed(read_signatures(model), contents, adapter, private, repository, counter)
    with replacing(*(signature_path(model, file) for file in made)) as unfinished:
        for temporary, content in zip(unfinished, made.values(), strict=True):
            temporary.write_bytes(content)
    return Signed(statement_in(*next(iter(made.items()))), tuple(private))


def signature_path(model: Path, file: str = SIGNATURE_FILE) -> Path:
    """Return where a signature file of a model file is: beside it, under its name."""
    return model.with_suffix(file.removeprefix("maskpack_model"))


def read_signatures(model: Path) -> dict[str, bytes]:
    """Return the contents of the signature files beside a model file, by the name that the format gives them."""
    found = {file: signature_path(model, file) for file in DIGESTS}
    return {file: read_bytes(path, path, MAX_SIGNATURE) for file, path in found.items() if path.exists()}


def remove_signature(model: Path) -> None:
    """Remove the signatures of a model file that is about to be replaced; of a file alone, those that are ours."""
    for file in DIGESTS:
        path = signature_path(model, file)
        if not path.is_file():
            continue
        if path.name != file:
            try:
                statement_in(file, read_bytes(path, path, MAX_SIGNATURE))
            except AdapterError:
                continue
        path.unlink(missing_ok=True)
