"""A mask trained without labels."""

from collections.abc import Mapping
from typing import ClassVar

from ...runtime.load import load_mask
from ...training.features import fit_probe
from ...training.objectives.base import SELF_SUPERVISED
from .base import RATES, ROWS, Fitted, Row, Trial, learned, settings_of, stored, train


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
            (result.about.training or {})["steps"],
        )
