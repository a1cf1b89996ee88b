"""Signing adapters: the signature file is made, renewed, and removed where another adapter is written."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import AdapterError, SignatureError
from ..tensorfile import replacing
from .adapter import Adapter
from .keys import Keys, is_signature_of, private_keys, signature_of
from .read import MODEL_FILE, parse_files, read_bytes, read_files
from .signature import (
    MAX_SIGNATURE,
    SIGNATURE_FILE,
    Contents,
    Envelope,
    Signed,
    Statement,
    check_envelope,
    pae,
    signature_path,
)


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
