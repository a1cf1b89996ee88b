"""A backbone: names and tensors of its body, its head, and what of it is an embedding.

torch is imported where modules and tensors are looked at: what an adapter says of its base is read without it.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import BackboneError, UnknownNameError
from ..mask import PackedMask, masked_weight

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK = 1 << 16  # weights that one hash stands for, so that memory beside the result is bounded
MAX_WEIGHTS = 1 << 27
MAX_SEED = (1 << 32) - 1


def random_weight(seed: int, classes: int, features: int) -> Tensor:
    """Return the values that a seed stands for (docs/format.md section 4.1), (classes, features) float32 on the CPU.

    They are uniform between -1 / sqrt(features) and 1 / sqrt(features), as those of a new `nn.Linear`; no value is 0.
    """
    import torch

    whole = torch.empty(classes * features)
    for block, part in enumerate(torch.split(whole, BLOCK)):
        words = random_words(f"maskpack head {seed} {block}", len(part))
        # exact up to the last division: 24 bits and a half
        part.copy_((2 * words + 1 - (1 << 24)).to(torch.float64) / (1 << 24) / math.sqrt(features))
    return whole.reshape(classes, features)


def random_words(label: str, count: int) -> Tensor:
    """Return `count` numbers from 0 to 2**24 - 1, int32: the upper three bytes of the words of SHAKE-128 of a text."""
    import torch

    words = hashlib.shake_128(label.encode()).digest(4 * count)
    return torch.frombuffer(bytearray(words), dtype=torch.int32) >> 8 & 0xFFFFFF


@dataclass(frozen=True, slots=True, eq=False)
class RandomWeight:
    """What a masked head is stored as.

    Attributes:
        seed: 0 to 2**32 - 1.
        mask: (classes, features), with alpha where the scale is on.
    """

    seed: int
    mask: PackedMask

    def dense(self) -> Tensor:
        """Return the masked weight, (classes, features) float32 on the CPU."""
        import torch

        classes, features = self.mask.shape
        alpha = None if self.mask.alpha is None else torch.tensor(self.mask.alpha, dtype=torch.float32)
        return masked_weight(random_weight(self.seed, classes, features), self.mask.tensor(), alpha)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, DataParallel and DistributedDataParallel wrappers."""
    from torch import nn

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
    """Tell whether a dotted name lies in one of the named modules."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def _storage(tensor: Tensor) -> tuple[object, ...]:
    """Key that equal views of one storage share; tensors without data are told apart by identity."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter under each of its canonical names, sorted."""
    found = {canonical(name): p for name, p in unwrap(model).named_parameters(remove_duplicate=False)}
    return dict(sorted(found.items()))


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return every buffer by its canonical name."""
    return {canonical(name): buffer for name, buffer in unwrap(model).named_buffers()}


def slots(model: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Tensor], str]]]:
    """Yield where a model keeps each parameter and buffer: canonical name, and a dictionary with its key there."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for owner in (module._parameters, module._buffers):
            for leaf, tensor in owner.items():
                if tensor is not None:
                    yield canonical(f"{prefix}.{leaf}" if prefix else leaf), (owner, leaf)


def aliases(model: nn.Module) -> dict[str, str]:
    """Map every parameter name to the first, in sorted order, of the names of the same tensor."""
    first: dict[tuple[object, ...], str] = {}
    return {name: first.setdefault(_storage(p), name) for name, p in named_parameters(model).items()}


def body(model: nn.Module, head: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the floating-point parameters and persistent buffers outside `head`, sorted, ties once."""
    from torch import Tensor

    head = tuple(head)
    found: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    state = unwrap(model).state_dict(keep_vars=True)
    for name, tensor in sorted((canonical(name), tensor) for name, tensor in state.items()):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or inside(name, head):
            continue
        if _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            found[name] = tensor.detach()
    return found


def same_size_int(tensor: Tensor) -> Tensor:
    """View a floating-point tensor as integers of the same size, so that copies and comparisons are of bits."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])


Pooling = Literal["mean", "cls", "projection"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "projection")


@dataclass(frozen=True, slots=True)
class Embedding:
    """Where a model's embedding is taken: the input of its head, or an encoder's pooled output.

    Attributes:
        module: dotted name of the head; None for an encoder.
        pooling: of an encoder: "mean" or "cls" of the last hidden state, over the tokens of the attention mask, or
            "projection", the image embedding of a CLIP-like vision tower. None where there is a module.
        normalize: divide an encoder's embedding by its Euclidean norm.
    """

    module: str | None = None
    pooling: Pooling | None = None
    normalize: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A linear head: in place of the module that `embedding` names, or behind an encoder.

    Attributes:
        embedding: its input.
        weight: (classes, features). bias: (classes,) or None.
        random: seed and mask of a masked random head, stored in place of `weight`; None stores the weight.
    """

    embedding: Embedding
    weight: Tensor
    bias: Tensor | None = None
    random: RandomWeight | None = None

    @property
    def module(self) -> str | None:
        """Dotted name of the module that the head replaces; None behind an encoder."""
        return self.embedding.module


def _stated_classifier(model: nn.Module) -> str | None:
    """The classifier that timm states, or the name that torchvision's families use."""
    stated: Any = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(stated, tuple | list):
        raise BackboneError(f"the model has {len(stated)} heads ({', '.join(stated)}); choose one with head=NAME")
    if stated:
        return str(stated) if stated in dict(model.named_modules()) else None
    children = dict(model.named_children())
    return next((name for name in ("fc", "classifier", "heads", "head") if name in children), None)


def find_head(model: nn.Module, name: str | None = None) -> str | None:
    """Return the dotted name of the head: the linear layer that gives the logits, or None if there is none.

    Args:
        name: the module that the user names; else timm's or torchvision's classifier, else the last linear layer.

    Raises:
        UnknownNameError: if `name` is not a module of the model; the message has the nearest names.
        BackboneError: if it holds no linear layer, or the model states several heads.
    """
    from torch import nn

    model = unwrap(model)
    modules = dict(model.named_modules())
    if name is not None and name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
        raise UnknownNameError(f"the model has no module {name!r} to be its head; nearest: {', '.join(near) or 'none'}")
    start = name or _stated_classifier(model) or ""
    prefix = f"{start}." if start else ""
    linear: list[str] = [
        n for n, m in modules.items() if isinstance(m, nn.Linear) and (n == start or n.startswith(prefix))
    ]
    if linear:
        return linear[-1]
    if start and isinstance(modules[start], nn.Identity):
        return start
    if name is not None:
        raise BackboneError(
            f"the module {name!r} is a {type(modules[name]).__name__} without a linear layer; a head must be linear"
        )
    return None


def head_features(model: nn.Module, head: str) -> int:
    """Return the number of features that go into the head.

    Raises:
        BackboneError: if the head was removed and the model does not state its `num_features`.
    """
    from torch import nn

    module = unwrap(model).get_submodule(head)
    if isinstance(module, nn.Linear):
        return module.in_features
    features = getattr(unwrap(model), "num_features", None)
    if not isinstance(features, int):
        raise BackboneError(f"the head {head!r} was removed and the model does not state num_features; load it whole")
    return features


def swap_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` at the dotted `name` and return the one that was there."""
    parent, _, leaf = name.rpartition(".")
    owner = unwrap(model).get_submodule(parent)
    old = owner._modules[leaf]
    assert old is not None
    owner._modules[leaf] = module
    return old


CASTS = ("float32", "bfloat16", "float16")  # the dtypes that a body is hashed in
PREFIX = 6  # bytes kept of a tensor's digest, for each cast


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
