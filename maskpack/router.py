"""The router of a cascade: from an embedding to the expert for it, by plain tensors. Fitting is in `training`."""

from dataclasses import dataclass

import torch
from torch import Tensor

WHITENING, MIXTURE = ("mean", "components", "scale"), ("weights", "means", "precisions")  # tensors, in their order


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """Principal components over their standard deviations: of the rows that it was fitted to, all have variance 1.

    Attributes:
        mean: (D,), which is subtracted first.
        components: (F, D), the directions.
        scale: (F,), standard deviations along them, above 0.
    """

    mean: Tensor
    components: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the coordinates (B, F) of embeddings (B, D), in their dtype and on their device."""
        return (x - self.mean.to(x)) @ self.components.to(x).T / self.scale.to(x)


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """A Gaussian mixture over whitened embeddings; an embedding goes to the component that most likely made it.

    Attributes:
        whitening: of embeddings divided by their Euclidean norm, D to q coordinates.
        weights: (K,), shares of the components, which sum to 1.
        means: (K, q).
        precisions: (K, q, q), upper triangular; P of a component with the inverse covariance P Pᵀ.
    """

    whitening: Whitening
    weights: Tensor
    means: Tensor
    precisions: Tensor

    def coordinates(self, x: Tensor) -> Tensor:
        """Return where embeddings (B, D) lie, (B, q), float64 on the CPU."""
        return self.whitening(torch.nn.functional.normalize(x.detach().cpu().double(), dim=1))

    def posterior(self, x: Tensor) -> Tensor:
        """Return the probability of each component for embeddings (B, D): (B, K), float64 on the CPU.

        A component's log density is log |P| - |(z - mean) P|² / 2, less a constant; densities are weighted.
        """
        z = self.coordinates(x)
        means, precisions = self.means.double(), self.precisions.double()
        volumes = precisions.diagonal(dim1=1, dim2=2).log().sum(1) + self.weights.double().log()
        # one component after another: K differences of (B, q) at a time would be much for large batches
        distances = [((z - mean) @ factor).square().sum(1) for mean, factor in zip(means, precisions, strict=True)]
        return (volumes - 0.5 * torch.stack(distances, dim=1)).softmax(1)

    def route(self, x: Tensor) -> Tensor:
        """Return the most likely component of embeddings (B, D): (B,), int64 on the CPU."""
        return self.posterior(x).argmax(1)
