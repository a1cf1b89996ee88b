"""From inputs to embeddings and logits: a model with a linear head in it or behind it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import BackboneError, DataError, StateError
from .load import Backbone, encoder_of
from .model import Embedding, Head, swap_module, unwrap

Inputs = Tensor | dict[str, Tensor]  # images, or a tokenizer's tensors by name
Batch = tuple[Inputs, Tensor]  # with the targets: classes (B,), numbers (B,), or classes of tokens (B, T)
IGNORED = -100  # target of a token that has none, as cross-entropy leaves it out


def batch_of(inputs: Tensor | Mapping[str, Tensor]) -> Inputs:
    """Return a batch as models take it; what a tokenizer returns is a mapping, but no dictionary."""
    if not isinstance(inputs, Tensor | Mapping):
        raise DataError(f"expected a preprocessed batch, a tensor or tensors by name; got {type(inputs).__name__}")
    return inputs if isinstance(inputs, Tensor) else dict(inputs)


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    if isinstance(inputs, dict):
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    return inputs.to(device)


def example_count(inputs: Inputs) -> int:
    return len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values()), ()))


def taken(inputs: Inputs, rows: Tensor) -> Inputs:
    """Return some rows of a batch."""
    if isinstance(inputs, dict):
        return {name: tensor[rows.to(tensor.device)] for name, tensor in inputs.items()}
    return inputs[rows.to(inputs.device)]


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of every part of a module on exit."""
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
        hidden = encoder_of(model)(**inputs).last_hidden_state  # (B, T, D)
        if embedding.pooling == "tokens":
            found = hidden
        elif embedding.pooling == "cls":
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
        """Return the logits, (B, classes), or (B, T, classes) of tokens."""
        if self.embedding.module is None:
            logits: Tensor = self.linear(encode(self.model, inputs, self.embedding))
        else:
            given = inputs.to(self.linear.weight.dtype) if isinstance(inputs, Tensor) else inputs
            output = self.model(**given) if isinstance(given, dict) else self.model(given)
            logits = output if isinstance(output, Tensor) else output.logits
        return logits

    def head(self) -> Head:
        """Return the head's tensors, copied to the CPU."""
        bias = self.linear.bias
        weight = self.linear.weight.detach().cpu().clone()
        return Head(self.embedding, weight, None if bias is None else bias.detach().cpu().clone())


def linear_from(head: Head) -> nn.Linear:
    linear = nn.Linear(head.weight.shape[1], head.weight.shape[0], bias=head.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(head.weight)
        if head.bias is not None:
            linear.bias.copy_(head.bias)
    return linear


def classifier_from(model: nn.Module, head: Head) -> Classifier:
    """Return a classifier with the linear layer that the model has at the head's place, or with `head` behind it."""
    if head.module is not None:
        linear = dict(unwrap(model).named_modules()).get(head.module)
        if not isinstance(linear, nn.Linear):
            raise StateError(
                f"the model has no linear layer {head.module!r}, the place of the adapter's head; load the adapter "
                f"first: load_mask(model, ref)"
            )
    else:
        example = next(model.parameters())
        linear = linear_from(head).to(example.device, example.dtype)
    return Classifier(model, linear, head.embedding)


def embeddings(backbone: Backbone, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return the embeddings, (N, D) float32 on the CPU, and the labels, (N,), of all batches, in evaluation mode.

    Masks that are loaded act. The head may be any module at its place, also an `nn.Identity`.
    """
    model, head, seen = backbone.model, backbone.head, list[Tensor]()
    if backbone.embedding == Embedding():
        raise BackboneError(f"the backbone {backbone.id} has no head whose input could be read; name it with head=NAME")
    if head is None:
        return _collected(model, batches, lambda inputs: encode(model, inputs, backbone.embedding))
    dtype = next(model.parameters()).dtype

    def embed(inputs: Inputs) -> Tensor:
        seen.clear()
        if isinstance(inputs, Tensor):
            model(inputs.to(dtype))
        else:
            model(**inputs)
        found = [tuple(x.shape) for x in seen]
        if len(found) != 1 or len(found[0]) != 2 or found[0][0] != example_count(inputs):
            raise BackboneError(
                f"the head {head!r} of {backbone.id} gets inputs of the shapes {found}, expected one vector for each "
                f"of {example_count(inputs)} examples; name another module as the head"
            )
        return seen[0]

    hook = unwrap(model).get_submodule(head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        return _collected(model, batches, embed)
    finally:
        hook.remove()


def embed_batch(model: nn.Module, embedding: Embedding, inputs: Inputs) -> Tensor:
    """Return the embeddings of one batch, (B, D) float32 on the CPU, in evaluation mode."""
    backbone = Backbone(model, "the model", embedding=embedding)
    return embeddings(backbone, [(inputs, torch.zeros(example_count(inputs)))])[0]


def predictions(classifier: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return the logits, (N, classes) float32 on the CPU, and the labels, (N,), of all batches, in evaluation mode."""
    return _collected(classifier, batches, classifier)


@torch.no_grad()
def _collected(
    module: nn.Module, batches: Iterable[Batch], compute: Callable[[Inputs], Tensor]
) -> tuple[Tensor, Tensor]:
    device, found, labels = next(module.parameters()).device, list[Tensor](), list[Tensor]()
    with modes_kept(module):
        module.eval()
        for inputs, y in batches:
            outputs = compute(to_device(inputs, device)).float().cpu()
            if y.dim() == 2:  # of tokens: those that have a class
                outputs, y = outputs[y != IGNORED], y[y != IGNORED]
            found.append(outputs)
            labels.append(y)
    if not labels:
        raise DataError("there is no example that could be read, so there are no outputs")
    return torch.cat(found), torch.cat(labels)


def accuracy(classifier: nn.Module, batches: Iterable[Batch]) -> tuple[float, int]:
    """Return the share of examples classified correctly, in evaluation mode, and their number."""
    logits, labels = predictions(classifier, batches)
    return float((logits.argmax(-1) == labels).double().mean()), len(labels)
