"""Linear probe: multinomial logistic regression on frozen features, the row to compare a mask with."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DataError

PENALTY = 0.01  # times 1 / n: see docs/methods.md, evaluation
ABSENT = -1e30  # the logit of a class without a training row: below all others, and finite
STEPS = 2000  # at most; some hundred are enough


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A linear classifier of features: weight (classes, D) and bias (classes,), float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of features (N, D), (N, classes)."""
        return x @ self.weight.T + self.bias

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Return the share of features (N, D) that get their label (N,)."""
        return float((self.logits(x).argmax(1) == y).double().mean())


def fit_probe(x: Tensor, y: Tensor, classes: int) -> Probe:
    """Return the one minimum of mean cross-entropy + PENALTY / (2 n) * sum of the squared weights; the bias is free.

    A convex solve, so there is no learning rate and no seed. L-BFGS in float64, on features that are centred and made
    nearly white: another basis of the same problem, in which it takes a hundred steps where it takes thousands in the
    features' own. A class without a row is left out, and gets weights of 0 and the logit `ABSENT`.

    Args:
        x: features, (n, D), as they are. y: (n,), each from 0 to classes - 1.

    Raises:
        DataError: if there is no row, or a feature is not finite.
    """
    if len(x) == 0 or not torch.isfinite(x).all():
        raise DataError(f"a linear probe needs finite features of at least one row, got {len(x)} rows")
    present, target = torch.unique(y, return_inverse=True)
    n, penalty = len(x), PENALTY / len(x)
    mean = x.double().mean(0)
    z = x.double() - mean
    basis: Tensor | None = None
    if n < z.shape[1]:  # the minimum lies in the span of the rows
        basis, rotated = torch.linalg.qr(z.T)
        z = rotated.T
    # about the Hessian, where a confident classifier leaves a hundredth of it to the penalty; its scale does not matter
    hessian = z.T @ z / n
    hessian.diagonal().add_(100 * len(present) * penalty + 1e-10 * hessian.diagonal().mean())
    root = torch.linalg.cholesky(hessian)
    white = torch.linalg.solve_triangular(root, z.T, upper=False).T.contiguous()
    del z, hessian
    v = torch.zeros(len(present), white.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(len(present), dtype=torch.float64, requires_grad=True)

    def weights() -> Tensor:
        w: Tensor = torch.linalg.solve_triangular(root, v, upper=False, left=False)
        return w

    optimizer = torch.optim.LBFGS(
        [v, b], max_iter=STEPS, max_eval=2 * STEPS, tolerance_grad=1e-7, tolerance_change=1e-12, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(white @ v.T + b, target) + penalty / 2 * weights().square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        w = weights() if basis is None else weights() @ basis.T
        weight = torch.zeros(classes, x.shape[1])
        bias = torch.full((classes,), ABSENT)
        weight[present] = w.float()
        bias[present] = (b - w @ mean).float()
    return Probe(weight, bias)
