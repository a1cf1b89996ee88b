"""A network: a state of a model by name, put into the one model in memory when it is needed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.layout import BASE
from ..apply.applied import applied
from ..apply.load import load_adapter, load_mask, unload_mask
from ..backbone.classifier import Classifier
from ..backbone.head import swap_module
from ..backbone.load import Backbone
from ..backbone.parameters import aliases, canonical, inside, unwrap
from ..backbone.state import load_tensors
from ..errors import AdapterError, ConfigError, StateError
from ..evaluate.accuracy import as_loaded
from ..mask import MaskSet
from ..tensorfile import open_tensors, read_tensors, write_tensors

State = Mapping[str, Tensor]
HEAD = "head"  # what a head behind an encoder is called in a state


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A trained network.

    Attributes:
        name: of this one. kind: what it is one of several of, as seeds.
        state: every parameter and buffer by name, as in the model; a head behind an encoder as `head.weight` and
            `head.bias`.
        initial: what its parameters were before training, by name: the backbone's values; of a mask those of the masked
            parameters. The head is not in it.
        masks: of an adapter, else None.
    """

    name: str
    kind: str
    state: State
    initial: State = field(repr=False)
    masks: MaskSet | None = None


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a module by name, tied ones once; those of a classifier by the
    names that they have in its backbone."""
    model = unwrap(module.model if isinstance(module, Classifier) else module)
    first = aliases(model)
    state = model.state_dict(keep_vars=True)
    found = {canonical(name): tensor.detach() for name, tensor in state.items() if isinstance(tensor, Tensor)}
    found = {name: tensor for name, tensor in found.items() if first.get(name, name) == name}
    if isinstance(module, Classifier) and module.module is None:
        found |= {f"{HEAD}.{name}": tensor.detach() for name, tensor in module.linear.named_parameters()}
    return found


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of `tensors_of`, on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors_of(module).items()}


@torch.no_grad()
def put_state(module: nn.Module, state: State) -> None:
    """Copy tensors into a module in place; those that the state lacks stay.

    Raises:
        StateError: if the module lacks one, or has it in another shape.
    """
    own = tensors_of(module)
    wrong = [name for name, tensor in state.items() if name not in own or own[name].shape != tensor.shape]
    if wrong:
        found = tuple(own[wrong[0]].shape) if wrong[0] in own else "none"
        raise StateError(
            f"{len(wrong)} of {len(state)} tensors do not fit the model, first {wrong[0]!r} of shape "
            f"{tuple(state[wrong[0]].shape)} where the model has {found}; give states of one architecture and one head"
        )
    for name, tensor in state.items():
        own[name].copy_(tensor)


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """On exit the module has the tensors that it had."""
    before = state_of(module)
    try:
        yield
    finally:
        put_state(module, before)


def write_network(path: str | Path, state: State) -> None:
    """Write a state as a safetensors file, which `read_networks` reads."""
    write_tensors(path, state, {"format": "pt"})


def is_adapter(reference: str) -> bool:
    """Tell whether a reference is to an adapter; else it is a safetensors file of weights."""
    return not reference.endswith(".safetensors") or BASE in open_tensors(reference)


def read_networks(
    backbone: Backbone, named: Sequence[tuple[str, str | Adapter]], token: str | None = None
) -> tuple[Backbone, Classifier, list[Network]]:
    """Read fine-tuned weights and adapters of one backbone.

    Args:
        backbone: with the weights that training started from.
        named: (name, reference): of an adapter, or a safetensors file of weights that is loaded strictly, with
            `head.weight` and `head.bias` beside them where the head is behind an encoder. Those of the same name are of
            one kind.

    Returns:
        The backbone as the adapters use it (preprocessing, head), a classifier that states are put into, the networks.
        The model has the weights that it had.

    Raises:
        BackboneMismatchError, BackboneError, AdapterError, DataError: if one cannot be read or is of another backbone.
        ConfigError: if heads or preprocessing are not those of one task.
    """
    if applied(backbone.model) is not None:
        raise StateError("the model has a mask loaded, and networks start from the base; call unload_mask(model) first")
    found: list[Network] = []
    whole = state_of(backbone.model)
    base = {name: one for name, one in whole.items() if not inside(name, filter(None, [backbone.head]))}
    outside = backbone.outside
    parameters = {name: base[name] for name in aliases(backbone.model) if name in base and not inside(name, outside)}
    kinds = [name for name, _ in named]
    for index, (kind, given) in enumerate(named):
        name = kind if kinds.count(kind) == 1 else f"{kind} {kinds[: index + 1].count(kind)}"
        adapter = given if isinstance(given, Adapter) else None
        if not isinstance(given, Adapter) and is_adapter(given):
            adapter = load_adapter(given, token=token)
        if adapter is not None:
            backbone = _with_adapter(backbone, adapter, name, not index)
            state, masks = _masked(backbone, adapter)
            found.append(Network(name, kind, state, {n: base[n] for n in masks}, masks))
        else:
            assert isinstance(given, str)
            layer = None if backbone.head is None else backbone.model.get_submodule(backbone.head)
            try:
                found.append(Network(name, kind, _weights(backbone, given), parameters))
            finally:
                if backbone.head is not None and layer is not None:
                    swap_module(backbone.model, backbone.head, layer)  # a file may have other classes
                put_state(backbone.model, whole)
    place = backbone.head or HEAD
    shape = found[0].state[f"{place}.weight"].shape
    for one in found:
        if one.state[f"{place}.weight"].shape != shape:
            raise ConfigError(
                f"{one.name} has a head of shape {tuple(one.state[f'{place}.weight'].shape)}, {found[0].name} one of "
                f"{tuple(shape)}; compare networks of one task"
            )
    example = next(backbone.model.parameters())
    linear = nn.Linear(shape[1], shape[0]).to(example.device, example.dtype)
    classifier = Classifier(backbone.model, linear, backbone.head, backbone.pooling, backbone.normalize).eval()
    return backbone, classifier, found


def _with_adapter(backbone: Backbone, adapter: Adapter, name: str, first: bool) -> Backbone:
    """The backbone with head and preprocessing of an adapter, which must be those of the networks before."""
    if len(adapter.sets) > 1 or adapter.head() is None:
        raise AdapterError(f"{adapter.path} has {len(adapter.sets)} mask sets, or no head; give adapters that classify")
    used = as_loaded(backbone, adapter)
    if not first and (used.preprocess, used.head, used.pooling) != (
        backbone.preprocess,
        backbone.head,
        backbone.pooling,
    ):
        raise ConfigError(
            f"{name} expects other inputs than the networks before it: {used.preprocess} and {backbone.preprocess}; "
            f"compare networks of one task"
        )
    return used


def _masked(backbone: Backbone, adapter: Adapter) -> tuple[dict[str, Tensor], MaskSet]:
    """The state that an adapter makes of the backbone, and its masks."""
    head, masks = adapter.head(), adapter.masks(backbone.model)
    assert head is not None
    load_mask(backbone.model, adapter, head="keep")
    try:
        state = state_of(backbone.model)
    finally:
        unload_mask(backbone.model)
    return _headed(backbone, state, head.weight, head.bias), masks


def _weights(backbone: Backbone, path: str) -> dict[str, Tensor]:
    """The state in a file of weights."""
    place, tensors = backbone.head or HEAD, read_tensors(path)
    weight, bias = tensors.get(f"{place}.weight"), tensors.get(f"{place}.bias")
    if weight is None or weight.ndim != 2:
        raise ConfigError(f"{path} has no {place}.weight, so the network has no head; write it beside the weights")
    own = dict(tensors)
    if backbone.head is None:
        own = {name: tensor for name, tensor in tensors.items() if not inside(name, (HEAD,))}
    load_tensors(backbone.model, own, path, backbone.head)
    return _headed(backbone, state_of(backbone.model), weight, bias)


def _headed(backbone: Backbone, state: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """A state with this head, which has a bias always."""
    place = backbone.head or HEAD
    body = {name: tensor for name, tensor in state.items() if not inside(name, (place,))}
    bias = torch.zeros(len(weight)) if bias is None else bias
    return {**body, f"{place}.weight": weight.clone(), f"{place}.bias": bias.clone()}
