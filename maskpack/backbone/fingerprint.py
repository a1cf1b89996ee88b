"""Fingerprint: what an adapter is bound to (docs/format.md section 3)."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BackboneMismatchError
from .parameters import body, same_size_int

CASTS: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
PREFIX = 6  # bytes kept of a tensor's digest, for each cast


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identity of a backbone's body.

    Attributes:
        id: where it comes from, as in "timm/resnet18.a1_in1k"; never a path.
        revision: Hub commit, torchvision weights enum, or None.
        dtype: dtype of the body when the fingerprint was taken, as in "float32".
        head: names of modules outside the body.
        digests: dtype name -> hex sha256 of the body cast to that dtype.
        tensors: parameter name -> first 18 bytes as in `maskpack.base`: 6 bytes each of the sha256 of the tensor
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


def _tensor_digest(tensor: Tensor, dtype: torch.dtype) -> bytes:
    cast = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return hashlib.sha256(same_size_int(cast).reshape(-1).numpy().data).digest()


def _body_digest(tensors: Mapping[str, Tensor], digests: Mapping[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name, tensor in tensors.items():
        shape = ",".join(str(size) for size in tensor.shape)
        whole.update(name.encode() + b"\0" + shape.encode() + b"\0" + digests[name])
    return whole.hexdigest()


def _compared_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype in which a model is compared: the shortest mantissa among its tensors."""
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
    tensors = body(model, head)
    digests: dict[str, str] = {}
    prefixes: dict[str, bytes] = dict.fromkeys(tensors, b"")
    for dtype in CASTS:
        each = {name: _tensor_digest(tensor, dtype) for name, tensor in tensors.items()}
        digests[_name(dtype)] = _body_digest(tensors, each)
        prefixes = {name: prefix + each[name][:PREFIX] for name, prefix in prefixes.items()}
    return Fingerprint(id, revision, _name(_compared_dtype(tensors.values())), head, digests, prefixes)


def _prefix(expected: Fingerprint, name: str, dtype: torch.dtype) -> bytes:
    at = CASTS.index(dtype) * PREFIX
    return expected.tensors[name][at : at + PREFIX]


def same_tensor(tensor: Tensor, expected: Fingerprint, name: str) -> bool:
    """Tell whether a tensor, in its own dtype (one of the three casts), is the base's of that name."""
    return _tensor_digest(tensor, tensor.dtype)[:PREFIX] == _prefix(expected, name, tensor.dtype)


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's body as it is compared.

    Attributes:
        dtype: in which it is compared. digest: of all. tensors: digest of each by name.
    """

    dtype: torch.dtype
    digest: str
    tensors: Mapping[str, bytes]


def measure_body(model: nn.Module, head: Iterable[str]) -> Measured:
    """Take the digests of a model's body that fingerprints are compared with."""
    tensors = body(model, head)
    dtype = _compared_dtype(tensors.values())
    each = {name: _tensor_digest(tensor, dtype) for name, tensor in tensors.items()}
    return Measured(dtype, _body_digest(tensors, each), each)


def check_fingerprint(model: nn.Module, expected: Fingerprint) -> str:
    """Compare a model's body with the fingerprint of an adapter's base; return the dtype that matched.

    Raises:
        BackboneMismatchError: if they differ; the message says how many masked tensors differ and which is first.
    """
    return check_measured(measure_body(model, expected.head), expected)


def check_measured(found: Measured, expected: Fingerprint) -> str:
    """As `check_fingerprint`, of a body that was measured with the same head."""
    dtype, each = found.dtype, found.tensors
    if found.digest == expected.digests[_name(dtype)]:
        return _name(dtype)
    masked = sorted(expected.tensors)
    differing = [name for name in masked if name not in each or each[name][:PREFIX] != _prefix(expected, name, dtype)]
    if differing:
        what = f"{len(differing)} of {len(masked)} masked tensors differ, first {differing[0]!r}"
    else:
        what = f"all {len(masked)} masked tensors agree, but other parameters or buffers of the body differ"
    revision = f" at revision {expected.revision}" if expected.revision else ""
    raise BackboneMismatchError(
        f"this adapter was made for the weights of {expected.id}{revision}, and the model has others: {what} "
        f"(compared as {_name(dtype)}); load the backbone named there, or apply it anyway with "
        f"load_mask(…, verify='off')"
    )
