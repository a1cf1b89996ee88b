"""The digits images that scikit-learn ships: 1,797 grey images of 8x8 pixels, always at hand."""

import io
import re
from typing import ClassVar

import numpy as np
from blake3 import blake3

from ...errors import DataError, require
from .base import SOURCES, Splits

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
                stream = io.BytesIO()
                image.fromarray(grey).save(stream, "PNG")
                rows = splits["test" if position % TEST_EVERY == 0 else "train"]
                rows["image"].append({"bytes": stream.getvalue(), "path": None})
                rows["label"].append(int(label) - first)
        loaded = {name: datasets.Dataset.from_dict(rows, features=features) for name, rows in splits.items()}
        return Splits(loaded, reference, whole.hexdigest())
