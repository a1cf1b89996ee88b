"""Predictions and text with an adapter: its preprocessing, the model, its head and class names."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, ConfigError, DataError, StateError, brief, require
from ..preprocess import (
    ChatPreprocess,
    ImagePreprocess,
    Preprocess,
    TextPreprocess,
    collate_text,
    open_image,
    preprocess_from_json,
)
from ..threads import Progress
from .content import About

Batches = Iterable[tuple[Any, Tensor]]  # model inputs and labels


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most likely class of an input and its probability (softmax); of a regression its number's name and value.

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
        parts = {"head": run, "class names": names, "preprocessing": about.preprocess}
        missing = ", ".join(name for name, one in parts.items() if one is None)
        raise AdapterError(
            f"this adapter has no {missing}, so it cannot predict by itself; take one trained with labels, or in "
            f"Python give class_names and preprocess to save_adapter"
        )
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
        if about.task == "token-classification":
            raise AdapterError("this adapter classifies words, and predict classifies inputs; take its head yourself")
        if about.task == "regression":
            found += [Prediction(names[0], float(number)) for number in logits[:, 0]]
            continue
        scores, best = logits.softmax(-1).max(-1)
        found += [Prediction(names[int(i)], float(s)) for i, s in zip(best, scores, strict=True)]
    return found


class Counted:
    """Streamer of transformers that counts tokens: it gets the prompt, then each token."""

    def __init__(self, progress: Progress, done: int, total: int):
        self.progress, self.done, self.total = progress, done, total

    def put(self, _: Tensor) -> None:
        self.progress(self.done, self.total)
        self.done += 1

    def end(self) -> None:
        """Do nothing: it is seen by the caller."""


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[str],
    how: TextPreprocess,
    tokenizer: Any,
    tokens: int = 256,
    temperature: float = 0.0,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[str]:
    """Return what a language model writes behind each prompt, without special tokens; see `Adapter.generate`."""
    if isinstance(prompts, str):
        raise DataError(f"prompts must be a list, got the text {prompts!r:.200} alone; put it into one")
    if temperature < 0 or not math.isfinite(temperature):
        raise ConfigError(f"temperature must be 0 or more, got {temperature}")
    chat = isinstance(how, ChatPreprocess)
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    said = [[{"role": "user", "content": one}] for one in prompts]
    texts = [tokenizer.apply_chat_template(one, **options) for one in said] if chat else list(prompts)
    sampled: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    found, device, training = list[str](), next(model.parameters()).device, model.training
    model.eval()
    try:
        starts = range(0, len(texts), batch_size)
        for number, start in enumerate(starts):
            batch = texts[start : start + batch_size]
            ids = [tokenizer(one, add_special_tokens=not chat)["input_ids"] for one in batch]
            most = max(map(len, ids))
            mask = torch.tensor([[0] * (most - len(one)) + [1] * len(one) for one in ids], device=device)
            fill = tokenizer.pad_token_id or 0  # in front, and never looked at
            inputs = torch.tensor([[fill] * (most - len(one)) + one for one in ids], device=device)
            if progress is not None:
                sampled["streamer"] = Counted(progress, number * tokens, len(starts) * tokens)
            ends = {"max_new_tokens": tokens, "pad_token_id": fill}
            written = model.generate(input_ids=inputs, attention_mask=mask, **ends, **sampled)  # type: ignore[operator]
            found += tokenizer.batch_decode(written[:, most:], skip_special_tokens=True)
    finally:
        model.train(training)
    return found
