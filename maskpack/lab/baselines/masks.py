"""Masks themselves: trained with labels, without, and as a cascade."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ...adapter.content import About, Cascade, Parts
from ...adapter.describe import inspect_adapter
from ...adapter.read import Adapter
from ...adapter.write import save_adapter
from ...backbone.classifier import Inputs, classifier_from
from ...backbone.load import Backbone
from ...backbone.model import Fingerprint
from ...backbone.select import select_parameters
from ...runtime.cascade import load_cascade
from ...runtime.load import load_mask
from ...training.auto import CLAIM, SEARCH, train_auto
from ...training.cascade import DISPATCHER, fit_cascade_head, fit_whitening, train_cascade
from ...training.config import TrainConfig
from ...training.evaluate import costs
from ...training.features import fit_probe
from ...training.methods.base import METHODS, build_method
from ...training.objectives.base import SELF_SUPERVISED
from ...training.run_folder import FILE
from ...training.trainer import TrainResult, train_mask
from .base import BASELINES, Baseline, Fitted, Predict, Rates, Trial, classified, parameters

UNLABELLED_RATES: Rates = {"adam": (0.003, 0.01, 0.03), "sgd": (3.0, 10.0, 30.0)}
EXPERTS = 5
SEARCH_STEPS = 1000


@BASELINES.register
class SupervisedMask(Baseline):
    """Mask trained with labels, by a method (default: the one of the settings), and a head."""

    id = "mask"
    reference = "https://arxiv.org/abs/1801.06519"
    argument = "method"
    rates: ClassVar[Rates] = {"adam": (0.02, 0.05, 0.1), "sgd": (10.0, 25.0, 60.0)}

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        config = self._settings(config)
        build_method(config.method, dict(config.method_options))
        select_parameters(backbone.model, config.include, config.exclude, backbone.outside)

    def fit(self, trial: Trial) -> Fitted:
        return _with_head(trial, *_train(trial, self._settings(trial.settings("supervised"))))

    def _settings(self, config: TrainConfig) -> TrainConfig:
        """Return settings with this baseline's method; options are those of the settings' own method."""
        if self.given is None or self.given == config.method:
            return config
        return replace(config, method=METHODS[self.given].id, method_options={})


@BASELINES.register
class SearchedMask(Baseline):
    """Mask with settings that a search chose, as `train --auto` does, and a head."""

    id = "auto"
    reference = "docs/methods.md"
    argument = "number of steps"

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        self.number(SEARCH_STEPS, least=1)

    def fit(self, trial: Trial) -> Fitted:
        steps = self.number(SEARCH_STEPS, least=1)
        found = _with_head(trial, *_train(trial, trial.settings("supervised"), partial(train_auto, search_steps=steps)))
        return replace(found, note=f"{steps} more steps to choose settings")


@BASELINES.register
class SelfSupervisedMask(Baseline):
    """Mask trained without labels on all training rows, and a linear probe of its features on the labels."""

    id = "self-supervised"
    reference = "Self-Masking Networks, section 3"
    needs_labels = False
    rates: ClassVar[Rates] = UNLABELLED_RATES

    def fit(self, trial: Trial) -> Fitted:
        result, adapter = _train(trial, trial.settings(SELF_SUPERVISED))
        probe = fit_probe(*trial.embed(), trial.classes)
        head = parameters(probe.weight, probe.bias)
        sizes = {**stored(adapter), "head": 4 * head}
        return Fitted(trial.probed(probe), _learned(result) + head, sizes, (result.about.training or {})["steps"])


@BASELINES.register
class ConditionalCascade(Baseline):
    """Dispatcher and experts trained without labels, and a linear probe of the conditional embeddings."""

    id = "cascade"
    reference = "Self-Masking Networks, section 3.4"
    argument = "number of experts"
    needs_labels = False
    rates: ClassVar[Rates] = UNLABELLED_RATES

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        self.number(EXPERTS, least=2)

    def fit(self, trial: Trial) -> Fitted:
        folder = trial.folder / "training"
        result = train_cascade(
            trial.backbone,
            trial.unlabelled,
            trial.settings(SELF_SUPERVISED),
            experts=self.number(EXPERTS, least=2),
            output=folder,
            resume=(folder / DISPATCHER / FILE).exists(),
            report=trial.report,
        )
        result = fit_cascade_head(trial.backbone, trial.data, result, batch_size=trial.config.batch_size)
        adapter = _write(trial, result.parts, result.base, result.about, result.cascade)
        cascade = load_cascade(trial.backbone.model, adapter)
        weight, bias = cascade.parts.weight, cascade.parts.bias
        assert weight is not None
        with cascade.loaded(DISPATCHER):
            x, y = trial.embed()

        def dispatcher_alone(whiten: bool) -> Fitted:
            whitening = fit_whitening(x, x.shape[1]) if whiten else None
            probe = fit_probe(x if whitening is None else whitening(x), y, trial.classes)

            def predict(inputs: Inputs) -> Tensor:
                with cascade.loaded(DISPATCHER):
                    features = trial.features(inputs)
                return probe.logits(features if whitening is None else whitening(features))

            reduced = probe.weight.shape[1] if whiten else 0
            found = costs(adapter, "dispatcher", x.shape[1], reduced, trial.classes)
            sizes = {name.removesuffix("_bytes"): size for name, size in found.items() if size}
            del sizes["bytes"]
            trained = result.parts[DISPATCHER].masks.total + parameters(probe.weight, probe.bias)
            return Fitted(predict, trained, sizes, sizes.pop("steps", 0))

        weight, bias = weight.float(), None if bias is None else bias.float()
        predict: Predict = lambda inputs: nn.functional.linear(cascade.embed(inputs), weight, bias)  # noqa: E731
        trained = sum(parts.masks.total for parts in result.parts.values()) + parameters(weight, bias)
        steps = sum((result.about.training or {})["cascade"]["steps"].values())
        controls = {DISPATCHER: dispatcher_alone(False), f"{DISPATCHER}, whitened": dispatcher_alone(True)}
        return Fitted(predict, trained, stored(adapter), steps, controls)


def _with_head(trial: Trial, result: TrainResult, adapter: Adapter) -> Fitted:
    """Return a loaded mask with its head."""
    head = result.parts.head
    assert head is not None
    predict = classified(classifier_from(trial.backbone.model, head).eval())
    trained = _learned(result) + parameters(head.weight, head.bias)
    return Fitted(predict, trained, stored(adapter), (result.about.training or {})["steps"])


def _train(
    trial: Trial, config: TrainConfig, train: Callable[..., TrainResult] = train_mask
) -> tuple[TrainResult, Adapter]:
    """Train a mask, write it as an adapter, and load it."""
    folder = trial.folder / "training"
    result = train(
        trial.backbone,
        trial.data if config.objective == "supervised" else trial.unlabelled,
        config,
        output=folder,
        resume=(folder / FILE).exists() or (folder / SEARCH / CLAIM).exists(),
        report=trial.report,
    )
    adapter = _write(trial, result.parts, result.base, result.about)
    load_mask(trial.backbone.model, adapter)
    return result, adapter


def _write(
    trial: Trial, parts: Parts | Mapping[str, Parts], base: Fingerprint, about: About, cascade: Cascade | None = None
) -> Adapter:
    path = trial.folder / "mask.safetensors"
    return save_adapter(path, parts, base, about, cascade=cascade, weights=trial.backbone.model, overwrite=True)


def _learned(result: TrainResult) -> int:
    """Return the count of trained numbers of a mask set: scores, and parameters themselves."""
    record = result.about.training or {}
    found: int = record["scores"] + parameters(*result.parts.parameters.values())
    for one in result.parts.norms.values() if record["rates"].get("train") else ():  # else of statistics that adapted
        found += one.scale.size + (0 if one.shift is None else one.shift.size)
    return found


def stored(adapter: Adapter) -> dict[str, int]:
    """Return the bytes of an adapter file by what they are; their sum is the file's size."""
    sizes = {"masks": 0, "head": 0, "statistics": 0, "index": 0}
    for part, size in inspect_adapter(adapter)["bytes"].items():
        role = part.partition("/")[2].replace("payloads", "masks") or "index"
        sizes[role] = sizes.get(role, 0) + size
    return sizes
