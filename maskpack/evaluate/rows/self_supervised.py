"""A mask trained without labels."""

from collections.abc import Mapping
from typing import ClassVar

from ...apply.load import load_mask
from ...training.objectives.base import SELF_SUPERVISED
from ..linear_probe import fit_probe
from .base import ROWS, Fitted, Row, Trial, settings_of
from .masked import RATES, learned, stored, train


@ROWS.register
class SelfSupervisedMask(Row):
    """Mask trained without labels on all training rows, and a linear probe of its features on the labels."""

    id: ClassVar[str] = "self-supervised"
    reference: ClassVar[str] = "Self-Masking Networks, section 3"
    needs_labels: ClassVar[bool] = False
    rates: ClassVar[Mapping[str, tuple[float, ...]]] = RATES

    def fit(self, trial: Trial) -> Fitted:
        result, adapter = train(trial, settings_of(trial, SELF_SUPERVISED), labelled=False)
        load_mask(trial.backbone.model, adapter)
        x, y = trial.embed()
        probe = fit_probe(x, y, trial.classes)
        head = probe.weight.numel() + probe.bias.numel()
        return Fitted(
            lambda inputs: probe.logits(trial.features(inputs)),
            learned(result.parts) + head,
            {**stored(adapter), "head": 4 * head},
            result.about["training"]["steps"],
        )
