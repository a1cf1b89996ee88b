"""Local folders of parquet files, csv files or images."""

from pathlib import Path
from typing import ClassVar

from ...errors import DataError, require
from ...preprocess import IMAGE_ENDINGS
from .base import SOURCES, TEST_NAMES, TRAIN_NAMES, Splits, digest_files

SPLITS = (*TRAIN_NAMES, *TEST_NAMES)


class _Table:
    """Folder of files of the format `id`, which the library datasets reads."""

    id: ClassVar[str]

    @classmethod
    def matches(cls, reference: str) -> bool:
        path = Path(reference)
        return any(path.rglob(f"*.{cls.id}")) if path.is_dir() else path.is_file() and path.suffix == f".{cls.id}"

    @classmethod
    def load(cls, reference: str) -> Splits:
        datasets = require("datasets", "train", "reading data")
        root = Path(reference)
        files = sorted(root.rglob(f"*.{cls.id}")) if root.is_dir() else [root]
        splits: dict[str, list[str]] = {}
        for file in files:
            # as on the Hub: a split is named by the file's first word or by its folder
            words = [file.stem.replace("_", "-").split("-")[0].lower(), file.parent.name.lower()]
            split = next((word for word in words if word in SPLITS), "train")
            splits.setdefault(split, []).append(str(file))
        try:
            loaded = {name: datasets.load_dataset(cls.id, data_files=f, split="train") for name, f in splits.items()}
        except Exception as error:
            # datasets raises its own and pyarrow's errors for a broken file
            raise DataError(
                f"cannot read the {cls.id} files in {reference}: {error.__cause__ or error}; expected rows in each, "
                f"with the same columns"
            ) from error
        return Splits(loaded, root.resolve().name, digest_files(files, root if root.is_dir() else root.parent))


@SOURCES.register
class Parquet(_Table):
    """Local parquet file, or folder of them: train*.parquet, test*.parquet, perhaps validation*.parquet."""

    id: ClassVar[str] = "parquet"
    reference: ClassVar[str] = "https://huggingface.co/docs/datasets/loading#parquet"
    priority: ClassVar[int] = 10


@SOURCES.register
class Csv(_Table):
    """Local csv file with a header line, or folder of them: train*.csv, test*.csv, perhaps validation*.csv."""

    id: ClassVar[str] = "csv"
    reference: ClassVar[str] = "https://huggingface.co/docs/datasets/loading#csv"
    priority: ClassVar[int] = 20


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
        named = {p.name: p for p in root.iterdir() if p.is_dir() and p.name.lower() in SPLITS}
        folders = named or {"train": root}
        classes = sorted({p.name for folder in folders.values() for p in folder.iterdir() if p.is_dir()})
        label = {"label": datasets.ClassLabel(names=classes)} if classes else {}
        features = datasets.Features({"image": datasets.Image(), **label})
        splits, files = {}, []
        for split, folder in folders.items():
            images = [file for file in _images(folder) if file.parent != folder or not classes]
            rows: dict[str, list[object]] = {"image": [str(file) for file in images]}
            if classes:
                rows["label"] = [classes.index(file.relative_to(folder).parts[0]) for file in images]
            splits[split.lower()] = datasets.Dataset.from_dict(rows, features=features)
            files += images
        return Splits(splits, root.resolve().name, digest_files(files, root))


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS)
