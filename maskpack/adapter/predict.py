"""Predictions with an adapter: its preprocessing, the model, its head and class names."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, ConfigError, DataError, StateError, brief, require
from ..preprocess import ImagePreprocess, Preprocess, TextPreprocess, collate_text, open_image, preprocess_from_json
from .content import About

Batches = Iterable[tuple[Any, Tensor]]  # model inputs and labels


@dataclass(frozen=True, slots=True)
class Prediction:
    """The name of the class that an input most likely has, and its probability (softmax), 0 to 1.

    Example:
        load_mask(model, adapter)
        for one in adapter.predict(model, ["rose.jpg", "daisy.jpg"]):
            print(one.label, one.score)
    """

    label: str
    score: float


def model_tokenizer(model: nn.Module) -> Any:
    """Return the tokenizer of a transformers model, found by the name that it was loaded from."""
    transformers = require("transformers", "train", "tokenising texts")
    name = getattr(model, "name_or_path", "")
    if not name:
        raise DataError("the model does not say where its tokenizer is; pass it: predict(model, texts, tokenizer=…)")
    return transformers.AutoTokenizer.from_pretrained(name)


def _check_inputs(inputs: Any, preprocess: Preprocess) -> None:
    if isinstance(inputs, Tensor):
        images = isinstance(preprocess, ImagePreprocess)
        if not images or inputs.ndim != 4 or inputs.shape[1] != 3:
            advice = "a batch of one image is image[None]" if images else "the adapter's tokenizer reads them"
            known = "preprocessed (B, 3, H, W)" if images else "a list of texts"
            raise ConfigError(f"inputs are {brief(inputs)}, expected {known}; {advice}")
    elif not isinstance(inputs, Sequence) or isinstance(inputs, str | bytes):
        known = "a list of images, their paths, or texts"
        raise ConfigError(f"inputs are {brief(inputs)}, expected {known}; of one input give [input]")


def _batches(inputs: Sequence[Any] | Tensor, preprocess: Preprocess, tokenizer: Any, batch_size: int) -> Batches:
    """Yield batches of model inputs, with dummy labels, from image paths, PIL images, a tensor, or texts."""
    for start in range(0, len(inputs), batch_size):
        chunk = inputs[start : start + batch_size]
        if isinstance(chunk, Tensor):
            batch: Any = chunk
        elif isinstance(preprocess, ImagePreprocess):
            transform = preprocess.transform()
            batch = torch.stack([transform(_image(one)) for one in chunk])
        else:
            batch = collate_text(tokenizer, preprocess)([str(x) for x in chunk])
        yield batch, torch.zeros(len(chunk), dtype=torch.long)


def _image(one: Any) -> Any:
    if isinstance(one, str | os.PathLike):
        return open_image(one)
    if not hasattr(one, "convert"):
        advice = "images as tensors go into one tensor"
        raise ConfigError(f"an input is {brief(one)}, expected an image file or a PIL image; {advice}")
    return one


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
    _check_inputs(inputs, how)
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
