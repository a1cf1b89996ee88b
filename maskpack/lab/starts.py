"""Contribution of a pretrained start: by checkpoint, and with shuffled image blocks (arXiv 2008.11687)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.load import Backbone, load_backbone
from ..errors import ConfigError, DataError, StateError
from ..preprocess import ImagePreprocess
from ..training.config import TrainConfig
from ..training.data.base import Data
from ..training.evaluate import held_out_accuracy
from ..training.features import digest_of
from ..training.learn import base_of
from ..training.run_folder import Report, claim, tagged
from .baselines.base import Trial, find_baseline
from .trial import check_each_once, measure, measured, shared_settings, splits

STARTS = ("pretrained", "random")


@dataclass(frozen=True)
class Trainings:
    """Trainings of one baseline from several starts, each in a folder of its own; what is finished is read back.

    Their rate is `config.lr`, or the middle one of the baseline's rates. `folder` must hold trainings with these
    settings only.
    """

    folder: Path
    baseline: str
    data: Data
    config: TrainConfig
    seeds: Sequence[int]
    report: Report | None = None

    @property
    def lr(self) -> float | None:
        """Peak learning rate."""
        rates = find_baseline(self.baseline).rates.get(self.config.optimizer, ())
        return self.config.lr if self.config.lr is not None or not rates else rates[len(rates) // 2]

    def begin(self, backbone: Backbone, **about: Any) -> None:
        """Check that the baseline is possible, and that the folder is of these settings and what else is to be said."""
        find_baseline(self.baseline).check(backbone, self.config)
        same = {"data": self.data.digest, "baseline": self.baseline, "settings": shared_settings(self.config)}
        known = {**same, "backbone": backbone.id, **about}
        claim(self.folder / "settings.json", known, shared_settings(TrainConfig()))

    def accuracy(self, name: str, load: Callable[[int], Backbone], lr: float | None) -> dict[str, Any]:
        """Return mean and deviation of the test accuracy over the seeds; `load` gives the start for a seed."""
        found = [
            self.train(f"{name}-{seed}", load(seed), replace(self.config, lr=lr, seed=seed)) for seed in self.seeds
        ]
        spread = stdev(found) if len(found) > 1 else None
        return {"accuracy": mean(found), "deviation": spread, "accuracies": found, "seeds": list(self.seeds)}

    def train(self, part: str, backbone: Backbone, config: TrainConfig) -> float:
        """Return the test accuracy of one training. It goes on if it was interrupted. The backbone is used up."""
        folder, start = self.folder / part, base_of(backbone).digest

        def fit() -> dict[str, Any]:
            folder.mkdir(parents=True, exist_ok=True)
            known, unlabelled, test = splits(self.data, 1.0, config.seed, False)
            report = tagged(self.report, part) or (lambda event: None)
            fitted = find_baseline(self.baseline).fit(Trial(backbone, known, unlabelled, config, folder, report))
            accuracy, _ = measure(fitted.predict, backbone, test, config.batch_size)
            return {"accuracy": accuracy, "steps": fitted.steps, "start": start}

        result = measured(folder / "result.json", frozenset(("accuracy", "start")), fit)
        if result["start"] != start:
            place = folder / "result.json"
            raise StateError(
                f"{place} is of a training from other weights than {backbone.id} has now; choose another folder"
            )
        if self.report is not None:
            self.report({"event": "trial", "part": part, "accuracy": result["accuracy"]})
        return float(result["accuracy"])


def feature_reuse(
    backbone: Mapping[str, Any],
    data: Data,
    output: str | Path,
    *,
    config: TrainConfig,
    blocks: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    baseline: str = "full",
    random_lr: float | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train a pretrained and a random start on shuffled images, from whole images to single pixels.

    One permutation for all images; nothing else differs but the start. What is finished in `output` is not done again.

    Args:
        backbone: arguments of `load_backbone`, as {"reference": …}, for the pretrained start.
        blocks: sides in pixels; default: the image's side, halved as long as that is whole, and 1.
        seeds: of heads, orders, and the weights of random starts.
        baseline: what is trained, of `maskpack list baselines`.
        config: its `lr` is the peak rate; None: the middle one of the baseline's rates.
        random_lr: the same of random starts; default: the same rate.

    Returns:
        {"size", "rows": {"start", "block", "accuracy": mean, "deviation", "accuracies", "seeds"}, "gains": {"block",
        "gain": mean accuracy of pretrained starts less that of random ones}}.

    Example:
        start = {"reference": "backbone.py:digits_cnn", "weights": "backbone.safetensors"}
        config = TrainConfig(steps=10)
        found = feature_reuse(start, load_data("digits:5-9"), "./reuse", config=config, blocks=[8, 1])
        shuffle_figure(found["rows"])
    """
    first, trainings = load_backbone(**backbone), Trainings(Path(output), baseline, data, config, seeds, report)
    if not isinstance(first.preprocess, ImagePreprocess):
        raise ConfigError(f"{first.id} reads {first.preprocess.kind}; only images have blocks to shuffle")
    size = first.preprocess.size
    blocks = sorted(blocks or _halved(size), reverse=True)
    for block in blocks:
        block_order(size, block)
    check_each_once(seeds=seeds, blocks=blocks)
    rates = {"pretrained": trainings.lr, "random": trainings.lr if random_lr is None else random_lr}
    trainings.begin(first, rates=rates, size=size)

    def begin(start: str, block: int, seed: int) -> Backbone:
        random = {"weights": None, "random_weights": seed} if start == "random" else {}
        own = load_backbone(**{**backbone, **random})
        shuffle_inputs(own.model, block)
        return own

    rows = []
    for block in blocks:
        for start in STARTS:
            found = trainings.accuracy(f"{start}-{block}", partial(begin, start, block), rates[start])
            rows.append({"start": start, "block": block, **found})
    means: dict[tuple[Any, Any], float] = {(one["start"], one["block"]): one["accuracy"] for one in rows}
    gains = [{"block": block, "gain": means["pretrained", block] - means["random", block]} for block in blocks]
    return {"size": size, "rows": rows, "gains": gains}


def _halved(size: int) -> list[int]:
    found = [size]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found if found[-1] == 1 else [*found, 1]


def block_order(size: int, block: int, seed: int = 0) -> Tensor:
    """Return for each pixel of a shuffled image of size x size pixels which one it shows, (size * size,).

    Squares of block x block pixels are permuted, and keep their inside. One seed gives one permutation.
    """
    if not 1 <= block <= size or size % block:
        raise ConfigError(f"blocks of {block} pixels do not tile an image of {size}; take a side that divides it")
    count = size // block
    places = torch.arange(size * size).reshape(count, block, count, block).permute(0, 2, 1, 3)
    order = torch.randperm(count * count, generator=torch.Generator().manual_seed(seed))
    shuffled = places.reshape(-1, block, block)[order].reshape(count, count, block, block)
    return shuffled.permute(0, 2, 1, 3).reshape(-1)


def shuffle_inputs(model: nn.Module, block: int, seed: int = 0) -> None:
    """Make a model shuffle every input image, (B, C, H, H), by `block_order`, in every mode, from now on."""

    def shuffled(image: Tensor) -> Tensor:
        order = block_order(image.shape[-1], block, seed).to(image.device)
        return image.flatten(2)[:, :, order].reshape(image.shape)

    def before(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if inputs:
            return (shuffled(inputs[0]), *inputs[1:]), named
        return inputs, {**named, "pixel_values": shuffled(named["pixel_values"])}  # of a CLIP-like tower

    model.register_forward_pre_hook(before, with_kwargs=True)


def from_checkpoints(
    backbone: Mapping[str, Any],
    checkpoints: Sequence[str | Path],
    data: Data,
    output: str | Path,
    *,
    config: TrainConfig,
    pretraining: Data | None = None,
    seeds: Sequence[int] = (0,),
    baseline: str = "full",
    report: Report | None = None,
) -> dict[str, Any]:
    """Train the same target from several checkpoints of a pretraining run; see `feature_reuse`.

    Args:
        backbone: arguments of `load_backbone`, as {"reference": …}, without weights.
        checkpoints: safetensors state dicts, in the order of the run.
        pretraining: the data of pretraining, on whose test split each checkpoint is measured with the head that it has.

    Returns:
        {"rows": {"checkpoint": file name, "pretraining": accuracy or None, "accuracy": mean on the target, "deviation",
        "accuracies", "seeds"}} in the order of the checkpoints.

    Example:
        target, checkpoints = load_data("digits:5-9"), ["backbone.safetensors"]
        config = TrainConfig(steps=10)
        found = from_checkpoints({"reference": "backbone.py:digits_cnn"}, checkpoints, target, "./runs", config=config)
        checkpoint_figure(found["rows"])
    """
    names = [Path(one).name.removesuffix(".safetensors") for one in checkpoints]
    check_each_once(checkpoints=names, seeds=seeds)
    trainings = Trainings(Path(output), baseline, data, config, seeds, report)
    rows = []
    for name, path in zip(names, checkpoints, strict=True):
        options = {**backbone, "weights": path}
        first = load_backbone(**options)
        trainings.begin(first, lr=trainings.lr)
        before = None if pretraining is None else _accuracy_before(name, first, pretraining, trainings.folder)
        found = trainings.accuracy(name, partial(_loaded, options), trainings.lr)
        rows.append({"checkpoint": name, "pretraining": before, **found})
    return {"rows": rows}


def _loaded(options: Mapping[str, Any], seed: int) -> Backbone:
    return load_backbone(**options)


def _accuracy_before(name: str, backbone: Backbone, data: Data, folder: Path) -> float:
    """Return the accuracy of a network on the test split of data that it was trained on."""
    use = f"the checkpoint {name} is measured on the data of pretraining {data.id} with its head"
    backbone.head_for(len(data.class_names), use, "leave these data out, or give those that it was trained on")

    def accuracy() -> dict[str, Any]:
        found = held_out_accuracy(backbone, data)
        if found is None:
            raise DataError(f"the data of pretraining {data.id} have no test split; leave them out, or give them one")
        return {"checkpoint": name, "accuracy": found}

    path = folder / "pretraining" / f"{digest_of([base_of(backbone).digest, data.digest])}.json"
    return float(measured(path, frozenset(("accuracy",)), accuracy)["accuracy"])
