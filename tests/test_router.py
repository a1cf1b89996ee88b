"""The router: plain tensors that say what scikit-learn's mixture says."""

import numpy as np
import pytest
import torch
from torch import Tensor

from maskpack.adapter.content import Router

from .helpers_cascade import router


def by_hand(one: Router, x: Tensor) -> list[list[float]]:
    """Weighted normal densities from covariances, row by row."""
    found = []
    for row in x.double():
        z = (row / row.norm() - one.whitening.mean.double()) @ one.whitening.components.double().T
        z = z / one.whitening.scale.double()
        densities = []
        for weight, mean, factor in zip(one.weights, one.means, one.precisions, strict=True):
            covariance = torch.linalg.inv(factor.double() @ factor.double().T)
            normal = torch.distributions.MultivariateNormal(mean.double(), covariance)
            densities.append(float(weight.double() * normal.log_prob(z).exp()))
        found.append([density / sum(densities) for density in densities])
    return found


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_posterior_by_hand(experts: int) -> None:
    one = router(6, experts, seed=experts)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    expected = torch.tensor(by_hand(one, x), dtype=torch.float64)
    assert torch.allclose(one.posterior(x), expected, atol=1e-9)
    assert torch.equal(one.route(x), expected.argmax(1))
    assert torch.equal(one.route(7 * x), one.route(x)), "embeddings are divided by their norm"
    assert one.posterior(x).shape == (40, experts)


def test_odd_embeddings_have_an_expert() -> None:
    one = router(6, 3)
    for x in (torch.zeros(1, 6), torch.full((1, 6), 1e30), torch.full((1, 6), 1e-30)):
        assert 0 <= int(one.route(x)) < 3
        assert float(one.posterior(x).sum()) == pytest.approx(1)
    assert one.route(torch.zeros(0, 6)).shape == (0,)
    far = Router(one.whitening, one.weights, one.means + 1e4, one.precisions)
    assert bool(far.posterior(torch.randn(5, 6)).isfinite().all()), "densities that underflow"


def test_half_precision_embeddings_are_routed_in_double() -> None:
    one = router(6, 3)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    assert torch.equal(one.route(x), one.route(x.double()))
    assert np.asarray(one.coordinates(x)).dtype == np.float64
