"""Predictions with an adapter: its preprocessing, the model, its head and class names."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, DataError, StateError, require
from ..preprocess import ImagePreprocess, Preprocess, TextPreprocess, collate_text, open_image, preprocess_from_json
from .content import About

Batches = Iterable[tuple[Any, Tensor]]  # model inputs and labels


@dataclass(frozen=True, slots=True)
class Prediction:
    """The name of the class that an input most likely has, and its probability (softmax), 0 to 1."""

    label: str
    score: float


def model_tokenizer(model: nn.Module) -> Any:
    """Return the tokenizer of a transformers model, found by the name that it was loaded from."""
    transformers = require("transformers", "train", "tokenising texts")
    name = getattr(model, "name_or_path", "")
    if not name:
        raise DataError("the model does not say where its tokenizer is; pass it: predict(model, texts, tokenizer=…)")
    return transformers.AutoTokenizer.from_pretrained(name)


def _batches(inputs: Sequence[Any] | Tensor, preprocess: Preprocess, tokenizer: Any, batch_size: int) -> Batches:
    """Yield batches of model inputs, with dummy labels, from image paths, PIL images, a tensor, or texts."""
    if isinstance(inputs, str):
        raise DataError(f"inputs must be a list, got the text {inputs!r:.200} alone; put it into one")
    for start in range(0, len(inputs), batch_size):
        chunk = inputs[start : start + batch_size]
        if isinstance(chunk, Tensor):
            batch: Any = chunk
        elif isinstance(preprocess, ImagePreprocess):
            transform = preprocess.transform()
            batch = torch.stack([transform(open_image(x) if isinstance(x, str | os.PathLike) else x) for x in chunk])
        else:
            batch = collate_text(tokenizer, preprocess)([str(x) for x in chunk])
        yield batch, torch.zeros(len(chunk), dtype=torch.long)


def predict(
    model: nn.Module,
    inputs: Sequence[Any] | Tensor,
    about: About,
    tokenizer: Any,
    batch_size: int,
    run: Callable[[Batches], Iterable[Tensor]] | None,
) -> list[Prediction]:
    """Return the most likely class of every input; `run` makes logits of batches, None where there is no head."""
    names = about.class_names
    if run is None or names is None or about.preprocess is None:
        raise AdapterError("this adapter has no head, class names or preprocessing, so it cannot predict by itself")
    how = preprocess_from_json(about.preprocess)
    if isinstance(how, TextPreprocess) and tokenizer is None and not isinstance(inputs, Tensor):
        tokenizer = model_tokenizer(model)
    found: list[Prediction] = []
    for logits in run(_batches(inputs, how, tokenizer, batch_size)) if len(inputs) else ():
        if logits.shape[1] != len(names):
            raise StateError(
                f"the model gives {logits.shape[1]} logits, the adapter has {len(names)} classes; load the adapter "
                f"with load_mask(model, ref) first, with head='replace'"
            )
        scores, best = logits.softmax(-1).max(-1)
        found += [Prediction(names[int(i)], float(s)) for i, s in zip(best, scores, strict=True)]
    return found
