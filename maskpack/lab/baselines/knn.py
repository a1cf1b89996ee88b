"""Nearest neighbours."""

from typing import ClassVar

from torch import Tensor

from ...backbone.classifier import Inputs
from ...training.features import knn_scores
from .base import ROWS, Fitted, Row, Trial


@ROWS.register
class Knn(Row):
    """Nearest neighbours of the frozen features: k 200, cosine, temperature 0.1; the bank is stored."""

    id: ClassVar[str] = "knn"
    reference: ClassVar[str] = "https://arxiv.org/abs/1805.01978"
    seeded: ClassVar[bool] = False

    def fit(self, trial: Trial) -> Fitted:
        x, y = trial.embed()

        def predict(inputs: Inputs) -> Tensor:
            return knn_scores(x, y, trial.features(inputs), trial.classes)

        return Fitted(predict, 0, {"bank": x.nbytes + y.nbytes})
