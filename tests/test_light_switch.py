"""The benchmark of gated tasks: its tasks, a short run of each kind, and the page that it writes."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra `lab`")

from benchmarks import light_switch, measured
from benchmarks.light_switch import EXPERIMENTS, MARK, Learner, train, write_pages
from benchmarks.light_switch_tasks import COLOURS, LeNet, coloured, linear, sinusoids


def test_colours() -> None:
    grey = torch.rand(2, 1, 4, 4)
    red = coloured(grey, "red", 3)
    assert torch.equal(red[:, 0], torch.ones(2, 4, 4)), "pure red makes the red channel constant"
    assert torch.equal(red[:, 1:], grey.expand(2, 2, 4, 4))
    for name, colour in COLOURS.items():
        for channel, value in enumerate(colour):
            expected = grey[:, 0] + (1 - grey[:, 0]) * value
            assert torch.equal(coloured(grey, name, 3)[:, channel], expected)
    assert torch.equal(coloured(grey, "black 2", 1), grey)
    assert torch.equal(coloured(grey, "inverse", 3), (1 - grey).expand(2, 3, 4, 4))
    assert float(coloured(grey, "white", 3).min()) == 1
    assert LeNet(3)(coloured(torch.rand(2, 1, 32, 32), "blue", 3)).shape == (2, 10)


def test_targets_are_those_of_the_masks() -> None:
    plain, noisy = linear(3, rows=9), linear(3, rows=9, noise=0.5)
    x, y = plain.test(1, True)
    whole = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution[:-1].T
    assert plain.weights is not None
    ratio = whole / plain.weights
    assert torch.allclose(ratio, ratio.round(), atol=1e-3), "a task's weights are those of all, or nothing"
    assert {0.0, 1.0} == {abs(one) for one in ratio.round().flatten().tolist()}
    generator = torch.Generator()
    inputs, targets = noisy.batch(0, generator)
    assert inputs.shape == (9, 10)
    assert not torch.equal(targets, plain.batch(0, generator)[1])
    assert float(sinusoids(0).test(7, True)[1].abs().max()) <= 1


def test_runs_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    learners = {
        "gated, adam": Learner("gated", r1=1e-4),
        "separate, adam": Learner("separate"),
        "shared, adam": Learner("shared"),
    }
    short = {"linear": replace(EXPERIMENTS["linear"], learners=learners, steps=40, every=20)}
    gated = {"gated": Learner("gated")}
    monkeypatch.setattr(light_switch, "SEEDS", (0, 1))
    monkeypatch.setattr(measured, "FOLDER", tmp_path / "measured")
    short["sinusoid"] = replace(
        EXPERIMENTS["sinusoid"], problems={"": partial(sinusoids, count=2)}, learners=gated, steps=20, every=20
    )
    for name, experiment in short.items():
        monkeypatch.setitem(light_switch.EXPERIMENTS, name, experiment)
        light_switch.run(name)
    assert len(capsys.readouterr().out.splitlines()) == 8
    light_switch.run("linear")
    assert capsys.readouterr().out == "", "what is recorded is not run again"
    found = measured.trials("light-switch", experiment="linear", seed=0, steps=40)
    first = {one["learner"]: one["result"] for one in found}
    assert [point[0] for point in first["gated, adam"]["curve"]] == [20, 40]
    assert first["gated, adam"]["curve"][-1][1] == pytest.approx(first["gated, adam"]["final"])
    assert first["gated, adam"]["from_weights"] > 0
    assert "hardened" not in first["shared, adam"]
    again = train(short["linear"], learners["gated, adam"], 0)
    assert again["per_task"] == first["gated, adam"]["per_task"]
    page = tmp_path / "page.md"
    page.write_text(f"a\n<!-- begin: {MARK} -->\n<!-- end: {MARK} -->\nb\n")
    write_pages(page)
    text = page.read_text()
    assert "| gated, adam |" in text
    assert "2 seeds, mean ± sample deviation." in text
    assert "Jensen-Shannon" in text
    for name in ("linear", "sinusoid", "gates", "sinusoid-features"):
        assert f"(light-switch-{name}.svg)" in text
        assert (tmp_path / f"light-switch-{name}.svg").stat().st_size > 1000


def test_four_times_the_tasks_is_faster() -> None:
    """As published: with the rates of the weights gates are slow, with 4T times them they are not."""
    short = replace(EXPERIMENTS["linear"], steps=250, every=250)
    slow, quick = (train(short, Learner("gated", factor=factor), 0)["final"] for factor in (1.0, None))
    assert quick < 0.5 * slow
