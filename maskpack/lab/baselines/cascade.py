"""A cascade trained without labels."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from ...adapter.content import Whitening
from ...adapter.read import Adapter
from ...backbone.classifier import Inputs
from ...backbone.load import Backbone
from ...runtime.cascade import LoadedCascade, load_cascade
from ...training.cascade import DISPATCHER, costs, fit_cascade_head, fit_whitening, train_cascade
from ...training.checkpoint import FILE
from ...training.config import TrainConfig
from ...training.features import fit_probe
from ...training.objectives.base import SELF_SUPERVISED
from .base import RATES, ROWS, Fitted, Row, Trial, settings_of, stored, write

EXPERTS = 5
WHITENED = f"{DISPATCHER}, whitened"


@ROWS.register
class ConditionalCascade(Row):
    """Dispatcher and experts trained without labels, and a linear probe of the conditional embeddings."""

    id: ClassVar[str] = "cascade"
    reference: ClassVar[str] = "Self-Masking Networks, section 3.4"
    argument: ClassVar[str | None] = "number of experts"
    needs_labels: ClassVar[bool] = False
    rates: ClassVar[Mapping[str, tuple[float, ...]]] = RATES

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        self.number(EXPERTS, least=2)

    def fit(self, trial: Trial) -> Fitted:
        folder = trial.folder / "training"
        result = train_cascade(
            trial.backbone,
            trial.unlabelled,
            settings_of(trial, SELF_SUPERVISED),
            experts=self.number(EXPERTS, least=2),
            output=folder,
            resume=(folder / DISPATCHER / FILE).exists(),
            report=trial.report,
        )
        result = fit_cascade_head(trial.backbone, trial.data, result, batch_size=trial.config.batch_size)
        adapter = write(trial, result.parts, result.base, result.about, result.cascade)
        cascade = load_cascade(trial.backbone.model, adapter)
        weight, bias = cascade.parts.weight, cascade.parts.bias
        assert weight is not None
        assert bias is not None

        def predict(inputs: Inputs) -> Tensor:
            return nn.functional.linear(cascade.embed(inputs), weight, bias)

        masked = sum(parts.masks.total for parts in result.parts.values())
        steps = sum((result.about.training or {})["cascade"]["steps"].values())
        with cascade.loaded(DISPATCHER):
            x, y = trial.embed()
        trained = result.parts[DISPATCHER].masks.total
        controls = {
            DISPATCHER: _dispatcher(trial, cascade, adapter, x, y, None, trained),
            WHITENED: _dispatcher(trial, cascade, adapter, x, y, fit_whitening(x, x.shape[1]), trained),
        }
        return Fitted(predict, masked + weight.numel() + bias.numel(), stored(adapter), steps, controls)


def _dispatcher(
    trial: Trial,
    cascade: LoadedCascade,
    adapter: Adapter,
    x: Tensor,
    y: Tensor,
    whitening: Whitening | None,
    masked: int,
) -> Fitted:
    """Fit a probe to embeddings by the dispatcher alone, (N, D), raw or whitened."""
    probe = fit_probe(x if whitening is None else whitening(x), y, trial.classes)

    def predict(inputs: Inputs) -> Tensor:
        with cascade.loaded(DISPATCHER):
            features = trial.features(inputs)
        return probe.logits(features if whitening is None else whitening(features))

    count = probe.weight.numel() + probe.bias.numel()
    found = costs(adapter, "dispatcher", x.shape[1], 0 if whitening is None else probe.weight.shape[1], trial.classes)
    steps = found.pop("steps")
    sizes = {what.removesuffix("_bytes"): size for what, size in found.items() if what != "bytes" and size}
    return Fitted(predict, masked + count, sizes, steps or 0)
