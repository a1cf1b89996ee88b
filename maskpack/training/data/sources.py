"""The data sources: local files of rows or text, folders of images, the Hub, and the digits of scikit-learn."""

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from blake3 import blake3

from ...errors import DataError, require
from ...network import UnreachableError, hides_secrets, library_calls
from ...preprocess import IMAGE_ENDINGS
from .base import SOURCES, TEST_NAMES, TRAIN_NAMES, Splits, digest_files

SPLITS = (*TRAIN_NAMES, *TEST_NAMES)
PIECE = 4096  # characters of a plain text in one row, at most


class _Table:
    """Files of the format `id`, in a folder or one alone, which the library datasets reads."""

    id: ClassVar[str]
    endings: ClassVar[tuple[str, ...]]

    @classmethod
    def files(cls, reference: str) -> list[Path]:
        """Return the files that a reference means."""
        root = Path(reference)
        found = [root] if root.is_file() else root.rglob("*") if root.is_dir() else []
        return sorted(file for file in found if file.suffix.lower() in cls.endings and file.is_file())

    @classmethod
    def matches(cls, reference: str) -> bool:
        return bool(cls.files(reference))

    @classmethod
    def load(cls, reference: str) -> Splits:
        root, files = Path(reference).resolve(), cls.files(reference)
        splits: dict[str, list[str]] = {}
        for file in files:
            # as on the Hub: a split is named by the file's first word or by its folder
            words = [file.stem.replace("_", "-").split("-")[0].lower(), file.parent.name.lower()]
            split = next((word for word in words if word in SPLITS and root.is_dir()), "train")
            splits.setdefault(split, []).append(str(file))
        try:
            loaded = {name: cls.read(own) for name, own in splits.items()}
        except Exception as error:
            # datasets raises its own and pyarrow's errors for a broken file
            raise DataError(
                f"cannot read the {cls.id} files in {reference}: {error.__cause__ or error}; expected rows in each, "
                f"with the same columns"
            ) from error
        return Splits(
            loaded, root.name, digest_files([one.resolve() for one in files], root if root.is_dir() else root.parent)
        )

    @classmethod
    def read(cls, files: list[str]) -> Any:
        """Return the rows of files as a data set."""
        datasets = require("datasets", "train", "reading data")
        return datasets.load_dataset(cls.id, data_files=files, split="train")


@SOURCES.register
class Parquet(_Table):
    """Local parquet file, or folder of them: train*.parquet, test*.parquet, perhaps validation*.parquet."""

    id: ClassVar[str] = "parquet"
    endings: ClassVar[tuple[str, ...]] = (".parquet",)
    reference: ClassVar[str] = "https://huggingface.co/docs/datasets/loading#parquet"
    priority: ClassVar[int] = 10


@SOURCES.register
class Csv(_Table):
    """Local csv file with a header line, or folder of them: train*.csv, test*.csv, perhaps validation*.csv."""

    id: ClassVar[str] = "csv"
    endings: ClassVar[tuple[str, ...]] = (".csv",)
    reference: ClassVar[str] = "https://huggingface.co/docs/datasets/loading#csv"
    priority: ClassVar[int] = 20


@SOURCES.register
class JsonLines(_Table):
    """Local files with a JSON object a line, train*.jsonl and test*.jsonl of a folder, or one."""

    id: ClassVar[str] = "json"
    endings: ClassVar[tuple[str, ...]] = (".jsonl",)
    reference: ClassVar[str] = "https://huggingface.co/docs/datasets/loading#json"
    priority: ClassVar[int] = 40


@SOURCES.register
class Texts(_Table):
    """Local plain texts, train*.txt and test*.txt of a folder, or one; each file is one text, cut into rows."""

    id: ClassVar[str] = "text"
    endings: ClassVar[tuple[str, ...]] = (".txt",)
    reference: ClassVar[str] = "https://huggingface.co/docs/datasets/loading#text-files"
    priority: ClassVar[int] = 50

    @classmethod
    def read(cls, files: list[str]) -> Any:
        datasets = require("datasets", "train", "reading data")
        rows: dict[str, list[Any]] = {"text": [], "ends": []}
        for file in files:
            pieces = _pieces(Path(file).read_text(encoding="utf-8"))
            rows["text"] += pieces
            rows["ends"] += [False] * (len(pieces) - 1) + [True] * bool(pieces)
        return datasets.Dataset.from_dict(rows)


def _pieces(text: str) -> list[str]:
    """Cut a text into pieces of at most `PIECE` characters, where there is an empty line, a line end or a space."""
    found, start = [], 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            ends = (text.rfind(mark, start, end) + len(mark) for mark in ("\n\n", "\n", " "))
            end = next((one for one in ends if one > start + PIECE // 2), end)
        found.append(text[start:end])
        start = end
    return found


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


TEST_EVERY = 5  # every fifth image of the original order is a test image


@SOURCES.register
class Digits:
    """`digits:A-B`: the digits from A to B that scikit-learn ships, 8x8 grey, every fifth for testing."""

    id: ClassVar[str] = "digits"
    reference: ClassVar[str] = "https://archive.ics.uci.edu/dataset/80"
    priority: ClassVar[int] = 0

    @staticmethod
    def matches(reference: str) -> bool:
        return reference.startswith("digits:")

    @staticmethod
    def load(reference: str) -> Splits:
        wanted = re.fullmatch(r"digits:([0-9])-([0-9])", reference)
        if wanted is None or wanted[1] >= wanted[2]:
            raise DataError(f"cannot read {reference!r}; expected digits:A-B with A < B, as in digits:5-9")
        first, last = int(wanted[1]), int(wanted[2])
        datasets = require("datasets", "train", "reading data")
        image = require("PIL.Image", "train", "reading data")
        bunch = require("sklearn.datasets", "train", "reading the digits images").load_digits()
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(n) for n in range(first, last + 1)])}
        )
        splits: dict[str, dict[str, list[object]]] = {split: {"image": [], "label": []} for split in ("train", "test")}
        whole = blake3()
        for position, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
            if first <= label <= last:
                grey = np.round(pixels * (255 / 16)).astype(np.uint8)
                whole.update(grey.tobytes() + bytes([label]))
                rows = splits["test" if position % TEST_EVERY == 0 else "train"]
                rows["image"].append(image.fromarray(grey))
                rows["label"].append(int(label) - first)
        loaded = {name: datasets.Dataset.from_dict(rows, features=features) for name, rows in splits.items()}
        return Splits(loaded, reference, whole.hexdigest())


@SOURCES.register
class HubDataset:
    """Hub data set: `user/name`, `user/name@revision`, `user/name:configuration`."""

    id: ClassVar[str] = "hub"
    reference: ClassVar[str] = "https://huggingface.co/docs/datasets/loading#hugging-face-hub"
    priority: ClassVar[int] = 90

    @staticmethod
    def matches(reference: str) -> bool:
        pattern = r"(?!\.)[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@[\w./-]+)?"
        return re.fullmatch(pattern, reference) is not None and not Path(reference).exists()

    @staticmethod
    @hides_secrets
    def load(reference: str) -> Splits:
        datasets = require("datasets", "train", "reading data")
        name, _, revision = reference.partition("@")
        name, _, configuration = name.partition(":")
        try:
            with library_calls():
                loaded = datasets.load_dataset(name, configuration or None, revision=revision or None)
        except UnreachableError as error:
            raise DataError(
                f"cannot load {reference!r}, which is no local folder, from the Hub: it is not in the cache, and "
                f"{error.host} cannot be reached ({error}); check network, proxy and HF_ENDPOINT"
            ) from error
        except Exception as error:
            # datasets raises its own, the Hub client's and the transport's errors
            raise DataError(
                f"cannot load {reference!r}, which is no local folder, from the Hub: {type(error).__name__}: "
                + " ".join(str(error).split())
            ) from error
        # the Hub client's cache files are named by their content; the fingerprints of the splits follow from it
        digest = "+".join(str(split._fingerprint) for split in loaded.values())
        return Splits(dict(loaded), name, digest)
