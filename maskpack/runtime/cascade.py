"""load_cascade: a dispatcher and its experts on one model."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..adapter.content import About, Cascade, Parts
from ..adapter.predict import Batches, Prediction, predict
from ..adapter.read import Adapter
from ..backbone.classifier import Inputs, batch_of, embed_batch, example_count, taken
from ..backbone.model import unwrap
from ..errors import AdapterError, BackboneMismatchError
from ..hub.pull import PullOptions
from .apply import check_masks, masked
from .load import Reference, Verify, check_base, check_choices, decoded_parts, load_adapter, take_off
from .place import Place, find_place, view


@dataclass(slots=True)
class Cost:
    """What a cascade's calls took so far: inputs, forward passes of an input, switches of masks, seconds of both.

    `mask_bytes` is the memory of masks (one bit a weight) and of what is switched beside them.
    """

    inputs: int = 0
    passes: int = 0
    switches: int = 0
    seconds: float = 0.0
    mask_bytes: int = 0

    @property
    def passes_per_input(self) -> float:
        """Forward passes for each input: 2 where a cascade is conditional, else one more than it has experts."""
        return self.passes / self.inputs if self.inputs else 0.0


class LoadedCascade:
    """A model with a dispatcher and experts as masks: one network in memory, and one bit a weight for each of the sets.

    A call puts masks on the model and takes them off again: between calls, and after one that failed, the model is
    what it was, to the bit. While a call runs, nothing else may use the model, in any thread.

    Attributes:
        model: the base. parts: dispatcher, experts, router, and how embeddings are combined.
        class_names: of the head, or None.
        cost: what the calls so far took; set it to `Cost(mask_bytes=cascade.cost.mask_bytes)` to count anew.
    """

    def __init__(self, model: nn.Module, sets: Mapping[str, Parts], parts: Cascade, about: About | None = None):
        self._about, self._sets = about or About(), sets
        self.model, self.parts, self.class_names = model, parts, self._about.class_names
        self.cost = Cost(mask_bytes=sum(one.nbytes + one.device_bytes for one in sets.values()))

    def __repr__(self) -> str:
        return f"LoadedCascade({type(unwrap(self.model)).__name__}, {len(self.parts.experts)} experts, {self.cost})"

    @property
    def features(self) -> int:
        """Length D of the embedding by one set."""
        return len(self.parts.router.whitening.mean)

    def embed(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the combined embeddings of a preprocessed batch, float32 on the CPU.

        They are (B, D (K + 1)): [D, E1, …, EK] with K experts, where blocks of experts that a conditional cascade does
        not ask are zero; (B, F) where the cascade has a reduction. Each expert's masks are put on once at most.
        """
        inputs = batch_of(inputs)
        first = self._embed(self.parts.dispatcher, inputs)
        chosen = self.parts.router.route(first)
        blocks = [first]
        for index, name in enumerate(self.parts.experts):
            block = torch.zeros_like(first)
            rows = (chosen == index).nonzero()[:, 0]
            if self.parts.combine == "unconditional":
                rows = torch.arange(len(first))
            if len(rows):
                block[rows] = self._embed(name, taken(inputs, rows))
            blocks.append(block)
        self.cost.inputs += len(first)
        whole = torch.cat(blocks, dim=1)
        return whole if self.parts.reduction is None else self.parts.reduction(whole)

    def route(self, inputs: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return which expert each input of a batch is for, (B,), and the probability of every expert, (B, K)."""
        posterior = self.parts.router.posterior(self._embed(self.parts.dispatcher, batch_of(inputs)))
        self.cost.inputs += len(posterior)
        return posterior.argmax(1), posterior

    def predict(
        self, inputs: Sequence[Any] | Tensor, *, tokenizer: Any = None, batch_size: int = 64
    ) -> list[Prediction]:
        """Classify inputs; masks are switched for each batch, so that large batches are quick.

        Args:
            inputs: image paths or PIL images; a tensor (B, C, H, W) that is preprocessed already; or texts.
            tokenizer: of a text model; default: the one that the model was loaded with.
        """

        def run(batches: Batches) -> Iterator[Tensor]:
            for batch, _ in batches:
                yield self.logits(batch)

        return predict(
            self.model, inputs, self._about, tokenizer, batch_size, None if self.parts.weight is None else run
        )

    def logits(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the outputs of the cascade's head for a preprocessed batch; AdapterError if it has none."""
        if self.parts.weight is None:
            raise AdapterError("this cascade has no head; compare its embeddings, as `maskpack cascade eval` does")
        bias = None if self.parts.bias is None else self.parts.bias.float()
        return nn.functional.linear(self.embed(inputs), self.parts.weight.float(), bias)

    @contextmanager
    def loaded(self, name: str) -> Iterator[None]:
        """Give the model with the masks of one set on it; afterwards it is as before, to the bit."""
        with masked(self.model, self._sets[name], name):
            self.cost.switches += 1
            yield

    def _embed(self, name: str, inputs: Inputs) -> Tensor:
        """Return the embeddings of a batch by one set, (B, D) float32 on the CPU."""
        if example_count(inputs) == 0:
            return torch.zeros(0, self.features)
        started = time.perf_counter()
        with self.loaded(name):
            x = embed_batch(self.model, self.parts.embedding, inputs)
        if x.shape[1] != self.features:
            raise BackboneMismatchError(
                f"the model gives embeddings of {x.shape[1]} features, the router expects {self.features}; load the "
                "cascade's base"
            )
        self.cost.passes += len(x)
        self.cost.seconds += time.perf_counter() - started
        return x


def load_cascade(
    model: nn.Module, ref: Reference | Adapter, *, verify: Verify = "strict", **options: Unpack[PullOptions]
) -> LoadedCascade:
    """Decode the masks of a cascade for a model; what is loaded on the model is unloaded, and nothing else changed.

    The model stays the only network in memory; masks are kept as one bit a weight. Arguments and errors as of
    `load_mask`; where the adapter's names stand in a part of the model, the cascade's model is that part.

    Example:
        cascade = load_cascade(model, "./my-cascade")
        print(cascade.embed(images).shape, cascade.cost)
    """
    check_choices(verify)
    unwrap(model)  # a wrong argument is told before anything is fetched
    adapter = ref if isinstance(ref, Adapter) else load_adapter(ref, **options)
    parts = adapter.cascade
    if parts is None:
        what = "one mask set" if len(adapter.sets) == 1 else f"{len(adapter.sets)} mask sets without a router"
        raise AdapterError(
            f"{adapter.path} is no cascade, it has {what}; use load_mask, or `maskpack eval` and `maskpack predict`"
        )
    take_off(model)
    shapes = {name: shape for own in adapter.sets for name, shape in adapter.shapes(own).items()}
    place = find_place(model, adapter.base, shapes)
    base, model, place = view(model, place), unwrap(model).get_submodule(place.add), Place(place.strip)
    for name in adapter.sets:
        check_masks(base, adapter.shapes(name))
    check_base(base, adapter.base, verify, stacklevel=4)
    module = parts.embedding.module
    if module is not None and module not in dict(unwrap(model).named_modules()):
        raise BackboneMismatchError(
            f"the model has no {module!r}, whose input the cascade takes; load it with its head"
        )
    sets = {name: place.parts(replace(decoded_parts(adapter, base, name), head=None)) for name in adapter.sets}
    return LoadedCascade(model, sets, parts, adapter.about)
