"""What `benchmarks.light_switch` measured, as tables and curves of a page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from maskpack.lab import feature_figure, gate_figure, new_figure, save_figure
from maskpack.lab.plots.figure import label, look, plain_axes

from .light_switch import EXPERIMENTS
from .pages import write_between

MARK = "python -m benchmarks.light_switch --write docs/results.md"
TITLES = {
    "linear": "7.1 Linear: 5 tasks, 200 rows each, no noise",
    "noisy": "7.2 Noisy linear: 10 tasks, few rows",
    "sinusoid": "7.3 Sinusoids: 8 tasks, three layers",
    "mnist": "7.4 MNIST, LeNet-5",
    "colours": "7.5 MNIST on coloured backgrounds",
    "white": "7.6 One task is all white",
    "inverse": "7.7 One task is inverse",
}
ACCURACY = ("mnist", "colours", "white", "inverse")
CURVES = {"noisy": "14 rows", "linear": "adam"}  # of experiments with many rows those with these words are drawn
# rows whose masks are drawn as sets of features
FEATURES = {"sinusoid": "gated", "colours": "gated from 0.2, red, green, blue"}


def write_pages(measured: Path, page: Path) -> None:
    """Write tables and pictures of what is finished between the page's markers."""
    texts = []
    for name, title in TITLES.items():
        path = measured / f"{name}.json"
        if path.exists():
            texts.append(f"**{title}**\n\n{experiment(name, json.loads(path.read_text())['rows'], page.parent)}")
    write_between(page, MARK, "\n".join(texts) or "Nothing is finished yet.\n")


def experiment(name: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Return the table of an experiment, and draw its curves."""
    accuracy = name in ACCURACY
    labels = [one for one in EXPERIMENTS[name].rows if any(row["row"] == one for row in rows)]
    own = {one: [row for row in rows if row["row"] == one] for one in labels}
    several = len(next(iter(own.values()))[0]["tasks"]) > 1 and accuracy
    what = "accuracy" if accuracy else "test error"
    columns = [what, "hardened", *(["each task"] if several else []), "density", "gates from 0 or 1"]
    lines = [f"| row | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for one, found in own.items():
        cells = [over(found, "final", accuracy), over(found, "hardened", accuracy)]
        if several:
            tasks = found[0]["tasks"]
            means = [mean(row["per_task"][at] for row in found) for at in range(len(tasks))]
            each = ", ".join(f"{task} {number(value, True)}" for task, value in zip(tasks, means, strict=True))
            cells.append(each)
        gated = "density" in found[0]
        cells.append(f"{mean(mean(row['density'].values()) for row in found):.3f}" if gated else "-")
        cells.append(f"{mean(row['from_ends'] for row in found):.3f}" if gated else "-")
        lines.append(f"| {one} | {' | '.join(cells)} |")
    seeds = max(len(found) for found in own.values())
    text = (
        "\n".join(lines)
        + f"\n\n{f'{seeds} seeds, mean ± sample deviation' if seeds > 1 else 'One seed'}.\n"
        + divergences(own)
    )
    save_figure(curves(own, CURVES.get(name, ""), accuracy), folder / f"light-switch-{name}.svg")
    text += f"\n![{what.capitalize()} over steps](light-switch-{name}.svg)\n"
    if FEATURES.get(name) in own:
        save_figure(feature_figure(own[FEATURES[name]][0]["users"]), folder / f"light-switch-{name}-features.svg")
        text += f"\n![How many tasks use each weight, layer by layer](light-switch-{name}-features.svg)\n"
    history = next((row["history"] for row in rows if "history" in row), None)
    if history is not None:
        save_figure(gate_figure(history), folder / "light-switch-gates.svg")
        text += "\n![Gates and effective weights of each task over steps](light-switch-gates.svg)\n"
    return text


def number(value: float, accuracy: bool) -> str:
    return f"{100 * value:.1f}" if accuracy else f"{value:.3g}"


def over(rows: Sequence[Mapping[str, Any]], key: str, accuracy: bool) -> str:
    """Return mean and deviation over seeds."""
    values = [row[key] for row in rows if key in row]
    if not values:
        return "-"
    spread = f" ± {number(stdev(values), accuracy)}" if len(values) > 1 else ""
    return number(mean(values), accuracy) + spread


def divergences(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return in words how alike the gates of tasks are, by layer, where there are several layers of them."""
    lines = []
    for name, found in rows.items():
        layers = [layer for layer in found[0].get("divergence", {}) if layer.endswith("weight")]
        if len(layers) > 1:
            means = {layer: mean(row["divergence"][layer] for row in found) for layer in layers}
            lines.append(f"{name}: " + ", ".join(f"{layer} {value:.3f}" for layer, value in means.items()))
    head = "\nJensen-Shannon divergence of two tasks' histograms of gates (bits), mean over pairs: "
    return head + "; ".join(lines) + ".\n" if lines else ""


def curves(rows: Mapping[str, Sequence[Mapping[str, Any]]], words: str, accuracy: bool) -> Any:
    """Draw the means over seeds of the rows whose name has these words, with the range of the seeds."""
    figure = new_figure(7.5, 3.6)
    axes = figure.add_subplot()
    for index, (name, found) in enumerate((n, f) for n, f in rows.items() if words in n):
        steps = [point[0] for point in found[0]["curve"]]
        values = [[point[1] for point in row["curve"]] for row in found]
        style = look(index)
        axes.plot(steps, [mean(one) for one in zip(*values, strict=True)], color=style["color"], label=label(name))
        low, high = ([end(one) for one in zip(*values, strict=True)] for end in (min, max))
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if not accuracy:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy" if accuracy else "test error")
    plain_axes(axes, grid="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure
