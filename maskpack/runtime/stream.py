"""load_masked: base and mask together, one tensor at a time, onto a model that has no weights yet."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from ..adapter.chain import base_of_chain, merged
from ..adapter.content import Parts
from ..adapter.read import Adapter
from ..backbone import fingerprint
from ..backbone.load import COUNTER, fit_head, sources
from ..backbone.model import aliases, body, canonical, named_parameters, slots, unwrap
from ..backbone.shards import any_shared
from ..errors import StateError, check_argument
from ..hub.pull import PullOptions
from ..mask import MaskSet
from ..safetensors_io import TensorFile
from .apply import Model, applied, apply_parts, check_masks, forget
from .load import (
    HeadChoice,
    Mode,
    Reference,
    Verify,
    check_choices,
    check_mode,
    check_one_set,
    check_result,
    checked,
    loaded_parts,
    read_chain,
    removing,
    with_earlier,
)
from .place import Place, find_place, module_of, view


def load_masked(
    model: Model,
    weights: str | os.PathLike[str],
    ref: Reference | Adapter | Sequence[Reference | Adapter],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    verify: Verify = "strict",
    head: HeadChoice = "replace",
    mode: Mode = "target",
    **options: Unpack[PullOptions],
) -> Model:
    """Load a base's weights and an adapter into a model together, and return the same model; there is no undo.

    A tensor of the file is read, compared with the adapter's digest, moved, masked and put into the model, then the
    next. So it takes the memory of the masked model, of the adapter, and of a few copies of the largest tensor. The
    model gets the bits that loading the weights, `load_mask(…, restorable=False)` and `model.to(device, dtype)` give.

    If it fails before it reads the first tensor, the model keeps its weights (it may have another head, with as many
    classes as the file's). If it fails later, every parameter and saved buffer of the model is on the meta device: it
    has no weights, rather than some. An interruption at the very end leaves the whole adapter on it. If it is
    interrupted twice, load it once more.

    Args:
        model: may be on the meta device, as made under `with torch.device("meta")`; its parameters become new ones.
        weights: of the base, which must fit the model strictly: a safetensors file, the index of one in several files,
            or a folder of either.
        device: where tensors go; default: where the model has them, the CPU for those on the meta device.
        dtype: of floating-point tensors in the end; default: the model's. Digests are compared and masks applied in
            the model's dtype, before that cast.
        ref, verify, head, mode and others: as of `load_mask`; with "strict" the first masked tensor that is not the
            base's is the end. For a patch on the Hub the weights are read and hashed once more before, to find out
            which earlier ones it needs.

    Example:
        with torch.device("meta"):
            empty = Network()
        load_masked(empty, "base.safetensors", "./my-mask")
    """
    check_choices(verify, head, mode)
    whole = unwrap(model)
    known = "a safetensors file or a folder"
    check_argument("weights", weights, str | os.PathLike, known, "they come before the adapter")
    chain, several = read_chain(ref, options)
    adapter = chain[-1]
    check_one_set(adapter)
    if applied(whole) is not None:
        raise StateError("this model has a mask already; load_masked is for a model without one: make it anew")
    if any_shared(named_parameters(whole)):
        raise StateError(
            "this model is sharded, and load_masked gives a model whole tensors; call it before fully_shard, or load "
            "the weights as always and then load_mask(model, ref)"
        )
    if any(one.is_meta for one in whole.parameters()) and callable(tie := getattr(whole, "tie_weights", None)):
        tie()  # of transformers: parameters that were put on the meta device one by one are tied no more
    place = find_place(whole, adapter.base, adapter.shapes())
    base = _Base(Path(weights), whole, adapter.base.head, place)
    # parameters that take no memory
    inner = view(whole, place)
    empty = {name: torch.zeros((), dtype=p.dtype).expand(p.shape) for name, p in named_parameters(inner).items()}
    of_body = {name: _on_meta(tensor) for name, tensor in body(inner, adapter.base.head).items()}
    compared = fingerprint.compared_dtype(of_body.values())
    if not several and verify != "off":
        measured = cache(lambda: _measured(base, of_body, compared))
        chain = with_earlier(adapter, lambda one: fingerprint.check_measured(measured(), one.base), options)
    check_mode(chain, mode)
    parts = loaded_parts(adapter, head, mode) if len(chain) == 1 else merged(chain, base)
    shapes, expected = parts.masks.shapes, base_of_chain(chain)
    check_masks(module_of(empty), shapes)
    digests, made = dict[str, bytes](), dict[str, bytes]()
    try:
        base.clear()
        for names in base.names:
            # it may be masked, or be of the body, under any of its names
            masked, digested = (base.own(names, known) for known in (shapes, of_body))
            if digested is not None and verify != "off":
                digests[digested] = fingerprint.tensor_digest(base[digested], compared)
                if verify == "strict" and masked is not None:
                    if not fingerprint.same_digest(digests[digested], expected, masked, compared):
                        what = f"the masked tensor {masked!r} differs, and nothing behind it was read"
                        raise fingerprint.mismatch(expected, what, compared)
            tensor = base.tensor(names[0]).to(device or base.devices[names[0]], copy=True)
            own = {}
            if masked is not None:
                alone = len(chain) == 1
                own[masked] = adapter.mask_on(masked, base, tensor) if alone else parts.masks[masked]
            base.let_go()
            if masked is not None:
                kept = MaskSet(own if mode == "target" else dict(removing(own.items())))
                values = {name: parts.values[name] for name in own if name in parts.values}
                apply_parts(module_of({masked: tensor}), Parts(kept, values=values), restorable=False)
                if len(chain) > 1 and digested in digests:
                    made[digested] = fingerprint.tensor_digest(tensor, compared)
            base.put(names, _cast(tensor, dtype))
        found = fingerprint.Measured(of_body, digests)
        checked(verify, lambda: fingerprint.check_measured(found, expected), stacklevel=3)
        if len(chain) > 1:
            for name, one in parts.statistics.items():
                made[name] = fingerprint.tensor_digest(one.to(of_body[name].dtype), compared)
            end = fingerprint.Measured(of_body, digests | made)
            checked(verify, lambda: check_result(end, adapter), stacklevel=3)
        for name, buffer in base.unsaved.items():
            base.put([name], _cast(buffer.to(device or buffer.device), dtype))
        rest = replace(parts.resolved(base), masks=MaskSet({}), values={})  # of norms before they were cast
        apply_parts(model, rest, mask_id=adapter.mask_id, restorable=False, place=place)
    except BaseException:
        record = applied(whole)
        if record is None or not record.complete:  # else it has the whole adapter
            forget(whole)
            base.clear()
        raise
    return model


class _Base(Mapping[str, Tensor]):
    """The base's weights by the adapter's names, in the model's dtypes, read when asked for; the last one is kept.

    Attributes:
        names: of each tensor of the model that a file holds: all of its names, sorted.
        devices: where the model has them, the CPU in the place of the meta device, by name.
        unsaved: buffers that files do not hold, by name.
    """

    def __init__(self, path: Path, model: nn.Module, heads: Iterable[str], place: Place):
        self._files = TensorFile(path)
        for head in {place.moved(head) for head in heads} & dict(model.named_modules()).keys():
            fit_head(model, head, self._files.shapes)
        self._sources = sources(model, self._files.shapes, path)
        self._places, self._place = dict(slots(model)), place
        own = {name: self._places[name][0][self._places[name][1]] for name in self._sources}
        self.devices = {name: torch.device("cpu") if t.is_meta else t.device for name, t in own.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in own.items()}
        first, names = aliases(model), dict[str, list[str]]()
        for name in sorted(own):
            names.setdefault(first.get(name, name), []).append(name)
        self.names = list(names.values())
        self.unsaved = {
            name: torch.zeros(b.shape, dtype=b.dtype) if b.is_meta and name.endswith(COUNTER) else b
            for name, b in ((canonical(n), b) for n, b in model.named_buffers())
            if name not in own
        }
        self.unsaved |= _computed(model, [name for name, buffer in self.unsaved.items() if buffer.is_meta])
        if lost := [name for name, buffer in self.unsaved.items() if buffer.is_meta]:
            raise StateError(
                f"the model has {len(lost)} buffers on the meta device that no file of weights holds, first "
                f"{lost[0]!r}; give them values before, or put parameters alone there, as "
                "accelerate.init_empty_weights() does"
            )
        self._last: tuple[str, Tensor] | None = None

    def put(self, names: Iterable[str], tensor: Tensor) -> None:
        """Make a tensor the model's of these names: a new parameter, or a buffer."""
        parameter: nn.Parameter | None = None
        for name in names:
            owner, leaf = self._places[name]
            old = owner[leaf]
            if isinstance(old, nn.Parameter):  # tied ones stay one
                parameter = nn.Parameter(tensor, old.requires_grad) if parameter is None else parameter
            owner[leaf] = tensor if parameter is None else parameter

    def clear(self) -> None:
        """Put all that the file holds on the meta device, and buffers that it does not hold as they were."""
        for names in self.names:
            owner, leaf = self._places[names[0]]
            self.put(names, _on_meta(owner[leaf]))
        for name, buffer in self.unsaved.items():
            self.put([name], buffer)

    def own(self, names: Iterable[str], known: Mapping[str, object]) -> str | None:
        """Return the first of the adapter's names of a tensor that is known; None if none is."""
        return next((own for own in map(self._place.back, names) if own in known), None)

    def let_go(self) -> None:
        self._last = None

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by the model's name."""
        source = self._sources[name]
        if self._last is None or self._last[0] != source:
            self.let_go()  # before the next is read
            self._last = source, self._files[source].to(self._dtypes[name])
        return self._last[1]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensor(self._place.moved(name))

    def __iter__(self) -> Iterator[str]:
        return (own for own in map(self._place.back, self._sources) if own is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _measured(base: _Base, of_body: Mapping[str, Tensor], dtype: torch.dtype) -> fingerprint.Measured:
    names = (base.own(names, of_body) for names in base.names)
    return fingerprint.Measured(of_body, {n: fingerprint.tensor_digest(base[n], dtype) for n in names if n is not None})


@torch.no_grad()
def _computed(model: nn.Module, lost: Iterable[str]) -> dict[str, Tensor]:
    """Return buffers that a model of transformers computes anew from its config, as rotary frequencies, by name.

    Its `_init_weights` writes them. A module that has parameters with data is left alone.
    """
    modules = {canonical(name): one for name, one in model.named_modules(remove_duplicate=False)}
    places = {name: name.rpartition(".") for name in lost}
    found = dict[str, Tensor]()
    for place in dict.fromkeys(place for place, _, _ in places.values()):
        module, parts = modules[place], place.split(".")
        above = (modules[".".join(parts[:count])] for count in range(len(parts), -1, -1))
        init = next((one._init_weights for one in above if hasattr(one, "_init_weights")), None)
        if init is None or not all(one is None or one.is_meta for one in module._parameters.values()):
            continue
        mine = {name: leaf for name, (own, _, leaf) in places.items() if own == place}
        before = {name: module._buffers[leaf] for name, leaf in mine.items()}
        for name, leaf in mine.items():
            old = before[name]
            assert old is not None
            unset = math.nan if old.is_floating_point() else torch.iinfo(old.dtype).min
            module._buffers[leaf] = found[name] = torch.full(old.shape, unset, dtype=old.dtype)
        with torch.random.fork_rng():
            init(module)
        for name, leaf in mine.items():
            value, module._buffers[leaf] = found[name], before[name]
            if bool((value.isnan() if value.is_floating_point() else value == torch.iinfo(value.dtype).min).any()):
                del found[name]
    return found


def _on_meta(tensor: Tensor) -> Tensor:
    # not empty_like, which may be Python here and then imports a lot
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
