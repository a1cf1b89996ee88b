"""Which parameters belong together: modules and blocks of a network."""

from collections.abc import Iterable
from typing import Literal

from torch import nn

from ..backbone.classifier import Classifier
from ..backbone.parameters import canonical, unwrap
from ..errors import ConfigError
from .network import HEAD, tensors_of

Per = Literal["module", "block"]
PER: tuple[Per, ...] = ("module", "block")


def grouped(module: nn.Module, per: Per = "module", names: Iterable[str] | None = None) -> dict[str, list[str]]:
    """Return names of modules or blocks, in the network's order, each with the names of its parameters.

    A module is a layer that has parameters of two or more dimensions, with all its own parameters, together with the
    norm that stands directly behind it in the same parent (a layer whose parameters all have one dimension). Other
    layers with parameters, and parameters of modules that have layers of their own, stand alone. A block is all
    modules whose names begin alike up to the first part that is a number, as in `layer1.0` or `encoder.layer.3`; a
    module without a number in its name is a block.

    Args:
        names: parameters that count; default: all. Modules without any are left out.

    Raises:
        ConfigError: if `per` is another word.
    """
    if per not in PER:
        raise ConfigError(f"per must be one of {', '.join(PER)}, got {per!r}")
    known = set(tensors_of(module)) if names is None else set(names)
    found: dict[str, list[str]] = {}
    for owner, parameters in _owners(module).items():
        key = owner if per == "module" else _block(owner)
        own = [name for name in parameters if name in known]
        if own:
            found.setdefault(key, []).extend(own)
    return found


def _block(name: str) -> str:
    parts = name.split(".")
    end = next((at + 1 for at, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[:end])


def _owners(module: nn.Module) -> dict[str, list[str]]:
    """The parameters of each module, by its name."""
    model = unwrap(module.model if isinstance(module, Classifier) else module)
    found: dict[str, list[str]] = {}
    before: dict[str, str] = {}  # parent -> its last child, if that has weights
    for raw, layer in model.named_modules():
        name = canonical(raw)
        own = {f"{name}.{leaf}" if name else leaf: one for leaf, one in layer.named_parameters(recurse=False)}
        parent = name.rpartition(".")[0]
        leaf = not any(True for _ in layer.children())
        weights = any(one.ndim > 1 for one in own.values())
        if own and not leaf:
            found.update({one: [one] for one in own})
        elif own and not weights and parent in before:
            found[before.pop(parent)] += own
            continue
        elif own:
            found[name] = list(own)
        if name:
            before.pop(parent, None)
            if own and leaf and weights:
                before[parent] = name
    if isinstance(module, Classifier) and module.module is None:
        found[HEAD] = [f"{HEAD}.{leaf}" for leaf, _ in module.linear.named_parameters()]
    return found
