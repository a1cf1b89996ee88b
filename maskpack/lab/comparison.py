"""compare: a mask and every baseline on one backbone and one data set, with the same splits and the same budget."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .. import errors
from ..backbone.load import load_backbone
from ..errors import ConfigError, StateError, TrainingError
from ..preprocess import preprocess_to_json
from ..safetensors_io import write_file
from ..training.config import TrainConfig
from ..training.data.base import load_data
from ..training.evaluate import table
from ..training.learn import base_of
from ..training.objectives.base import SELF_SUPERVISED, check_data, find_objective
from ..training.run_folder import Report, claim, locked, stopping, write_json
from ..training.stored import batchnorm_statistics
from ..training.trainer import plan_training
from .baselines.base import BASELINES, Baseline, find_baseline
from .trial import MEASURED, Job, Worker, check_each_once, measured, shared_settings, splits

COMPARISON, RESULT, TABLE = "comparison.json", "results.json", "results.md"
STATISTICS = {"freeze": "frozen", "adapt": "adapted"}  # settings of BatchNorm, in words
FURTHER = 2  # more rates that are tried where the best is the least or the greatest


def compare(
    backbone: Mapping[str, Any],
    data: Mapping[str, Any],
    output: str | Path,
    *,
    baselines: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    fractions: Sequence[float] = (1.0,),
    rates: Mapping[str, Sequence[float]] | None = None,
    config: TrainConfig | None = None,
    report: Report | None = None,
    shard: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """Compare ways to solve a task, each in a process of its own; what is finished in `output` is not done again.

    Learning rates are chosen with the first seed and the greatest share of the labels, on a fifth of these labels;
    where the least or the greatest rate is the best, the search goes on in that direction. Where the backbone has
    BatchNorm statistics and the settings do not say what becomes of them, each baseline with labels and rates to choose
    from gets those of frozen and adapted ones that are better at its middle rate. Then every baseline is trained on all
    labels of a share, once for each seed, and measured once on the test split. Baselines that train without labels do
    it once for all shares.

    Args:
        backbone, data: arguments of `load_backbone` and `load_data`, as {"reference": …}.
        output: folder. A comparison with other settings must have another one; baselines, seeds and shares may be
            added.
        baselines: "id" or "id:argument" (`maskpack list baselines`), masks among them; default: all.
        seeds: of heads, orders, prototypes; and of which labels are used, where they are a share.
        fractions: shares of the labels.
        rates: by baseline, rates to choose from in place of its own; a single one is not searched.
        config: budget and settings that all baselines share; its own seed and `lr` are not used.
        shard: (number, count), as (3, 16): do a sixteenth of the trials, and nothing that another process of these
            does at the same time in the same `output`. What has to wait for trials of others, as those that need the
            best rate, is left; call it again when they are done. The results are written by who finds all trials done.
        report: called with every event of training, with "part", and with {"event": "trial", "part", "accuracy",
            "settings", "result", "folder"}.

    Returns:
        {"rows": [{"method", "labels_fraction", "accuracy": mean, "deviation", …}], "backbone", "data", …}, which is
        also in `results.json`, and as a table in `results.md`; "waiting" of a shard: how many trials are left.

    Raises:
        StateError: if `output` holds a comparison with other settings, or another process writes into it.
        StoppedError: after SIGTERM or SIGUSR1, in the main thread. Others: of wrong settings, and of the baselines.

    Example:
        found = compare(
            {"reference": "backbone.py:digits_cnn", "weights": "backbone.safetensors"},
            {"reference": "digits:5-9"},
            "./comparison",
            baselines=["knn", "probe"],
        )
        print(found["rows"][0]["method"], found["rows"][0]["accuracy"])
    """
    config, folder, given = config or TrainConfig(), Path(output), dict(rates or {})
    backbone, data = _plain(backbone), _plain(data)
    names = list(baselines) or [one.id for one in BASELINES.all()]
    _check(names, seeds, fractions, given)
    own_folder = folder if shard == (1, 1) else folder / f".shard-{shard[0]}-of-{shard[1]}"
    if not 1 <= shard[0] <= shard[1]:
        raise ConfigError(f"a shard is (number, count) with a number from 1 to the count, got {shard}")
    model = load_backbone(**backbone)
    found = {name: find_baseline(name) for name in names}
    for one in found.values():
        one.check(model, config)
    examples = load_data(**data)
    known, unlabelled, _ = splits(examples, max(fractions), seeds[0], False)
    check_data(known, model, find_objective("supervised", model.task))
    if not all(one.needs_labels for one in found.values()) and not (folder / COMPARISON).exists():
        # a wrong option is seen before the folder is bound to it
        plan_training(model, unlabelled, replace(config, objective=SELF_SUPERVISED))
    about = {
        "backbone": {"id": model.id, "digest": base_of(model).digest, "head": model.head},
        "preprocess": preprocess_to_json(model.preprocess),
        "data": {"id": examples.id, "digest": examples.digest, "classes": len(examples.class_names)},
        "settings": shared_settings(config),
    }
    chosen = config.bn is None and batchnorm_statistics(model.model)
    statistics = tuple(STATISTICS) if chosen else (None,)
    results: list[dict[str, Any]] = []
    with locked(own_folder), stopping("call compare again to go on"), Worker() as worker:
        claim(folder / COMPARISON, about, shared_settings(TrainConfig()))
        trials = Trials(folder, backbone, data, config, report, worker, shard)
        for index, (name, one) in enumerate(found.items()):
            best = trials.choose(name, one, given.get(name), seeds[0], max(fractions), statistics, index)
            if best is None:
                continue
            rate, bn, tried = best
            for place, share in enumerate(fractions):
                own = seeds if one.seeded or share < 1 else seeds[:1]
                numbers = itertools.count((index * len(fractions) + place) * len(seeds))
                each = [trials.run(name, seed, share, rate, bn, number=next(numbers)) for seed in own]
                done = [trial for trial in each if trial is not None]
                if len(done) < len(own):
                    continue
                rows = summaries(name, share, rate, own, done)
                results += [{**row, "bn": bn, "search": tried} for row in rows]
                if not trials.waiting:
                    write_json(folder / RESULT, {**about, "rows": results})
                    write_file(folder / TABLE, markdown(results))
    return {**about, "rows": results, **({"waiting": trials.waiting} if trials.waiting else {})}


def _check(
    names: Sequence[str], seeds: Sequence[int], fractions: Sequence[float], rates: Mapping[str, Sequence[float]]
) -> None:
    check_each_once(baselines=names, seeds=seeds, fractions=fractions)
    unknown = sorted(rates.keys() - set(names))
    if unknown:
        raise ConfigError(f"a rate is given for {unknown[0]!r}, which is none of the baselines {', '.join(names)}")
    for name, given in rates.items():
        if not given or not all(0 < rate < float("inf") for rate in given):
            raise ConfigError(f"the rates of {name!r} must be finite numbers above 0, got {list(given)}")


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as JSON values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def result_file(
    folder: Path, name: str, seed: int, share: float, rate: float | None, bn: str | None, validate: bool
) -> Path:
    """Return the file in a comparison's folder for the result of a trial; arguments as of `Trials.run`."""
    parts = ["search" if validate else "seed", str(seed), *([] if rate is None else [f"{rate:g}"])]
    parts += [] if bn is None else [bn]
    if find_baseline(name).needs_labels or validate:
        parts.append(f"labels-{share:g}")
    return folder / name.replace(":", "-") / "-".join(parts) / f"result-{share:g}.json"


@dataclass
class Trials:
    """The trials of a comparison, by folder and file: those that are there are read, others run, if they are ours.

    `waiting` counts trials that are not there and are another shard's.
    """

    folder: Path
    backbone: Mapping[str, Any]
    data: Mapping[str, Any]
    config: TrainConfig
    report: Report | None
    worker: Worker
    shard: tuple[int, int] = (1, 1)
    waiting: int = 0

    def choose(
        self,
        name: str,
        baseline: Baseline,
        given: Sequence[float] | None,
        seed: int,
        share: float,
        statistics: Sequence[str | None] = (None,),
        index: int = 0,
    ) -> tuple[float | None, str | None, list[dict[str, Any]]] | None:
        """Return the best rate and setting of BatchNorm statistics on the validation split, and what was tried.

        None: trials of other shards are not there yet. `statistics` are chosen from where a baseline trains with labels
        and has rates to choose from; None among them is the setting of the configuration. Shards count from the
        baseline's `index` on.
        """
        rates = sorted(given or baseline.rates.get(self.config.optimizer, ()))
        if len(rates) < 2:
            return (rates[0] if rates else None), None, []

        settings = statistics if baseline.needs_labels else (None,)
        numbers = itertools.count(index * len(rates) * len(settings))

        def accuracy_of(rate: float, bn: str | None) -> float | None:  # -1 where training broke off
            try:
                found = self.run(name, seed, share, rate, bn, validate=True, number=next(numbers))
            except TrainingError:
                return -1.0
            return None if found is None else float(found["accuracy"])

        middle = rates[len(rates) // 2]
        begun = {bn: accuracy_of(middle, bn) for bn in settings}
        first = {bn: one for bn, one in begun.items() if one is not None}
        if len(first) < len(begun):
            return None
        bn = max(first, key=lambda one: first[one])
        own = {rate: first[bn] if rate == middle else accuracy_of(rate, bn) for rate in rates}
        for left in reversed(range(FURTHER + 1)):
            accuracy = {rate: one for rate, one in sorted(own.items()) if one is not None}
            if len(accuracy) < len(own):
                return None
            ends, best = list(accuracy), max(accuracy, key=lambda rate: accuracy[rate])
            if not left or best not in (ends[0], ends[-1]):
                break
            further = best * ends[0] / ends[1] if best == ends[0] else best * ends[-1] / ends[-2]
            own[further] = accuracy_of(further, bn)
        if accuracy[best] < 0:
            raise TrainingError(
                f"baseline {name!r}: training failed with all of the rates {', '.join(f'{rate:g}' for rate in ends)}; "
                f"give others for it"
            )
        each = {(middle, one): first[one] for one in first if one != bn} | {(rate, bn): accuracy[rate] for rate in ends}
        tried = [{"rate": one[0], "bn": one[1], "accuracy": max(0.0, each[one])} for one in each]
        return best, bn, tried

    def run(
        self,
        name: str,
        seed: int,
        share: float,
        rate: float | None,
        bn: str | None = None,
        validate: bool = False,
        number: int = 0,
    ) -> dict[str, Any] | None:
        """Return the result of a trial; run it if it is not there, or return None if it is another shard's."""
        path = result_file(self.folder, name, seed, share, rate, bn, validate)
        part = f"{name}, {'search ' if validate else ''}seed {seed}" + (f", rate {rate:g}" if rate else "")
        part += f", statistics {STATISTICS[bn]}" if bn else ""
        if share < 1:
            part += f", {share:.2%} of the labels"
        # not resolved: some defaults follow from the objective, which is the baseline's
        settings = {**asdict(self.config), "seed": seed, "lr": rate, "bn": bn or self.config.bn}
        if number % self.shard[1] != self.shard[0] - 1 and not path.exists():
            self.waiting += 1
            return None
        job = Job(name, share, validate, settings, self.backbone, self.data, str(path.parent))
        found = measured(path, MEASURED, lambda: self._in_process(job, part))
        if self.report is not None:
            about = {"baseline": name, "search": validate, "labels_fraction": share, "rate": rate, "seed": seed}
            about |= {"bn": bn} if bn else {}
            event = {"event": "trial", "part": part, "accuracy": found["accuracy"]}
            self.report({**event, "settings": about, "result": found, "folder": str(path.parent)})
        return found

    def _in_process(self, job: Job, part: str) -> dict[str, Any]:
        """Run a job in a process of its own, pass on what it reports, and return its result."""
        path = Path(job.folder) / "job.json"
        write_json(path, asdict(job))
        result: dict[str, Any] = {}
        failed: errors.MaskpackError | None = None
        code = 0
        for event in self.worker.run(path):
            match event["event"]:
                case "error":
                    kind: type[errors.MaskpackError] = getattr(errors, event["kind"])
                    failed = kind(f"{part}: {event['message']}")
                case "exit":
                    code = event["code"]
                case "result":
                    result = event["result"]
                case _ if self.report is not None:
                    self.report({**event, "part": part})
        if failed is not None:
            raise failed
        if code:
            raise StateError(
                f"{part}: its process ended with the exit code {code}, perhaps for lack of memory; free some and "
                f"call it again to go on, or take a smaller batch size and another folder"
            )
        return result


NOTE = (
    "Accuracy: test split, in per cent, mean ± sample deviation over {seeds}. Trained: numbers that training changed. "
    "Bytes: all to store beside the backbone; head: of which the head's. Memory: growth of the process over the loaded "
    "backbone. Forward: time of a batch relative to the bare backbone's.\n"
)


def summaries(
    name: str, share: float, rate: float | None, seeds: Sequence[int], trials: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the means of a baseline's trials, one for each seed, and of its controls, under the keys of pictures."""
    own = {name: trials}
    for control in trials[0]["controls"]:
        own[f"{name}: {control}"] = [trial["controls"][control] for trial in trials]
    rows = []
    for method, found in own.items():
        values = {key: [one[key] for one in found] for key in found[0] if key not in ("sizes", "controls", "note")}
        row = {
            "method": method,
            "labels_fraction": share,
            "rate": rate,
            "seeds": list(seeds),
            "accuracies": values["accuracy"],
            "deviation": stdev(values["accuracy"]) if len(found) > 1 else None,
            "note": found[0].get("note", ""),
            "sizes": {what: mean(one["sizes"][what] for one in found) for what in found[0]["sizes"]},
        }
        rows.append({**row, **{key: mean(one) for key, one in values.items()}})
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of a comparison as a Markdown table with a note."""
    texts = [cells(row) for row in rows]
    count = max(len(row["seeds"]) for row in rows)
    seeds = f"{count} seeds" if count > 1 else "one seed (no deviation)"
    return table(list(texts[0]), [list(one.values()) for one in texts]) + "\n" + NOTE.format(seeds=seeds)


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row's cells as text, by the title of their column."""
    notes = [row.get("note"), f"statistics {STATISTICS[row['bn']]}" if row.get("bn") else None]
    said = ", ".join(note for note in notes if note)
    deviation = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.2f}"
    return {
        "baseline": f"{row['method']} ({said})" if said else str(row["method"]),
        "labels": f"{100 * row['labels_fraction']:g} %",
        "accuracy": f"{100 * row['accuracy']:.2f}{deviation}",
        "trained": f"{row['trained']:,.0f}",
        "bytes": f"{row['bytes']:,.0f}",
        "head": f"{row['sizes'].get('head', 0):,.0f}",
        "rate": "-" if row["rate"] is None else f"{row['rate']:g}",
        "steps": f"{row['steps']:,.0f}",
        "seconds": f"{row['seconds']:.1f}" if "seconds" in row else "-",
        "memory": f"{row['peak_memory'] / 2**20:,.0f} MiB" if "peak_memory" in row else "-",
        "forward": f"{row['overhead']:.2f}x" if "overhead" in row else "-",
    }
