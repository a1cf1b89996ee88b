"""From inputs to embeddings and logits: a model with a linear head in it or behind it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackboneError, DataError
from .load import Backbone
from .model import Embedding, Head, swap_module, unwrap

Inputs = Tensor | dict[str, Tensor]  # images, or a tokenizer's tensors by name
Batch = tuple[Inputs, Tensor]  # with the labels


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Move inputs to a device."""
    if isinstance(inputs, dict):
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    return inputs.to(device)


def example_count(inputs: Inputs) -> int:
    """Return the number of examples."""
    return len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values()), ()))


def taken(inputs: Inputs, rows: Tensor) -> Inputs:
    """Return the given rows."""
    if isinstance(inputs, dict):
        return {name: tensor[rows.to(tensor.device)] for name, tensor in inputs.items()}
    return inputs[rows.to(inputs.device)]


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """On exit every part of a module is in training or evaluation mode as before."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def encode(model: nn.Module, inputs: Inputs, embedding: Embedding) -> Tensor:
    """Return the embeddings (B, D) of a text encoder or a CLIP-like vision tower."""
    if embedding.pooling == "projection":
        assert isinstance(inputs, Tensor)
        # nothing is interpolated at the tower's own size
        output = model(pixel_values=inputs.to(next(model.parameters()).dtype), interpolate_pos_encoding=True)
        # SigLIP has no projection: its pooled state is the embedding
        found: Tensor = output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output
    else:
        assert isinstance(inputs, dict)
        hidden = model(**inputs).last_hidden_state  # (B, T, D)
        if embedding.pooling == "cls":
            found = hidden[:, 0]
        else:
            weights = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            found = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return nn.functional.normalize(found, dim=-1) if embedding.normalize else found


class Classifier(nn.Module):
    """A model with a linear head, which replaces the module that `embedding` names or follows the encoder."""

    def __init__(self, model: nn.Module, linear: nn.Linear, embedding: Embedding):
        super().__init__()
        self.model, self.linear, self.embedding = model, linear, embedding
        if embedding.module is not None:
            swap_module(model, embedding.module, linear)

    def forward(self, inputs: Inputs) -> Tensor:
        """Return the logits, (B, classes)."""
        if self.embedding.module is None:
            logits: Tensor = self.linear(encode(self.model, inputs, self.embedding))
        else:
            assert isinstance(inputs, Tensor)
            output = self.model(inputs.to(self.linear.weight.dtype))
            logits = output if isinstance(output, Tensor) else output.logits
        return logits

    def head(self) -> Head:
        """Return the head's tensors, copied to the CPU."""
        bias = self.linear.bias
        weight = self.linear.weight.detach().cpu().clone()
        return Head(self.embedding, weight, None if bias is None else bias.detach().cpu().clone())


def linear_from(head: Head) -> nn.Linear:
    """Return a layer with the head's tensors, float32 on the CPU."""
    linear = nn.Linear(head.weight.shape[1], head.weight.shape[0], bias=head.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(head.weight)
        if head.bias is not None:
            linear.bias.copy_(head.bias)
    return linear


def classifier_from(model: nn.Module, head: Head) -> Classifier:
    """Return a classifier with the linear layer that the model has at the head's place, or with `head` behind it."""
    if head.module is not None:
        linear = unwrap(model).get_submodule(head.module)
        assert isinstance(linear, nn.Linear)
    else:
        example = next(model.parameters())
        linear = linear_from(head).to(example.device, example.dtype)
    return Classifier(model, linear, head.embedding)


@torch.no_grad()
def embeddings(backbone: Backbone, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return the embeddings, (N, D) float32 on the CPU, and the labels, (N,), of all batches, in evaluation mode.

    Masks that are loaded act. The head may be any module at its place, also an `nn.Identity`.

    Raises:
        BackboneError: if the backbone has no place for a head, or the head gets no vector for each example.
        DataError: if there is no batch.
    """
    model, head = backbone.model, backbone.head
    if backbone.embedding == Embedding():
        raise BackboneError(f"the backbone {backbone.id} has no head whose input could be read; name it with head=NAME")
    example = next(model.parameters())
    collected: list[Tensor] = []
    labels: list[Tensor] = []

    def collect(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        collected.append(args[0].float().cpu())

    hook = None if head is None else unwrap(model).get_submodule(head).register_forward_pre_hook(collect)
    try:
        with modes_kept(model):
            model.eval()
            for given, y in batches:
                inputs = to_device(given, example.device)
                if head is None:
                    collected.append(encode(model, inputs, backbone.embedding).float().cpu())
                elif isinstance(inputs, Tensor):
                    model(inputs.to(example.dtype))
                else:
                    model(**inputs)
                found = [tuple(x.shape) for x in collected[len(labels) :]]
                labels.append(y)
                if len(found) != 1 or len(found[0]) != 2 or found[0][0] != len(y):
                    raise BackboneError(
                        f"the head {head!r} of {backbone.id} gets inputs of the shapes {found} for a batch of "
                        f"{len(y)}, expected one vector for each example; name another module as the head"
                    )
    finally:
        if hook is not None:
            hook.remove()
    if not labels:
        raise DataError("there is no example that could be read, so there are no features")
    return torch.cat(collected), torch.cat(labels)


@torch.no_grad()
def predictions(classifier: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return the logits, (N, classes) float32 on the CPU, and the labels, (N,), of all batches, in evaluation mode.

    Raises:
        DataError: if there is no batch.
    """
    device = next(classifier.parameters()).device
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    with modes_kept(classifier):
        classifier.eval()
        for inputs, y in batches:
            logits.append(classifier(to_device(inputs, device)).float().cpu())
            labels.append(y)
    if not labels:
        raise DataError("there is no example that could be read, so there are no predictions")
    return torch.cat(logits), torch.cat(labels)


def accuracy(classifier: nn.Module, batches: Iterable[Batch]) -> tuple[float, int]:
    """Return the share of examples classified correctly, in evaluation mode, and their number."""
    logits, labels = predictions(classifier, batches)
    return float((logits.argmax(-1) == labels).double().mean()), len(labels)


def by_class(logits: Tensor, y: Tensor) -> dict[str, Any]:
    """Return what the greatest logit of each row, (N, classes), gets right of the labels, (N,).

    Returns:
        {"accuracy", "per_class": accuracy of each class, None where it has no row, "confusion": rows of counts,
        [true][predicted]}.
    """
    classes = logits.shape[1]
    counts = (y * classes + logits.argmax(1)).bincount(minlength=classes**2).reshape(classes, classes)
    correct, rows = counts.diagonal().tolist(), counts.sum(1).tolist()
    return {
        "accuracy": sum(correct) / sum(rows),
        "per_class": [right / of if of else None for right, of in zip(correct, rows, strict=True)],
        "confusion": counts.tolist(),
    }
