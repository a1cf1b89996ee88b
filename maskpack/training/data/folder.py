"""Local folders of parquet or csv files."""

from pathlib import Path
from typing import ClassVar

from ...errors import DataError, require
from .base import SOURCES, TEST_NAMES, TRAIN_NAMES, Splits, digest_files


def _load(kind: str, reference: str) -> Splits:
    datasets = require("datasets", "train", "reading data")
    root = Path(reference)
    files = sorted(root.rglob(f"*.{kind}"))
    splits: dict[str, list[str]] = {}
    for file in files:
        # as on the Hub: a split is named by the file's first word or by its folder
        words = [file.stem.replace("_", "-").split("-")[0].lower(), file.parent.name.lower()]
        known = [word for word in words if word in (*TRAIN_NAMES, *TEST_NAMES)]
        splits.setdefault(known[0] if known else "train", []).append(str(file))
    try:
        loaded = {name: datasets.load_dataset(kind, data_files=f, split="train") for name, f in splits.items()}
    except Exception as error:
        # datasets raises its own and pyarrow's errors for a broken file
        cause = error.__cause__ or error
        raise DataError(
            f"cannot read the {kind} files in {reference}: {cause}; expected rows in each, with the same columns"
        ) from error
    return Splits(loaded, root.resolve().name, digest_files(files, root))


@SOURCES.register
class Parquet:
    """Local folder of parquet files: train*.parquet, test*.parquet."""

    id: ClassVar[str] = "parquet"
    reference: ClassVar[str] = "https://huggingface.co/docs/datasets/loading#parquet"
    priority: ClassVar[int] = 10

    @staticmethod
    def matches(reference: str) -> bool:
        return Path(reference).is_dir() and any(Path(reference).rglob("*.parquet"))

    @staticmethod
    def load(reference: str) -> Splits:
        return _load("parquet", reference)


@SOURCES.register
class Csv:
    """Local folder of csv files with a header line: train*.csv, test*.csv."""

    id: ClassVar[str] = "csv"
    reference: ClassVar[str] = "https://huggingface.co/docs/datasets/loading#csv"
    priority: ClassVar[int] = 20

    @staticmethod
    def matches(reference: str) -> bool:
        return Path(reference).is_dir() and any(Path(reference).rglob("*.csv"))

    @staticmethod
    def load(reference: str) -> Splits:
        return _load("csv", reference)
