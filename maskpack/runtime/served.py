"""Adapters on a model that an inference server holds: its memory, seen as the tensors of the checkpoint.

A server fuses, renames and slices what it loads. Its own loader says where each part of the checkpoint went: it runs
once more, and its copies are looked at instead of done. What they would write is views of the server's memory, and
these are a module like any other, on which a `MaskBank` switches.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from ..adapter.chain import base_of_chain, merged
from ..adapter.content import Parts
from ..adapter.read import Adapter
from ..adapter.values import Steps, at_zeros
from ..backbone.fingerprint import Measured, check_measured, tensor_digest
from ..backbone.model import Fingerprint, all_names, body, named_parameters, same_size_int, unwrap
from ..errors import AdapterError, BackboneMismatchError, ConfigError, StateError
from ..hub.pull import PullOptions
from ..mask import MaskSet, PackedMask
from .apply import at_places, check_masks, places
from .bank import MaskBank
from .load import Reference, check_one_set, load_adapter, with_earlier
from .place import find_place, module_of, view

Checkpoint = Callable[[], Iterable[tuple[str, Tensor]]]  # gives name and tensor of each, anew with each call
Part = tuple[tuple[int, int], ...]  # begin and end in each dimension
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class Piece(NamedTuple):
    """A part of a checkpoint's tensor, and the server's memory that holds it."""

    part: Part
    memory: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """Return this part of a tensor of the checkpoint's shape."""
        return whole[tuple(slice(*one) for one in self.part)]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """An adapter that a server can switch to: what it changes in this process's memory, decoded.

    Attributes:
        pinned: the reference that always means these bytes. digest: of the adapter's file.
        size: bytes of that file, with those of earlier patches that it stands on.
        changed: weights that it changes here.
    """

    pinned: str
    digest: str
    size: int
    changed: int
    parts: Parts = field(repr=False)


class Served:
    """A server's model as its checkpoint, with the adapters that were prepared; it computes with one, or as the base.

    `switch` leaves the base or one whole adapter, whatever happens. It must not be called while the model computes;
    `prepare` may be.

    Args:
        model: has `load_weights`, which takes names and tensors, as models of vLLM and SGLang.
        checkpoint: gives the tensors that it was loaded from. dtype: in which it is served.
        tied: the head is the embedding. keep: how many adapters stay prepared.
        everyone: value -> the values of all processes that hold a part of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        *,
        tied: bool = False,
        keep: int = 8,
        everyone: Callable[[Any], Sequence[Any]] = lambda value: [value],
    ):
        if keep < 1:
            raise ConfigError(f"keep must be 1 or more, got {keep}")
        self._checkpoint, self._keep, self._everyone = checkpoint, keep, everyone
        self._pieces, shapes, self._digests = _traced(model, checkpoint, dtype)
        self._check_complete(shapes)
        # parameters of the checkpoint's shapes that take no memory
        empty = {
            name: nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), False) for name, shape in shapes.items()
        }
        self._names = {id(tensor): name for name, tensor in empty.items()}
        if tied:  # a checkpoint has it once
            empty[HEAD] = next(tensor for name, tensor in empty.items() if name.endswith(EMBEDDING))
        self._whole = module_of(empty)
        own = {_key(name, i): piece.memory for name, found in self._pieces.items() for i, piece in enumerate(found)}
        self._bank = MaskBank(module_of(own))
        self._prepared: dict[str, Prepared] = {}

    @property
    def active(self) -> Prepared | None:
        """The adapter that the model computes with; None: the base."""
        name = self._bank.active
        return None if name is None else self._prepared[name]

    def prepare(self, ref: Reference, **options: Unpack[PullOptions]) -> Prepared:
        """Read an adapter, compare its base with what is served, and decode it; the model computes as before.

        Where a patch on the Hub stands on one of an earlier commit, the whole chain is.
        """
        adapter = load_adapter(ref, **options)
        if adapter.digest not in self._prepared:
            self._prepared[adapter.digest] = self._decoded(
                with_earlier(adapter, lambda one: self._located(one.base, one.shapes()), options)
            )
        return self._prepared[adapter.digest]

    def switch(self, digest: str | None) -> None:
        """Compute with a prepared adapter from now on, or with None as the base.

        If any of the processes fails, all of them compute as the base, and all raise.
        """
        error: BaseException | None = None
        try:
            if digest is None:
                self._bank.disable()
            elif digest not in self._prepared:
                raise StateError(f"no adapter with the digest {digest} is prepared here; prepare it first")
            else:
                if digest not in self._bank:
                    self._bank.add(self._prepared[digest].parts, digest)
                self._bank.use(digest)
                self._make_room(digest)
        except BaseException as failed:
            error = failed
        others = [one for one in self._everyone(None if error is None else str(error)) if one is not None]
        if others:
            self._bank.disable()
            if error is None:
                raise StateError(f"another process of this server failed, so that all have the base: {others[0]}")
            raise error

    def _make_room(self, newest: str) -> None:
        for digest in [*self._prepared][: max(len(self._prepared) - self._keep, 0)]:
            if digest != newest:
                if digest in self._bank:
                    self._bank.remove(digest)
                del self._prepared[digest]

    def _check_complete(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Find out which tensors have a place in the server's memory, all processes together."""
        mine = {name: [piece.part for piece in found] for name, found in self._pieces.items()}
        parts: dict[str, set[Part]] = {name: set() for name in shapes}
        for found in self._everyone(mine):
            for name, some in found.items():
                parts[name] |= set(some)
        held = {n: sum(math.prod(end - begin for begin, end in part) for part in some) for n, some in parts.items()}
        self._lost = {name for name, shape in shapes.items() if held[name] < math.prod(shape)}

    def _located(self, base: Fingerprint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Return the checkpoint's names by an adapter's, whose base must be what is served."""
        inner = view(self._whole, find_place(self._whole, base, shapes))
        check_masks(inner, shapes)
        own = {name: self._names[id(tensor)] for name, tensor in named_parameters(inner).items()}
        tensors = body(inner, base.head)
        check_measured(Measured(tensors, {name: self._digests[own[name]] for name in tensors}, all_names(inner)), base)
        return own

    def _decoded(self, chain: Sequence[Adapter]) -> Prepared:
        adapter, current = chain[-1], dict[str, Tensor]()
        check_one_set(adapter)
        shapes = {name: shape for one in chain for name, shape in one.shapes().items()}
        own = self._located(base_of_chain(chain), shapes)
        parts = adapter.parts(base=current, stream=True) if len(chain) == 1 else merged(chain, current)
        norms = {f"{name}.{leaf}" for name in parts.norms for leaf in ("weight", "bias")}
        touched = {*parts.masks, *parts.parameters, *(name for name in norms if name in own)}
        if parts.head is not None or parts.statistics:
            raise AdapterError(f"{adapter.path} has a head or statistics, for which a server has no place")
        if unknown := sorted(name for name in touched if name not in own or own[name] in self._lost):
            raise BackboneMismatchError(
                f"the server does not hold {unknown[0]!r} as the checkpoint has it, as where weights are quantised, "
                f"transposed or computed anew after loading; serve the model as it is in the checkpoint"
            )
        masks, values, dense, base = dict[str, PackedMask](), dict[str, Tensor](), dict[str, Tensor](), {}
        wanted: dict[str, list[str]] = {}
        for name in touched:
            wanted.setdefault(own[name], []).append(name)
        for stored, tensor in self._checkpoint():
            for name in wanted.get(stored, ()):
                if name in norms:
                    base[name] = tensor
                if name in parts.masks:
                    current.clear()
                    current[name] = tensor
                    mask, value = parts.masks[name], parts.values.get(name)
                    value = value.values(at_zeros(tensor, mask)) if isinstance(value, Steps) else value
                    for i, piece in enumerate(self._pieces[stored]):
                        key, whole = _key(stored, i), piece.part == tuple((0, size) for size in mask.shape)
                        own_mask = mask if whole else mask.part(piece.of)
                        # with the places of its zeros, so that a switch need not search them
                        at = places(own_mask.bits, piece.memory.device) if at_places(own_mask) else None
                        masks[key] = replace(own_mask, zeros=at)
                        if value is not None:
                            values[key] = value if whole else mask.values_of_part(value, piece.of)
        for name, tensor in replace(parts, masks=MaskSet({}), values={}).resolved(base).parameters.items():
            for i, piece in enumerate(self._pieces[own[name]]):
                dense[_key(own[name], i)] = piece.of(tensor)
        changed = sum(len(mask.bits) - mask.kept if at_places(mask) else len(mask.bits) for mask in masks.values())
        changed += sum(tensor.numel() for tensor in dense.values())
        own_parts = Parts(MaskSet(masks), parameters=dense, values=values)
        return Prepared(adapter.pinned, adapter.digest, sum(one.size for one in chain), changed, own_parts)


def _key(name: str, index: int) -> str:
    """Return a name without dots: the bank's model is one module, which is gone through in each switch."""
    return f"{name}.{index}".replace(".", "/")


@contextmanager
def _looked_at(take: Callable[[Tensor, Tensor], bool]) -> Iterator[None]:
    """Intercept every `Tensor.copy_` within the context; a copy that `take` accepts is not made."""
    own = Tensor.copy_

    def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        return target if take(target, source) else own(target, source, non_blocking)

    Tensor.copy_ = copy_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.copy_ = own  # type: ignore[method-assign]


def _traced(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[dict[str, list[Piece]], dict[str, tuple[int, ...]], dict[str, bytes]]:
    """Return by checkpoint name the pieces that this process has, and of all tensors shapes and digests as served.

    Raises:
        StateError: if the server has other weights than the checkpoint.
    """
    pieces, shapes, digests = dict[str, list[Piece]](), dict[str, tuple[int, ...]](), dict[str, bytes]()
    held = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    given: list[tuple[str, Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in checkpoint():
            given[:] = [(name, tensor)]
            if tensor.is_floating_point():
                shapes[name], digests[name] = tuple(tensor.shape), tensor_digest(tensor, dtype)
                pieces[name] = []
            yield name, tensor
        given.clear()

    def take(target: Tensor, source: Tensor) -> bool:
        if not given or source.untyped_storage().data_ptr() != given[0][1].untyped_storage().data_ptr():
            return False
        name, tensor = given[0]
        part = _place(source, tensor)
        if name not in pieces or part is None or target.shape != source.shape or target.dtype != dtype:
            return False
        if target.untyped_storage().data_ptr() not in held:
            return False
        if not torch.equal(same_size_int(target.detach()), same_size_int(source.to(target))):
            raise StateError(
                f"the server has other weights than its checkpoint, first {name!r}: something wrote them since, or "
                f"they were made up (--load-format dummy); start the server anew"
            )
        pieces[name].append(Piece(part, target.data))  # with a count of writes of its own
        return True

    with _looked_at(take):
        unwrap(model).load_weights(tensors())  # type: ignore[operator]
    return pieces, shapes, digests


def _place(part: Tensor, whole: Tensor) -> Part | None:
    """Return which part of a tensor a view of it is, or None if it is no block of it."""
    if part.dim() != whole.dim() or part.stride() != whole.stride() or not whole.is_contiguous():
        return None
    offset, found = int(part.storage_offset() - whole.storage_offset()), []
    for stride, size in zip(whole.stride(), part.shape, strict=True):
        begin, offset = divmod(offset, stride)
        found.append((begin, begin + size))
    return tuple(found)
