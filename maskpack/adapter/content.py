"""What an adapter holds: the parts of each mask set, a cascade of the sets, and what it says about them.

torch is imported where something is computed, so that an adapter is described without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from ..backbone.model import Embedding, Fingerprint, Head
from ..backbone.shards import whole
from ..errors import BackboneMismatchError, brief, short_repr
from ..mask import MaskSet
from .steps import Norm
from .values import Steps

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """One mask set of an adapter: its masks, and the tensors stored with them (head, statistics, parameters).

    Attributes:
        masks: by parameter name.
        head: None if the model's own stays.
        statistics: BatchNorm buffers by name, float32.
        parameters: trained parameters that are stored whole, by name.
        values: for masks with op "replace": the values for the zeros of the mask, row-major, by parameter name; of an
            adapter that was read perhaps as steps from the base's.
        norms: by the name of a normalisation layer, how its weight and bias differ from the base's.

    Example:
        parts = Parts(masks, Head(Embedding("fc"), torch.zeros(5, 16)), statistics={"bn1.running_mean": torch.zeros(8)})
        save_adapter("./with-head", parts, fingerprint(model, id="my-network", head="fc"))
    """

    masks: MaskSet
    head: Head | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor | Steps] = field(default_factory=dict)
    norms: Mapping[str, Norm] = field(default_factory=dict)

    def __repr__(self) -> str:
        head = [] if self.head is None else [f"head {brief(self.head.weight)}"]
        counts = {name: len(getattr(self, name)) for name in ("statistics", "parameters", "values", "norms")}
        beside = [*head, *(f"{count} {name}" for name, count in counts.items() if count)]
        return f"Parts({', '.join([repr(self.masks), *beside])})"

    def resolved(self, base: Mapping[str, Tensor]) -> Parts:
        """Return these parts with norms as parameters, computed from the tensors of the base, by name."""
        found = dict(self.parameters)
        for name, norm in self.norms.items():
            weight, bias = f"{name}.weight", f"{name}.bias"
            if weight not in base or (norm.shift is not None and bias not in base):
                raise BackboneMismatchError(f"the model has no normalisation layer {name!r}, which the adapter changes")
            if any(base[n].shape != norm.scale.shape for n in (weight, bias) if n in base):
                raise BackboneMismatchError(f"the model's layer {name!r} has not {norm.scale.size} channels")
            new, shifted = norm.values(whole(base[weight]), whole(base.get(bias)))
            found[weight] = new
            if shifted is not None:
                found[bias] = shifted
        return replace(self, parameters=found, norms={})

    @property
    def dense(self) -> dict[str, Tensor]:
        """Statistics and parameters: what takes the place of the model's tensors of these names, beside `norms`."""
        return {**self.statistics, **self.parameters}

    @property
    def nbytes(self) -> int:
        """Memory of the masks on the host, at a bit a weight, and of the tensors beside them."""
        packed = sum(mask.nbytes for mask in self.masks.values())
        head = () if self.head is None else (self.head.weight, self.head.bias)
        tensors = [*self.dense.values(), *self.values.values(), *(one for one in head if one is not None)]
        norms = sum(one.scale.nbytes + (0 if one.shift is None else one.shift.nbytes) for one in self.norms.values())
        return packed + norms + sum(int(tensor.nbytes) for tensor in tensors)

    @property
    def device_bytes(self) -> int:
        """Memory of those masks that were decoded on a device, there."""
        return sum(mask.there.nbytes for mask in self.masks.values() if mask.there is not None)


@dataclass(frozen=True, slots=True)
class About:
    """Description of an adapter: task, classes, preprocessing, training record; None where a field is unknown.

    Attributes:
        task: the Hub's name of what the network does, as in "image-classification".
        class_names: one for each row of the head. preprocess: how inputs are prepared, with a `kind`.
        training: the training record.
        result: of a patch, the digests of the body that it makes, as `Fingerprint.digests`.
    """

    task: str | None = None
    class_names: tuple[str, ...] | None = None
    preprocess: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    result: Mapping[str, str] | None = None

    __repr__ = short_repr


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """Result of training a model: the learned parts, the base's fingerprint and the base's tensors by name (`weights`).

    Of several processes that share the model all have it, and one `writes` it.
    """

    parts: Parts
    base: Fingerprint
    weights: Mapping[str, Tensor]
    writes: bool = True

    __repr__ = short_repr


# Models that learn, and what reads off them what they learned; given the id of the base, if that is known. Training
# enters them, which is above this stage.
LEARNING: WeakKeyDictionary[nn.Module, Callable[[nn.Module, str | None], Learned]] = WeakKeyDictionary()


class Figure(NamedTuple):
    """A measure of quality: `sign` is 1 if greater is better, else -1; `baseline` names what it is compared with."""

    sign: int
    baseline: str
    words: str


# by name; a split has it as SPLIT_NAME, and that of the baseline as SPLIT_BASELINE_NAME
FIGURES: Mapping[str, Figure] = {
    "accuracy": Figure(1, "probe", "a linear probe of the raw backbone"),
    "r2": Figure(1, "probe", "a linear probe of the raw backbone"),
    "perplexity": Figure(-1, "raw", "the raw model"),
}
# the Hub's names for what a network of a task does without its head
FEATURES = {"image-classification": "image-feature-extraction", "text-classification": "feature-extraction"}
WHITENING, MIXTURE = ("mean", "components", "scale"), ("weights", "means", "precisions")  # tensors, in their order
Combine = Literal["conditional", "unconditional"]
COMBINES: tuple[Combine, ...] = ("conditional", "unconditional")


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """Principal components: mean (D,), directions (F, D), and standard deviations along them (F,), all above 0."""

    mean: Tensor
    components: Tensor
    scale: Tensor

    __repr__ = short_repr

    def __call__(self, x: Tensor) -> Tensor:
        """Return the coordinates (B, F) of embeddings (B, D), in their dtype and on their device."""
        return (x - self.mean.to(x)) @ self.components.to(x).T / self.scale.to(x)


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """Router of a cascade: a Gaussian mixture over whitened embeddings, one component for each expert.

    Attributes:
        whitening: of embeddings divided by their Euclidean norm, D to q coordinates.
        weights: (K,), shares of the components, which sum to 1. means: (K, q).
        precisions: (K, q, q), upper triangular; P of a component with the inverse covariance P Pᵀ.
    """

    whitening: Whitening
    weights: Tensor
    means: Tensor
    precisions: Tensor

    __repr__ = short_repr

    def coordinates(self, x: Tensor) -> Tensor:
        """Return where embeddings (B, D) lie, (B, q), float64 on the CPU."""
        from torch.nn.functional import normalize

        return self.whitening(normalize(x.detach().cpu().double(), dim=1))

    def posterior(self, x: Tensor) -> Tensor:
        """Return the probability of each component for embeddings (B, D): (B, K), float64 on the CPU.

        A component's log density is log |P| - |(z - mean) P|² / 2, less a constant; densities are weighted.
        """
        import torch

        z = self.coordinates(x)
        means, precisions = self.means.double(), self.precisions.double()
        volumes = precisions.diagonal(dim1=1, dim2=2).log().sum(1) + self.weights.double().log()
        # one component after another: K differences of (B, q) at a time would be much for large batches
        distances = [((z - mean) @ factor).square().sum(1) for mean, factor in zip(means, precisions, strict=True)]
        return (volumes - 0.5 * torch.stack(distances, dim=1)).softmax(1)

    def route(self, x: Tensor) -> Tensor:
        """Return the most likely component of embeddings (B, D): (B,), int64 on the CPU."""
        return self.posterior(x).argmax(1)


@dataclass(frozen=True, slots=True, eq=False)
class Cascade:
    """A cascade of mask sets: the dispatcher's embedding decides which expert embeds the input once more.

    The combined embedding is [D, E1, …, EK], of the dispatcher and every expert, (K + 1) times as long as one.

    Attributes:
        dispatcher: name of the set whose embeddings are routed.
        experts: names of the other sets, one for each component of the router, in its order.
        embedding: what of the model an embedding is.
        combine: "conditional": blocks of experts other than the routed one are zero, so that an input takes two passes;
            "unconditional": every block is computed.
        reduction: of combined embeddings to fewer numbers, or None.
        weight, bias: of a linear head on the combined (and, if so, reduced) embedding, or None.
    """

    dispatcher: str
    experts: tuple[str, ...]
    embedding: Embedding
    router: Router
    combine: Combine = "conditional"
    reduction: Whitening | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    __repr__ = short_repr
