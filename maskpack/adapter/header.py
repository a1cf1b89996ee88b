"""The adapter's header: typed values <-> canonical JSON (docs/format.md section 2)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..backbone.fingerprint import Fingerprint
from ..errors import AdapterError, ConfigError, CorruptAdapterError, UnsupportedVersionError
from ..preprocess import KINDS, preprocess_from_json
from ..tensorheader import strict_json
from .cascade import CascadeHeader, parse_cascade
from .fields import PATH, Fields
from .sets import SetHeader, canonical_json, parse_sets

FORMAT_VERSION = 1
BASE_DTYPES = ("float32", "bfloat16", "float16")


def base_to_json(base: Fingerprint) -> dict[str, Any]:
    """Return the base as the header keeps it, without the digests of single tensors."""
    return {
        "id": base.id,
        "revision": base.revision,
        "dtype": base.dtype,
        "head": list(base.head),
        "digests": dict(base.digests),
    }


@dataclass(frozen=True, slots=True)
class Header:
    """What the file says beside its tensors. `base.tensors` is empty here: it is stored as a tensor."""

    producer: str
    mask_id: str
    data_digest: str
    base: Fingerprint
    sets: Mapping[str, SetHeader]
    task: str | None = None
    class_names: tuple[str, ...] | None = None
    preprocess: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    cascade: CascadeHeader | None = None

    def to_json(self) -> str:
        """Return canonical JSON.

        Raises:
            AdapterError: if `preprocess` or `training` hold what JSON cannot, such as NaN or a tensor.
        """
        value: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "producer": self.producer,
            "mask_id": self.mask_id,
            "data_blake3": self.data_digest,
            "base": base_to_json(self.base),
            "sets": {name: one.to_json() for name, one in self.sets.items()},
        }
        if self.cascade is not None:
            value["cascade"] = self.cascade.to_json()
        for key in ("task", "class_names", "preprocess", "training"):
            if (member := getattr(self, key)) is not None:
                try:
                    value[key] = json.loads(canonical_json(member))
                except (TypeError, ValueError, RecursionError) as error:
                    raise AdapterError(
                        f"{key} cannot be stored as JSON: {error}; give finite numbers, texts, lists and mappings"
                    ) from None
        return canonical_json(value)

    @classmethod
    def from_json(cls, text: str) -> "Header":
        """Parse and check a header.

        Raises:
            UnsupportedVersionError: if a newer format version wrote it.
            CorruptAdapterError: if anything in it is not what the format allows; the message says what and where.
        """
        fields = Fields.of(strict_json(text, "the adapter header"), "$")
        version = fields.get("format_version")
        if type(version) is not int or version < 1:
            raise fields.refuse("format_version", f"an integer from 1 to {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise UnsupportedVersionError(
                f"the adapter has format version {version}, this release reads up to {FORMAT_VERSION}; "
                f"upgrade with: pip install --upgrade maskpack"
            )
        preprocess = fields.optional_object("preprocess")
        if preprocess is not None and fields.object("preprocess").text("kind") in KINDS:
            try:
                preprocess_from_json(preprocess)
            except ConfigError as error:
                raise CorruptAdapterError(f"$.{error}, or fetch the file again") from None
        sets = parse_sets(fields.object("sets"))
        return cls(
            producer=fields.text("producer"),
            mask_id=fields.digest("mask_id"),
            data_digest=fields.digest("data_blake3"),
            base=_base(fields.object("base")),
            sets=sets,
            task=fields.optional_text("task"),
            class_names=fields.texts("class_names") if "class_names" in fields.members else None,
            preprocess=preprocess,
            training=fields.optional_object("training"),
            cascade=parse_cascade(fields.object("cascade"), sets) if "cascade" in fields.members else None,
        )


def _base(fields: Fields) -> Fingerprint:
    id_ = fields.text("id")
    if PATH.match(id_):
        raise fields.refuse("id", "a name as in 'timm/resnet18.a1_in1k', never a local path")
    digests = fields.object("digests")
    return Fingerprint(
        id_,
        fields.optional_text("revision"),
        fields.text("dtype"),
        fields.texts("head"),
        {dtype: digests.digest(dtype) for dtype in BASE_DTYPES},
        {},
    )
