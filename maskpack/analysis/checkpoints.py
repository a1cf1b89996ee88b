"""Which checkpoint of a pretraining run to start from (arXiv 2008.11687)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..backbone.load import load_backbone
from ..data.base import Data
from ..errors import ConfigError
from ..evaluate.rows.base import find_row
from ..training.config import TrainConfig
from ..training.log import Report
from .trials import about_run, accuracy_before, claim, peak_rate, trained_accuracy


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
        claim(folder, {**about_run(data, config, row), "lr": config.lr, "backbone": own.id})
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
