"""Files of pictures: bytes that follow from what is drawn, and names that are written as they are."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from maskpack.errors import ConfigError, StateError
from maskpack.lab import cluster_figure, confusion_figure, density_figure, save_figure
from maskpack.lab.figure import image_suffix, in_order, label, look


def test_names_as_labels() -> None:
    assert in_order(["l.10.b", "l.9.b", "l.9.a", "head", "l"]) == ["head", "l", "l.9.a", "l.9.b", "l.10.b"]
    assert label("a\nb\x07") == r"a b\x07"
    assert label("x" * 40 + "y" * 40) == "…" + "x" * 7 + "y" * 40
    looks = [(one["color"], one["marker"]) for one in map(look, range(49))]
    assert len(set(looks)) == 49


def test_dollars_are_no_formula(tmp_path: Path) -> None:
    save_figure(confusion_figure([[1, 0], [0, 1]], ["$x^2$", r"$\frac{"]), tmp_path / "x.svg")
    text = "".join(ElementTree.parse(tmp_path / "x.svg").getroot().itertext())
    assert text.count("$x^2$") == text.count(r"$\frac{") == 2


def draw_some(folder: Path) -> None:
    """Write a few pictures; run by another process as well."""
    for ending in ("png", "svg"):
        save_figure(confusion_figure([[1, 2], [3, 4]], ["a", "b"]), folder / f"confusion.{ending}")
        points = [[n, n * n % 7] for n in range(2500)]
        save_figure(cluster_figure(points, [n % 3 for n in range(2500)]), folder / f"clusters.{ending}")
        save_figure(density_figure({"x": [{"a": 0.5, "b": 0.25}, {"a": 0.75}]}), folder / f"density.{ending}")


@pytest.mark.slow
def test_same_bytes_in_every_process(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    draw_some(ours)
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.test_plot_files import draw_some\n"
        "draw_some(Path(sys.argv[1]))\nassert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(theirs)], check=True, cwd=Path(__file__).parent.parent)
    assert {path.name for path in theirs.iterdir()} == {path.name for path in ours.iterdir()}
    for file in ours.iterdir():
        assert file.read_bytes() == (theirs / file.name).read_bytes(), file.name


def test_files_name_no_program_and_no_date(tmp_path: Path) -> None:
    draw_some(tmp_path)
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as image:
            assert set(image.info) == {"dpi"}
    for file in tmp_path.glob("*.svg"):
        assert b"date" not in file.read_bytes().lower()
        words = "".join(ElementTree.parse(file).getroot().itertext())
        assert {"confusion": "true class", "clusters": "expert", "density": "share of weights"}[file.stem] in words


def test_names_that_the_font_lacks(tmp_path: Path) -> None:
    """No warning; in an SVG they stay text."""
    figure = confusion_figure([[1, 0], [0, 1]], ["猫", "狗"])
    save_figure(figure, tmp_path / "x.PNG")
    save_figure(figure, tmp_path / "x.svg")
    assert "猫" in (tmp_path / "x.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["x.pdf", "x", "x.png.txt"])
def test_other_endings(name: str) -> None:
    with pytest.raises(ConfigError, match=r"x.* ends in '.*', expected \.png or \.svg; give the picture one of these"):
        image_suffix(name)


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="nowhere"):
        save_figure(cluster_figure([[0, 1]], [0]), tmp_path / "nowhere" / "x.svg")
