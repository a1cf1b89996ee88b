"""What a pretrained start is worth: by checkpoint, and where images are shuffled block by block (arXiv 2008.11687)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from ...training.heads import own_linear
from ...training.run_folder import Report, claim, read_json, tagged, write_json
from ..baselines.base import Trial, find_row
from ..trial import measure, splits

RESULT, SETTINGS = "result.json", "settings.json"


def about_run(data: Data, config: TrainConfig, row: str) -> dict[str, Any]:
    """Return what all trials of a folder share, JSON values; the seed is each trial's own."""
    settings = {name: value for name, value in config.to_json().items() if name not in ("seed", "lr", "workers")}
    return {"data": data.digest, "row": row, "settings": settings}


def peak_rate(row: str, config: TrainConfig) -> float | None:
    """Return the learning rate of the settings, else the middle one of those that the row would choose from."""
    rates = find_row(row).rates.get(config.optimizer, ())
    return config.lr if config.lr is not None or not rates else rates[len(rates) // 2]


def accuracy_before(backbone: Backbone, data: Data, path: Path) -> float:
    """Return the accuracy of a network on the test split of data that it was trained on, measured once.

    Args:
        path: JSON file of what was measured; of other weights or data it is measured anew.

    Raises:
        ConfigError: if the network has no head for these classes. DataError: if there is nothing to measure on.
    """
    linear = own_linear(backbone)
    if linear is None or linear.out_features != len(data.class_names):
        found = "no linear head" if linear is None else f"a head for {linear.out_features} classes"
        raise ConfigError(
            f"the checkpoint {path.stem} has {found}, and the data of pretraining {data.id} have "
            f"{len(data.class_names)} classes; leave these data out, or give those that it was trained on"
        )
    about = {"start": _digest(backbone), "data": data.digest}
    if path.exists():
        there = read_json(path, frozenset(("start", "data", "accuracy")), "delete it, and it is measured again")
        if about == {name: there[name] for name in about}:
            return float(there["accuracy"])
    accuracy = held_out_accuracy(backbone, data)
    if accuracy is None:
        raise DataError(f"the data of pretraining {data.id} have no test split; leave them out, or give them one")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**about, "accuracy": accuracy})
    return accuracy


def _digest(backbone: Backbone) -> str:
    base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    return base.digests[base.dtype]


def trained_accuracy(
    row: str, backbone: Backbone, data: Data, config: TrainConfig, folder: Path, part: str, report: Report | None
) -> float:
    """Train a row of comparisons (`maskpack list rows`) and return its accuracy on the test split.

    What is finished in `folder` is read back, and a training that was interrupted goes on. The backbone is used up.

    Args:
        part: what events call it.

    Raises:
        DataError: if there is no training or no test split. StateError: if the folder's trial had other weights.
            Others: as the rows raise.
    """
    path, start = folder / RESULT, _digest(backbone)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        known, unlabelled, test = splits(data, 1.0, config.seed, False)
        own = tagged(report, part) or (lambda event: None)
        fitted = find_row(row).fit(Trial(backbone, known, unlabelled, config, folder, own))
        accuracy, _ = measure(fitted.predict, backbone, test, config.batch_size, len(data.class_names))
        write_json(path, {"accuracy": accuracy, "steps": fitted.steps, "start": start})
    result = read_json(path, frozenset(("accuracy", "start")), "delete it, and its trial runs again")
    if result["start"] != start:
        raise StateError(
            f"{path} is of a training that started from other weights than {backbone.id} has now; choose another "
            f"folder, or delete it"
        )
    found: float = result["accuracy"]
    if report is not None:
        report({"event": "trial", "part": part, "accuracy": found})
    return found


def from_checkpoints(
    backbone: Mapping[str, Any],
    checkpoints: Sequence[str | Path],
    data: Data,
    output: str | Path,
    *,
    config: TrainConfig,
    pretraining: Data | None = None,
    seeds: Sequence[int] = (0,),
    row: str = "full",
    report: Report | None = None,
) -> dict[str, Any]:
    """Train the same target from several checkpoints of a pretraining run; what is finished in `output` is not done
    again.

    Args:
        backbone: arguments of `load_backbone`, as {"reference": …}, without weights.
        checkpoints: safetensors state dicts, in the order of the run.
        pretraining: the data of pretraining, on whose test split each checkpoint is measured with the head that it has.
        seeds, row, config, report: as of `feature_reuse`.

    Returns:
        {"rows": {"checkpoint": file name, "pretraining": accuracy or None, "accuracy": mean on the target, "deviation",
        "accuracies", "seeds"}} in the order of the checkpoints.

    Raises:
        ConfigError: if there is no checkpoint or no seed, two have the same name, or one has no head for the data of
            pretraining. BackboneError: if one does not fit. StateError: if `output` holds trials with other settings.
    """
    names, folder = [Path(one).name.removesuffix(".safetensors") for one in checkpoints], Path(output)
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"checkpoints must be at least one, each with a name of its own; got {', '.join(names) or 'none'}"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be given, each once; got {list(seeds)}")
    config = replace(config, lr=peak_rate(row, config))
    rows = []
    for name, path in zip(names, checkpoints, strict=True):
        own = load_backbone(**{**backbone, "weights": path})
        find_row(row).check(own, config)
        claim(folder / SETTINGS, {**about_run(data, config, row), "lr": config.lr, "backbone": own.id}, "trials")
        before = (
            None if pretraining is None else accuracy_before(own, pretraining, folder / "pretraining" / f"{name}.json")
        )
        found = []
        for seed in seeds:
            part = f"{name}-{seed}"
            own = load_backbone(**{**backbone, "weights": path})
            found.append(trained_accuracy(row, own, data, replace(config, seed=seed), folder / part, part, report))
        spread = stdev(found) if len(found) > 1 else None
        rows.append({"checkpoint": name, "pretraining": before, "accuracy": mean(found), "deviation": spread,
                     "accuracies": found, "seeds": list(seeds)})  # fmt: skip
    return {"rows": rows}


STARTS = ("pretrained", "random")


def block_order(size: int, block: int, seed: int = 0) -> Tensor:
    """Return for each pixel of a shuffled image of size x size pixels which one it shows, (size * size,).

    Squares of block x block pixels are permuted, and keep their inside. One seed gives one permutation.

    Raises:
        ConfigError: if a side of the image is not a multiple of the block.
    """
    if not 1 <= block <= size or size % block:
        raise ConfigError(f"blocks of {block} pixels do not tile an image of {size}; take a side that divides it")
    count = size // block
    places = torch.arange(size * size).reshape(count, block, count, block).permute(0, 2, 1, 3)
    order = torch.randperm(count * count, generator=torch.Generator().manual_seed(seed))
    shuffled = places.reshape(-1, block, block)[order].reshape(count, count, block, block)
    return shuffled.permute(0, 2, 1, 3).reshape(-1)


@contextmanager
def shuffled_inputs(model: nn.Module, block: int, seed: int = 0) -> Iterator[None]:
    """As long as this lasts, a model sees every image, (B, C, H, H), shuffled by `block_order`, in every mode."""

    def shuffled(image: Tensor) -> Tensor:
        order = block_order(image.shape[-1], block, seed).to(image.device)
        return image.flatten(2)[:, :, order].reshape(image.shape)

    def before(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if inputs:
            return (shuffled(inputs[0]), *inputs[1:]), named
        return inputs, {**named, "pixel_values": shuffled(named["pixel_values"])}  # of a CLIP-like tower

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def feature_reuse(
    backbone: Mapping[str, Any],
    data: Data,
    output: str | Path,
    *,
    config: TrainConfig,
    blocks: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    row: str = "full",
    random_lr: float | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train a pretrained and a random start on shuffled images, from whole images to single pixels.

    One permutation for all images of both splits; there is nothing else that differs but the start. What is finished in
    `output` is not done again.

    Args:
        backbone: arguments of `load_backbone`, as {"reference": …}, for the pretrained start.
        blocks: sides in pixels; default: the image's side, halved as long as that is whole, and 1.
        seeds: of heads, orders, and the weights of random starts.
        row: what is trained, a row of `maskpack list rows`.
        config: its `lr` is the peak rate of what is trained; None: the middle one of the row's rates.
        random_lr: the same of random starts; default: the same rate.

    Returns:
        {"size", "rows": {"start", "block", "accuracy": mean, "deviation", "accuracies", "seeds"}, "gains": {"block",
        "gain": mean accuracy of pretrained starts less that of random ones}}.

    Raises:
        ConfigError: if the backbone reads no images, a block does not tile them, or there is no seed.
        StateError: if `output` holds trials with other settings. Others: as the rows raise.
    """
    first = load_backbone(**backbone)
    if not isinstance(first.preprocess, ImagePreprocess):
        raise ConfigError(f"{first.id} reads {first.preprocess.kind}; only images have blocks to shuffle")
    size, folder = first.preprocess.size, Path(output)
    blocks = list(blocks) or _halved(size)
    for block in blocks:
        block_order(size, block)
    if not seeds or len(set(seeds)) < len(seeds) or len(set(blocks)) < len(blocks):
        raise ConfigError(f"blocks and seeds must be given, each once; got {list(blocks)} and {list(seeds)}")
    find_row(row).check(first, config)
    rate = peak_rate(row, config)
    rates = {"pretrained": rate, "random": rate if random_lr is None else random_lr}
    claim(
        folder / SETTINGS,
        {**about_run(data, config, row), "backbone": first.id, "rates": rates, "size": size},
        "trials",
    )
    rows: list[dict[str, Any]] = []
    for block in sorted(blocks, reverse=True):
        for start in STARTS:
            found = []
            for seed in seeds:
                part = f"{start}-{block}-{seed}"
                random = {"weights": None, "random_weights": seed} if start == "random" else {}
                own = load_backbone(**{**backbone, **random})
                settings = replace(config, seed=seed, lr=rates[start])
                with shuffled_inputs(own.model, block):
                    found.append(trained_accuracy(row, own, data, settings, folder / part, part, report))
            spread = stdev(found) if len(found) > 1 else None
            rows.append({"start": start, "block": block, "accuracy": mean(found), "deviation": spread,
                         "accuracies": found, "seeds": list(seeds)})  # fmt: skip
    means: dict[tuple[Any, Any], float] = {(one["start"], one["block"]): one["accuracy"] for one in rows}
    gains = [
        {"block": block, "gain": means["pretrained", block] - means["random", block]}
        for block in sorted(blocks, reverse=True)
    ]
    return {"size": size, "rows": rows, "gains": gains}


def _halved(size: int) -> list[int]:
    found = [size]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found if found[-1] == 1 else [*found, 1]
