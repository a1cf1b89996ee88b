"""Selection of the parameters to mask, by globs on dotted names."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import SelectionError
from .model import aliases, canonical, inside, named_parameters, unusable, unwrap

_LINEAR = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)


def _default_names(model: nn.Module, head: Sequence[str], experts: bool) -> list[str]:
    """Return weights of convolutions and linear layers, but for head, pooler and what is tied to an embedding.

    With `experts` also those of experts that are one parameter of three dimensions.
    """
    first = aliases(model)
    names, embeddings = [], set()
    for raw, module in unwrap(model).named_modules(remove_duplicate=False):
        prefix = f"{canonical(raw)}." if raw else ""
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings.add(first[prefix + "weight"])
        # transformers' Conv1D is a linear layer with a transposed weight
        elif isinstance(module, _LINEAR) or type(module).__name__ == "Conv1D":
            names.append(prefix + "weight")
        elif experts and ("Expert" in type(module).__name__ or raw.rpartition(".")[2] == "experts"):
            names += [prefix + name for name, one in module._parameters.items() if one is not None and one.ndim == 3]
        elif isinstance(module, nn.MultiheadAttention):
            names += [prefix + n for n in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")]
    return [
        name
        for name in names
        if name in first
        and first[name] not in embeddings
        and not inside(name, head)
        and "pooler" not in name.split(".")
    ]


def _match(patterns: Iterable[str], names: Sequence[str], option: str) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern.replace("*", ""), names, n=5, cutoff=0.3) or names[:5]
            raise SelectionError(
                f"{option} {pattern!r} matches none of {len(names)} parameters; the nearest are: {', '.join(near)}"
            )
        matched.update(found)
    return matched


def match_parameters(model: nn.Module, patterns: Iterable[str], head: Sequence[str] = ()) -> list[str]:
    """Return the names of the body's parameters that match the globs of `train`, sorted; of tied ones the first.

    A pattern that matches nothing is a SelectionError.
    """
    first = aliases(model)
    return sorted({first[name] for name in _match(patterns, [n for n in first if not inside(n, head)], "train")})


def select_parameters(
    model: nn.Module,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    head: Sequence[str] = (),
    experts: bool = True,
) -> list[str]:
    """Return the names of the parameters to mask, sorted; of tied ones the first.

    Args:
        include, exclude: globs on dotted names (`*` also matches dots); default: every convolution and linear weight of
            the body, without embeddings and pooler.
        head: modules that are not part of the body.
        experts: weights of experts that are fused into one parameter are among the default.
    """
    parameters, first = named_parameters(model), aliases(model)
    names = list(parameters)
    if not names:
        raise SelectionError("the model has no parameters to mask; mask a quantised model before it is quantised")
    include, exclude = list(include), list(exclude)
    chosen = _match(include, names, "include") if include else set(_default_names(model, head, experts))
    found = sorted({first[name] for name in chosen - _match(exclude, names, "exclude")})
    if not found:
        raise SelectionError(
            f"no parameter is left to mask of {len(names)}, first {', '.join(names[:5])}: include "
            f"{include or 'default'}, exclude {exclude}"
        )
    for name in found:
        if why := unusable(parameters[name]):
            raise SelectionError(f"{name!r} {why}; or leave it out with exclude")
    return found
