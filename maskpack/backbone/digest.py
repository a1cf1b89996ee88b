"""What a model computes with, as one digest: the same digest means the same features for the same inputs."""

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import nn
from torch.nn.utils import parametrize

from .parameters import canonical, inside, unwrap


def model_digest(model: nn.Module, outside: Iterable[str] = ()) -> str | None:
    """Return the BLAKE3 of what a model computes with, in evaluation mode, outside of the modules `outside`.

    A fingerprint tells bases apart; this tells apart whatever may change an output: every parameter and buffer in its
    own bits (integers and buffers that are not saved included), the modules with their settings, and the source of
    their classes. None while scores are attached, weights are parametrized otherwise, or a module has hooks: what those
    compute is in none of these.
    """
    model, outside = unwrap(model), tuple(outside)
    for module in model.modules():
        if parametrize.is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
    whole = blake3(torch.__version__.encode())
    sources = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if not inside(canonical(name), outside):
            settings = {key: text for key, value in vars(module).items() if (text := _setting(value)) is not None}
            settings.pop("training", None)
            _add(whole, "module", canonical(name), type(module).__qualname__, json.dumps(settings, sort_keys=True))
            sources.add(_source(type(module)))
    for kind, tensors in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in tensors:
            if not inside(canonical(name), outside):
                _add(whole, kind, canonical(name), str(tensor.dtype), str(tuple(tensor.shape)))
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                whole.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    _add(whole, *sorted(sources))
    return whole.hexdigest()


def _add(whole: blake3, *texts: str) -> None:
    for text in texts:
        whole.update(text.encode() + b"\0")


def _setting(value: Any) -> str | None:
    """An attribute of a module as text: numbers, words, functions, tuples of them, configurations of transformers."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    if isinstance(value, tuple | list):
        parts = [_setting(one) for one in value]
        return None if None in parts else repr(parts)
    if hasattr(value, "to_json_string"):
        return str(value.to_json_string())
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name is not None else None


def _source(cls: type) -> str:
    """The BLAKE3 of the file that defines a class; its name where there is no file."""
    try:
        return blake3().update_mmap(Path(inspect.getfile(cls))).hexdigest()
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"
