"""The head: which module it is, and its tensors apart from the body."""

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import BackboneError, UnknownNameError
from .parameters import unwrap
from .random_weight import RandomWeight

Pooling = Literal["mean", "cls", "projection"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "projection")


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A linear head.

    Attributes:
        kind: "linear" replaces the module called `module`; "pooled-linear" lies behind an encoder: its embedding by
            `pooling`, divided by its Euclidean norm if `normalize`, then the layer.
        weight: (classes, features). bias: (classes,) or None.
        pooling: "mean" or "cls" of the last hidden state (tokens of the attention mask), or "projection", the image
            embedding that a CLIP-like vision tower gives.
        random: seed and mask of a masked random head, which stand for `weight` in the file; None: it is stored whole.
    """

    kind: Literal["linear", "pooled-linear"]
    weight: Tensor
    bias: Tensor | None = None
    module: str | None = None
    pooling: Pooling | None = None
    normalize: bool = False
    random: RandomWeight | None = None


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
