"""Networks of an analysis: their tensors and modules by name, how they are read, and their accuracy and loss."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..adapter.read import TENSOR, Adapter
from ..backbone.classifier import Batch, Classifier, predictions
from ..backbone.fingerprint import cache_folder, model_digest
from ..backbone.load import Backbone, load_tensors
from ..backbone.model import aliases, canonical, inside, swap_module, unwrap
from ..errors import AdapterError, ConfigError, DataError, StateError, check_choice
from ..mask import MaskSet
from ..runtime.apply import applied, unload_mask
from ..runtime.load import load_adapter, load_mask
from ..safetensors_io import TensorFile, read_tensors, write_tensors
from ..training.data.base import Data, Examples, loader, readable
from ..training.evaluate import as_loaded
from ..training.features import digest_of, inputs_content
from ..training.stored import BATCH_NORMS, recalibrate
from .trial import measured

State = Mapping[str, Tensor]
HEAD = "head"  # what a head behind an encoder is called in a state
Per = Literal["module", "block"]


def grouped(module: nn.Module, per: Per = "module", names: Iterable[str] | None = None) -> dict[str, list[str]]:
    """Return the parameters in `names` by module or block, in the network's order.

    A module is a layer that has parameters of two or more dimensions, with all its own parameters, together with the
    norm that stands directly behind it in the same parent (a layer whose parameters all have one dimension). Other
    layers with parameters, and parameters of modules that have layers of their own, stand alone. A block is all modules
    whose names begin alike up to the first part that is a number, as in `layer1.0` or `encoder.layer.3`; a module
    without a number in its name is a block.

    Example:
        blocks = grouped(model, "block")  # {"conv1": ["conv1.weight", "bn1.weight", …], …}
    """
    check_choice("per", per, Per)
    known = set(tensors_of(module)) if names is None else set(names)
    found: dict[str, list[str]] = {}
    for owner, parameters in _owners(module).items():
        block = re.match(r"(.*?\.)??\d+(?=\.|$)", owner)
        key = block[0] if block and per == "block" else owner
        own = [name for name in parameters if name in known]
        if own:
            found.setdefault(key, []).extend(own)
    return found


def _owners(module: nn.Module) -> dict[str, list[str]]:
    """The parameters of each module, by its name."""
    model = body_of(module)
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
    if isinstance(module, Classifier) and module.embedding.module is None:
        found[HEAD] = [f"{HEAD}.{leaf}" for leaf, _ in module.linear.named_parameters()]
    return found


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network.

    Attributes:
        name: of this one. kind: what it is one of several of, as seeds.
        state: every parameter and buffer by name; a head behind an encoder as `head.weight` and `head.bias`.
        initial: parameters before training, by name: the backbone's values, of a mask those of the masked parameters.
        masks: of an adapter, else None.
    """

    name: str
    kind: str
    state: State
    initial: State = field(repr=False)
    masks: MaskSet | None = None


def body_of(module: nn.Module) -> nn.Module:
    """Return the backbone of a classifier, or the module itself; of a compiled module the original."""
    return unwrap(module.model if isinstance(module, Classifier) else module)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a module by name, tied ones once.

    Those of a classifier have the names that they have in its backbone.
    """
    model = body_of(module)
    first = aliases(model)
    state = model.state_dict(keep_vars=True)
    found = {canonical(name): tensor.detach() for name, tensor in state.items() if isinstance(tensor, Tensor)}
    found = {name: tensor for name, tensor in found.items() if first.get(name, name) == name}
    if isinstance(module, Classifier) and module.embedding.module is None:
        found |= {f"{HEAD}.{name}": tensor.detach() for name, tensor in module.linear.named_parameters()}
    return found


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of `tensors_of`, on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors_of(module).items()}


@torch.no_grad()
def put_state(module: nn.Module, state: State) -> None:
    """Copy tensors into a module in place; those that the state lacks stay."""
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
    """Restore the module's tensors on exit."""
    before = state_of(module)
    try:
        yield
    finally:
        put_state(module, before)


def write_network(path: str | Path, state: State) -> None:
    """Write a state as a safetensors file, which `read_networks` reads."""
    write_tensors(path, state, {"format": "pt"})


def is_adapter(reference: str) -> bool:
    """Return True if a reference is to an adapter, False if it is to a safetensors file of weights."""
    return not reference.endswith(".safetensors") or TENSOR in TensorFile(reference)


def read_networks(
    backbone: Backbone, named: Sequence[tuple[str, str | Adapter]]
) -> tuple[Backbone, Classifier, list[Network]]:
    """Read fine-tuned weights and adapters of one backbone, which afterwards has the weights that it had.

    Args:
        backbone: with the weights that training started from.
        named: (name, reference): of an adapter, or a safetensors file of weights that is loaded strictly, with
            `head.weight` and `head.bias` beside them where the head is behind an encoder. Those of the same name are of
            one kind.

    Returns:
        The backbone as the adapters use it (preprocessing, head), a classifier that states are put into, the networks.

    Example:
        named = [("first", "./my-mask"), ("second", "./other-mask")]
        backbone, classifier, networks = read_networks(backbone, named)
    """
    if applied(backbone.model) is not None:
        raise StateError("the model has a mask loaded, and networks start from the base; call unload_mask(model) first")
    found: list[Network] = []
    head = () if backbone.head is None else (backbone.head,)
    base = {name: one for name, one in state_of(backbone.model).items() if not inside(name, head)}
    outside = backbone.outside
    parameters = {name: base[name] for name in aliases(backbone.model) if name in base and not inside(name, outside)}
    kinds = [name for name, _ in named]
    for index, (kind, given) in enumerate(named):
        name = kind if kinds.count(kind) == 1 else f"{kind} {kinds[: index + 1].count(kind)}"
        if isinstance(given, str) and not is_adapter(given):
            found.append(Network(name, kind, _weights(backbone, given), parameters))
            continue
        adapter = given if isinstance(given, Adapter) else load_adapter(given)
        own = adapter.parts(adapter.sets[0], stream=True).head
        if len(adapter.sets) > 1 or own is None:
            raise AdapterError(f"{adapter.path} has no head, or several mask sets; give adapters that classify")
        used = as_loaded(backbone, adapter)
        if index and (used.preprocess, used.embedding) != (backbone.preprocess, backbone.embedding):
            raise ConfigError(f"{name} expects other inputs than the networks before it; compare networks of one task")
        backbone, masks = used, adapter.parts(base=backbone.model).masks
        load_mask(backbone.model, adapter, head="keep")
        try:
            state = _headed(backbone, own.weight, own.bias)
        finally:
            unload_mask(backbone.model)
        found.append(Network(name, kind, state, {one: base[one] for one in masks}, masks))
    place = backbone.head or HEAD
    shape = found[0].state[f"{place}.weight"].shape
    for one in found[1:]:
        other = one.state[f"{place}.weight"].shape
        if other != shape:
            heads = f"{one.name} has a head of shape {tuple(other)}, {found[0].name} one of {tuple(shape)}"
            raise ConfigError(f"{heads}; compare networks of one task")
    example = next(backbone.model.parameters())
    linear = nn.Linear(shape[1], shape[0]).to(example.device, example.dtype)
    classifier = Classifier(backbone.model, linear, backbone.embedding).eval()
    return backbone, classifier, found


def _weights(backbone: Backbone, path: str) -> dict[str, Tensor]:
    """Return the state in a file of weights."""
    place, tensors = backbone.head or HEAD, read_tensors(path)
    weight, bias = tensors.get(f"{place}.weight"), tensors.get(f"{place}.bias")
    if weight is None or weight.ndim != 2:
        raise ConfigError(f"{path} has no {place}.weight, so the network has no head; write it beside the weights")
    own = tensors if backbone.head else {name: one for name, one in tensors.items() if not inside(name, (HEAD,))}
    layer = None if backbone.head is None else backbone.model.get_submodule(backbone.head)
    before = state_of(backbone.model)
    try:
        load_tensors(backbone.model, own, path, backbone.head)
        return _headed(backbone, weight, bias)
    finally:
        if backbone.head is not None and layer is not None:
            swap_module(backbone.model, backbone.head, layer)  # a file may have other classes
        put_state(backbone.model, before)


def _headed(backbone: Backbone, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Return the state of the model with this head, which has a bias always."""
    place = backbone.head or HEAD
    body = {name: tensor for name, tensor in state_of(backbone.model).items() if not inside(name, (place,))}
    bias = torch.zeros(len(weight)) if bias is None else bias
    return {**body, f"{place}.weight": weight.clone(), f"{place}.bias": bias.clone()}


VERSION = 1  # of the keys and of the files
CALIBRATION = 1024  # training rows that BatchNorm statistics are taken from
IN_MEMORY = 1_000_000_000  # bytes of preprocessed inputs that are kept
MEASURED = frozenset(("accuracy", "loss", "examples"))
Progress = Callable[[int, int], None]  # (done, in all)
T = TypeVar("T")


def counted(items: Collection[T], report: Progress | None) -> Iterator[T]:
    """Yield items, and report after each how many are done."""
    for done, item in enumerate(items, 1):
        yield item
        if report is not None:
            report(done, len(items))


def evaluations_folder() -> Path:
    """Return where evaluations are kept if no folder is given: beside the features."""
    return cache_folder() / "evaluations"


def some(examples: Examples, count: int | None, seed: int = 0) -> Examples:
    """Return `count` of the examples, drawn by `seed`, in the order of the data; all of them if there are fewer."""
    if count is not None and count < 1:
        raise ConfigError(f"the number of examples must be at least 1, got {count}")
    if count is None or count >= len(examples):
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:count]
    indices = [examples.indices[one] for one in sorted(order.tolist())]
    return replace(examples, indices=indices, unreadable=set())


class Batches:
    """Preprocessed batches of examples, in order: read once if they fit into `IN_MEMORY`, else whenever walked."""

    def __init__(self, backbone: Backbone, examples: Examples, batch_size: int):
        self.backbone, self.examples, self.batch_size = backbone, examples, batch_size
        self.kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.kept is not None:
            yield from self.kept
            return
        given = self.backbone
        batches = loader(self.examples, given.preprocess, given.tokenizer, batch_size=self.batch_size)
        size, kept = 0, list[Batch]()
        for inputs, labels in readable(batches):
            size += sum(one.nbytes for one in (inputs.values() if isinstance(inputs, dict) else [inputs]))
            kept = [*kept, (inputs, labels)] if size <= IN_MEMORY else []
            yield inputs, labels
        self.kept = kept if size <= IN_MEMORY else None


class Evaluations:
    """Measures states of a module on the rows of a split; what was measured before is read back.

    Where the module has BatchNorm, its statistics are those of the state's own weights, over `CALIBRATION` training
    rows.

    Args:
        module: from inputs to logits, as `read_networks` or `train_dense` gives. A state stays in it.
        backbone: its preprocessing and tokenizer.
        data: with a training split if there is BatchNorm.
        split: "test" or "train". limit: at most so many of its rows, drawn by seed 0.
        folder: for the JSON file of each evaluation; None: nothing is kept.

    Example:
        evaluations = Evaluations(classifier, backbone, data, limit=100)
        print(evaluations.of(networks[0].state)["accuracy"])
    """

    def __init__(
        self,
        module: nn.Module,
        backbone: Backbone,
        data: Data,
        *,
        split: str = "test",
        limit: int | None = None,
        batch_size: int = 64,
        folder: Path | None = None,
    ):
        check_choice("split", split, Literal["test", "train"])
        self.module, self.backbone, self.folder = module, backbone, folder
        self.examples = some(data.labelled(split, "an analysis"), limit)
        self.batches = Batches(backbone, self.examples, batch_size)
        norms = any(isinstance(one, BATCH_NORMS) and one.running_mean is not None for one in module.modules())
        calibration = some(data.labelled("train", "an analysis"), CALIBRATION) if norms else None
        self.calibration = None if calibration is None else Batches(backbone, calibration, batch_size)

    def put(self, state: State) -> None:
        """Put a state into the module, with BatchNorm statistics of its own."""
        put_state(self.module, state)
        if self.calibration is not None:
            recalibrate(self.module, self.calibration)

    def content(self, state: State) -> list[Any] | None:
        """Return digests of a state and of the inputs; None if one of them has none, or nothing is kept."""
        if self.folder is None:
            return None
        put_state(self.module, state)
        rows = [self.examples] if self.calibration is None else [self.examples, self.calibration.examples]
        inputs = [inputs_content(self.backbone, one) for one in rows]
        digest = model_digest(self.module)
        return None if digest is None or None in inputs else [VERSION, digest, *inputs]

    def of(self, state: State, *, rows: bool = False) -> dict[str, Any]:
        """Return {"accuracy", "loss": mean cross-entropy, "examples"} of a state; with `rows` each that is "right"."""
        content = self.content(state)
        if self.folder is None or content is None:
            return self._measure(state, rows)
        path = self.folder / f"{digest_of([*content, rows])}.json"
        return measured(path, MEASURED, lambda: self._measure(state, rows))

    def _measure(self, state: State, rows: bool) -> dict[str, Any]:
        self.put(state)
        logits, y = predictions(self.module, self.batches)
        if int(y.max()) >= logits.shape[1]:
            classes = f"the network has {logits.shape[1]} classes, and the data have a class {int(y.max())} (from 0)"
            raise DataError(f"{classes}; give the data that it was trained for")
        right = logits.argmax(1) == y
        loss = float(nn.functional.cross_entropy(logits.double(), y))
        loss = loss if loss < 1e30 else 1e30  # of a network that gives no numbers; JSON has no infinity
        found = {"accuracy": float(right.double().mean()), "loss": loss, "examples": len(y)}
        return {**found, "right": right.int().tolist()} if rows else found
