"""Arguments of the command line for tests."""

from pathlib import Path

from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits

FACTORY = Path(__file__).parent.parent / "cli/maskpack_cli/digits_backbone.py"


BACKBONE = ["--backbone", f"{FACTORY}:digits_cnn", "--random-weights", "0"]


TRAIN = ["train", *BACKBONE, "--data", "digits:5-9", "--optimizer", "sgd", "--epochs", "1", "--labels-fraction", "0.3"]
