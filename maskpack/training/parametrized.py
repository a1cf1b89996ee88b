"""Parametrizations of the parameters of a model, and taking them off again so that the model is as before."""

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

from ..backbone.parameters import aliases, unwrap

Orders = dict[nn.Module, list[str]]  # names of the parameters of a module, in their order before one was parametrized


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has a parameter, and the parameter's name there."""
    parent, _, leaf = name.rpartition(".")
    module = model
    for part in parent.split(".") if parent else ():
        module = getattr(module, part)
        module = unwrap(module)
    return module, leaf


def all_names(model: nn.Module) -> dict[str, list[str]]:
    """Return every name of each parameter by its first one; a tied parameter has several."""
    found: dict[str, list[str]] = {}
    for name, first in aliases(model).items():
        found.setdefault(first, []).append(name)
    return found


def put_on(model: nn.Module, names: Iterable[str], made: nn.Module, orders: Orders) -> None:
    """Parametrize one parameter under all its names, and note in `orders` what `take_off` needs."""
    for name in names:
        module, leaf = owner(model, name)
        orders.setdefault(module, list(module._parameters))
        # unsafe: the parametrization keeps shape and dtype by contract, and must not be run to find that out
        parametrize.register_parametrization(module, leaf, made, unsafe=True)


def take_off(model: nn.Module, kind: type[nn.Module], orders: Iterable[Orders]) -> None:
    """Remove the parametrizations of one kind; the parameters themselves are put back, not copies."""
    for module in list(unwrap(model).modules()):
        if not parametrize.is_parametrized(module):
            continue
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        for leaf in [leaf for leaf, chain in lists.items() if isinstance(chain[0], kind)]:  # type: ignore[index]
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
    # removing a parametrization puts its parameter behind the others of its module
    for module, names in ((module, names) for one in orders for module, names in one.items()):
        if module._parameters.keys() == set(names):
            module._parameters = {name: module._parameters[name] for name in names}
