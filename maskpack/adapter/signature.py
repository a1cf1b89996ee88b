"""Signatures of adapters: a DSSE envelope over a statement of file digests, beside the model file (docs/format.md)."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ..errors import ConfigError, CorruptAdapterError, SignatureError
from ..tensorheader import strict_json
from .adapter import Adapter
from .fields import Fields
from .keys import Keys, is_signature_of
from .read import CONFIG_FILE, MODEL_FILE, parse_files
from .sets import canonical_json

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
