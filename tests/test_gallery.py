"""docs/gallery: every adapter is whole, and its page, card and report say what it holds."""

from pathlib import Path

import pytest

from benchmarks.gallery import ADAPTERS, GALLERY, PICTURES, commands, page
from benchmarks.measured import trials
from maskpack import load_adapter, load_backbone, load_mask, unload_mask

from .helpers_html import checked
from .helpers_models import bits, same

NAMES = [name for name in ADAPTERS if (GALLERY / name).is_dir()]
MOST = 600_000  # bytes of a folder


def test_page() -> None:
    assert (GALLERY / "index.md").read_text(encoding="utf-8") == "\n".join(page())
    assert {path.name for path in GALLERY.iterdir() if path.is_dir()} <= set(ADAPTERS)
    assert len(trials("gallery")) == len(NAMES) > 0


@pytest.mark.parametrize("name", NAMES)
def test_entry(name: str) -> None:
    folder = GALLERY / name
    adapter = load_adapter(folder)
    found = adapter.verify()
    assert found["mask_id"] or found["needs_base"]
    assert adapter.mask_id in (folder / "README.md").read_text(encoding="utf-8")
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
    unload_mask(model)
    assert same(bits(model), before)
