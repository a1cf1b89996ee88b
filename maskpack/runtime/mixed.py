"""Several adapters in one forward pass: each example's linear layers are corrected where its adapter changes weights.

With D the changes of a weight W, (W + D) x = W x + D x. W x is computed for the whole batch, D x from the places and
differences of the few weights that change.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from ..adapter.content import Parts
from ..backbone.shards import shared
from ..errors import DataError, StateError
from .apply import at_places, changed_bits, read, values_at, zeros_of

FEW = 0.02  # share of weights that change up to which this is faster than the whole matrix again


class Correction(NamedTuple):
    """The changes of a weight (rows, columns) as a sparse matrix.

    Attributes:
        begin: where each row begins in the others, and their end: (rows + 1,), int32.
        columns, values: of each change, row by row, int32 and float32.
    """

    begin: Tensor
    columns: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


def corrections(model: nn.Module, parts: Parts) -> dict[str, Correction] | None:
    """Return the corrections of linear layers by name; None if an adapter changes other parts, or too many weights."""
    layers = {f"{name}.weight": one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    masks = parts.masks
    if parts.head is not None or parts.dense or parts.norms or not masks.keys() <= layers.keys():
        return None
    if masks.kept < (1 - FEW) * masks.total or not all(map(at_places, masks.values())):
        return None
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    found = {}
    for name, mask in masks.items():
        weight = layers[name].weight.detach()
        if users[id(layers[name].weight)] > 1 or shared(weight):  # an embedding has it too, or other processes
            return None
        at = zeros_of(mask, weight.device)
        old, values = read(weight, at), values_at(parts.values.get(name), weight, at)
        bits = changed_bits(weight, mask, old, values)
        new = torch.zeros(len(at), device=weight.device) if bits is None else bits.view(weight.dtype).float()
        rows, columns = weight.shape
        begin = torch.searchsorted(at, torch.arange(rows + 1, device=weight.device) * columns)
        change = new - old.view(weight.dtype).float()
        if not change.isfinite().all():
            return None
        found[name.removesuffix(".weight")] = Correction(begin.int(), (at % columns).int(), change)
    return found


@contextmanager
def mixing(model: nn.Module, examples: Sequence[Mapping[str, Correction] | None]) -> Iterator[None]:
    """Let a model that is the base compute each example of a batch with its own corrections, within the context.

    A batch may have several rows for each example, one after another, as where sequences are sampled or searched.
    """
    if any(getattr(one, "_compiled_call_impl", None) is not None for one in model.modules()):
        raise StateError("the model is compiled, and would not see corrections; give the model before torch.compile")
    modules = dict(model.named_modules())
    tasks = list({id(one): one for one in examples if one is not None}.values())
    order = torch.tensor([next((i for i, one in enumerate(tasks) if one is own), -1) for own in examples])
    with ExitStack() as stack:
        for name in sorted({name for one in tasks for name in one}):
            hook = _hook(order, [one.get(name) for one in tasks])
            stack.callback(modules[name].register_forward_hook(hook).remove)
        yield


def _hook(order: Tensor, found: Sequence[Correction | None]) -> Callable[..., Tensor]:
    add: Callable[[Tensor, Tensor, Tensor], None] = partial(_add, found)
    if any(one is not None and one.values.is_cuda for one in found):
        from .mixed_gpu import Stacked

        add = Stacked(found).add

    def correct(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs = given[0]
        if len(inputs) % len(order):
            raise DataError(
                f"a batch of {len(order)} examples came to a layer as {len(inputs)} rows, which cannot be told apart"
            )
        rows = order.repeat_interleave(inputs.numel() // inputs.shape[-1] // len(order))
        total = output.reshape(-1, output.shape[-1]).float()
        add(inputs.reshape(-1, inputs.shape[-1]).float(), rows, total)
        return total.to(output.dtype).reshape(output.shape)

    return correct


def _add(found: Sequence[Correction | None], inputs: Tensor, rows: Tensor, total: Tensor) -> None:
    """Add D x to the rows of `total`; `rows` has the number of each row's correction, -1 for none."""
    for task, one in enumerate(found):
        at = (rows == task).nonzero()[:, 0]
        if one is None or not len(at):
            continue
        # its sum over the changes of a row reads rows of the transposed inputs: quicker than a sparse matrix product
        change = embedding_bag(
            one.columns, inputs[at].T.contiguous(), one.begin, mode="sum", per_sample_weights=one.values,
            include_last_offset=True,
        )  # fmt: skip
        total[at] += change.T
