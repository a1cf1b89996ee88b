"""Weighted k-nearest-neighbour classification of frozen features (https://arxiv.org/abs/1805.01978, section 3.4)."""

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError

CHUNK = 1 << 24  # similarities in memory at one time


def knn_scores(
    bank: Tensor, bank_labels: Tensor, x: Tensor, classes: int, k: int = 200, temperature: float = 0.1
) -> Tensor:
    """Return each class's share of the vote of the k bank rows with the greatest cosine, (N, classes) float32.

    A neighbour votes for its class with the weight exp(cosine / temperature). Where the bank has fewer than k rows, all
    vote. Of bank rows with equal cosines at the edge of the k, which of them vote is not defined.

    Args:
        bank: (M, D). bank_labels: (M,). x: (N, D), rows that are not in the bank.

    Raises:
        ConfigError: if k is below 1 or the temperature not above 0.
        DataError: if the bank is empty, or its rows and `x` have not the same number of features.
    """
    if k < 1 or temperature <= 0:
        raise ConfigError(f"k must be at least 1 and the temperature above 0; got k={k}, temperature={temperature}")
    if len(bank) == 0 or bank.shape[1:] != x.shape[1:]:
        raise DataError(
            f"the nearest neighbours of features of shape {tuple(x.shape)} are looked for in a bank of shape "
            f"{tuple(bank.shape)}; expected as many features, and at least one row"
        )
    # divided out of the products: a bank of many gigabytes is not copied
    lengths = bank.norm(dim=1).clamp(min=torch.finfo(bank.dtype).tiny)
    scores = torch.zeros(len(x), classes)
    rows = max(1, CHUNK // len(bank))
    for start in range(0, len(x), rows):
        queries = nn.functional.normalize(x[start : start + rows], dim=1)
        cosines, neighbours = (queries @ bank.T / lengths).topk(min(k, len(bank)))
        # relative to the greatest: a low temperature overflows otherwise, and shares are the same
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        scores[start : start + rows].scatter_add_(1, bank_labels[neighbours], weights)
    return scores / scores.sum(1, keepdim=True)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, x: Tensor, y: Tensor, classes: int, k: int = 200, temperature: float = 0.1
) -> float:
    """Return the share of rows of `x` whose label has the greatest vote; of equal votes the first class counts.

    Arguments and errors are those of `knn_scores`; y: (N,).
    """
    predicted = knn_scores(bank, bank_labels, x, classes, k, temperature).argmax(1)
    return float((predicted == y).double().mean())
