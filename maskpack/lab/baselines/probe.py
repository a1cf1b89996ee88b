"""Linear probe."""

from typing import ClassVar

from ...training.features import fit_probe
from .base import ROWS, Fitted, Row, Trial


@ROWS.register
class LinearProbe(Row):
    """Linear probe of the frozen features, a convex problem without a learning rate."""

    id: ClassVar[str] = "probe"
    reference: ClassVar[str] = "https://arxiv.org/abs/1610.01644"
    seeded: ClassVar[bool] = False

    def fit(self, trial: Trial) -> Fitted:
        x, y = trial.embed()
        probe = fit_probe(x, y, trial.classes)
        count = probe.weight.numel() + probe.bias.numel()
        return Fitted(lambda inputs: probe.logits(trial.features(inputs)), count, {"head": 4 * count})
