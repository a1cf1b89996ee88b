"""What a pretrained start contributes: by checkpoint, and with shuffled image blocks (arXiv 2008.11687)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from ...backbone.fingerprint import fingerprint
from ...backbone.load import Backbone, load_backbone
from ...errors import ConfigError, DataError, StateError
from ...preprocess import ImagePreprocess
from ...training.config import TrainConfig
from ...training.data.base import Data
from ...training.evaluate import held_out_accuracy
from ...training.features import digest_of
from ...training.run_folder import Report, claim, tagged
from ..baselines.base import Trial, find_baseline
from ..store import measured, shared_settings
from ..trial import measure, splits

SETTINGS, RESULT = "settings.json", "result.json"
STARTS = ("pretrained", "random")


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

    Raises:
        ConfigError: if the backbone reads no images, a block does not tile them, or there is no seed.
        StateError: if `output` holds trials with other settings. Others: as the baselines raise.
    """
    first, folder = load_backbone(**backbone), Path(output)
    if not isinstance(first.preprocess, ImagePreprocess):
        raise ConfigError(f"{first.id} reads {first.preprocess.kind}; only images have blocks to shuffle")
    size = first.preprocess.size
    blocks = sorted(blocks or _halved(size), reverse=True)
    for block in blocks:
        block_order(size, block)
    if not seeds or len(set(seeds)) < len(seeds) or len(set(blocks)) < len(blocks):
        raise ConfigError(f"blocks and seeds must be given, each once; got {list(blocks)} and {list(seeds)}")
    find_baseline(baseline).check(first, config)
    rate = _peak_rate(baseline, config)
    rates = {"pretrained": rate, "random": rate if random_lr is None else random_lr}
    about = {"backbone": first.id, "rates": rates, "size": size}
    claim(folder / SETTINGS, {**_about(data, config, baseline), **about}, shared_settings(TrainConfig()))

    def begin(start: str, block: int, seed: int) -> Backbone:
        random = {"weights": None, "random_weights": seed} if start == "random" else {}
        own = load_backbone(**{**backbone, **random})
        shuffle_inputs(own.model, block)
        return own

    rows = []
    for block in blocks:
        for start in STARTS:
            settings = replace(config, lr=rates[start])
            load = partial(begin, start, block)
            found = _repeated(f"{start}-{block}", load, baseline, data, settings, folder, seeds, report)
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
    """Let a model see every image, (B, C, H, H), shuffled by `block_order`, in every mode, from now on."""

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
    """
    names, folder = [Path(one).name.removesuffix(".safetensors") for one in checkpoints], Path(output)
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"checkpoints must be at least one, each with a name of its own; got {', '.join(names) or 'none'}"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be given, each once; got {list(seeds)}")
    config = replace(config, lr=_peak_rate(baseline, config))

    def begin(path: str | Path, seed: int) -> Backbone:
        return load_backbone(**{**backbone, "weights": path})

    rows = []
    for name, path in zip(names, checkpoints, strict=True):
        first = begin(path, seeds[0])
        find_baseline(baseline).check(first, config)
        claim(
            folder / SETTINGS,
            {**_about(data, config, baseline), "lr": config.lr, "backbone": first.id},
            shared_settings(TrainConfig()),
        )
        before = None if pretraining is None else _accuracy_before(name, first, pretraining, folder / "pretraining")
        found = _repeated(name, partial(begin, path), baseline, data, config, folder, seeds, report)
        rows.append({"checkpoint": name, "pretraining": before, **found})
    return {"rows": rows}


def _accuracy_before(name: str, backbone: Backbone, data: Data, folder: Path) -> float:
    """Return the accuracy of a network on the test split of data that it was trained on."""
    linear = backbone.linear
    if linear is None or linear.out_features != len(data.class_names):
        found = "no linear head" if linear is None else f"a head for {linear.out_features} classes"
        raise ConfigError(
            f"the checkpoint {name} has {found}, and the data of pretraining {data.id} have {len(data.class_names)} "
            f"classes; leave these data out, or give those that it was trained on"
        )

    def accuracy() -> dict[str, Any]:
        found = held_out_accuracy(backbone, data)
        if found is None:
            raise DataError(f"the data of pretraining {data.id} have no test split; leave them out, or give them one")
        return {"checkpoint": name, "accuracy": found}

    path = folder / f"{digest_of([_digest(backbone), data.digest])}.json"
    return float(measured(path, frozenset(("accuracy",)), accuracy)["accuracy"])


def _peak_rate(baseline: str, config: TrainConfig) -> float | None:
    """Return the learning rate of the settings, else the middle one of those that the baseline would choose from."""
    rates = find_baseline(baseline).rates.get(config.optimizer, ())
    return config.lr if config.lr is not None or not rates else rates[len(rates) // 2]


def _about(data: Data, config: TrainConfig, baseline: str) -> dict[str, Any]:
    return {"data": data.digest, "baseline": baseline, "settings": shared_settings(config)}


def _digest(backbone: Backbone) -> str:
    base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    return base.digests[base.dtype]


def _repeated(
    name: str,
    load: Callable[[int], Backbone],
    baseline: str,
    data: Data,
    config: TrainConfig,
    folder: Path,
    seeds: Sequence[int],
    report: Report | None,
) -> dict[str, Any]:
    """Return mean and deviation of the accuracy of a baseline over seeds; `load` gives the start for a seed."""
    accuracies = [
        trained_accuracy(baseline, load(seed), data, replace(config, seed=seed), folder, f"{name}-{seed}", report)
        for seed in seeds
    ]
    spread = stdev(accuracies) if len(accuracies) > 1 else None
    return {"accuracy": mean(accuracies), "deviation": spread, "accuracies": accuracies, "seeds": list(seeds)}


def trained_accuracy(
    baseline: str, backbone: Backbone, data: Data, config: TrainConfig, folder: Path, part: str, report: Report | None
) -> float:
    """Train a baseline and return its accuracy on the test split. The backbone is used up.

    What is finished in `folder` is read back, and a training that was interrupted goes on. `part` names the training
    in events, and its folder.
    """
    path, start = folder / part / RESULT, _digest(backbone)

    def fit() -> dict[str, Any]:
        path.parent.mkdir(parents=True, exist_ok=True)
        known, unlabelled, test = splits(data, 1.0, config.seed, False)
        own = tagged(report, part) or (lambda event: None)
        fitted = find_baseline(baseline).fit(Trial(backbone, known, unlabelled, config, path.parent, own))
        accuracy, _ = measure(fitted.predict, backbone, test, config.batch_size)
        return {"accuracy": accuracy, "steps": fitted.steps, "start": start}

    result = measured(path, frozenset(("accuracy", "start")), fit)
    if result["start"] != start:
        raise StateError(
            f"{path} is of a training that started from other weights than {backbone.id} has now; choose another "
            f"folder, or delete it"
        )
    found: float = result["accuracy"]
    if report is not None:
        report({"event": "trial", "part": part, "accuracy": found})
    return found
