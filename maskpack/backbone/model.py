"""Names and tensors of a model, its head, embedding and fingerprint.

An adapter's header is read with the classes of this module, so it imports torch in functions alone.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import BackboneError, UnknownNameError, check_argument, short_repr
from ..mask import PackedMask, masked_weight
from .shards import layout_of, local, put_away, shared

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CASTS = ("float32", "bfloat16", "float16")  # dtypes in which a body is hashed
PREFIX = 2  # bytes of a tensor's digest that are stored, for each cast
STATISTICS = ("running_mean", "running_var")  # of BatchNorm
Pooling = Literal["mean", "cls", "projection", "tokens"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Where a model's embedding is taken: the input of its head, or an encoder's pooled output.

    Attributes:
        module: dotted name of the head; None for an encoder.
        pooling: of an encoder: "mean" or "cls" of the last hidden state, over the tokens of the attention mask;
            "tokens", that state, an embedding for each token; or "projection", the image embedding of a CLIP-like
            vision tower. None where there is a module.
        normalize: divide an encoder's embedding by its Euclidean norm.
    """

    module: str | None = None
    pooling: Pooling | None = None
    normalize: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A linear head, (classes, features): in place of the module that `embedding` names, or behind an encoder.

    `random` is the seed and mask of a masked random head, stored in place of `weight`; with `steps`, (classes,)
    float32, each row of it is a multiple of its step, and stored as whole numbers.
    """

    embedding: Embedding
    weight: Tensor
    bias: Tensor | None = None
    random: RandomWeight | None = None
    steps: Tensor | None = None

    __repr__ = short_repr

    @property
    def module(self) -> str | None:
        """Dotted name of the module that the head replaces; None behind an encoder."""
        return self.embedding.module

    def named_tensors(self, place: str) -> dict[str, Tensor]:
        """Return weight and bias by dotted name; `place` is the name of a head that replaces no module."""
        found = {f"{self.module or place}.weight": self.weight, f"{self.module or place}.bias": self.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identity of a backbone's body, which is the model without the modules of `head`.

    Attributes:
        id, revision: as those of `Backbone`.
        dtype: of the body when the fingerprint was taken, as in "float32".
        digests: hex BLAKE3 of the body by the dtype that it was cast to.
        tensors: 6 bytes by parameter name: 2 each of the digests of the tensor cast to float32, bfloat16, float16.
    """

    id: str
    revision: str | None
    dtype: str
    head: tuple[str, ...]
    digests: Mapping[str, str]
    tensors: Mapping[str, bytes]

    __repr__ = short_repr

    @property
    def digest(self) -> str:
        """Digest of the body in its own dtype."""
        return self.digests[self.dtype]


def _check_module(model: object) -> None:
    from torch import nn

    if not isinstance(model, nn.Module):
        advice = "the model comes before adapters and inputs, as in load_mask(model, ref)"
        if isinstance(model, str):
            advice = f"load one first, as by load_backbone('timm/resnet18').model; {advice}"
        elif isinstance(getattr(model, "model", None), nn.Module):
            advice = "give the module that it holds: its `.model`"
        check_argument("the model", model, nn.Module, "a torch.nn.Module", advice)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, DataParallel and DistributedDataParallel wrappers."""
    from torch import nn

    _check_module(model)
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
            assert inner is not None
            model = inner
        else:
            return model


def canonical(name: str) -> str:
    """Return a dotted name without the `_orig_mod.` of compiled submodules."""
    return name.replace("_orig_mod.", "")


def inside(name: str, modules: Iterable[str]) -> bool:
    """Return True if a dotted name lies in one of the named modules."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def _storage(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that equal views of one storage share; tensors without data have one each."""
    if shared(tensor) or tensor.numel() == 0 or tensor.is_meta or not tensor.data_ptr():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter under each of its canonical names, sorted; of sharded models the shared ones."""
    put_away(unwrap(model))
    found = {canonical(name): p for name, p in unwrap(model).named_parameters(remove_duplicate=False)}
    return dict(sorted(found.items()))


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return every buffer under the first of its canonical names."""
    return {canonical(name): buffer for name, buffer in unwrap(model).named_buffers()}


def slots(model: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Tensor], str]]]:
    """Yield the canonical name of each parameter and buffer, and the dictionary and key where the model keeps it."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for owner in (module._parameters, module._buffers):
            for leaf, tensor in owner.items():
                if tensor is not None:
                    yield canonical(f"{prefix}.{leaf}" if prefix else leaf), (owner, leaf)


def aliases(model: nn.Module) -> dict[str, str]:
    """Map every parameter name to the first, in sorted order, of the names of the same tensor."""
    first: dict[tuple[object, ...], str] = {}
    return {name: first.setdefault(_storage(p), name) for name, p in named_parameters(model).items()}


def all_names(model: nn.Module) -> dict[str, list[str]]:
    """Return every name of each parameter by its first one; a tied parameter has several."""
    found: dict[str, list[str]] = {}
    for name, first in aliases(model).items():
        found.setdefault(first, []).append(name)
    return found


def body(model: nn.Module, head: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the floating-point parameters and persistent buffers outside `head`, sorted; of tied ones the first."""
    return body_of({canonical(name): one for name, one in unwrap(model).state_dict(keep_vars=True).items()}, head)


def body_of(state: Mapping[str, Any], head: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the `body` of a state dict with canonical names."""
    from torch import Tensor

    head = tuple(head)
    found: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    for name, tensor in sorted(state.items()):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not inside(name, head):
            found.setdefault(_storage(tensor), (name, tensor.detach()))
    return dict(found.values())


def tied_outputs(model: nn.Module, learning: Iterable[str] = ()) -> list[str]:
    """Return the linear layers whose tensors are all other modules' too, and an embedding's, as in language models.

    They are left out of the body, which has their tensors under other names: those of the model without such a layer.
    """
    from torch import nn

    modules, names = dict(unwrap(model).named_modules(remove_duplicate=False)), dict[int, set[str]]()
    for raw, module in modules.items():
        for one in module._parameters.values():
            names.setdefault(id(one), set()).add(raw)
    found = []
    for raw, module in modules.items():
        own = [names[id(one)] for one in module._parameters.values() if one is not None]
        embedded = any(isinstance(modules[other], nn.Embedding) for others in own for other in others)
        if isinstance(module, nn.Linear) and embedded and all(len(others) > 1 for others in own):
            found.append(canonical(raw))
    return [one for one in found if not any(inside(name, [one]) for name in learning)]


def unusable(tensor: Tensor) -> str | None:
    """Return why a tensor's values cannot be read and changed in place, and what to do; None if they can."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if tensor.is_meta:
        return (
            "is on the meta device and has no data; load the weights first, or weights and mask together by "
            "load_masked; where accelerate offloads weights, call load_mask before it does"
        )
    wrapped: bool = is_traceable_wrapper_subclass(local(tensor))
    layout = layout_of(tensor)
    if wrapped or layout or not tensor.is_floating_point():
        kind = layout or (f"a {type(local(tensor)).__name__}" if wrapped else f"of {tensor.dtype}")
        return f"is {kind} and cannot be masked; load float weights, apply the mask, then quantise or shard"
    return None


def same_size_int(tensor: Tensor) -> Tensor:
    """View a floating-point tensor as integers of the same size, to copy and compare bits."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])


def exact_cast(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return a tensor in another dtype, or None where that changes its values."""
    cast = tensor.to(dtype)
    same = tensor.dtype == dtype or same_size_int(cast.to(tensor.dtype)).equal(same_size_int(tensor))
    return cast if same else None


def source_of(model: nn.Module) -> tuple[str, str | None]:
    """Return where a model says that its weights come from, never a path, and the revision; its class if it does not.

    Models of timm say so, and those of transformers and diffusers.
    """
    model = unwrap(model)
    stated: Any = getattr(model, "pretrained_cfg", None) or {}
    if stated.get("architecture"):
        return f"timm/{'.'.join(filter(None, (stated['architecture'], stated.get('tag'))))}", None
    config: Any = getattr(model, "config", None)
    name = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return type(model).__name__, None
    if Path(name).exists():  # a folder is named by its own name
        return f"hf/{Path(name).resolve().name}", None
    return f"hf/{name}", getattr(config, "_commit_hash", None)


def _stated_classifier(model: nn.Module) -> str | None:
    stated: Any = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(stated, tuple | list):
        raise BackboneError(f"the model has {len(stated)} heads ({', '.join(stated)}); choose one with head=NAME")
    if stated:
        return str(stated) if stated in dict(model.named_modules()) else None
    children = dict(model.named_children())
    return next((name for name in ("fc", "classifier", "heads", "head") if name in children), None)


def find_head(model: nn.Module, name: str | None = None) -> str | None:
    """Return the dotted name of the head, the linear layer that gives the logits; None if there is none.

    It is the last linear layer of the module `name`; default: of timm's or torchvision's classifier, else of all.
    """
    from torch import nn

    model = unwrap(model)
    modules = dict(model.named_modules())
    if name is not None and name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
        raise UnknownNameError(f"the model has no module {name!r} to be its head; nearest: {', '.join(near) or 'none'}")
    start = name or _stated_classifier(model) or ""
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear) and (not start or inside(n, [start]))]
    if linear:
        return str(linear[-1])
    if start and isinstance(modules[start], nn.Identity):
        return start
    if name is not None:
        raise BackboneError(
            f"a head must be linear, and {name!r} is a {type(modules[name]).__name__} without linear layer"
        )
    return None


def swap_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` at the dotted `name` and return the one that was there."""
    parent, _, leaf = name.rpartition(".")
    owner = unwrap(model).get_submodule(parent)
    old = owner._modules[leaf]
    assert old is not None
    owner._modules[leaf] = module
    return old


BLOCK = 1 << 16  # weights per hash, which bounds the memory beside the result
MAX_WEIGHTS = 1 << 27
MAX_SEED = (1 << 32) - 1
KINDS = ("kaiming", "signed-constant")
RANDOM = "random:"  # of the revision of a random base


def _hashed(label: str, shape: tuple[int, ...], value: Callable[[Tensor], Tensor]) -> Tensor:
    """Return float32 values of odd numbers from 1 - 2**24 to 2**24 - 1, float64, that follow from the label."""
    import torch

    whole = torch.empty(math.prod(shape))
    for block, part in enumerate(torch.split(whole, BLOCK)):
        digest = hashlib.shake_128(f"{label} {block}".encode()).digest(4 * len(part))
        words = torch.frombuffer(bytearray(digest), dtype=torch.int32) >> 8 & 0xFFFFFF
        part.copy_(value((2 * words + 1 - (1 << 24)).to(torch.float64)))
    return whole.reshape(shape)


def random_weight(seed: int, classes: int, features: int) -> Tensor:
    """Return a random head (docs/format.md section 4.1), (classes, features) float32 on the CPU.

    Values are uniform between -1 / sqrt(features) and 1 / sqrt(features), as those of a new `nn.Linear`; none is 0.
    """
    return _hashed(f"maskpack head {seed}", (classes, features), lambda odd: odd / (1 << 24) / math.sqrt(features))


@dataclass(frozen=True, slots=True, eq=False)
class RandomWeight:
    """Stored form of a masked random head: seed, and mask of shape (classes, features), with alpha if it is scaled."""

    seed: int
    mask: PackedMask

    def dense(self) -> Tensor:
        """Return the masked weight, (classes, features) float32 on the CPU."""
        import torch

        classes, features = self.mask.shape
        alpha = None if self.mask.alpha is None else torch.tensor(self.mask.alpha, dtype=torch.float32)
        return masked_weight(random_weight(self.seed, classes, features), self.mask.tensor(), alpha)


def parse_random(text: str) -> tuple[str, int]:
    """Return kind and seed of "KIND:SEED", or "" and the seed of "SEED", which the model's library draws from."""
    kind, _, seed = text.rpartition(":")
    if kind not in ("", *KINDS) or text.startswith(":") or not seed.isdecimal() or int(seed) > MAX_SEED:
        raise BackboneError(
            f"random weights must be SEED or KIND:SEED, from 0 to {MAX_SEED} and of {', '.join(KINDS)}; got {text!r}"
        )
    return kind, int(seed)


def random_values(name: str, shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """Return one weight, float32: uniform of standard deviation d = sqrt(2 / fan-in), or d with random signs.

    The fan-in is the number of weights of one output (He et al., 2015, and Ramanujan et al., 2020).
    """
    fan_in = math.prod(shape[1:])

    def value(odd: Tensor) -> Tensor:
        if kind == "kaiming":
            return odd / (1 << 24) * math.sqrt(6 / fan_in)
        return odd.sign() * math.sqrt(2 / fan_in)

    return _hashed(f"maskpack weight {seed} {name}", shape, value)
