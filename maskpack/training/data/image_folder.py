"""Local folders with one folder of images per class, under train/ and test/ or alone."""

from pathlib import Path
from typing import ClassVar

from ...errors import require
from .base import SOURCES, TEST_NAMES, TRAIN_NAMES, Splits, digest_files

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)


@SOURCES.register
class ImageFolder:
    """Local folder with one folder of images per class, or images without labels, under train/ and test/ or alone."""

    id: ClassVar[str] = "image_folder"
    reference: ClassVar[str] = "https://huggingface.co/docs/datasets/image_load#imagefolder"
    priority: ClassVar[int] = 30

    @staticmethod
    def matches(reference: str) -> bool:
        return Path(reference).is_dir() and bool(_images(Path(reference)))

    @staticmethod
    def load(reference: str) -> Splits:
        datasets = require("datasets", "train", "reading data")
        root = Path(reference)
        named = {p.name: p for p in root.iterdir() if p.is_dir() and p.name.lower() in (*TRAIN_NAMES, *TEST_NAMES)}
        folders = named or {"train": root}
        classes = sorted({p.name for folder in folders.values() for p in folder.iterdir() if p.is_dir()})
        index = {name: i for i, name in enumerate(classes)}
        label = {"label": datasets.ClassLabel(names=classes)} if classes else {}
        features = datasets.Features({"image": datasets.Image(), **label})
        splits, files = {}, []
        for split, folder in folders.items():
            images = [file for file in _images(folder) if file.parent != folder or not classes]
            rows: dict[str, list[object]] = {"image": [str(file) for file in images]}
            if classes:
                rows["label"] = [index[file.relative_to(folder).parts[0]] for file in images]
            splits[split.lower()] = datasets.Dataset.from_dict(rows, features=features)
            files += images
        return Splits(splits, root.resolve().name, digest_files(files, root))
