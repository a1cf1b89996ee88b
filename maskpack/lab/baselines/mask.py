"""A mask trained with labels."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from ...backbone.classifier import classifier_from
from ...backbone.load import Backbone
from ...backbone.select import select_parameters
from ...runtime.load import load_mask
from ...training.config import TrainConfig
from ...training.methods.base import METHODS, build_method
from .base import ROWS, Fitted, Row, Trial, classified, learned, settings_of, stored, train


@ROWS.register
class SupervisedMask(Row):
    """Mask trained with labels, by a method (default: the one of the settings), and a head."""

    id: ClassVar[str] = "mask"
    reference: ClassVar[str] = "https://arxiv.org/abs/1801.06519"
    argument: ClassVar[str | None] = "method"
    rates: ClassVar[Mapping[str, tuple[float, ...]]] = {"adam": (0.01, 0.02, 0.05), "sgd": (10.0, 25.0, 60.0)}

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        config = self._settings(config)
        build_method(config.method, dict(config.method_options))
        select_parameters(backbone.model, config.include, config.exclude, backbone.outside)

    def fit(self, trial: Trial) -> Fitted:
        result, adapter = train(trial, self._settings(settings_of(trial, "supervised")), labelled=True)
        head = result.parts.head
        assert head is not None
        load_mask(trial.backbone.model, adapter)
        count = learned(result.parts) + sum(t.numel() for t in (head.weight, head.bias) if t is not None)
        predict = classified(classifier_from(trial.backbone.model, head).eval())
        return Fitted(predict, count, stored(adapter), (result.about.training or {})["steps"])

    def _settings(self, config: TrainConfig) -> TrainConfig:
        """Return settings with the row's method; options are those of the settings' own method."""
        if self.given is None or self.given == config.method:
            return config
        return replace(config, method=METHODS[self.given].id, method_options={})
