"""Identities that sign adapters through sigstore: a login instead of a key pair, with an entry in a public log."""

import base64
import functools
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptAdapterError, MaskpackError, SignatureError, require
from ..network import UnreachableError, library_calls, reach
from ..safetensors_io import strict_json
from .fields import STRING, one_of, record

BUNDLE_FILE = "maskpack_model.sigstore.json"
MAX_SIGNATURE = 64 << 10  # bytes of a signature file; two hundred signatures by keys fit
PAYLOAD_TYPE = "application/vnd.in-toto+json"
SERVER = "https://tuf-repo-cdn.sigstore.dev"  # where sigstore publishes whom its clients trust
TOKEN = "SIGSTORE_IDENTITY_TOKEN"
ISSUER = "1.3.6.1.4.1.57264.1.1"  # extension of sigstore's certificates
FORM = re.compile(r"(.+)@(https?://[^@\s]+)")

log = logging.getLogger("maskpack")


@dataclass(frozen=True, slots=True)
class Identity:
    """A signer: e-mail address, or address of a workflow, as an OpenID Connect issuer (https://…) knows them."""

    name: str
    issuer: str

    def __str__(self) -> str:
        return f"{self.name}@{self.issuer}"

    @classmethod
    def parse(cls, text: str) -> "Identity | None":
        """Return the identity that a text NAME@https://ISSUER means; None if it has another form."""
        found = FORM.fullmatch(text)
        return cls(found[1], found[2]) if found else None

    @classmethod
    def of(cls, certificate: Any) -> "Identity":
        """Return the identity that a certificate names; nothing is verified."""
        from cryptography.x509 import ObjectIdentifier, SubjectAlternativeName

        (name,) = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
        issuer = certificate.extensions.get_extension_for_oid(ObjectIdentifier(ISSUER)).value.value
        return cls(name.value if isinstance(name.value, str) else name.value.decode(), issuer.decode())


ENVELOPE = {"payload": STRING, "payloadType": one_of(PAYLOAD_TYPE)}


def bundle_payload(content: bytes) -> bytes:
    """Return the statement in a bundle of sigstore, unverified; SignatureError if there is none."""
    with parsing(content, f"{BUNDLE_FILE} is no bundle of sigstore"):
        bundle = record({"dsseEnvelope": record(ENVELOPE)})(strict_json(content, "it"), "$")
        return base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)


@contextmanager
def parsing(content: bytes, what: str) -> Iterator[None]:
    """Raise SignatureError if a signature file is too large or what the block parses in it is wrong."""
    try:
        if len(content) > MAX_SIGNATURE:
            raise CorruptAdapterError(f"it has {len(content)} bytes, at most {MAX_SIGNATURE} are accepted")
        yield
    except (CorruptAdapterError, ValueError) as error:
        raise SignatureError(f"{what}: {error}; fetch it again, or sign anew") from None


def verified_payload(content: bytes, trusted: Identity) -> bytes:
    """Return the statement in a bundle of sigstore; SignatureError unless all verifies, by a trusted identity."""
    require("sigstore", "sigstore", "signatures by an identity")
    from sigstore.models import Bundle
    from sigstore.verify.policy import Identity as Policy

    bundle_payload(content)  # strict: what two parsers could understand differently is refused
    verifier = _verifier()
    try:
        bundle = Bundle.from_json(content)
        found = Identity.of(bundle.signing_certificate)
        if found != trusted:
            raise SignatureError(
                f"it is signed by the identity {found}, and {trusted} is trusted; ask its owner, or trust that one"
            )
        kind, payload = verifier.verify_dsse(bundle, Policy(identity=trusted.name, issuer=trusted.issuer))
    except SignatureError:
        raise
    except Exception as error:  # whatever bytes of a stranger make of several parsers
        why = str(error) or type(error).__name__
        raise SignatureError(f"{BUNDLE_FILE} does not verify: {why}; it is damaged or forged, fetch it again") from None
    if kind != PAYLOAD_TYPE:
        raise SignatureError(f"{BUNDLE_FILE} holds {kind!r}, expected {PAYLOAD_TYPE!r}; sign anew")
    return bytes(payload)


@functools.cache
def _verifier() -> Any:
    """Return sigstore's verifier, with the newest keys of its servers that can be had."""
    from sigstore.verify import Verifier

    with _our_errors("get the keys that sigstore is verified with"), library_calls(SERVER) as online:
        if not online:
            log.warning("%s is not asked; sigstore is verified with the keys that are known here", SERVER)
        return Verifier.production(offline=not online)


class IdentitySigner:
    """Signs with the identity of a CI job, of a token in SIGSTORE_IDENTITY_TOKEN, or of a login in the browser."""

    def __init__(self) -> None:
        require("sigstore", "sigstore", "signing with an identity")
        from sigstore.models import ClientTrustConfig
        from sigstore.oidc import IdentityToken, Issuer, detect_credential
        from sigstore.sign import Signer, SigningContext

        with _our_errors("sign with an identity"):
            reach(SERVER)
            config = ClientTrustConfig.production()
            if token := os.environ.get(TOKEN) or detect_credential():
                login = IdentityToken(token)
            elif sys.stdin.isatty():
                login = Issuer(config.signing_config.get_oidc_url()).identity_token()
            else:
                raise SignatureError(
                    f"there is no identity to sign with: no CI job that has one, no {TOKEN}, and no terminal to log in "
                    "from; run it in a terminal, or sign with a key"
                )
            self._signer = Signer(login, SigningContext.from_trust_config(config))
            # its certificate is good for ten minutes; it alone says which identity others will see
            self.identity = Identity.of(self._signer._signing_cert())

    def sign(self, payload: bytes, there: bytes | None = None) -> bytes:
        """Return a bundle with a statement; the one that is there, if this identity signed the same in it."""
        from sigstore.dsse import Statement

        with suppress(SignatureError):
            if there is not None and verified_payload(there, self.identity) == payload:
                return there
        with _our_errors("sign with an identity"):
            return bytes(self._signer.sign_dsse(Statement(payload)).to_json().encode())


@contextmanager
def _our_errors(task: str) -> Iterator[None]:
    """Raise SignatureError in place of the errors of sigstore and its libraries, which have no class in common."""
    try:
        yield
    except MaskpackError:
        raise
    except UnreachableError as error:
        raise SignatureError(f"cannot {task}: {error.host} cannot be reached ({error}); check the network") from error
    except Exception as error:
        raise SignatureError(f"cannot {task}: {type(error).__name__}: {error}; try again") from error
