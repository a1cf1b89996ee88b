"""train_auto: settings chosen by short runs on training rows that are held out, and the training with them."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from ..adapter.content import FIGURES
from ..backbone.load import Backbone
from ..errors import ConfigError, StateError, TrainingError
from ..safetensors_io import write_file
from .budget import coded_bytes
from .config import ALL, TOP, TrainConfig, config_from
from .data.base import HELD, Data, hold_out
from .learn import base_of, borrowed, resolved
from .methods.base import METHODS
from .objectives.base import find_objective
from .progress import shown
from .run_folder import (
    FILE,
    RunFolder,
    RunOptions,
    check_new,
    check_parts,
    check_untaken,
    claim,
    is_main_process,
    locked,
    part_options,
)
from .stored import batchnorm_statistics
from .trainer import ObjectiveRun, TrainResult, as_backbone, plan_training, train_mask

SEARCH, CLAIM, TRIALS = "search", "search.json", "trials.jsonl"  # a folder in the run's, and files in it
FINALISTS = 4  # candidates of the second round
LEAST = 10  # steps of a trial
SLOWER, FASTER, GENTLER = 0.4, 2.0, 0.3  # times the usual rate of scores, and of norms

Changes = Mapping[str, Any]  # settings that differ from those given, JSON values
DEFAULT: Changes = {}
NORMS: Changes = {"top": 0.0}


@dataclass(frozen=True)
class Trial:
    """Settings that differ from those given, `steps` of a short run, and what it measured on the rows held out.

    `figure` is None where training failed.
    """

    changes: Changes
    steps: int
    figure: float | None
    density: float = 1.0
    mask_bytes: int = 0

    def worth(self, sign: int) -> float:
        """Return a number that is greater for better trials; `sign` is that of the figure."""
        return -math.inf if self.figure is None else sign * self.figure


@dataclass
class Search:
    """A search: `first` and `last` are the steps of a trial of each round; without a folder no trial is kept."""

    backbone: Backbone
    data: Data
    config: TrainConfig
    first: int
    last: int
    candidates: Sequence[Changes]
    figure: str
    folder: Path | None
    options: RunOptions
    trials: list[Trial] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Most steps of all trials together."""
        return self.first * len(self.candidates) + self.last * FINALISTS

    def run(self) -> Changes:
        """Make the trials that are left; return the best changes of the second round, of equal ones the earlier."""
        sign = FIGURES[self.figure].sign
        first = [self.tried(changes, self.first) for changes in self.candidates]
        last = [self.tried(changes, self.last) for changes in finalists(first, sign)]
        return max(last, key=lambda trial: trial.worth(sign)).changes

    def tried(self, changes: Changes, steps: int) -> Trial:
        """Return a trial; run it, or go on with it, if it was not made before."""
        for one in self.trials:
            if (one.changes, one.steps) == (changes, steps):
                return one
        part, report = f"search, {steps} steps, {in_words(changes)}", self.options.get("report")
        done = sum(one.steps for one in self.trials)

        def moved(event: Mapping[str, Any]) -> None:  # a step of the trial is one of the whole search
            if report is not None and event["event"] == "step":
                report({**event, "part": part, "step": done + event["step"], "steps": max(self.steps, done + steps)})

        own = part_options(self.options, self.folder, str(len(self.trials)))
        trial = self.measured(changes, steps, RunFolder(RunOptions(**{**own, "report": moved})))
        self.trials.append(trial)
        if self.folder is not None and is_main_process():
            write_file(self.folder / TRIALS, "".join(json.dumps(asdict(one)) + "\n" for one in self.trials))
            shutil.rmtree(str(own["output"]))
        if report is not None and is_main_process():
            report({"event": "trial", "part": part, self.figure: trial.figure})
        return trial

    def measured(self, changes: Changes, steps: int, folder: RunFolder) -> Trial:
        """Run a trial in a folder."""
        config = replace(changed(self.config, changes), steps=steps)
        with folder.opened(), borrowed(self.backbone):
            folder.tell({"event": "step", "step": 0, "steps": steps})  # something is seen at once
            run = ObjectiveRun(self.backbone, self.data, config)
            try:
                metrics = run.train(folder, longer=False).metrics
            except TrainingError:  # a rate that is too great
                return Trial(changes, steps, None)
            size = coded_bytes(one.mask() for one in run.scored)
        return Trial(changes, steps, metrics[f"validation_{self.figure}"], metrics.get("density", 1.0), size)


@shown
def train_auto(
    model: Backbone | nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    search_steps: int,
    **options: Unpack[RunOptions],
) -> TrainResult:
    """Choose settings by short runs, and train a mask with them: see docs/methods.md, `--auto`.

    A fifth of the training rows is held out and measures every trial; the validation and test splits are not read.
    Settings that are given stay. The training afterwards has all training rows.

    Args:
        search_steps: most optimiser steps of all trials together.
        options: as in `train_mask`. `output` gets a folder `search` with a line of JSON for each trial; on resume
            trials that are there are not made again.

    Returns:
        What `train_mask` gives; `about.training["auto"]` has the trials and what was chosen.

    Raises:
        ConfigError: if the objective has no labels, or the steps are too few for the candidates. Others: as
            `train_mask`.

    Example:
        result = train_auto(backbone, data, TrainConfig(steps=10), search_steps=180)
        print(result.about.training["auto"]["chosen"])
    """
    config = TrainConfig() if config is None else config
    backbone = as_backbone(model, config, data)
    output, resume = options.get("output"), options.get("resume", False)
    folder = None if output is None else Path(output) / SEARCH
    check_search(folder, resume)
    search = plan_search(backbone, data, config, search_steps, folder, options)
    with locked(folder):
        if folder is not None:
            about = {
                "settings": config.to_json(),
                "search_steps": search_steps,
                "backbone": base_of(backbone).digest,
                "data": [data.digest, len(search.data.train or ()), len(data.class_names)],
            }
            claim(folder / CLAIM, about, TrainConfig().to_json())
            search.trials += kept_trials(folder / TRIALS)
        chosen = search.run()
    resume = resume and output is not None and (Path(output) / FILE).exists()
    settings, own = changed(config, chosen), RunOptions(**{**options, "resume": resume})
    result = train_mask(backbone, data, settings, longer=False, **own)
    trials = [asdict(one) for one in search.trials]
    record = {
        **(result.about.training or {}),
        "auto": {"steps": search_steps, "trials": trials, "chosen": dict(chosen)},
    }
    if chosen.get("top") == 0:
        said = "the search found no masks that are better than norms and head alone, so that none were trained"
        record["warnings"] = [*record.get("warnings", []), said]
        if (report := options.get("report")) is not None and is_main_process():
            report({"event": "warning", "warning": said})
    return replace(result, about=replace(result.about, training=record))


def check_search(folder: Path | None, resume: bool) -> None:
    """Raise StateError if a search and its training cannot begin, or go on; the search's folder is in the run's."""
    if folder is None:
        return
    check_untaken(folder.parent, resume)
    check_new(folder / CLAIM, resume, "search")
    check_parts(folder if folder.is_dir() else folder.parent, resume)


def plan_search(
    backbone: Backbone,
    data: Data,
    config: TrainConfig,
    search_steps: int,
    folder: Path | None = None,
    options: RunOptions | None = None,
) -> Search:
    """Return a search that takes at most so many steps, without a trial yet.

    Half of the steps are for the first round, in which every candidate has one run, and half for the finalists; no
    trial is longer than the training.
    """
    if not config.labels or data.train is None:
        raise ConfigError(
            f"a search for settings compares accuracies and the like, and the objective {config.objective!r} has no "
            f"labels; leave auto out"
        )
    whole = plan_training(backbone, data, config)
    last = min(whole["steps"], search_steps // 2 // FINALISTS)
    found = candidates(backbone, config, whole["weights"], whole["steps"], probe=2 * last >= whole["steps"])
    first = min(last, search_steps // 2 // len(found))
    shortest = min(LEAST, whole["steps"])
    if first < shortest:
        least = 2 * shortest * max(len(found), FINALISTS)
        raise ConfigError(
            f"a search of {search_steps} steps is too short for {len(found)} candidates; give at least {least} steps, "
            f"or fix some settings"
        )
    train, held = hold_out(data.train, HELD, config.seed)
    if held is None:
        raise ConfigError(f"{len(data.train)} training rows are too few to hold some out for a search; leave auto out")
    rows = replace(data, train=train, validation=held, test=None)
    figure = find_objective(config.objective, backbone.task).figure
    return Search(backbone, rows, config, first, last, found, figure, folder, options or {})


def candidates(backbone: Backbone, config: TrainConfig, weights: int, steps: int, probe: bool) -> list[Changes]:
    """Return the changes that a search tries: none, norms alone, and one or two of the settings that were left open.

    A head that starts as the probe wins in short runs and not in longer ones: it is tried with `probe` alone, where
    trials are nearly as long as the training.
    """
    method = METHODS[config.method]
    some = method.partial and not config.scale and config.selective == ALL
    usual, found, lr = resolved(config, backbone), [DEFAULT], config.score_lr(steps, weights, backbone.task)
    open_top = config.top is None and some
    if open_top and config.beside:
        found.append(NORMS)
    if open_top:
        found.append({"top": TOP if usual.top == 1 else 1.0})
    if open_top and config.train is None:
        found.append({"top": 1.0, "train": ["none"]})
    if config.lr is None and method.learns:
        found += [{"lr": lr * FASTER}, {"lr": lr * SLOWER}]
    if config.train_lr is None and config.beside:
        found.append({"train_lr": config.beside_lr * GENTLER})
    if config.bn is None and batchnorm_statistics(backbone.model):
        found.append({"bn": "adapt" if usual.bn == "freeze" else "freeze"})
    heads = find_objective(config.objective, backbone.task).trains_head and backbone.task != "regression"
    if heads and config.head_start == "plain" and config.head_kind == "linear" and probe:
        found.append({"head_start": "probe"})
    return found


def finalists(trials: Sequence[Trial], sign: int = 1) -> list[Changes]:
    """Return the changes of the second round: none, norms alone, the two best that helped together, and the best alone.

    The first of the trials is the one without changes.
    """
    ranked = sorted(trials, key=lambda one: -one.worth(sign))
    helped = [one.changes for one in ranked if one.worth(sign) > trials[0].worth(sign)]
    pair = [{**helped[0], **one} for one in helped[1:] if together(helped[0], one)][:1]
    norms = [NORMS] if any(one.changes == NORMS for one in trials) else []
    order = [DEFAULT, *norms, *pair, *(one.changes for one in ranked)]
    return [one for i, one in enumerate(order) if one not in order[:i]][:FINALISTS]


def together(one: Changes, other: Changes) -> bool:
    """Return True if two changes go together: norms alone have no rate of scores."""
    alone = NORMS in (one, other) and "lr" in {**one, **other}
    return not alone and not one.keys() & other.keys()


def changed(config: TrainConfig, changes: Changes) -> TrainConfig:
    """Return the settings with these changes."""
    return config_from({**vars(config), **changes})


def in_words(changes: Changes) -> str:
    """Return changes of settings in words."""
    if changes == NORMS:
        return "norms alone"
    texts = {name: ", ".join(value) if isinstance(value, list) else value for name, value in changes.items()}
    words = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in texts.items()]
    return ", ".join(words) or "settings as given"


def kept_trials(path: Path) -> list[Trial]:
    """Return the trials in a file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return [Trial(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise StateError(
            f"cannot read the trials in {path}: {error}; delete it and resume: they are made again"
        ) from None
