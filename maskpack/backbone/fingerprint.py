"""Fingerprint: what an adapter is bound to (docs/format.md section 3)."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from blake3 import blake3
from torch import Tensor, nn

from ..errors import BackboneMismatchError
from ..threads import Result, in_order
from .parameters import body, unwrap
from .tensor_digest import Stamp, stamp, tensor_digest

CASTS: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
PREFIX = 6  # bytes kept of a tensor's digest, for each cast
WORTH = 1 << 17  # weights; hashing fewer takes less than a thread costs


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identity of a backbone's body.

    Attributes:
        id: where it comes from, as in "timm/resnet18.a1_in1k"; never a path.
        revision: Hub commit, torchvision weights enum, or None.
        dtype: dtype of the body when the fingerprint was taken, as in "float32".
        head: names of modules outside the body.
        digests: dtype name -> hex BLAKE3 of the body cast to that dtype.
        tensors: parameter name -> first 18 bytes as in `maskpack.base`: 6 bytes each of the digest of the tensor
            cast to float32, bfloat16, float16.
    """

    id: str
    revision: str | None
    dtype: str
    head: tuple[str, ...]
    digests: Mapping[str, str]
    tensors: Mapping[str, bytes]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_digests(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, bytes]:
    """Return `tensor_digest` of each, several at a time where they are on the CPU."""
    return _of_each(tensors, lambda _, tensor: tensor_digest(tensor, dtype))


def _of_each(tensors: Mapping[str, Tensor], work: Callable[[str, Tensor], Result]) -> dict[str, Result]:
    """Return what work gives for each name and tensor, several at a time where they are on the CPU."""
    # the largest first: one that comes last would be waited for alone
    items = sorted(tensors.items(), key=lambda item: -item[1].numel())
    workers = None if all(tensor.is_cpu for tensor in tensors.values()) else 1
    found = in_order(lambda item: work(*item), items, lambda item: item[1].numel(), WORTH, workers)
    return {name: one for (name, _), one in zip(items, found, strict=True)}


def _with_data(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors, or raise BackboneMismatchError if one is on the meta device."""
    if on_meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise BackboneMismatchError(
            f"{len(on_meta)} of the {len(tensors)} tensors of the model's body are on the meta device and have no "
            f"values, first {on_meta[0]!r}; load its weights before, or weights and adapter together by "
            f"load_masked(model, weights, ref)"
        )
    return tensors


def _body_digest(tensors: Mapping[str, Tensor], digests: Mapping[str, bytes]) -> str:
    whole = blake3()
    for name, tensor in tensors.items():
        shape = ",".join(str(size) for size in tensor.shape)
        whole.update(name.encode() + b"\0" + shape.encode() + b"\0" + digests[name])
    return whole.hexdigest()


def compared_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype in which a model is compared: the shortest mantissa among its tensors."""
    present = {tensor.dtype for tensor in tensors}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in present), torch.float32)


def fingerprint(model: nn.Module, *, id: str, revision: str | None = None, head: Iterable[str] = ()) -> Fingerprint:
    """Take the fingerprint of a model's body.

    Args:
        id: where the weights come from, as in "timm/resnet18.a1_in1k"; never a path.
        revision: Hub commit or torchvision weights enum, if known.
        head: names of modules that do not belong to the body.
    """
    head = tuple(sorted(head))
    tensors = _with_data(body(model, head))
    digests: dict[str, str] = {}
    prefixes: dict[str, bytes] = dict.fromkeys(tensors, b"")
    for dtype in CASTS:
        each = tensor_digests(tensors, dtype)
        digests[_name(dtype)] = _body_digest(tensors, each)
        prefixes = {name: prefix + each[name][:PREFIX] for name, prefix in prefixes.items()}
    return Fingerprint(id, revision, _name(compared_dtype(tensors.values())), head, digests, prefixes)


def _prefix(expected: Fingerprint, name: str, dtype: torch.dtype) -> bytes:
    at = CASTS.index(dtype) * PREFIX
    return expected.tensors[name][at : at + PREFIX]


def same_digest(digest: bytes, expected: Fingerprint, name: str, dtype: torch.dtype) -> bool:
    """Tell whether a digest by `tensor_digest` is that of the base's masked tensor of that name."""
    return digest[:PREFIX] == _prefix(expected, name, dtype)


def same_tensor(tensor: Tensor, expected: Fingerprint, name: str) -> bool:
    """Tell whether a tensor, in its own dtype (one of the three casts), is the base's of that name."""
    return same_digest(tensor_digest(tensor, tensor.dtype), expected, name, tensor.dtype)


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's body as it is compared.

    Attributes:
        dtype: in which it is compared. digest: of all. tensors: digest of each by name.
    """

    dtype: torch.dtype
    digest: str
    tensors: Mapping[str, bytes]


# model -> tensor name -> its stamp, the dtype of the cast, and the digest
_MEASURED: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Stamp, torch.dtype, bytes]]]
_MEASURED = weakref.WeakKeyDictionary()


def measure_body(model: nn.Module, head: Iterable[str]) -> Measured:
    """Take the digests of a model's body that fingerprints are compared with.

    A tensor that still has the stamp that it had when it was last measured is not hashed again.
    """
    tensors = _with_data(body(model, head))
    dtype = compared_dtype(tensors.values())
    known = _MEASURED.setdefault(unwrap(model), {})

    def measure(name: str, tensor: Tensor) -> tuple[Stamp | None, torch.dtype, bytes]:
        now = stamp(tensor)  # before the digest: what is written meanwhile makes it void
        if now is not None and name in known and known[name][:2] == (now, dtype):
            return known[name]
        return now, dtype, tensor_digest(tensor, dtype)

    found = _of_each(tensors, measure)
    known |= {name: (now, dtype, digest) for name, (now, dtype, digest) in found.items() if now is not None}
    each = {name: digest for name, (_, _, digest) in found.items()}
    return Measured(dtype, _body_digest(tensors, each), each)


def versions(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return PyTorch's count of writes of each tensor that was measured; `tensors` are the model's by name."""
    known = _MEASURED.get(unwrap(model), {})
    return {name: tensors[name]._version for name in known if name in tensors and not tensors[name].is_inference()}


def has_again(model: nn.Module, was: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Note that tensors have again the bytes that they had at the counts `was`; their counts are `now`."""
    known = _MEASURED.get(unwrap(model), {})
    for name in was.keys() & now.keys() & known.keys():
        found, dtype, digest = known[name]
        if found.version == was[name]:
            known[name] = replace(found, version=now[name]), dtype, digest


def check_fingerprint(model: nn.Module, expected: Fingerprint) -> str:
    """Compare a model's body with the fingerprint of an adapter's base; return the dtype that matched.

    Raises:
        BackboneMismatchError: if they differ; the message says how many masked tensors differ and which is first.
    """
    return check_measured(measure_body(model, expected.head), expected)


def check_digests(tensors: Mapping[str, Tensor], each: Mapping[str, bytes], expected: Fingerprint) -> str:
    """Compare digests that were taken of a body's tensors as `check_fingerprint` does; return the dtype that matched.

    Args:
        tensors: the body, for names, dtypes and shapes alone: it may be on the meta device.
        each: name -> digest by `tensor_digest` in the dtype of `compared_dtype(tensors.values())`.
    """
    return check_measured(Measured(compared_dtype(tensors.values()), _body_digest(tensors, each), each), expected)


def check_measured(found: Measured, expected: Fingerprint) -> str:
    """As `check_fingerprint`, of a body that was measured with the same head."""
    dtype, each = found.dtype, found.tensors
    if found.digest == expected.digests[_name(dtype)]:
        return _name(dtype)
    masked = sorted(expected.tensors)
    differing = [name for name in masked if name not in each or not same_digest(each[name], expected, name, dtype)]
    if differing:
        what = f"{len(differing)} of {len(masked)} masked tensors differ, first {differing[0]!r}"
    else:
        what = f"all {len(masked)} masked tensors agree, but other parameters or buffers of the body differ"
    raise mismatch(expected, what, dtype)


def mismatch(expected: Fingerprint, what: str, dtype: torch.dtype) -> BackboneMismatchError:
    """Return the error for a body that is not an adapter's base; `what` says what differs."""
    revision = f" at revision {expected.revision}" if expected.revision else ""
    return BackboneMismatchError(
        f"this adapter was made for the weights of {expected.id}{revision}, and the model has others: {what} "
        f"(compared as {_name(dtype)}); load the backbone named there, or apply it anyway with "
        f"load_mask(…, verify='off')"
    )
