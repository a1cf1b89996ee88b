"""What the rows that change weights themselves share: training, and what has to be stored."""

from torch import Tensor

from ...backbone.classifier import Classifier, Inputs, to_device
from ...training.checkpoint import FILE
from ...training.dense import train_dense
from ...training.learn import Learn
from .base import Fitted, Predict, Trial, settings_of


def fit_dense(trial: Trial, learn: Learn) -> Fitted:
    """Train what `learn` returns, and a head.

    What was learned is rounded to 2 bytes a number, as it would be stored, before it is measured; statistics and head
    keep 4, as they do beside a mask.
    """
    folder = trial.folder / "training"
    result = train_dense(
        trial.backbone,
        trial.data,
        settings_of(trial, "supervised"),
        learn,
        output=folder,
        resume=(folder / FILE).exists(),
        report=trial.report,
    )
    for parameter in result.learned.values():
        parameter.data.copy_(parameter.data.half())
    classifier = result.classifier
    assert isinstance(classifier, Classifier)
    learned = sum(one.numel() for one in result.learned.values())
    head = sum(one.numel() for one in classifier.linear.parameters())
    statistics = sum(one.numel() for one in result.statistics.values())
    sizes = {"weights": 2 * learned, "statistics": 4 * statistics, "head": 4 * head}
    return Fitted(classified(classifier), learned + head, sizes, result.steps)


def classified(classifier: Classifier) -> Predict:
    """Return what a classifier gives for a batch, on its own device."""
    device = classifier.linear.weight.device

    def predict(inputs: Inputs) -> Tensor:
        logits: Tensor = classifier(to_device(inputs, device))
        return logits.float().cpu()

    return predict
