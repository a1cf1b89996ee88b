"""One training of a comparison of starts: fitted and measured once, and written as JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backbone.fingerprint import fingerprint
from ..backbone.load import Backbone
from ..data.base import Data
from ..errors import ConfigError, DataError, StateError
from ..evaluate.rows.base import Trial, find_row
from ..evaluate.transfer import held_out_accuracy
from ..evaluate.trial import measure, read_json, splits, write_json
from ..training.config import TrainConfig
from ..training.heads import own_linear
from ..training.log import Report, tagged

RESULT = "result.json"


def about_run(data: Data, config: TrainConfig, row: str) -> dict[str, Any]:
    """Return what all trials of a folder share, JSON values; the seed is each trial's own."""
    settings = {name: value for name, value in config.to_json().items() if name not in ("seed", "lr", "workers")}
    return {"data": data.digest, "row": row, "settings": settings}


def peak_rate(row: str, config: TrainConfig) -> float | None:
    """Return the learning rate of the settings, else the middle one of those that the row would choose from."""
    rates = find_row(row).rates.get(config.optimizer, ())
    return config.lr if config.lr is not None or not rates else rates[len(rates) // 2]


def claim(folder: Path, about: Mapping[str, Any]) -> None:
    """Bind a folder to settings, or see that it has them.

    Raises:
        StateError: if it has others.
    """
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, about)
        return
    there = read_json(path, frozenset(), "choose another folder")
    differing = sorted(key for key in there.keys() | about.keys() if there.get(key) != about.get(key))
    if differing:
        raise StateError(
            f"{folder} holds trials with other settings: {', '.join(differing)} differ; choose another folder, or give "
            f"the settings that it was begun with"
        )


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
