"""docs/gallery: every adapter is whole, and its page, card and report say what it holds."""

from pathlib import Path

import pytest

from benchmarks.gallery import ADAPTERS, GALLERY, PICTURES, commands, page
from maskpack import inspect_adapter, load_adapter, load_backbone, load_mask, unload_mask
from maskpack.adapter.card import FENCE, render_card

from .helpers_models import bits
from .test_report import checked

NAMES = sorted(ADAPTERS)
MOST = 600_000  # bytes of a folder


def test_page() -> None:
    assert (GALLERY / "index.md").read_text(encoding="utf-8") == "\n".join(page())
    assert sorted(path.name for path in GALLERY.iterdir() if path.is_dir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_entry(name: str) -> None:
    folder = GALLERY / name
    adapter = load_adapter(folder)
    found = adapter.verify()
    assert found["mask_id"] or found["needs_base"]
    card = FENCE.search((folder / "README.md").read_text(encoding="utf-8"))
    own = FENCE.search(render_card(inspect_adapter(adapter)))
    assert card is not None
    assert own is not None
    assert card[0] == own[0]
    report = (folder / "report.html").read_text(encoding="utf-8")
    text = checked(report).text
    assert "<img" not in report  # the data are others'
    assert adapter.digest in text
    assert all((folder / one).read_text(encoding="utf-8").rstrip().endswith("</svg>") for one in PICTURES)
    assert sum(file.stat().st_size for file in folder.iterdir()) < MOST
    assert all("$MASKPACK_DATA" in line for kind, line in commands(name).items() if kind in ("train", "report", "eval"))


def test_an_adapter_fits_its_base(shared_data: Path) -> None:
    from benchmarks.tasks import resnet

    model = load_backbone(**resnet(20)).model
    before = bits(model)
    load_mask(model, GALLERY / "resnet20-cartoon")
    assert bits(model).keys() == before.keys()
    unload_mask(model)
    assert all((one == before[name]).all() for name, one in bits(model).items())
