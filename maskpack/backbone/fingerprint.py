"""Digests of a model's body, which bind an adapter to its base (docs/format.md section 3), and where such bases lie."""

import inspect
import itertools
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize

from ..errors import BackboneMismatchError, MaskpackError, by_triton
from ..safetensors_io import write_file
from ..threads import Result, in_order
from .model import CASTS, PREFIX, Fingerprint, all_names, body, canonical, inside, slots, unusable, unwrap
from .shards import any_shared, shared, whole

PIECE = 1 << 24  # bytes of the cast tensor that are in memory at one time
TRIED = 36_000  # words: 141 chunks, of two programs of the kernel
LOG = logging.getLogger(__name__)


def tensor_digest(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """Return the BLAKE3 of a tensor's row-major little-endian bytes after a cast to `dtype`; devices do not matter."""
    flat, digest = whole(tensor).detach().reshape(-1), blake3()
    if _hashes(flat.device):
        from .digest_gpu import digest_of

        return digest_of(_bytes(flat.to(dtype)))
    pieces: Iterable[Tensor] = (piece.cpu().to(dtype) for piece in torch.split(flat, PIECE // dtype.itemsize))
    for piece in [flat.cpu()] if flat.dtype == dtype else pieces:
        digest.update(_bytes(piece).numpy().data)
    return digest.digest()


@cache
def _hashes(device: torch.device) -> bool:
    """Return True if a device hashes its tensors itself, which is tried once, so that no weights come over the bus."""
    if device.type == "cpu" or not by_triton(device.type):
        return False
    try:
        from .digest_gpu import digest_of

        here, there = (_bytes(torch.arange(TRIED, dtype=torch.int32, device=one)) for one in ("cpu", device))
        if digest_of(there) == blake3(here.numpy().data).digest():
            return True
        why = "its digests are not those of the library"
    except Exception as error:  # Triton compiles when it is first used, and may find no compiler
        why = str(error)
    LOG.warning("weights on %s are not hashed there, but on the CPU: %s", device, why)
    return False


def _bytes(flat: Tensor) -> Tensor:
    return flat.contiguous().view(torch.uint8)


@dataclass(frozen=True, slots=True)
class Stamp:
    """Evidence that a tensor has not changed: equal stamps mean equal bytes.

    Attributes:
        storage: its memory, by a weak reference, whose identity no other memory gets while it exists.
        version: PyTorch's count of writes.
        total: sum of the bytes as 64-bit words, which shows writes that PyTorch does not count: through `.data`, or by
            a fused optimiser.
    """

    storage: StorageWeakRef
    layout: tuple[object, ...]
    version: int
    total: int


def stamp(tensor: Tensor) -> Stamp | None:
    """Return a tensor's stamp, or None for an inference tensor, whose writes are not counted, and for a shared one.

    The processes that share a tensor have to hash it together, whatever each of them knows.
    """
    if tensor.is_inference() or shared(tensor):
        return None
    layout, version = (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()), tensor._version
    data = _bytes(tensor.detach().reshape(-1))
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64)
    # numpy sums in this thread; PyTorch would wake threads that are busy elsewhere
    total = int(words.numpy().sum() if words.is_cpu else words.sum()) + int(data[whole:].sum())
    return Stamp(StorageWeakRef(tensor.untyped_storage()), layout, version, total)  # type: ignore[no-untyped-call]


def model_digest(model: nn.Module, outside: Iterable[str] = ()) -> str | None:
    """Return the BLAKE3 of all that a model's output in evaluation mode depends on, without the modules `outside`.

    Unlike a fingerprint it covers the bits of every parameter and buffer, the settings of modules, and the source files
    of their classes. None if a weight is parametrized (as by scores) or a module has hooks, which none of these cover.
    """
    model, outside = unwrap(model), tuple(outside)
    for module in model.modules():
        if parametrize.is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
    whole = blake3(torch.__version__.encode())
    sources = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if not inside(canonical(name), outside):
            settings = {key: text for key, value in vars(module).items() if (text := _setting(value)) is not None}
            settings.pop("training", None)
            _add(whole, "module", canonical(name), type(module).__qualname__, json.dumps(settings, sort_keys=True))
            sources.add(_source(type(module)))
    for name, (owner, leaf) in slots(model):
        if not inside(name, outside):
            tensor = owner[leaf]
            _add(whole, "tensor", name, str(tensor.dtype), str(tuple(tensor.shape)))
            whole.update(tensor_digest(tensor, tensor.dtype))
    _add(whole, *sorted(sources))
    return whole.hexdigest()


def _add(whole: blake3, *texts: str) -> None:
    for text in texts:
        whole.update(text.encode() + b"\0")


def _setting(value: Any) -> str | None:
    """Return an attribute of a module as text, or None if it is no setting."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    if isinstance(value, tuple | list):
        parts = [_setting(one) for one in value]
        return None if None in parts else repr(parts)
    if hasattr(value, "to_json_string"):
        return str(value.to_json_string())
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name is not None else None


def _source(cls: type) -> str:
    """Return the BLAKE3 of the file that defines a class, or the class's name if there is none."""
    try:
        return blake3().update_mmap(Path(inspect.getfile(cls))).hexdigest()
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"


WORTH = 1 << 17  # weights that are worth a thread


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_digests(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, bytes]:
    """Return the `tensor_digest` of each, in threads on the CPU."""
    return _of_each(tensors, lambda _, tensor: tensor_digest(tensor, dtype))


def _of_each(tensors: Mapping[str, Tensor], work: Callable[[str, Tensor], Result]) -> dict[str, Result]:
    # the largest first, so that it is not waited for alone
    items = sorted(tensors.items(), key=lambda item: -item[1].numel())
    workers = None if all(tensor.is_cpu for tensor in tensors.values()) and not any_shared(dict(tensors)) else 1
    found = in_order(lambda item: work(*item), items, lambda item: item[1].numel(), WORTH, workers)
    return {name: one for (name, _), one in zip(items, found, strict=True)}


def _body_with_data(model: nn.Module, head: Iterable[str]) -> dict[str, Tensor]:
    tensors = body(model, head)
    for name, tensor in tensors.items():
        if why := unusable(tensor):
            raise BackboneMismatchError(f"the base cannot be compared: {name!r} {why}")
    return tensors


def _body_digest(tensors: Mapping[str, Tensor], digests: Mapping[str, bytes]) -> str:
    whole = blake3()
    for name, tensor in tensors.items():
        shape = ",".join(str(size) for size in tensor.shape)
        whole.update(name.encode() + b"\0" + shape.encode() + b"\0" + digests[name])
    return whole.hexdigest()


def compared_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype in which a model is compared: that of the shortest mantissa among its tensors."""
    present = {tensor.dtype for tensor in tensors}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in present), torch.float32)


def fingerprint(model: nn.Module, *, id: str, revision: str | None = None, head: Iterable[str] = ()) -> Fingerprint:
    """Take the fingerprint of a model's body, without the modules of `head`.

    `id` says where the weights come from, as in "timm/resnet18.a1_in1k", never a path; `revision` is a Hub commit or a
    weights enum of torchvision.

    Example:
        base = fingerprint(model, id="my-network", head="fc")
        print(base.digests["float32"])
    """
    head = (head,) if isinstance(head, str) else tuple(sorted(head))
    return fingerprint_of(_body_with_data(model, head), id, revision, head)


def fingerprint_of(tensors: Mapping[str, Tensor], id: str, revision: str | None, head: tuple[str, ...]) -> Fingerprint:
    """Return the fingerprint of a body that is given as tensors by name; for the other arguments see `fingerprint`."""
    return joined_digests(tensors, all_digests(tensors), id, revision, head)


def all_digests(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, bytes]]:
    """Return the digests of tensors by the dtype that they are cast to, and by name."""
    return {cast: tensor_digests(tensors, getattr(torch, cast)) for cast in CASTS}


def joined_digests(
    tensors: Mapping[str, Tensor],
    each: Mapping[str, Mapping[str, bytes]],
    id: str,
    revision: str | None = None,
    head: tuple[str, ...] = (),
) -> Fingerprint:
    """Return the fingerprint of a body from its tensors, perhaps on the meta device, and their `all_digests`."""
    digests = {cast: _body_digest(tensors, one) for cast, one in each.items()}
    prefixes = {name: b"".join(one[name][:PREFIX] for one in each.values()) for name in tensors}
    return Fingerprint(id, revision, _name(compared_dtype(tensors.values())), head, digests, prefixes)


def same_digest(digest: bytes, expected: Fingerprint, name: str, dtype: torch.dtype) -> bool:
    """Return True if the `tensor_digest` in `dtype` is that of the base's masked tensor `name`."""
    at = CASTS.index(_name(dtype)) * PREFIX
    return digest[:PREFIX] == expected.tensors[name][at : at + PREFIX]


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's body, which may be on the meta device, and the digests of its tensors in its `compared_dtype`.

    Attributes:
        names: every name of each parameter by its first one.
    """

    body: Mapping[str, Tensor]
    digests: Mapping[str, bytes]
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return _body_digest(self.body, self.digests)


# of the last measurement, by model and tensor name: stamp, dtype of the cast, digest
_MEASURED: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Stamp, torch.dtype, bytes]]]
_MEASURED = weakref.WeakKeyDictionary()


def measure_body(model: nn.Module, head: Iterable[str]) -> Measured:
    """Measure a model's body; a tensor with the stamp of the last measurement is not hashed again."""
    tensors = _body_with_data(model, head)
    dtype = compared_dtype(tensors.values())
    known = _MEASURED.setdefault(unwrap(model), {})

    def measure(name: str, tensor: Tensor) -> tuple[Stamp | None, torch.dtype, bytes]:
        now = stamp(tensor)  # before the digest, so that it does not vouch for what is written meanwhile
        if now is not None and name in known and known[name][:2] == (now, dtype):
            return known[name]
        return now, dtype, tensor_digest(tensor, dtype)

    found = _of_each(tensors, measure)
    known |= {name: (now, dtype, digest) for name, (now, dtype, digest) in found.items() if now is not None}
    return Measured(tensors, {name: digest for name, (_, _, digest) in found.items()}, all_names(model))


def has_again(model: nn.Module, counts: Mapping[str, tuple[int, int]]) -> None:
    """Record that tensors have the same bytes again as at an earlier write count: name -> (earlier count, now)."""
    known = _MEASURED.get(unwrap(model), {})
    for name in counts.keys() & known.keys():
        (found, dtype, digest), (earlier, now) = known[name], counts[name]
        if found.version == earlier:
            known[name] = replace(found, version=now), dtype, digest


def check_fingerprint(model: nn.Module, expected: Fingerprint) -> str:
    """Compare a model's body with the fingerprint of an adapter's base, and return the dtype in which they agree.

    If they differ, a BackboneMismatchError says how many masked tensors do, and which is first.
    """
    return check_measured(measure_body(model, expected.head), expected)


def check_measured(found: Measured, expected: Fingerprint) -> str:
    """Compare a measured body with a fingerprint that has the same head; see `check_fingerprint`."""
    dtype, each = compared_dtype(found.body.values()), found.digests
    wanted = expected.digests[_name(dtype)]
    if found.digest == wanted or any(part.digest == wanted for part in _parts_of(found, expected)):
        return _name(dtype)
    masked = sorted(expected.tensors)
    differing = [name for name in masked if name not in each or not same_digest(each[name], expected, name, dtype)]
    if differing:
        what = f"{len(differing)} of {len(masked)} masked tensors differ, first {differing[0]!r}"
    else:
        what = (
            f"all {len(masked)} masked tensors agree, but other parameters or buffers of the body differ, or it lacks "
            f"some, as those of a pooler"
        )
    raise mismatch(expected, what, dtype)


MODULES = 8  # of a body, beyond which only one at a time is left out


def _parts_of(whole: Measured, expected: Fingerprint) -> Iterator[Measured]:
    """Yield a body without one or several of its modules that hold no mask: the base may have had no head or pooler.

    What is left is then compared as a whole, so that nothing is let through. Modules are those of the first two levels.
    """
    modules: dict[str, None] = {}
    for name in whole.body:
        parts = name.split(".")[:-1]
        places = (".".join(parts[:depth]) for depth in (1, 2)[: len(parts)])
        free = (one for one in places if not any(inside(masked, [one]) for masked in expected.tensors))
        modules |= dict.fromkeys(itertools.islice(free, 1))
    for count in range(1, len(modules) + 1 if len(modules) <= MODULES else 2):
        for gone in itertools.combinations(modules, count):
            names = ((name, whole.names.get(name, [name])) for name in whole.body)
            left = {one: name for name, own in names for one in [n for n in own if not inside(n, gone)][:1]}
            left = dict(sorted(left.items()))
            body = {one: whole.body[name] for one, name in left.items()}
            yield Measured(body, {one: whole.digests[name] for one, name in left.items()})


def mismatch(expected: Fingerprint, what: str, dtype: torch.dtype) -> BackboneMismatchError:
    revision = f" at revision {expected.revision}" if expected.revision else ""
    return BackboneMismatchError(
        f"this adapter was made for the weights of {expected.id}{revision}, and the model has others: {what} "
        f"(compared as {_name(dtype)}); load the backbone named there (--backbone); in Python, "
        f"load_mask(…, verify='off') applies it anyway"
    )


MOST = 200  # backbones; the oldest are forgotten


def cache_folder() -> Path:
    """Return the cache folder: $MASKPACK_CACHE, else `maskpack` in the user's cache folder."""
    if own := os.environ.get("MASKPACK_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache") / "maskpack"


def _file() -> Path:
    return cache_folder() / "backbones.json"


def _known() -> dict[str, dict[str, str]]:
    with suppress(OSError, ValueError):
        found = json.loads(_file().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {key: one for key, one in found.items() if isinstance(one, dict) and "reference" in one}
    return {}


def remember_backbone(digest: str, arguments: Mapping[str, Any]) -> None:
    """Write down by which arguments of `load_backbone` a backbone with this digest was loaded, if there is need."""
    found = {name: str(arguments[name]) for name in ("weights", "random_weights") if arguments.get(name) is not None}
    reference = arguments["reference"]
    path, _, function = reference.rpartition(":") if ".py:" in reference else (reference.removeprefix("hf/"), "", "")
    if "weights" in found:
        found["weights"] = str(Path(found["weights"]).resolve())
    if Path(path).exists():
        found["file"] = str(Path(path).resolve())
        reference = f"{found['file']}:{function}" if function else f"hf/{found['file']}"
    if found:  # otherwise the name of the base says all
        known = {key: one for key, one in _known().items() if key != digest}
        known[digest] = {"reference": reference, **found}
        with suppress(OSError, MaskpackError):  # without it no verb does less than it says
            write_file(_file(), json.dumps(dict(list(known.items())[-MOST:]), indent=1) + "\n")


def remembered_backbone(digest: str) -> dict[str, Any] | None:
    """Return the arguments of `load_backbone` for a backbone with this digest, if its files are there.

    Only what the user named before is loaded: an adapter says which weights it needs, never which file.
    """
    found = _known().get(digest)
    if found is None or not all(Path(found[key]).exists() for key in ("file", "weights") if key in found):
        return None
    return {name: found.get(name) for name in ("reference", "weights", "random_weights")}
