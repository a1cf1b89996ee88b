"""Fitting what routes a cascade: principal components and a Gaussian mixture, kept as plain tensors."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError, require
from ..router import Router, Whitening

COORDINATES = 20  # of the router at most: see docs/methods.md, cascades
STARTS = 5  # of the mixture's optimisation, the best of which is kept
LEAST = 1e-5  # standard deviations below this share of the first are rounding errors
WIDEST = 4096  # features up to which components are computed exactly


def fit_whitening(x: Tensor, most: int, seed: int = 0) -> Whitening:
    """Return the principal components of embeddings (N, D) with unit variance along each, at most `most` of them.

    Fewer where N or the rank of the embeddings are less. The variance is 1 and not 1 / N, as it is where singular
    vectors themselves are taken for coordinates, so that constants of other methods (the covariance that a mixture
    adds, the penalty of a probe) mean what they mean for raw features.

    Raises:
        TrainingError: if all embeddings are alike.
    """
    decomposition = require("sklearn.decomposition", "train", "principal components")
    size, spread = float(x.double().square().mean().sqrt()), float(x.double().var(0).mean().sqrt())
    if len(x) < 2 or not spread > LEAST * size:
        raise TrainingError(
            f"the embeddings of {len(x)} training rows are all alike (root mean square {size:.1e}, standard deviation "
            f"{spread:.1e}): the masks have collapsed; lower the learning rate, or change the objective's options"
        )
    count = min(most, x.shape[1], len(x) - 1)
    exact = x.shape[1] <= WIDEST or count >= 0.8 * min(x.shape)
    options = {"svd_solver": "covariance_eigh"} if exact else {"svd_solver": "randomized", "iterated_power": 10}
    found = decomposition.PCA(count, random_state=seed, **options).fit(x.double().numpy())
    scale = torch.from_numpy(found.explained_variance_).clamp(min=0).sqrt()
    kept = scale > LEAST * scale[0]
    mean, components = torch.from_numpy(found.mean_), torch.from_numpy(found.components_)
    return Whitening(mean.float(), components[kept].float(), scale[kept].float())


def fit_mixture(z: Tensor, experts: int, seed: int) -> Any:
    """Return scikit-learn's Gaussian mixture with full covariances of coordinates (N, q)."""
    mixture = require("sklearn.mixture", "train", "the router of a cascade")
    exceptions = require("sklearn.exceptions", "train", "the router of a cascade")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)  # `converged_` says it
        return mixture.GaussianMixture(experts, n_init=STARTS, max_iter=500, random_state=seed).fit(z.numpy())


def router_of(whitening: Whitening, mixture: Any) -> Router:
    """Return a fitted mixture as a router, without scikit-learn."""
    values = (mixture.weights_, mixture.means_, mixture.precisions_cholesky_)
    weights, means, precisions = (torch.from_numpy(value).float() for value in values)
    return Router(whitening, weights, means, precisions.triu())


def fit_router(x: Tensor, experts: int, seed: int) -> tuple[Router, dict[str, Any]]:
    """Fit the router of a cascade to embeddings (N, D); return it with what the fit shows.

    There are at most sqrt(N / experts) coordinates: a covariance has about q² / 2 numbers, which a cluster must tell.

    Raises:
        TrainingError: if all embeddings are alike.
    """
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    whitening = fit_whitening(unit, max(1, min(COORDINATES, math.isqrt(len(x) // experts))), seed)
    z = whitening(unit)
    mixture = fit_mixture(z, experts, seed)
    explained = min(1.0, float(whitening.scale.double().square().sum() / unit.var(0).sum()))
    about = {
        "coordinates": z.shape[1],
        "explained_variance": explained,
        "log_likelihood": float(mixture.score(z.numpy())),
        "converged": bool(mixture.converged_),
    }
    return router_of(whitening, mixture), about
