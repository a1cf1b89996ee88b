"""Data sets on the Hugging Face Hub."""

import re
from pathlib import Path
from typing import ClassVar

from ...errors import DataError, require
from ...network import UnreachableError, hides_secrets, library_calls
from .base import SOURCES, Splits


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
